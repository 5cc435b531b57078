"""What users of nn.LSTM and nn.GRU rely on, asked of both and of QRNN, which drops in for them."""

import copy
import io
import pickle
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence, pad_packed_sequence

from qrnn import QRNN
from tests.versions import OLDEST

RNNS = {
    "LSTM": nn.LSTM,
    "GRU": nn.GRU,
    "QRNN": QRNN,
    "QRNN-all-options": partial(QRNN, kernel_size=3, first_kernel_size=4, mode="ifo", activation="tanh", dense=True),
}
every_rnn = pytest.mark.parametrize("rnn_class", RNNS.values(), ids=RNNS)
every_depth = pytest.mark.parametrize("num_layers", (1, 3))
every_direction = pytest.mark.parametrize("bidirectional", (False, True), ids=("forward", "both directions"))
every_layout = pytest.mark.parametrize("batch_first", (False, True), ids=("(T, B)", "(B, T)"))

LENGTHS = {"sorted": [7, 4, 4, 1], "not sorted": [4, 1, 7, 4], "all as long": [5, 5, 5, 5]}  # with ties


def build(rnn_class, *args, dtype=torch.float64, **kwargs):
    """4 features in, 6 channels; the same parameters for the same shapes."""
    torch.manual_seed(0)
    return rnn_class(4, 6, *args, dtype=dtype, **kwargs)


def draw(*shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=dtype)


def parts(state):
    """The tensors of a state: one of nn.GRU, two of nn.LSTM, nested tuples of QRNN."""
    return [state] if isinstance(state, torch.Tensor) else [tensor for part in state for tensor in parts(part)]


def each(function, state):
    """The state with the function applied to all its tensors, in plain tuples."""
    return function(state) if isinstance(state, torch.Tensor) else tuple(each(function, part) for part in state)


def random_state(rnn, batch_size):
    """A state with nothing in it zero, after 5 steps of other sequences."""
    shape = (batch_size, 5, 4) if rnn.batch_first else (5, batch_size, 4)
    return rnn(torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64))[1]


def assert_same_state(got, want):
    for got_part, want_part in zip(parts(got), parts(want), strict=True):
        torch.testing.assert_close(got_part, want_part)


# --- arguments and attributes ----------------------------------------------------------------------------------------


@every_rnn
def test_arguments_have_the_order_and_the_defaults_of_lstm(rnn_class):
    given = rnn_class(4, 6, 3, False, True, 0.25, True)
    default = rnn_class(4, 6)
    for name, first, second in (
        ("input_size", 4, 4),
        ("hidden_size", 6, 6),
        ("num_layers", 3, 1),
        ("bias", False, True),
        ("batch_first", True, False),
        ("dropout", 0.25, 0.0),
        ("bidirectional", True, False),
    ):
        assert (getattr(given, name), getattr(default, name)) == (first, second), name
    assert not any("bias" in name for name, _ in given.named_parameters())
    assert any("bias" in name for name, _ in default.named_parameters())


@every_rnn
def test_input_and_state_may_be_given_by_name(rnn_class):
    rnn, x = build(rnn_class), draw(5, 2, 4)
    state = random_state(rnn, 2)
    assert torch.equal(rnn(input=x, hx=state)[0], rnn(x, state)[0])


@every_rnn
def test_device_and_dtype_are_those_of_the_parameters(rnn_class):
    rnn = rnn_class(4, 6, 2, device="meta", dtype=torch.bfloat16)
    assert {(parameter.device.type, parameter.dtype) for parameter in rnn.parameters()} == {("meta", torch.bfloat16)}


@every_rnn
def test_repr_names_sizes_and_options(rnn_class):
    text = repr(rnn_class(4, 6, 3, batch_first=True, dropout=0.25, bidirectional=True))
    assert text.startswith(("LSTM(", "GRU(", "QRNN("))
    for option in ("4, 6, num_layers=3", "batch_first=True", "dropout=0.25", "bidirectional=True"):
        assert option in text


@every_rnn
def test_dropout_with_a_single_layer_warns(rnn_class):
    with pytest.warns(UserWarning, match=r"dropout=0.5 .*num_layers=1"):
        rnn_class(4, 6, dropout=0.5)


@every_rnn
def test_flatten_parameters_may_be_called(rnn_class):
    rnn, x = build(rnn_class, 2), draw(5, 2, 4)
    before = rnn(x)[0]
    assert rnn.flatten_parameters() is None
    assert torch.equal(rnn(x)[0], before)


