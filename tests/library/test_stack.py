"""What QRNN has beyond nn.LSTM's contract (test_contract.py) and beyond its layers' (test_layer.py)."""

import pickle
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence
from torch.utils._pytree import tree_leaves, tree_map

from qrnn import QRNN
from qrnn.seq2seq import QRNNSeq2Seq
from qrnn_layer import METHODS, MODES, QRNNLayer, ShapeError

every_mode = pytest.mark.parametrize("mode", MODES)
every_way_of_stacking = pytest.mark.parametrize("dense", (False, True), ids=("plain", "dense"))


def build(*args, dtype=torch.float64, **kwargs):
    """4 features in, 6 channels, batch first; candidates of both signs unless asked otherwise."""
    torch.manual_seed(0)
    return QRNN(4, 6, *args, **{"batch_first": True, "activation": "tanh", **kwargs}).to(dtype)


def draw(*shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=dtype)


def assert_same_state(got, want):
    for got_part, want_part in zip(tree_leaves(got), tree_leaves(want), strict=True):
        torch.testing.assert_close(got_part, want_part)


def picked(state, index):
    """The state of the sequences `index` of the batch."""
    return tree_map(lambda part: part.index_select(1, index), state)


# --- the stack -------------------------------------------------------------------------------------------------------


def test_each_layer_is_fed_with_the_outputs_of_the_one_before():
    rnn, x = build(3), draw(2, 9, 4)
    first, second, third = (lambda x, layer=layer: layer(x)[0] for layer in rnn.layers)
    torch.testing.assert_close(rnn(x)[0], third(second(first(x))))


def test_dense_layers_are_fed_with_the_input_and_all_earlier_outputs():
    rnn, x = build(3, dense=True), draw(2, 9, 4)
    first, second, third = (lambda *seen, layer=layer: layer(torch.cat(seen, dim=2))[0] for layer in rnn.layers)
    h1 = first(x)
    h2 = second(x, h1)
    torch.testing.assert_close(rnn(x)[0], third(x, h1, h2))


@every_way_of_stacking
def test_the_second_direction_is_a_stack_that_reads_backwards(dense):
    rnn, x = build(2, bidirectional=True, dense=dense), draw(2, 9, 4)
    forward, reverse, forward_above, reverse_above = (lambda x, layer=layer: layer(x)[0] for layer in rnn.layers)
    middle = torch.cat([forward(x), reverse(x.flip(1)).flip(1)], dim=2)
    middle = torch.cat([x, middle], dim=2) if dense else middle
    want = torch.cat([forward_above(middle), reverse_above(middle.flip(1)).flip(1)], dim=2)
    torch.testing.assert_close(rnn(x)[0], want)


@pytest.mark.parametrize("bidirectional", (False, True))
def test_the_first_layer_may_have_a_width_of_its_own(bidirectional):
    rnn = build(3, kernel_size=2, first_kernel_size=6, bidirectional=bidirectional)
    directions = 1 + bidirectional
    assert [layer.kernel_size for layer in rnn.layers] == [6] * directions + [2] * 2 * directions
    widths = [layer.kernel_size for layer in build(3, kernel_size=5, bidirectional=bidirectional).layers]
    assert widths == [1] * directions + [5] * 2 * directions  # what makes (h, c) enough


def test_options_reach_every_layer():
    options = {"mode": "ifo", "zoneout": 0.2, "mean_zoneout": True, "activation": "relu", "method": "loop"}
    rnn = QRNN(4, 6, 2, bias=False, bidirectional=True, **options)
    for layer in rnn.layers:
        assert {name: getattr(layer, name) for name in options} == options
        assert layer.bias is None


@pytest.mark.parametrize("method", METHODS)
def test_method_does_not_matter(method):
    x = draw(2, 100, 4)
    torch.testing.assert_close(build(2, method=method, bidirectional=True)(x)[0], build(2, bidirectional=True)(x)[0])


@every_way_of_stacking
@every_mode
def test_no_output_sees_a_later_input(mode, dense):
    rnn, x = build(3, kernel_size=3, mode=mode, dense=dense), draw(2, 12, 4)
    changed = x.clone()
    changed[:, 7] += 1
    assert torch.equal(rnn(x)[0][:, :7], rnn(changed)[0][:, :7])
    assert not torch.equal(rnn(x)[0][:, 7], rnn(changed)[0][:, 7])


