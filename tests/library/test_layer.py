"""The layer against the paper's equations, one step and one tap at a time."""

import copy
import enum
import io
import math
import pickle
from decimal import Decimal, getcontext

import numpy as np
import pytest
import torch
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import weight_norm

from qrnn.fast import FastQRNNLayer
from qrnn_layer import ACTIVATIONS, METHODS, MODES, QRNNLayer, QRNNState

every_method = pytest.mark.parametrize("method", METHODS)
every_mode = pytest.mark.parametrize("mode", MODES)


def relative(got, want):
    """Relative L2 error."""
    return ((got.double() - want).norm() / want.norm()).item()


# --- the layer: against the paper, one step at a time -----------------------------------------------------------------


def reference_layer(layer, x):
    """Sections 2 and 2.1 of the paper in float64: convolution, gates, recurrence, one step and one tap at a time."""
    channels, width = layer.hidden_size, layer.kernel_size
    weight = layer.weight.detach().double().view(-1, width, layer.input_size)
    c, h = torch.zeros(x.shape[0], channels, dtype=torch.float64), []
    for t in range(x.shape[1]):
        y = torch.zeros(x.shape[0], len(weight), dtype=torch.float64)
        if layer.bias is not None:
            y += layer.bias.detach().double()
        for k in range(width):  # the last tap is the present
            if t - (width - 1) + k >= 0:
                y += x[:, t - (width - 1) + k].double() @ weight[:, k].T
        blocks = y.split(channels, dim=1)
        z, f = ACTIVATIONS[layer.activation](blocks[0]), blocks[1].sigmoid()
        moved = f * c + (blocks[2].sigmoid() if layer.mode == "ifo" else 1 - f) * z
        c = layer.zoneout * c + (1 - layer.zoneout) * moved if layer.mean_zoneout else moved
        h.append(c if layer.mode == "f" else blocks[-1].sigmoid() * c)
    return torch.stack(h, 1), c


@pytest.mark.parametrize("kernel_size", (1, 2, 5, 12))
@pytest.mark.parametrize("activation", ACTIVATIONS)
@every_mode
def test_layer_is_the_papers(mode, activation, kernel_size):
    torch.manual_seed(0)
    layer = QRNNLayer(4, 6, kernel_size, mode, activation=activation, bias=kernel_size != 5).double()
    x = torch.randn(3, 9, 4, dtype=torch.float64)
    h, state = layer(x)
    want_h, want_c = reference_layer(layer, x)
    torch.testing.assert_close(h, want_h, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(state.c, want_c, rtol=1e-12, atol=1e-14)  # c, not o * c, is what is carried


@pytest.mark.parametrize("method", ("auto", *METHODS))
@pytest.mark.parametrize("activation", ACTIVATIONS)
@every_mode
def test_method_does_not_matter(mode, activation, method):
    torch.manual_seed(0)
    layer = QRNNLayer(4, 6, mode=mode, activation=activation, method=method)
    x = torch.randn(3, 40, 4)
    torch.testing.assert_close(layer(x)[0].double(), reference_layer(layer, x)[0], rtol=1e-4, atol=1e-5)


def test_shifted_softplus_and_its_derivatives_keep_their_digits():
    """Check against a reference of 50 digits: the values span what has small digits, 0 and both ends."""
    getcontext().prec = 50
    values = [0.0, *(sign * size for size in (1e-30, 1e-6, 1e-3, 0.1, 0.5, 1, 3, 10, 44, 100, 3e4) for sign in (-1, 1))]
    for dtype in (torch.float32, torch.float64):
        eps = torch.finfo(dtype).eps
        a = torch.tensor(values, dtype=dtype, requires_grad=True)
        found = ACTIVATIONS["shifted_softplus"](a)
        (first,) = torch.autograd.grad(found.sum(), a, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), a)
        for x, z, slope, bend in zip(*(array.tolist() for array in (a, found, first, second)), strict=True):
            power = (-2 * abs(Decimal(x))).exp()  # exp(-2|a|)
            sigmoid = (1 if x > 0 else power) / (1 + power)
            exact = max(2 * Decimal(x), Decimal(0)) + ((1 + power) / 2).ln()
            assert abs(Decimal(z) - exact) <= 4 * eps * float(abs(exact)), x
            assert abs(slope - 2 * float(sigmoid)) <= 4 * eps, x
            assert abs(bend - 4 * float(sigmoid * (1 - sigmoid))) <= 8 * eps, x
    limits = ACTIVATIONS["shifted_softplus"](torch.tensor([-math.inf, math.inf, math.nan]))
    torch.testing.assert_close(limits, torch.tensor([-math.log(2), math.inf, math.nan]), equal_nan=True)