# --- layouts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("time", "batch_size"), ((7, 3), (1, 3), (7, 1), (1, 1)))
@every_layout
@every_direction
@every_depth
@every_rnn
def test_output_and_state_have_the_documented_shapes(
    rnn_class, num_layers, bidirectional, batch_first, time, batch_size
):
    rnn = build(rnn_class, num_layers, batch_first=batch_first, bidirectional=bidirectional)
    directions = 1 + bidirectional
    outer = (batch_size, time) if batch_first else (time, batch_size)
    output, state = rnn(draw(*outer, 4))
    assert output.shape == (*outer, directions * 6)
    assert parts(state)[0].shape == (num_layers * directions, batch_size, 6)
    assert all(part.shape[1] == batch_size for part in parts(state))


@every_direction
@every_depth
@every_rnn
def test_layout_of_time_and_batch_is_all_that_batch_first_changes(rnn_class, num_layers, bidirectional):
    x = draw(7, 3, 4)
    time_first, batch_first = (
        build(rnn_class, num_layers, batch_first=batch_first, bidirectional=bidirectional)
        for batch_first in (False, True)
    )
    output, state = time_first(x)
    transposed, same_state = batch_first(x.transpose(0, 1))
    torch.testing.assert_close(transposed.transpose(0, 1), output)
    assert_same_state(same_state, state)


@every_direction
@every_rnn
def test_time_first_output_can_be_viewed(rnn_class, bidirectional):
    output, state = build(rnn_class, 2, bidirectional=bidirectional)(draw(7, 3, 4))
    directions = 1 + bidirectional
    assert output.view(7 * 3, directions * 6).shape == (21, directions * 6)
    assert parts(state)[0].view(2, directions, 3, 6).shape == (2, directions, 3, 6)


@every_layout
@every_direction
@every_depth
@every_rnn
def test_a_sequence_without_a_batch_is_a_batch_of_one(rnn_class, num_layers, bidirectional, batch_first):
    rnn = build(rnn_class, num_layers, batch_first=batch_first, bidirectional=bidirectional)
    x, before = draw(7, 4), random_state(rnn, 1)
    batch_dimension = 0 if batch_first else 1
    for hx, hx_of_batch in ((None, None), (each(lambda part: part.squeeze(1), before), before)):
        output, state = rnn(x, hx)
        want, want_state = rnn(x.unsqueeze(batch_dimension), hx_of_batch)
        torch.testing.assert_close(output, want.squeeze(batch_dimension))
        assert_same_state(state, each(lambda part: part.squeeze(1), want_state))


# --- states ----------------------------------------------------------------------------------------------------------


@every_direction
@every_depth
@every_rnn
def test_no_state_is_a_state_of_zeros(rnn_class, num_layers, bidirectional):
    rnn, x = build(rnn_class, num_layers, bidirectional=bidirectional), draw(7, 3, 4)
    output, state = rnn(x)
    assert torch.equal(rnn(x, each(torch.zeros_like, state))[0], output)


@every_layout
@every_depth
@every_rnn
def test_pieces_and_single_steps_with_carried_state_are_the_whole(rnn_class, num_layers, batch_first):
    rnn = build(rnn_class, num_layers, batch_first=batch_first)
    time_dimension = 1 if batch_first else 0
    x = draw(3, 7, 4) if batch_first else draw(7, 3, 4)
    whole, last = rnn(x)
    for cuts in ([2, 5], [1] * 7):
        outputs, state = [], None
        for piece in x.split(cuts, dim=time_dimension):
            output, state = rnn(piece, state)
            outputs.append(output)
        torch.testing.assert_close(torch.cat(outputs, dim=time_dimension), whole)
        assert_same_state(state, last)