@pytest.mark.parametrize("bidirectional", (False, True))
@every_way_of_stacking
@every_mode
def test_every_gate_of_every_layer_gets_a_gradient(mode, dense, bidirectional):
    rnn = build(3, mode=mode, dense=dense, bidirectional=bidirectional)
    rnn(draw(2, 9, 4))[0].sum().backward()
    for name, parameter in rnn.named_parameters():
        assert parameter.grad.flatten(1 if parameter.dim() > 1 else 0).any(-1).all(), name


def test_forget_bias_is_added_in_every_layer():
    rnn = QRNN(4, 6, 2, bidirectional=True)
    rnn.reset_parameters(forget_bias=5.0)
    for layer in rnn.layers:
        z, f, o = layer.bias.view(3, 6)
        assert z.abs().max() < 1 < 4 < f.min() and o.abs().max() < 1


def test_weights_of_salesforce_are_converted_as_the_docstring_says():
    """Their layer written out: F = 1 - f, its window is [x_t, x_{t-1}], tanh candidates, mode "fo"."""
    weight, bias, x = draw(3 * 6, 2 * 4), draw(3 * 6), draw(2, 9, 4)
    present_then_past = torch.cat([x, F.pad(x, (0, 0, 1, 0))[:, :-1]], dim=2)
    z, forget, o = F.linear(present_then_past, weight, bias).chunk(3, dim=2)
    forget = forget.sigmoid()
    c, steps = torch.zeros(2, 6, dtype=torch.float64), []
    for t in range(9):
        c = forget[:, t] * z[:, t].tanh() + (1 - forget[:, t]) * c
        steps.append(o[:, t].sigmoid() * c)

    rnn = build(first_kernel_size=2)
    sign = torch.tensor([1.0, -1.0, 1.0], dtype=torch.float64).repeat_interleave(6)
    with torch.no_grad():
        rnn.layers[0].weight.copy_(sign.unsqueeze(1) * torch.cat([weight[:, 4:], weight[:, :4]], dim=1))
        rnn.layers[0].bias.copy_(sign * bias)
    torch.testing.assert_close(rnn(x)[0], torch.stack(steps, dim=1))


# --- the state -------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:kernel_size=")  # of a single layer, which does not have it
@pytest.mark.parametrize("first_kernel_size", (1, 3))
@pytest.mark.parametrize("kernel_size", (1, 2, 5, 12))  # 12: wider than the sequence
@pytest.mark.parametrize("num_layers", (1, 3))
@every_way_of_stacking
@every_mode
def test_pieces_and_single_steps_with_carried_state_are_the_whole(
    mode, dense, num_layers, kernel_size, first_kernel_size
):
    rnn = build(num_layers, kernel_size=kernel_size, first_kernel_size=first_kernel_size, mode=mode, dense=dense)
    x = draw(2, 11, 4)
    whole, last = rnn(x)
    for cuts in ([5, 6], [3, 0, 8], [1] * 11):
        outputs, state = [], None
        for piece in x.split(cuts, dim=1):
            output, state = rnn(piece, state)
            outputs.append(output)
        torch.testing.assert_close(torch.cat(outputs, dim=1), whole)
        assert_same_state(state, last)


@every_way_of_stacking
@every_mode
def test_gradients_through_carried_states_are_those_of_the_whole(mode, dense):
    rnn, x = build(3, kernel_size=3, mode=mode, dense=dense), draw(2, 11, 4).requires_grad_()
    outputs, state = [], None
    for piece in x.split([5, 1, 5], dim=1):
        output, state = rnn(piece, state)
        outputs.append(output)
    weights = draw(2, 11, 6)
    (got,) = torch.autograd.grad((torch.cat(outputs, dim=1) * weights).sum(), x)
    (want,) = torch.autograd.grad((rnn(x)[0] * weights).sum(), x)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("kernel_size", (1, 2, 5))