@pytest.mark.parametrize("gate", (-300.0, 300.0))
@pytest.mark.parametrize("method", METHODS)
@every_mode
def test_saturated_gates_give_finite_values_and_gradients(mode, method, gate):
    layer = QRNNLayer(3, 4, mode=mode, method=method)
    with torch.no_grad():
        layer.bias.fill_(gate)
    x = torch.randn(2, 70, 3, requires_grad=True)
    h, _ = layer(x)
    h.sum().backward()
    assert h.isfinite().all() and x.grad.isfinite().all() and layer.weight.grad.isfinite().all()


@pytest.mark.parametrize("kernel_size", (1, 2, 4, 20))
@every_mode
def test_pieces_and_single_steps_with_carried_state_are_the_whole(mode, kernel_size):
    torch.manual_seed(0)
    layer = QRNNLayer(4, 6, kernel_size, mode, activation="tanh").double()
    x = torch.randn(3, 11, 4, dtype=torch.float64)
    whole, last = layer(x)
    for cuts in ([11], [5, 6], [1] * 11, [3, 0, 8]):
        pieces, state = [], None
        for piece in x.split(cuts, dim=1):
            h, state = layer(piece, state)
            pieces.append(h)
        torch.testing.assert_close(torch.cat(pieces, 1), whole)
        torch.testing.assert_close(state.c, last.c)
        torch.testing.assert_close(state.window, last.window)


@pytest.mark.parametrize("kernel_size", (1, 2, 5))
@every_mode
def test_no_output_sees_a_later_input(mode, kernel_size):
    torch.manual_seed(0)
    layer = QRNNLayer(4, 6, kernel_size, mode)
    x = torch.randn(2, 12, 4)
    changed = x.clone()
    changed[:, 7] += 1
    before, after = layer(x)[0], layer(changed)[0]
    assert torch.equal(before[:, :7], after[:, :7])
    assert not torch.equal(before[:, 7], after[:, 7])


# --- the layer: zoneout ----------------------------------------------------------------------------------------------


@every_mode
def test_zoned_out_channels_keep_their_state_exactly(mode):
    torch.manual_seed(0)
    layer = QRNNLayer(4, 50, mode=mode, zoneout=0.3)
    _, state = layer(torch.randn(8, 5, 4))
    _, after = layer(torch.randn(8, 1, 4), state)
    kept = (after.c == state.c).double().mean().item()
    assert abs(kept - 0.3) < 4 * math.sqrt(0.3 * 0.7 / 400)  # four standard deviations of 8 * 50 draws


@every_mode
def test_zoneout_does_not_rescale_the_other_channels(mode):
    torch.manual_seed(0)
    layer = QRNNLayer(4, 50, mode=mode, zoneout=0.3).double()
    x = torch.randn(8, 6, 4, dtype=torch.float64)
    _, state = layer(x[:, :5])
    moved = layer(x[:, 5:], state)[1].c
    unzoned = layer.eval()(x[:, 5:], state)[1].c
    changed = moved != state.c
    assert changed.any()
    torch.testing.assert_close(moved[changed], unzoned[changed])


@every_mode
def test_zoneout_is_off_in_evaluation(mode):
    torch.manual_seed(0)
    layer = QRNNLayer(4, 6, mode=mode, zoneout=0.9).double().eval()
    x = torch.randn(3, 9, 4, dtype=torch.float64)
    torch.testing.assert_close(layer(x)[0], reference_layer(layer, x)[0])


@pytest.mark.parametrize("zoneout", (0.0, 1e-9, 0.3, 1.0))
@pytest.mark.parametrize("layer_class", (QRNNLayer, FastQRNNLayer))
@pytest.mark.parametrize("method", METHODS)
@every_mode
def test_mean_zoneout_evaluates_with_the_mean(mode, method, layer_class, zoneout):
    torch.manual_seed(0)
    layer = layer_class(4, 6, mode=mode, method=method, zoneout=zoneout, mean_zoneout=True).double().eval()
    x = torch.randn(3, 9, 4, dtype=torch.float64)
    wanted, c = reference_layer(layer, x)
    h, state = layer(x)
    torch.testing.assert_close((h, state.c), (wanted, c))
    with torch.no_grad():  # where the fast layer is another function
        torch.testing.assert_close(layer(x), (h, state))
        steps, after = [], None
        for t in range(9):
            one, after = layer(x[:, t : t + 1], after)
            steps.append(one)
        torch.testing.assert_close(torch.cat(steps, 1), h)