@every_direction
@every_depth
@every_rnn
def test_states_are_ordered_by_layer_and_then_by_direction(rnn_class, num_layers, bidirectional):
    """A change of one entry of the given state reaches the same entry of the returned state, and all later layers."""
    rnn, x = build(rnn_class, num_layers, bidirectional=bidirectional), draw(3, 2, 4)
    directions = 1 + bidirectional
    before = random_state(rnn, 2)
    which = 0 if isinstance(before, torch.Tensor) else 1  # c: h of a QRNN's last layer goes nowhere
    after = parts(rnn(x, before)[1])[which]
    changed_part = parts(before)[which]
    for index in range(num_layers * directions):
        changed = changed_part.clone()
        changed[index] += 1
        hx = each(lambda part: changed if part is changed_part else part, before)  # noqa: B023
        reached = (parts(rnn(x, hx)[1])[which] != after).flatten(1).any(1)
        assert reached.tolist() == [
            other == index or other // directions > index // directions for other in range(num_layers * directions)
        ]


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@every_depth
@pytest.mark.parametrize("rnn_class", (*RNNS.values(), partial(QRNN, mode="f")), ids=(*RNNS, "QRNN-f"))
def test_state_is_the_output_of_the_last_real_step_and_in_reverse_of_the_first(rnn_class, num_layers, lengths):
    """Of the last layer."""
    rnn = build(rnn_class, num_layers, bidirectional=True)
    packed = pack_padded_sequence(draw(7, 4, 4), lengths, enforce_sorted=False)
    output, state = rnn(packed)
    output, _ = pad_packed_sequence(output)  # (T, B, 2 * H)
    forward, reverse = parts(state)[0].view(num_layers, 2, 4, 6)[-1]
    last = torch.tensor(lengths) - 1
    torch.testing.assert_close(forward, output[last, torch.arange(4), :6])
    torch.testing.assert_close(reverse, output[0, :, 6:])


# --- packed sequences ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@every_layout
@every_direction
@every_depth
@every_rnn
def test_packed_sequences_give_what_each_gives_alone(rnn_class, num_layers, bidirectional, batch_first, lengths):
    rnn = build(rnn_class, num_layers, batch_first=batch_first, bidirectional=bidirectional)
    sequences = draw(4, 7, 4)
    sequences = [sequence[:length] for sequence, length in zip(sequences, lengths, strict=True)]
    packed = pack_sequence(sequences, enforce_sorted=lengths == sorted(lengths, reverse=True))
    before = random_state(rnn, 4)  # in the order of `sequences`, not in the packed one
    for hx in (None, before):
        output, state = rnn(packed, hx)
        assert isinstance(output, PackedSequence)
        assert torch.equal(output.batch_sizes, packed.batch_sizes)
        for name in ("sorted_indices", "unsorted_indices"):
            got, want = getattr(output, name), getattr(packed, name)
            assert got is want or torch.equal(got, want), name
        padded, got_lengths = pad_packed_sequence(output, batch_first=True)
        assert got_lengths.tolist() == lengths
        for row, sequence in enumerate(sequences):
            alone, alone_state = rnn(sequence, None if hx is None else each(lambda part: part[:, row], hx))  # noqa: B023
            torch.testing.assert_close(padded[row, : lengths[row]], alone)
            assert_same_state(each(lambda part: part[:, row], state), alone_state)  # noqa: B023


@every_rnn
def test_content_of_padding_is_never_seen(rnn_class):
    rnn = build(rnn_class, 2, batch_first=True, bidirectional=True)
    x, lengths = draw(3, 7, 4), [4, 7, 2]
    other = x.clone()
    for row, length in enumerate(lengths):
        other[row, length:] = torch.nan
    outputs = [rnn(pack_padded_sequence(padded, lengths, True, enforce_sorted=False))[0].data for padded in (x, other)]
    assert torch.equal(*outputs)


# --- dropout ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rnn_class", (nn.LSTM, nn.GRU, QRNN))
def test_dropout_is_between_the_layers_and_nowhere_else(rnn_class):
    rnn = build(rnn_class, 2, dropout=1.0)  # the second layer is fed with zeros
    x = draw(7, 3, 4)
    (output, state), (of_other, state_of_other) = rnn(x), rnn(-x)
    assert torch.equal(output, of_other) and output.all()  # the outputs are not dropped
    assert not torch.equal(parts(state)[0][0], parts(state_of_other)[0][0])  # the input is not
    assert not torch.equal(rnn.eval()(x)[0], rnn(-x)[0])  # nothing is in evaluation


# --- as modules ------------------------------------------------------------------------------------------------------


@every_rnn
def test_copies_give_the_same_to_the_bit(rnn_class):
    rnn, x = build(rnn_class, 2, bidirectional=True), draw(5, 2, 4)
    output, _ = rnn(x)
    loaded = rnn_class(4, 6, 2, bidirectional=True, dtype=torch.float64)
    assert not torch.equal(loaded(x)[0], output)
    loaded.load_state_dict(rnn.state_dict())
    for twin in (loaded, copy.deepcopy(rnn), pickle.loads(pickle.dumps(rnn))):
        assert torch.equal(twin(x)[0], output)


