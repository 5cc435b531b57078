"""What QRNN has beyond nn.LSTM's contract (test_contract.py) and beyond its layers' (test_qrnn_layer.py)."""

import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence

from qrnn import QRNN, QRNNStackState
from qrnn_layer import METHODS, MODES, ShapeError

every_mode = pytest.mark.parametrize("mode", MODES)
every_way_of_stacking = pytest.mark.parametrize("dense", (False, True), ids=("plain", "dense"))


def build(*args, dtype=torch.float64, **kwargs):
    """4 features in, 6 channels, batch first; candidates of both signs unless asked otherwise."""
    torch.manual_seed(0)
    return QRNN(4, 6, *args, **{"batch_first": True, "activation": "tanh", **kwargs}).to(dtype)


def draw(*shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=dtype)


def assert_same_state(got, want):
    torch.testing.assert_close(got.c, want.c)
    for index, (window, wanted) in enumerate(zip(got.window, want.window, strict=True)):
        torch.testing.assert_close(window, wanted, msg=lambda text, index=index: f"window of layer {index}: {text}")


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
    assert {layer.kernel_size for layer in build(3, kernel_size=5, bidirectional=bidirectional).layers} == {5}


def test_options_reach_every_layer():
    rnn = QRNN(4, 6, 2, mode="ifo", zoneout=0.2, activation="relu", method="loop", bias=False, bidirectional=True)
    for layer in rnn.layers:
        assert (layer.mode, layer.zoneout, layer.activation, layer.method) == ("ifo", 0.2, "relu", "loop")
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

    rnn = build()
    sign = torch.tensor([1.0, -1.0, 1.0], dtype=torch.float64).repeat_interleave(6)
    with torch.no_grad():
        rnn.layers[0].weight.copy_(sign.unsqueeze(1) * torch.cat([weight[:, 4:], weight[:, :4]], dim=1))
        rnn.layers[0].bias.copy_(sign * bias)
    torch.testing.assert_close(rnn(x)[0], torch.stack(steps, dim=1))


# --- the state -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel_size", (1, 2, 5, 12))  # 12: wider than the sequence
@pytest.mark.parametrize("num_layers", (1, 3))
@every_way_of_stacking
@every_mode
def test_pieces_and_single_steps_with_carried_state_are_the_whole(mode, dense, num_layers, kernel_size):
    rnn = build(num_layers, kernel_size=kernel_size, first_kernel_size=3, mode=mode, dense=dense)
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
    """Whoever has more goes on in the next piece, with the state that `index_select` picks for him."""
    rnn = build(3, kernel_size=kernel_size, mode=mode, dense=dense)
    lengths, x = torch.tensor([3, 11, 4, 7]), draw(4, 11, 4)
    whole, last = rnn(pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False))
    whole, _ = pad_packed_sequence(whole, batch_first=True)

    rows, state = torch.arange(4), None  # those that go on
    for start in range(0, 11, 4):
        going_on = (lengths[rows] > start).nonzero().squeeze(1)
        rows, state = rows[going_on], None if state is None else state.index_select(going_on)
        pieces = [x[row, start : min(start + 4, lengths[row])] for row in rows]
        output, state = rnn(pack_sequence(pieces, enforce_sorted=False), state)
        padded, piece_lengths = pad_packed_sequence(output, batch_first=True)
        for place, (row, length) in enumerate(zip(rows, piece_lengths, strict=True)):
            torch.testing.assert_close(padded[place, :length], whole[row, start : start + length])
            if start + length == lengths[row]:
                assert_same_state(state.index_select(torch.tensor([place])), last.index_select(row.unsqueeze(0)))


def test_pieces_read_from_the_end_continue_the_reverse_direction():
    rnn = build(bidirectional=True, kernel_size=3)
    x = draw(2, 11, 4)
    whole, last = rnn(x)
    end, state = rnn(x[:, 5:])
    beginning, state = rnn(x[:, :5], state)
    torch.testing.assert_close(torch.cat([beginning, end], dim=1)[..., 6:], whole[..., 6:])
    torch.testing.assert_close(state.c[1], last.c[1])