@every_mode
def test_a_step_with_mean_zoneout_is_the_mean_of_training_steps(mode):
    torch.manual_seed(0)
    layer = QRNNLayer(4, 6, mode=mode, zoneout=0.3, mean_zoneout=True).double()
    x, many = torch.randn(1, 1, 4, dtype=torch.float64), 40_000
    state = QRNNState(torch.randn(1, 6, dtype=torch.float64), torch.randn(1, 1, 4, dtype=torch.float64))
    drawn = layer(x.expand(many, -1, -1), QRNNState(*(part.expand(many, *part.shape[1:]) for part in state)))[1].c
    mean = layer.eval()(x, state)[1].c[0]
    assert ((drawn.mean(0) - mean).abs() < 5 * drawn.std(0) / math.sqrt(many)).all()  # five standard errors


@every_mode
def test_mean_zoneout_changes_nothing_in_training(mode):
    layers = [QRNNLayer(4, 6, mode=mode, zoneout=0.3, mean_zoneout=flag) for flag in (False, True)]
    layers[1].load_state_dict(layers[0].state_dict())
    x, outputs = torch.randn(3, 9, 4), []
    for layer in layers:
        torch.manual_seed(0)
        outputs.append(layer(x)[0])
    assert torch.equal(*outputs)


@pytest.mark.parametrize("zoneout", (0.5, 0.999, 1.0))
@pytest.mark.parametrize("method", ("loop", "blocked", "scan"))  # the errors of "log" grow with T
def test_mean_zoneout_keeps_its_digits_over_many_steps(method, zoneout):
    torch.manual_seed(0)
    layer = QRNNLayer(4, 6, method=method, zoneout=zoneout, mean_zoneout=True).eval()
    exact, x = copy.deepcopy(layer).double(), torch.randn(2, 5000, 4)
    state = QRNNState(torch.randn(2, 6), torch.zeros(2, 1, 4))
    h, after = layer(x, state)
    wanted, _ = exact(x.double(), QRNNState(*(part.double() for part in state)))
    assert relative(h, wanted) < 2e-6
    assert torch.equal(after.c, state.c) == (zoneout == 1)


def test_second_derivatives_after_a_switch_to_evaluation_are_those_of_training():
    def derivative(layer_class, **graph):
        torch.manual_seed(0)
        layer = layer_class(3, 4, zoneout=0.4, mean_zoneout=True).double()
        x = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
        h, _ = layer(x)
        layer.eval()
        return torch.autograd.grad(h.sum(), x, **graph)[0]

    torch.testing.assert_close(derivative(FastQRNNLayer, create_graph=True), derivative(QRNNLayer))


@pytest.mark.parametrize("layer_class", (QRNNLayer, FastQRNNLayer))
@every_mode
def test_derivatives_of_an_evaluation_with_mean_zoneout(mode, layer_class):
    torch.manual_seed(0)
    layer = layer_class(3, 4, mode=mode, zoneout=0.4, mean_zoneout=True).double().eval()
    x = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: layer(x)[0], (x,))


def test_zoneout_of_one_freezes_the_state():
    layer = QRNNLayer(4, 6, zoneout=1.0)
    state = QRNNState(torch.randn(3, 6), torch.zeros(3, 1, 4))
    assert torch.equal(layer(torch.randn(3, 9, 4), state)[1].c, state.c)


# --- the layer: padded batches ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", (False, True))
@pytest.mark.parametrize("kernel_size", (1, 2, 5))
@pytest.mark.parametrize("activation", ("softplus", "tanh"))
@pytest.mark.parametrize("method", METHODS)
@every_mode
def test_padding_is_never_seen(mode, method, activation, kernel_size, training):
    torch.manual_seed(0)
    layer = QRNNLayer(4, 6, kernel_size, mode, method=method, activation=activation).train(training).double()
    lengths = torch.tensor([9, 1, 0, 5])
    x = torch.randn(4, 9, 4, dtype=torch.float64)
    for row, length in enumerate(lengths):
        x[row, length:] = math.nan
    start = layer(torch.randn(4, 3, 4, dtype=torch.float64))[1]
    h, state = layer(x, start, lengths)
    for row, length in enumerate(lengths):
        alone, last = layer(x[row : row + 1, :length], QRNNState(*(part[row : row + 1] for part in start)))
        torch.testing.assert_close(h[row : row + 1, :length], alone)
        assert (h[row, length:] == 0).all()
        torch.testing.assert_close(state.c[row], last.c[0])
        torch.testing.assert_close(state.window[row], last.window[0])
    (h.sum() + state.c.sum()).backward()
    assert layer.weight.grad.isfinite().all() and layer.weight.grad.any()