@every_rnn
def test_states_can_be_saved(rnn_class):
    rnn, x, buffer = build(rnn_class, 2), draw(5, 2, 4), io.BytesIO()
    state = rnn(x)[1]
    torch.save(each(torch.detach, state), buffer)
    buffer.seek(0)
    assert torch.equal(rnn(x, torch.load(buffer))[0], rnn(x, state)[0])


@pytest.mark.parametrize("dtype", (torch.float64, torch.bfloat16))
@every_rnn
def test_other_precisions(rnn_class, dtype):
    rnn, x = build(rnn_class, 2, bidirectional=True, dtype=torch.float32), draw(5, 2, 4, dtype=torch.float32)
    want, _ = rnn(x)
    rnn, x = rnn.to(dtype), x.to(dtype)
    output, state = rnn(x)
    assert output.dtype == rnn(x, state)[0].dtype == dtype
    tolerance = 1e-6 if dtype == torch.float64 else 0.02  # bfloat16 has 8 bits
    torch.testing.assert_close(output.float(), want, rtol=0, atol=tolerance)


@every_direction
@every_rnn
def test_gradients_reach_input_and_state(rnn_class, bidirectional):
    rnn = build(rnn_class, 2, bidirectional=bidirectional)
    x, before = draw(3, 2, 4).requires_grad_(), random_state(rnn, 2)
    leaves = [part.detach().requires_grad_() for part in parts(before)]

    def run(x, *leaves):
        remaining = iter(leaves)
        output, state = rnn(x, each(lambda _: next(remaining), before))
        return output, *parts(state)

    assert torch.autograd.gradcheck(run, (x, *leaves))


@every_direction
@every_rnn
def test_every_parameter_gets_a_gradient(rnn_class, bidirectional):
    rnn = build(rnn_class, 3, bidirectional=bidirectional)
    rnn(draw(5, 2, 4))[0].sum().backward()
    for name, parameter in rnn.named_parameters():
        assert parameter.grad.any(), name


# --- errors ----------------------------------------------------------------------------------------------------------

X = torch.zeros(5, 2, 4)
PACKED = pack_sequence([X[:, 0], X[:3, 1]])
THREE = torch.zeros(5, 3, 4)  # another batch size


@pytest.mark.parametrize(
    ("error", "call"),
    (
        (ValueError, lambda make: make(0, 6)),
        (ValueError, lambda make: make(4, 0)),
        (ValueError, lambda make: make(4, 6, 0)),
        (ValueError, lambda make: make(4, 6, dropout=1.5)),
        (ValueError, lambda make: make(4, 6, dropout=True)),
        (TypeError, lambda make: make(4.0, 6)),
        (TypeError, lambda make: make(4, 6.0)),
        (TypeError, lambda make: make(4, 6, 2.0)),
        (TypeError, lambda make: make(4, 6, 2, 0.5)),  # a probability of dropout in the place of bias
        (TypeError, lambda make: make(4, 6, 2, True, 0.5)),
        (RuntimeError, lambda make: make(4, 6)(X[..., :3])),
        (RuntimeError, lambda make: make(4, 6)(X[:, 0, :3])),
        (ValueError, lambda make: make(4, 6)(X[0, 0])),
        (ValueError, lambda make: make(4, 6)(X.unsqueeze(0))),
        (ValueError, lambda make: make(4, 6)(X.double())),
        (ValueError, lambda make: make(4, 6)(X.long())),
        (RuntimeError, lambda make: make(3, 6)(PACKED)),
        (RuntimeError, lambda make: make(4, 6)(X, make(4, 6)(THREE)[1])),
        (RuntimeError, lambda make: make(4, 6)(PACKED, make(4, 6)(THREE)[1])),
        (RuntimeError, lambda make: make(4, 6, 2)(X, make(4, 6)(X)[1])),
        (RuntimeError, lambda make: make(4, 6, bidirectional=True)(X, make(4, 6)(X)[1])),
        (RuntimeError, lambda make: make(4, 6)(X, make(4, 5)(X)[1])),
        (RuntimeError, lambda make: make(4, 6)(X, make(4, 6)(X[:, 0])[1])),
        (RuntimeError, lambda make: make(4, 6)(X[:, 0], make(4, 6)(X)[1])),
    ),
)
@every_rnn
def test_the_same_mistakes_raise_the_same_errors(rnn_class, error, call):
    if OLDEST and rnn_class in (nn.LSTM, nn.GRU):
        pytest.skip("PyTorch 2.6: its own layers let some pass")
    with pytest.raises(error):
        call(rnn_class)