@every_way_of_stacking
@every_mode
def test_packed_pieces_in_which_sequences_end_are_the_whole(mode, dense, kernel_size):
    """Whoever has more goes on in the next piece, with the state that is picked for him."""
    rnn = build(3, kernel_size=kernel_size, mode=mode, dense=dense)
    lengths, x = torch.tensor([3, 11, 4, 7]), draw(4, 11, 4)
    whole, last = rnn(pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False))
    whole, _ = pad_packed_sequence(whole, batch_first=True)

    rows, state = torch.arange(4), None  # those that go on
    for start in range(0, 11, 4):
        going_on = (lengths[rows] > start).nonzero().squeeze(1)
        rows, state = rows[going_on], None if state is None else picked(state, going_on)
        pieces = [x[row, start : min(start + 4, lengths[row])] for row in rows]
        output, state = rnn(pack_sequence(pieces, enforce_sorted=False), state)
        padded, piece_lengths = pad_packed_sequence(output, batch_first=True)
        for place, (row, length) in enumerate(zip(rows, piece_lengths, strict=True)):
            torch.testing.assert_close(padded[place, :length], whole[row, start : start + length])
            if start + length == lengths[row]:
                assert_same_state(picked(state, torch.tensor([place])), picked(last, row.unsqueeze(0)))


@pytest.mark.filterwarnings("ignore:kernel_size=")  # of a single layer, which does not have it
def test_pieces_read_from_the_end_continue_the_reverse_direction():
    rnn = build(bidirectional=True, kernel_size=3)
    x = draw(2, 11, 4)
    whole, last = rnn(x)
    end, state = rnn(x[:, 5:])
    beginning, state = rnn(x[:, :5], state)
    torch.testing.assert_close(torch.cat([beginning, end], dim=1)[..., 6:], whole[..., 6:])
    torch.testing.assert_close(state[1][1], last[1][1])


def test_the_state_of_chosen_sequences_continues_them():
    """As a beam search does: some are kept twice, some not at all."""
    rnn, x, index = build(2, kernel_size=3, bidirectional=True, dense=True), draw(3, 9, 4), torch.tensor([2, 2, 0])
    _, state = rnn(x[:, :5])
    output, after = rnn(x[index, 5:], picked(state, index))
    want, want_after = rnn(x[:, 5:], state)
    torch.testing.assert_close(output, want[index])
    assert_same_state(after, picked(want_after, index))


@pytest.mark.parametrize("kernel_size", (2, 3))
def test_a_state_is_made_of_plain_tuples_and_may_be_lists(kernel_size, tmp_path):
    rnn, x = build(2, kernel_size=kernel_size), draw(2, 9, 4)
    _, state = rnn(x)
    assert type(state) is tuple and len(state) == (2 if kernel_size == 2 else 3)
    want, _ = rnn(x, state)
    assert torch.equal(rnn(x, list(state))[0], want)
    assert torch.equal(rnn(x, tree_map(torch.Tensor.detach, state))[0], want)
    torch.save(tree_map(torch.Tensor.detach, state), tmp_path / "state.pt")
    assert torch.equal(rnn(x, torch.load(tmp_path / "state.pt", weights_only=True))[0], want)


def test_states_are_pickled_without_the_sequence():
    rnn = build(2, dtype=torch.float32)
    with torch.no_grad():
        _, state = rnn(draw(2, 1000, 4, dtype=torch.float32))
    pickled = pickle.dumps(state)
    assert len(pickled) < 4000
    assert_same_state(pickle.loads(pickled), state)


@every_mode
def test_h_is_the_last_output_and_c_the_last_cell_state(mode):
    rnn, x = build(2, mode=mode), draw(2, 9, 4)
    output, state = rnn(x)
    h, c = (state, state) if mode == "f" else state
    assert torch.equal(h[1], output[:, -1])
    _, below = rnn.layers[0](x)
    assert torch.equal(c[0], below.c)
    if mode != "f":
        assert not torch.equal(h, c)


def test_windows_of_zeros_take_the_place_of_those_not_given_and_that_is_said_once():
    rnn, x = build(2, first_kernel_size=2), draw(2, 9, 4)
    _, (h, c, window) = rnn(x)
    zeros = tree_map(torch.zeros_like, window)
    with pytest.warns(UserWarning, match=r"^hx: .*\[2, 2\]"):
        got, _ = rnn(x, (h, c))
    assert torch.equal(got, rnn(x, (h, c, zeros))[0])
    rnn(x, (h, c))  # said once: a warning would be an error here
    fresh = build(2, first_kernel_size=2)
    assert torch.equal(fresh(x, (torch.zeros_like(h), torch.zeros_like(c)))[0], fresh(x)[0])  # exact, so not warned of