def test_lengths_may_be_a_list():
    layer, x = QRNNLayer(4, 6), torch.randn(2, 5, 4)
    assert torch.equal(layer(x, lengths=[5, 2])[0], layer(x, lengths=torch.tensor([5, 2]))[0])


# --- the layer: as a module ------------------------------------------------------------------------------------------


@every_mode
def test_every_parameter_gets_a_gradient(mode):
    layer = QRNNLayer(4, 6, mode=mode)
    layer(torch.randn(2, 5, 4))[0].sum().backward()
    for name, parameter in layer.named_parameters():
        rows = parameter.grad.abs().view(MODES[mode], 6, -1).sum(dim=(1, 2))
        assert (rows > 0).all(), f"a gate of {name} is not used"


def test_nothing_is_hidden_in_the_module():
    layer = QRNNLayer(4, 6)
    x = torch.randn(2, 5, 4)
    before = copy.deepcopy(layer.__dict__)
    first = layer(x)[0]
    assert layer.__dict__.keys() == before.keys()
    assert list(layer.state_dict()) == ["weight", "bias"]
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x)[0], first)


def test_states_do_not_hold_the_whole_sequence():
    layer = QRNNLayer(4, 6)
    _, state = layer(torch.randn(2, 1000, 4))
    buffer = io.BytesIO()
    torch.save(tuple(state), buffer)
    assert len(buffer.getvalue()) < 4000


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_two_stacked_layers_in_half_precision(dtype):
    torch.manual_seed(0)
    layers = [QRNNLayer(4, 6), QRNNLayer(6, 6)]
    x = torch.randn(2, 300, 4)
    want = layers[1](layers[0](x)[0])[0]
    half = [copy.deepcopy(layer).to(dtype) for layer in layers]
    h, state = half[1](half[0](x.to(dtype))[0])
    assert h.dtype == dtype and state.c.dtype == torch.float32
    assert relative(h, want.double()) < 4 * torch.finfo(dtype).eps
    again, _ = half[1](half[0](x.to(dtype))[0][:, :1], state)
    assert again.dtype == dtype


def test_two_stacked_layers_under_autocast():
    torch.manual_seed(0)
    layers = torch.nn.ModuleList([QRNNLayer(4, 6, zoneout=0.1), QRNNLayer(6, 6)]).eval()
    x = torch.randn(2, 300, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        middle, state = layers[0](x)
        h, _ = layers[1](middle)
        layers[0](x, state)
    assert h.dtype == torch.bfloat16 and state.c.dtype == torch.float32
    assert relative(h, layers[1](layers[0](x)[0])[0].double()) < 4 * torch.finfo(torch.bfloat16).eps
    layers[0](x, state)  # a state from inside is good outside
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(ValueError, match=r"x: dtype torch\.float64"):
        layers[0](x.double())
    h.float().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in layers.parameters())


@every_mode
def test_layer_compiles_without_a_graph_break(mode):
    torch._dynamo.reset()
    torch.manual_seed(0)
    layer = QRNNLayer(4, 6, mode=mode)
    compiled = torch.compile(layer, fullgraph=True, backend="inductor" if mode == "fo" else "aot_eager")
    x, lengths = torch.randn(2, 9, 4), torch.tensor([9, 3])
    state = QRNNState(*(part.detach() for part in layer(x)[1]))
    for arguments in ((x,), (x, state), (x, None, lengths)):
        got, want = compiled(*arguments), layer(*arguments)
        torch.testing.assert_close(got[0], want[0])
        got[0].sum().backward()
        got_gradient, layer.weight.grad = layer.weight.grad, None
        want[0].sum().backward()
        torch.testing.assert_close(got_gradient, layer.weight.grad)
        layer.weight.grad = None


@pytest.mark.parametrize("mode", MODES)
def test_signals_do_not_die_out_in_a_deep_stack_at_first(mode):
    x = torch.randn(8, 100, 64)
    spreads = []
    for _ in range(8):
        x, _ = QRNNLayer(64, 64, mode=mode, activation="tanh")(x)
        spreads.append(x[:, 20:].std(dim=1).mean().item())  # over time: what a constant adds says nothing
    assert spreads[-1] > 0.1 and 0.8 < spreads[-1] / spreads[-2] < 1.2