def test_the_state_of_chosen_sequences_continues_them():
    """As a beam search does: some are kept twice, some not at all."""
    rnn, x, index = build(2, kernel_size=3, bidirectional=True, dense=True), draw(3, 9, 4), torch.tensor([2, 2, 0])
    _, state = rnn(x[:, :5])
    output, after = rnn(x[index, 5:], state.index_select(index))
    want, want_after = rnn(x[:, 5:], state)
    torch.testing.assert_close(output, want[index])
    assert_same_state(after, want_after.index_select(index))


def test_a_state_may_be_a_plain_tuple_a_list_or_detached_through_both():
    def repackage(state, kind):
        return state.detach() if isinstance(state, torch.Tensor) else kind(repackage(part, kind) for part in state)

    rnn, x = build(2), draw(2, 9, 4)
    _, state = rnn(x)
    want, _ = rnn(x, state)
    for hx in (tuple(state), list(state), repackage(state, tuple), repackage(state, list)):
        assert torch.equal(rnn(x, hx)[0], want)
    parts = repackage(state, tuple)
    assert not any(part.requires_grad for part in (parts[0], *parts[1]))


def test_states_are_pickled_without_the_sequence():
    rnn = build(2, dtype=torch.float32)
    with torch.no_grad():
        _, state = rnn(draw(2, 1000, 4, dtype=torch.float32))
    pickled = pickle.dumps(state)
    assert len(pickled) < 4000
    loaded = pickle.loads(pickled)
    assert isinstance(loaded, QRNNStackState)
    assert_same_state(loaded, state)


def test_cell_states_alone_are_a_state_with_windows_of_zeros():
    rnn, x = build(2, bidirectional=True), draw(2, 9, 4)
    c = draw(4, 2, 6)
    windows = tuple(torch.zeros(1, 2, layer.input_size, dtype=torch.float64) for layer in rnn.layers)
    assert torch.equal(rnn(x, c)[0], rnn(x, QRNNStackState(c, windows))[0])
    assert torch.equal(rnn(x[0], c[:, 0])[0], rnn(x[:1], c[:, :1])[0][0])  # without a batch


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_zeros_in_the_half_precision_of_the_weights_are_a_state(dtype):
    """As `weight.new_zeros` gives them; the state itself is float32."""
    rnn, x = build(2, dtype=dtype), draw(2, 9, 4, dtype=torch.float32).to(dtype)
    output, state = rnn(x, rnn.layers[0].weight.new_zeros(2, 2, 6))
    assert torch.equal(output, rnn(x)[0])
    assert state.c.dtype == torch.float32


def test_nothing_is_remembered_in_the_module():
    rnn, x = build(2), draw(2, 9, 4)
    first, _ = rnn(x)
    assert torch.equal(rnn(x)[0], first)
    assert sorted(rnn.state_dict()) == ["layers.0.bias", "layers.0.weight", "layers.1.bias", "layers.1.weight"]


def test_a_state_splits_and_joins_along_dimension_1():
    """As `nn.DataParallel(rnn, dim=1)` does with inputs and states, in and out, for all of nn's RNNs."""
    rnn, x = build(2, batch_first=False, kernel_size=3), draw(9, 4, 4)
    before = rnn(draw(5, 4, 4))[1]
    output, state = rnn(x, before)
    halves = []
    for half in (slice(0, 2), slice(2, 4)):
        hx = before.c[:, half], tuple(window[:, half] for window in before.window)
        halves.append(rnn(x[:, half], hx))
    torch.testing.assert_close(torch.cat([half for half, _ in halves], dim=1), output)
    windows = zip(*(half.window for _, half in halves), strict=True)
    joined = QRNNStackState(torch.cat([half.c for _, half in halves], 1), tuple(torch.cat(w, 1) for w in windows))
    assert_same_state(joined, state)


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
    assert torch.equal(rnn.train()(x, state)[1].c, state.c)
    torch.testing.assert_close(rnn.eval()(x, state)[0], build(2, mode=mode)(x, state)[0])


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
RNN = QRNN(4, 6)
C, WINDOW = torch.zeros(1, 2, 6), torch.zeros(1, 2, 4)