@every_mode
def test_initial_states_of_both_directions_are_all_used(mode):
    """As in nn.LSTM: h of the last layer alone goes nowhere, for no layer is above it."""
    rnn, x = build(2, mode=mode, bidirectional=True), draw(2, 9, 4)
    h, c = (draw(4, 2, 6).requires_grad_() for _ in range(2))
    rnn(x, h if mode == "f" else (h, c))[0].sum().backward()
    assert h.grad[:2].flatten(1).any(1).all()
    if mode != "f":
        assert c.grad.flatten(1).any(1).all() and not h.grad[2:].any()


def test_dropout_acts_on_the_step_before_a_piece_too():
    """The window of a layer is the output below at the last step, through dropout as any other step."""
    rnn, x = build(2, dropout=1.0), draw(2, 9, 4)
    _, state = rnn(x)
    none = state[0].clone(), state[1]
    none[0][0] = 0
    assert torch.equal(rnn(x, state)[0], rnn(x, none)[0])
    assert not torch.equal(rnn.eval()(x, state)[0], rnn(x, none)[0])


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_zeros_in_the_half_precision_of_the_weights_are_a_state(dtype):
    """As `weight.new_zeros` gives them; c itself is float32."""
    rnn, x = build(2, dtype=dtype), draw(2, 9, 4, dtype=torch.float32).to(dtype)
    zeros = rnn.layers[0].weight.new_zeros(2, 2, 6)
    output, (h, c) = rnn(x, (zeros, zeros))
    assert torch.equal(output, rnn(x)[0])
    assert (h.dtype, c.dtype) == (dtype, torch.float32)


def test_nothing_is_remembered_in_the_module():
    rnn, x = build(2), draw(2, 9, 4)
    first, _ = rnn(x)
    assert torch.equal(rnn(x)[0], first)
    assert sorted(rnn.state_dict()) == ["layers.0.bias", "layers.0.weight", "layers.1.bias", "layers.1.weight"]


@pytest.mark.parametrize("kernel_size", (2, 3))
def test_a_state_splits_and_joins_along_dimension_1(kernel_size):
    """As `nn.DataParallel(rnn, dim=1)` does with inputs and states, in and out, for all of nn's RNNs."""
    rnn, x = build(2, batch_first=False, kernel_size=kernel_size), draw(9, 4, 4)
    before = rnn(draw(5, 4, 4))[1]
    output, state = rnn(x, before)
    halves = [rnn(x[:, half], picked(before, half)) for half in (torch.arange(2), torch.arange(2, 4))]
    torch.testing.assert_close(torch.cat([half for half, _ in halves], dim=1), output)
    assert_same_state(tree_map(lambda *parts: torch.cat(parts, dim=1), *(half for _, half in halves)), state)


# --- training --------------------------------------------------------------------------------------------------------


def test_dropout_is_drawn_anew_for_every_layer_but_the_last():
    rnn, x = build(3, dropout=0.5, dtype=torch.float32), draw(2, 9, 4, dtype=torch.float32)
    seen = []
    for layer in rnn.layers:
        layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    output, _ = rnn(x)
    assert seen[0] is x and output.all()
    assert all(0.2 < (h == 0).double().mean() < 0.8 for h in seen[1:])
    assert not torch.equal(seen[1] == 0, seen[2] == 0)


def test_dense_dropout_leaves_the_input_alone():
    rnn, x = build(2, dropout=1.0, dense=True), draw(2, 9, 4)
    want, _ = rnn.layers[1](torch.cat([x, torch.zeros(2, 9, 6, dtype=torch.float64)], dim=2))
    torch.testing.assert_close(rnn(x)[0], want)