@pytest.mark.parametrize(("mode", "gain"), [("f", 2), ("fo", 4), ("ifo", 4)])
def test_initial_weights_have_their_range(mode, gain):
    layer = QRNNLayer(50, 60, mode=mode)
    candidate, gates = layer.weight.detach().abs().split([60, layer.weight.shape[0] - 60])
    assert 0.98 * gain < candidate.max() * 10 <= gain and 0.98 < gates.max() * 10 <= 1  # 1 / sqrt(2 * 50) = 1 / 10
    assert 0.9 < layer.bias.detach().abs().max() * 10 <= 1


def test_forget_bias_is_added_to_the_forget_gate_only():
    layer = QRNNLayer(4, 6, mode="ifo")
    torch.manual_seed(0)
    layer.reset_parameters()
    plain = layer.bias.detach().clone()
    torch.manual_seed(0)
    layer.reset_parameters(forget_bias=2.0)
    torch.testing.assert_close(layer.bias - plain, torch.tensor([0.0] * 6 + [2.0] * 6 + [0.0] * 12))


def test_repr_names_what_was_chosen():
    assert "4, 6, kernel_size=2, mode='fo', zoneout=0.0, mean_zoneout=False, activation" in repr(QRNNLayer(4, 6))


def test_the_state_of_chosen_sequences_continues_them():
    torch.manual_seed(0)
    layer = QRNNLayer(4, 6, kernel_size=3)
    x, index = torch.randn(3, 9, 4), torch.tensor([2, 2, 0])
    _, state = layer(x[:, :5])
    got, _ = layer(x[index, 5:], QRNNState(*(part[index] for part in state)))
    torch.testing.assert_close(got, layer(x)[0][index, 5:])


# --- the layer: errors -----------------------------------------------------------------------------------------------

X = torch.zeros(2, 5, 4)
STATE = QRNNState(torch.zeros(2, 6), torch.zeros(2, 1, 4))


@pytest.mark.parametrize(
    ("call", "parts"),
    (
        (lambda: QRNNLayer(0, 6), ("input_size", "0")),
        (lambda: QRNNLayer(4, 6, 0), ("kernel_size", "0")),
        (lambda: QRNNLayer(4, 6, mode="of"), ("mode", "'of'", "ifo")),
        (lambda: QRNNLayer(4, 6, activation="gelu"), ("activation", "'gelu'", "softplus")),
        (lambda: QRNNLayer(4, 6, method="cuda"), ("method", "'cuda'", "blocked")),
        (lambda: QRNNLayer(4, 6, zoneout=1.5), ("zoneout", "1.5")),
        (lambda: QRNNLayer(4, 6, zoneout=True), ("zoneout", "True")),
        (lambda: QRNNLayer(4, 6, bias=False).reset_parameters(1.0), ("forget_bias", "1.0")),
        (lambda: QRNNLayer(4, 6).reset_parameters(math.nan), ("forget_bias", "nan", "a number")),
        (lambda: prune.l1_unstructured(QRNNLayer(4, 6), "weight", 3).reset_parameters(), ("weight_orig", "alone")),
        (lambda: weight_norm(QRNNLayer(4, 6)).reset_parameters(), ("parametrizations.weight", "alone")),
        (lambda: QRNNLayer(4, 6).reset_parameters("1"), ("forget_bias", "'1'", "a number")),
        (lambda: QRNNLayer(4, 6, dtype=torch.complex64), ("dtype", "torch.complex64", "floating")),
        (lambda: QRNNLayer(4, 6)(X, QRNNState(STATE.c, STATE.window.double())), ("state.window", "torch.float64")),
        (lambda: QRNNLayer(4, 6)(X[0]), ("x", "(5, 4)", "(B, T, 4)")),
        (lambda: QRNNLayer(4, 6)(X[:, :, :3]), ("x", "(2, 5, 3)", "(B, T, 4)")),
        (lambda: QRNNLayer(4, 6)(X.double()), ("x", "torch.float64", "torch.float32")),
        (lambda: QRNNLayer(4, 6)(X.to("meta")), ("x", "meta", "cpu")),
        (lambda: QRNNLayer(4, 6)(X[:1], STATE), ("state.c", "(2, 6)", "(1, 6)")),
        (lambda: QRNNLayer(4, 6, 3)(X, STATE), ("state.window", "(2, 1, 4)", "(2, 2, 4)")),
        (lambda: QRNNLayer(4, 6)(X, QRNNState(STATE.c.double(), STATE.window)), ("state.c", "torch.float64")),
        (lambda: QRNNLayer(4, 6)(X, lengths=[5]), ("lengths", "[5]", "(2,)")),
        (lambda: QRNNLayer(4, 6)(X, lengths=[5, 6]), ("lengths", "[5, 6]", "5")),
        (lambda: QRNNLayer(4, 6)(X, lengths=[5, -1]), ("lengths", "[5, -1]")),
        (lambda: QRNNLayer(4, 6)(X, lengths=torch.tensor([5.0, 2.0])), ("lengths", "5., 2.")),
    ),
)
def test_layer_errors_name_the_argument_and_what_was_given(call, parts):
    with pytest.raises(ValueError) as caught:
        call()
    assert all(part in str(caught.value) for part in parts), caught.value


