"""The stack: what users of nn.LSTM rely on, as far as the stack has it."""

import copy
import pickle

import pytest
import torch
from torch import nn

from qrnn import QRNN, QRNNStackState
from qrnn_layer import MODES

every_mode = pytest.mark.parametrize("mode", MODES)


@pytest.mark.parametrize("rnn_class", (nn.LSTM, QRNN))
@pytest.mark.parametrize("batch_first", (False, True))
def test_shapes_are_those_of_lstm(rnn_class, batch_first):
    rnn = rnn_class(4, 6, 3, True, batch_first, 0.1)
    x = torch.randn(2, 9, 4) if batch_first else torch.randn(9, 2, 4)
    output, state = rnn(x)
    assert output.shape == (*x.shape[:2], 6)
    assert state[0].shape == (3, 2, 6)


def test_layout_of_time_and_batch_is_all_that_batch_first_changes():
    torch.manual_seed(0)
    rnn = QRNN(4, 6, 2)
    batch_first = QRNN(4, 6, 2, batch_first=True)
    batch_first.load_state_dict(rnn.state_dict())
    x = torch.randn(9, 2, 4)
    torch.testing.assert_close(batch_first(x.transpose(0, 1))[0].transpose(0, 1), rnn(x)[0])


@pytest.mark.parametrize("kernel_size", (1, 2, 5))
@every_mode
def test_pieces_and_single_steps_with_carried_state_are_the_whole(mode, kernel_size):
    torch.manual_seed(0)
    rnn = QRNN(4, 6, 3, batch_first=True, kernel_size=kernel_size, mode=mode, activation="tanh").double()
    x = torch.randn(2, 11, 4, dtype=torch.float64)
    whole, last = rnn(x)
    for cuts in ([5, 6], [1] * 11):
        pieces, state = [], None
        for piece in x.split(cuts, dim=1):
            output, state = rnn(piece, state)
            pieces.append(output)
        torch.testing.assert_close(torch.cat(pieces, 1), whole)
        torch.testing.assert_close(state.c, last.c)
        for window, wanted in zip(state.window, last.window, strict=True):
            torch.testing.assert_close(window, wanted)


def test_no_output_sees_a_later_input():
    torch.manual_seed(0)
    rnn = QRNN(4, 6, 3, batch_first=True, kernel_size=3)
    x = torch.randn(2, 12, 4)
    changed = x.clone()
    changed[:, 7] += 1
    assert torch.equal(rnn(x)[0][:, :7], rnn(changed)[0][:, :7])


def test_dropout_is_between_the_layers_and_nowhere_else():
    x = torch.randn(2, 9, 4)
    one = QRNN(4, 6, 1, batch_first=True, dropout=0.9)
    assert torch.equal(one(x)[0], one.eval()(x)[0])  # not on the input, not on the output
    two = QRNN(4, 6, 2, batch_first=True, dropout=0.9)
    assert not torch.equal(two(x)[0], two(x)[0])
    assert torch.equal(two(x)[1].c[0], two(x)[1].c[0])  # the first layer sees none
    assert torch.equal(two.eval()(x)[0], two(x)[0])


def test_every_parameter_gets_a_gradient_and_nothing_is_hidden():
    rnn = QRNN(4, 6, 2)
    x = torch.randn(9, 2, 4)
    output, _ = rnn(x)
    output.sum().backward()
    assert all(parameter.grad.any() for parameter in rnn.parameters())
    rnn.zero_grad()
    for twin in (copy.deepcopy(rnn), pickle.loads(pickle.dumps(rnn))):
        assert torch.equal(twin(x)[0], output)


def test_a_plain_tuple_is_a_state_too():
    """The repackage_hidden idiom: detach through nested tuples."""

    def repackage(state):
        return state.detach() if isinstance(state, torch.Tensor) else tuple(map(repackage, state))

    rnn = QRNN(4, 6, 2)
    x = torch.randn(9, 2, 4)
    _, state = rnn(x)
    assert torch.equal(rnn(x, repackage(state))[0], rnn(x, state)[0])


@pytest.mark.parametrize("dtype", (torch.float64, torch.bfloat16))
def test_other_precisions(dtype):
    rnn = QRNN(4, 6, 2, dtype=dtype)
    output, state = rnn(torch.randn(9, 2, 4, dtype=dtype))
    output, _ = rnn(torch.randn(9, 2, 4, dtype=dtype), state)
    assert output.dtype == dtype


@pytest.mark.parametrize(
    ("call", "message"),
    (
        (lambda: QRNN(4, 6, 0), "num_layers: 0 given"),
        (lambda: QRNN(4, 6, dropout=2), "dropout: 2 given, a probability"),
        (lambda: QRNN(4, 6, mode="of"), "mode: 'of' given"),
        (lambda: QRNN(4, 6)(torch.zeros(5, 1, 4), torch.zeros(2, 1, 6)), "hx: not the state of 1"),
        (lambda: QRNN(4, 6)(torch.zeros(5, 1, 3)), r"x: shape \(5, 1, 3\) given, \(T, B, 4\) expected"),
        (lambda: QRNN(4, 6)(torch.zeros(5, 4)), r"x: shape \(5, 4\) given"),
        (
            lambda: QRNN(4, 6, 2)(torch.zeros(5, 1, 4), QRNN(4, 6)(torch.zeros(5, 1, 4))[1]),
            "hx: not the state of 2",
        ),
        (
            lambda: QRNN(4, 6)(torch.zeros(5, 1, 4), QRNNStackState(torch.zeros(1, 2, 6), (torch.zeros(1, 1, 4),))),
            "c: ",
        ),
    ),
)
def test_errors_say_what_was_given_and_expected(call, message):
    with pytest.raises(ValueError, match=message):
        call()
