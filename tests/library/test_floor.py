"""Candidates that are bounded below: in the modes "f" and "fo" the log forms pool them as positive ones.

The bounds here are absolute near h = 0: errors count relative to the same pooling of |z| + s, where z >= -s.
"""

import math

import pytest
import torch
import torch.nn.functional as F

import qrnn_layer
from qrnn_layer import ACTIVATIONS, FLOORS, MODES, QRNNLayer, QRNNState

BIASES = torch.linspace(-6, 12, 7)  # 1 - f from 1 to 6e-6
SHIFTED = [name for name, floor in FLOORS.items() if floor > -math.inf]

every_shifted = pytest.mark.parametrize("activation", SHIFTED)
both_log_forms = pytest.mark.parametrize("method", ("log", "blocked"))
every_mode = pytest.mark.parametrize("mode", MODES)


def layer_of(mode, method, activation, size=7, **options):
    torch.manual_seed(0)
    return QRNNLayer(3, size, mode=mode, method=method, activation=activation, **options)


def drawn(layer, time, scale=1.0, dtype=torch.float32):
    """Pre-activations, forget gates of all biases, and a state of both signs. `scale` is that of the candidates."""
    generator = torch.Generator().manual_seed(1)
    a = torch.randn(2, time, MODES[layer.mode], layer.hidden_size, generator=generator)
    a[:, :, 0] *= scale
    a[:, :, 1] += BIASES
    return a.flatten(2).to(dtype), 3 * torch.randn(2, layer.hidden_size, generator=generator).to(dtype)


def oracle(layer, projection, c0, magnitudes=False):
    """The cells in float64, one step at a time; with `magnitudes` the pooling of |z| + s from |c0|."""
    a_z, a_f, *others = projection.double().chunk(MODES[layer.mode], dim=2)
    z, c, steps = ACTIVATIONS[layer.activation](a_z), c0.double(), []
    if magnitudes:
        z, c = z.abs() - FLOORS[layer.activation], c.abs() - FLOORS[layer.activation]
    i = (others[0] if layer.mode == "ifo" else -a_f).sigmoid()
    for f_t, x_t in zip(a_f.sigmoid().unbind(1), (i * z).unbind(1), strict=True):
        c = f_t * c + x_t
        steps.append(c)
    return torch.stack(steps, dim=1)


def bound(layer, projection):
    """Of "log" the documented bound, of "blocked", whose blocks are float64, the rounding of z, x and h."""
    eps = torch.finfo(torch.float32).eps
    if layer.method == "blocked":
        return 4 * eps
    a_z, a_f, *_ = projection.double().chunk(MODES[layer.mode], dim=2)
    z = ACTIVATIONS[layer.activation](a_z) - FLOORS[layer.activation]
    log_x = (torch.sigmoid(-a_f) * z.clamp(min=eps)).log()
    c = F.logsigmoid(a_f).clamp(min=math.log(torch.finfo(torch.float32).tiny)).cumsum(1)
    largest = (array.abs().amax(1, keepdim=True) for array in (c, log_x))
    return 4 * eps * (1 + math.log(len(c[0])) + sum(largest))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_floor_is_the_largest_lower_bound(activation):
    a = torch.cat([torch.linspace(-100, 100, 20_001, dtype=torch.float64), torch.tensor([-math.inf])])
    z, floor = ACTIVATIONS[activation](a), FLOORS.get(activation, 0)
    assert (z >= floor).all() and z[-1] == floor


@pytest.mark.parametrize("activation", ("tanh", "shifted_softplus", "elu", "identity"))
def test_centred_candidates_have_value_0_and_slope_1_at_0(activation):
    a = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    z = ACTIVATIONS[activation](a)
    (slope,) = torch.autograd.grad(z.sum(), a)
    torch.testing.assert_close(z, torch.zeros_like(z))
    torch.testing.assert_close(slope, torch.ones_like(slope))


@every_mode
@pytest.mark.parametrize("activation", ACTIVATIONS)
@both_log_forms
def test_only_what_has_no_floor_is_pooled_in_halves(method, activation, mode, monkeypatch):
    pooled, closed_form = [], qrnn_layer.closed_form
    monkeypatch.setattr(qrnn_layer, "closed_form", lambda f, x: pooled.append(x.shape) or closed_form(f, x))
    layer = layer_of(mode, method, activation)
    layer(torch.randn(2, 5, 3))
    halves = activation == "identity" or (mode == "ifo" and activation in FLOORS)
    ((*batch, _, _),) = pooled
    assert (batch[0] == 2 and len(batch) > (2 if method == "blocked" else 1)) == halves


@pytest.mark.parametrize("scale", (1.0, 100.0))  # of 100: most candidates are at the floor, to the last digit
@pytest.mark.parametrize("time", (1, 33, 1000))
@pytest.mark.parametrize("mode", ("f", "fo"))
@every_shifted
@both_log_forms
def test_error_is_within_the_bound(method, activation, mode, time, scale):
    layer = layer_of(mode, method, activation)
    projection, c0 = drawn(layer, time, scale)
    c, _ = layer._cells(projection, c0, None)
    error = (c.double() - oracle(layer, projection, c0)).abs() / oracle(layer, projection, c0, magnitudes=True)
    assert (error < bound(layer, projection)).all()