@pytest.mark.parametrize(
    ("call", "name"),
    (
        (lambda: QRNNLayer(4, 2.5), "hidden_size"),
        (lambda: QRNNLayer(True, 6), "input_size"),
        (lambda: QRNNLayer(4, "6"), "hidden_size"),
        (lambda: QRNNLayer(4, 6, bias=0.5), "bias"),
        (lambda: QRNNLayer(4, 6)(X.tolist()), "x"),
        (lambda: QRNNLayer(4, 6)(X.numpy()), "x"),
        (lambda: QRNNLayer(4, 6)(None), "x"),
        (lambda: QRNNLayer(4, 6)(X.to_sparse()), "x"),
        (lambda: QRNNLayer(4, 6)(X, torch.zeros(2, 6)), "state"),
        (lambda: QRNNLayer(4, 6)(X, (STATE.c, [0.0])), "state.window"),
        (lambda: QRNNLayer(4, 6)(X, lengths="ab"), "lengths"),
    ),
)
def test_arguments_of_a_wrong_type_are_named(call, name):
    with pytest.raises((TypeError, ValueError), match=f"^{name}: "):
        call()


@pytest.mark.parametrize("dtype", (torch.uint8, torch.int8, torch.int16, torch.uint16, torch.uint32, torch.uint64))
def test_lengths_are_of_any_integer_type(dtype):
    layer, x = QRNNLayer(4, 6), torch.randn(2, 300, 4)
    lengths = torch.tensor([100, 7])
    torch.testing.assert_close(layer(x, lengths=lengths.to(dtype)), layer(x, lengths=lengths))


def test_names_may_be_of_an_enumeration_that_prints_as_they_do():
    class Name(enum.Enum):
        FO, TANH, SCAN = "fo", "tanh", "scan"

        def __str__(self):
            return self.value

    layer = QRNNLayer(4, 6, mode=Name.FO, activation=Name.TANH, method=Name.SCAN)
    assert (layer.mode, layer.activation, layer.method) == ("fo", "tanh", "scan")


def test_sizes_are_of_any_integer_type():
    layer = QRNNLayer(np.int64(4), np.int32(6), kernel_size=np.uint8(2))
    assert [type(size) for size in (layer.input_size, layer.hidden_size, layer.kernel_size)] == [int] * 3


@pytest.mark.parametrize("activation", ("softplus", "tanh", "identity"))  # pooled as it is, shifted, and in halves
@every_mode
@every_method
def test_a_channel_that_stays_keeps_its_state_to_the_bit(method, mode, activation):
    """Zoned out at every other step or padded: a scan comes to each step on a path of its own."""
    torch.manual_seed(0)
    layer = QRNNLayer(4, 40, mode=mode, method=method, zoneout=0.5, activation=activation)
    seen, c0 = torch.randn(8, 34, 4), torch.randn(8, 40)
    keep = torch.rand(8, 33, 40) < 0.5
    c, _ = layer._cells(layer._project(seen), c0, keep)
    before = torch.cat([c0.unsqueeze(1), c[:, :-1]], dim=1)
    assert torch.equal(c[keep], before[keep])
    x, lengths = torch.randn(8, 33, 4), torch.randint(1, 33, (8,))
    _, state = layer.eval()(x, lengths=lengths)
    for row, length in enumerate(lengths):
        _, alone = layer(x[row : row + 1, :length])
        torch.testing.assert_close(state.c[row], alone.c[0])