@pytest.mark.parametrize(
    ("error", "call", "message"),
    (
        (ValueError, lambda: QRNN(4, 6, 0), "num_layers: 0 given"),
        (ValueError, lambda: QRNN(4, 6, dropout=2), "dropout: 2 given, a probability"),
        (TypeError, lambda: QRNN(4, 6, 2, 0.5), "bias: 0.5 given, True or False expected"),
        (ValueError, lambda: QRNN(4, 6, mode="of"), "mode: 'of' given"),
        (ValueError, lambda: QRNN(4, 6, first_kernel_size=0), "first_kernel_size: 0 given"),
        (ShapeError, lambda: RNN(X[..., :3]), r"input: shape \(5, 2, 3\) given, \(T, B, 4\) or \(T, 4\) expected"),
        (ShapeError, lambda: QRNN(4, 6, batch_first=True)(X[None]), r"input: shape \(1, 5, 2, 4\) given, \(B, T, 4\)"),
        (
            ShapeError,
            lambda: QRNN(3, 6)(pack_sequence([X[:, 0]])),
            r"input: packed, of shape \(5, 4\) given, \(steps, 3\)",
        ),
        (TypeError, lambda: RNN(X, {"c": C}), "hx: no state but a dict given; pass on what the last"),
        (TypeError, lambda: RNN(X, (C,)), "hx: no state but a tuple given"),
        (ShapeError, lambda: RNN(X, (C, C)), "hx: a second part that is not the windows of 1 layers"),
        (ShapeError, lambda: QRNN(4, 6, 2)(X, RNN(X)[1]), "hx: a second part that is not the windows of 2 layers"),
        (ShapeError, lambda: RNN(X[:, 0], C), r"hx: c of shape \(1, 2, 6\) given, \(1, 6\) expected"),
        (ShapeError, lambda: RNN(X, (C[:, :1], (WINDOW,))), r"hx: c of shape \(1, 1, 6\) given, \(1, 2, 6\) expected"),
        (
            ShapeError,
            lambda: RNN(X, (C, (WINDOW[:0],))),
            r"hx: window of shape \(0, 2, 4\) given, \(1, 2, 4\) expected",
        ),
        (ValueError, lambda: RNN(X.double()), "x: dtype torch.float64 given, torch.float32 expected"),
        (ValueError, lambda: RNN(X, C.double()), "state.c: dtype torch.float64 given, torch.float32 expected"),
        (ValueError, lambda: RNN(X, C.long()), "state.c: dtype torch.int64 given, a floating dtype expected"),
    ),
)
def test_errors_say_what_was_given_and_expected(error, call, message):
    with pytest.raises(error, match=message):
        call()


def test_a_detached_state_has_no_history_and_goes_on_alike():
    torch.manual_seed(0)
    rnn, x = QRNN(4, 6, 2), torch.randn(9, 2, 4, requires_grad=True)
    _, state = rnn(x)
    detached = state.detach()
    assert not any(part.requires_grad for part in (detached.c, *detached.window))
    assert torch.equal(rnn(x, detached)[0], rnn(x, state)[0])


def test_a_state_without_a_batch_has_no_sequences_to_select():
    _, state = QRNN(4, 6)(torch.randn(9, 4))
    with pytest.raises(ShapeError, match=r"c of shape \(1, 6\) has no batch"):
        state.index_select(torch.tensor([0, 0]))


@pytest.mark.parametrize("flag", ("bias", "batch_first", "bidirectional", "dense"))
def test_a_flag_that_is_no_bool_is_a_type_error(flag):
    with pytest.raises(TypeError, match=f"{flag}: 'no' given, True or False expected"):
        QRNN(4, 6, **{flag: "no"})


@pytest.mark.parametrize("hx", ((None, None), (3, ()), [1, 2, 3]))
def test_what_is_no_state_is_a_type_error(hx):
    with pytest.raises(TypeError, match="hx: no state but a"):
        QRNN(4, 6)(torch.randn(9, 2, 4), hx)


def test_a_plain_tuple_survives_saving_without_code(tmp_path):
    rnn, x = QRNN(4, 6, 2), torch.randn(9, 2, 4)
    _, state = rnn(x)
    torch.save(tuple(state.detach()), tmp_path / "state.pt")
    assert torch.equal(rnn(x, torch.load(tmp_path / "state.pt"))[0], rnn(x, state)[0])