@every_mode
def test_zoneout_is_in_every_layer_in_training_and_off_in_evaluation(mode):
    rnn, x = build(2, mode=mode, zoneout=1.0), draw(2, 9, 4)
    state = rnn.eval()(draw(2, 3, 4))[1]
    cells = (lambda state: state) if mode == "f" else (lambda state: state[1])
    assert torch.equal(cells(rnn.train()(x, state)[1]), cells(state))
    torch.testing.assert_close(rnn.eval()(x, state)[0], build(2, mode=mode)(x, state)[0])


def test_a_kernel_size_that_a_single_layer_does_not_have_is_warned_of():
    with pytest.warns(UserWarning, match="kernel_size=4 .* first_kernel_size=1"):
        assert QRNN(4, 6, kernel_size=4).layers[0].kernel_size == 1
    QRNN(4, 6, kernel_size=4, first_kernel_size=4)  # a warning would be an error here
    QRNN(4, 6, 2, kernel_size=4)


def test_the_warning_about_dropout_points_at_the_line_that_asked_for_it():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        QRNN(4, 6, dropout=0.5)
        QRNN(4, 6, 2, dropout=0.5)  # nothing to warn of
    assert [warning.filename for warning in caught] == [__file__]


def test_gradients_of_expanded_and_strided_outputs():
    rnn, x = build(2), draw(2, 9, 4).requires_grad_()
    output, _ = rnn(x)
    expanded = torch.ones((), dtype=torch.float64).expand(9, 2, 6)
    (got,) = torch.autograd.grad(output.transpose(0, 1), x, expanded, retain_graph=True)
    (want,) = torch.autograd.grad(output, x, torch.ones_like(output))
    torch.testing.assert_close(got, want)


# --- errors ----------------------------------------------------------------------------------------------------------

X = torch.zeros(5, 2, 4)
RNN, WIDE, F_MODE = QRNN(4, 6), QRNN(4, 6, first_kernel_size=2), QRNN(4, 6, mode="f")
C, WINDOW = torch.zeros(1, 2, 6), torch.zeros(1, 2, 4)


@pytest.mark.parametrize(
    ("error", "call", "parts"),
    (
        (ValueError, lambda: QRNN(4, 6, 0), ("num_layers", "0")),
        (ValueError, lambda: QRNN(4, 6, dropout=2), ("dropout", "2")),
        (TypeError, lambda: QRNN(4, 6, 2, 0.5), ("bias", "0.5")),
        (ValueError, lambda: QRNN(4, 6, mode="of"), ("mode", "'of'")),
        (ValueError, lambda: QRNN(4, 6, proj_size=3), ("proj_size", "3")),
        (ValueError, lambda: QRNN(4, 6, first_kernel_size=0), ("first_kernel_size", "0")),
        (ValueError, lambda: QRNN(4, 6, kernel_size=0), ("kernel_size", "0")),
        (ShapeError, lambda: RNN(X[..., :3]), ("input", "(5, 2, 3)", "(T, B, 4)")),
        (ShapeError, lambda: RNN(X[:, 0, :3]), ("input", "(5, 3)", "(T, 4)")),
        (ShapeError, lambda: QRNN(4, 6, batch_first=True)(X[None]), ("input", "(1, 5, 2, 4)", "(B, T, 4)")),
        (ShapeError, lambda: QRNN(3, 6)(pack_sequence([X[:, 0]])), ("input", "(5, 4)", "(steps, 3)")),
        (TypeError, lambda: RNN(X.tolist()), ("input", "list")),
        (TypeError, lambda: RNN(None), ("input", "NoneType")),
        (TypeError, lambda: RNN(X, {"c": C}), ("hx", "dict", "(h, c)", "(1, 2, 6)")),
        (TypeError, lambda: RNN(X, (C,)), ("hx", "tuple", "(h, c)")),
        (TypeError, lambda: RNN(X, C), ("hx", "Tensor", "(h, c)")),  # never taken for h or for c
        (TypeError, lambda: F_MODE(X, (C, C)), ("hx", "tuple", "a tensor h", "(1, 2, 6)")),
        (TypeError, lambda: RNN(X, (C, C, (WINDOW,))), ("parts of hx: 3 given", "(h, c)")),
        (TypeError, lambda: RNN(X, (None, None)), ("hx", "h", "NoneType")),
        (ShapeError, lambda: QRNN(4, 6, 2)(X, RNN(X)[1]), ("hx", "h", "(1, 2, 6)", "(2, 2, 6)")),
        (ShapeError, lambda: RNN(X[:, 0], (C, C)), ("hx", "h", "(1, 2, 6)", "(1, 6)")),
        (ShapeError, lambda: RNN(X, (C, C[:, :1])), ("hx", "c", "(1, 1, 6)", "(1, 2, 6)")),
        (ShapeError, lambda: WIDE(X, (C, C, (WINDOW[:0],))), ("hx", "window", "(0, 2, 4)", "(1, 2, 4)")),
        (ValueError, lambda: WIDE(X, (C, C, ())), ("hx", "window", "0", "1 tensors")),
        (TypeError, lambda: WIDE(X, (C, C, WINDOW)), ("hx", "window", "Tensor")),
        (ShapeError, lambda: RNN(X.double()), ("input: ", "torch.float64", "torch.float32")),
        (ShapeError, lambda: RNN(X[:, 0].double()), ("input: ", "torch.float64", "torch.float32")),
        (ShapeError, lambda: RNN(pack_sequence([X[:, 0].double()])), ("input: ", "torch.float64", "torch.float32")),
        (ShapeError, lambda: RNN(X.to("meta"), (C, C)), ("input: ", "meta", "cpu")),
        (ShapeError, lambda: RNN(X, (C.double(), C)), ("hx[0] ", "torch.float64", "torch.float32")),
        (ShapeError, lambda: F_MODE(X, C.double()), ("hx[0] ", "torch.float64", "torch.float32")),
        (ShapeError, lambda: RNN(X, (C, C.double())), ("hx[1] ", "torch.float64", "torch.float32")),
        (ShapeError, lambda: RNN(X, (C, C.long())), ("hx[1] ", "torch.int64", "torch.float32")),
        (ShapeError, lambda: WIDE(X, (C, C, (WINDOW.double(),))), ("hx[2] ", "torch.float64", "torch.float32")),
        (ValueError, lambda: QRNN(4, 6, dtype=torch.complex64), ("dtype", "torch.complex64", "floating")),
    ),
)
def test_errors_name_the_argument_and_what_was_given(error, call, parts):
    with pytest.raises(error) as caught:
        call()
    assert all(part in str(caught.value) for part in parts), caught.value