@pytest.mark.parametrize("bias", (9.21, 11.0, 12.3))
@every_shifted
@both_log_forms
def test_equal_gates_that_hardly_forget(method, activation, bias):
    """A plain gate has lost the digits of 1 - f, and where the gates of all steps are equal, the losses add up."""
    layer = layer_of("f", method, activation)
    projection, c0 = drawn(layer, 10_000)
    projection[:, :, 7:] = bias
    c, _ = layer._cells(projection, c0, None)
    error = (c.double() - oracle(layer, projection, c0)).abs() / oracle(layer, projection, c0, magnitudes=True)
    assert (error < bound(layer, projection)).all()


@pytest.mark.parametrize("share", (0.1, 1.0))
@pytest.mark.parametrize("mode", ("f", "fo"))
@every_shifted
@both_log_forms
def test_gates_of_0_and_1_and_candidates_at_their_ends(method, activation, mode, share):
    layer = layer_of(mode, method, activation)
    projection, c0 = drawn(layer, 300)
    chosen = torch.rand(projection.shape, generator=torch.Generator().manual_seed(2)) < share
    projection = torch.where(chosen, projection.sign() * 100, projection)  # sigmoid(-100) is 4e-44
    c, _ = layer._cells(projection, c0, None)
    error = (c.double() - oracle(layer, projection, c0)).abs() / oracle(layer, projection, c0, magnitudes=True)
    assert (error < bound(layer, projection)).all()


@pytest.mark.parametrize("scale", (1.0, 100.0))
@pytest.mark.parametrize("mode", ("f", "fo"))
@every_shifted
@both_log_forms
def test_gradients_are_within_the_bound(method, activation, mode, scale):
    layer = layer_of(mode, method, activation)
    leaves = [array.requires_grad_() for array in drawn(layer, 300, scale)]
    in_float64 = [array.detach().double().requires_grad_() for array in leaves]
    weights = torch.randn(2, 300, layer.hidden_size, generator=torch.Generator().manual_seed(3))
    found = torch.autograd.grad((layer._cells(*leaves, None)[0] * weights).sum(), leaves)
    expected = torch.autograd.grad((oracle(layer, *in_float64) * weights.double()).sum(), in_float64)
    for mine, theirs in zip(found, expected, strict=True):
        assert (mine - theirs).norm() < max(
            2e-5, torch.as_tensor(bound(layer, leaves[0].detach())).max()
        ) * theirs.norm()


@every_mode
@pytest.mark.parametrize("activation", ("shifted_softplus", "elu", "tanh"))
@both_log_forms
def test_derivatives_of_first_and_second_order(method, activation, mode):
    layer = layer_of(mode, method, activation, size=2, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    projection = torch.randn(1, 5, 2 * MODES[mode], dtype=torch.float64, generator=generator, requires_grad=True)
    c0 = torch.randn(1, 2, dtype=torch.float64, generator=generator, requires_grad=True)
    keep = torch.zeros(1, 5, 2, dtype=torch.bool)
    keep[:, 1, 0] = keep[:, 3] = True

    def cells(projection, c0):
        return layer._cells(projection, c0, keep)[0]

    assert torch.autograd.gradcheck(cells, (projection, c0), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(cells, (projection, c0))


@every_shifted
@both_log_forms
def test_function_transforms(method, activation):
    layer = layer_of("fo", method, activation, dtype=torch.float64)
    x = torch.randn(4, 6, 3, dtype=torch.float64)

    def run(sequence):
        return layer(sequence.unsqueeze(0))[0].squeeze(0)

    torch.testing.assert_close(torch.func.vmap(run)(x), layer(x)[0])
    torch.testing.assert_close(torch.func.jacfwd(run)(x[0]), torch.func.jacrev(run)(x[0]))


@pytest.mark.parametrize("activation", ("shifted_softplus", "elu"))
@both_log_forms
def test_compiled_and_exported(method, activation):
    torch._dynamo.reset()
    layer, x, lengths = layer_of("fo", method, activation, zoneout=0.5).eval(), torch.randn(2, 9, 3), [9, 3]
    state = QRNNState(torch.randn(2, 7), torch.randn(2, 1, 3))
    expected, _ = layer(x, state, torch.tensor(lengths))
    found, _ = torch.compile(layer, fullgraph=True, backend="aot_eager")(x, state, torch.tensor(lengths))
    torch.testing.assert_close(found, expected)
    assert torch.equal(torch.export.export(layer, (x, state)).module()(x, state)[0], layer(x, state)[0])


@every_shifted
@both_log_forms
def test_a_state_that_nothing_enters_is_carried_to_the_bit(method, activation):
    layer = layer_of("fo", method, activation)
    state = QRNNState(torch.randn(2, 7) * 1e-6, torch.zeros(2, 1, 3))
    _, after = layer(torch.randn(2, 5, 3), state, lengths=[0, 0])
    assert torch.equal(after.c, state.c)