@pytest.mark.parametrize("flag", ("bias", "batch_first", "bidirectional", "dense"))
@pytest.mark.parametrize("wrong", ("no", 0.5, None, 2))
def test_a_flag_that_is_no_bool_is_a_type_error(flag, wrong):
    with pytest.raises(TypeError, match=f"{flag}: {wrong!r} given"):
        QRNN(4, 6, **{flag: wrong})


@pytest.mark.parametrize("convert", (int, np.bool_))
def test_a_flag_may_be_a_whole_number_or_numpys_as_in_nn_lstm(convert):
    rnn = QRNN(4, 6, bidirectional=convert(True), batch_first=convert(False), bias=convert(False), dense=convert(False))
    assert rnn.bidirectional is True and rnn.batch_first is False and len(rnn.layers) == 2
    assert rnn.bias is False and rnn.dense is False and rnn.layers[0].bias is None
    assert QRNNLayer(4, 6, bias=convert(False)).bias is None
    QRNNSeq2Seq(9, 7, 4, 6, 1, causal_encoder=convert(False))


def test_a_state_from_autocast_goes_on_under_autocast():
    rnn = QRNN(4, 6, 2, first_kernel_size=2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        h, c, window = rnn(X)[1]
        assert (h.dtype, c.dtype, window[1].dtype) == (torch.bfloat16, torch.float32, torch.bfloat16)
        assert rnn(X, (h, c, window))[0].dtype == torch.bfloat16
        with pytest.raises(ShapeError, match=r"hx\[0\] .*torch\.float64"):
            rnn(X, (h.double(), c, window))


def test_the_state_cuts_the_history_when_it_is_detached():
    torch.manual_seed(0)
    rnn, x = QRNN(4, 6, 2), torch.randn(9, 2, 4, requires_grad=True)
    _, state = rnn(x)
    detached = tuple(part.detach() for part in state)
    assert not any(part.requires_grad for part in detached)
    assert torch.equal(rnn(x, detached)[0], rnn(x, state)[0])
