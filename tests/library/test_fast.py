"""The fast layer against the plain one: the same numbers, for every mode, and nothing from the future."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import qrnn_layer
from qrnn import convolution, fast, onednn
from qrnn.fast import ACTIVATIONS, FastQRNNLayer
from qrnn_layer import QRNNLayer
from tests.versions import skip_in_oldest

BATCH, FEATURES, HIDDEN = 3, 4, 5


@pytest.fixture(params=["taps", "short filter", "oneDNN"], autouse=True)
def small(request, monkeypatch) -> str:
    """Cut short sequences into pieces and let them use both convolutions and the scan, as long ones do.

    With oneDNN, in float32, it is the short filter. Without it the products are those of PyTorch, whatever the CPU.
    """
    if request.param == "oneDNN" and not torch.backends.mkldnn.is_available():
        pytest.skip("PyTorch without oneDNN")
    monkeypatch.setattr(onednn, "is_faster", lambda: request.param == "oneDNN")
    for name in ("MULTIPLICATIONS", "SHORTEST", "NUMBERS"):
        monkeypatch.setattr(onednn, name, 1)
    monkeypatch.setattr(fast, "PIECE", 500)
    monkeypatch.setattr(fast, "HALF_PIECE", 500)
    monkeypatch.setattr(fast, "PIECE_ROWS", 1)
    monkeypatch.setattr(fast, "LOOP_STEPS", 2)
    monkeypatch.setattr(convolution, "SHORT_FILTER_ROWS", 10**9 if request.param == "taps" else 1)
    return request.param


def built(kernel_size: int = 2, mode: str = "fo", dtype: torch.dtype = torch.float64, **options) -> FastQRNNLayer:
    torch.manual_seed(0)
    return FastQRNNLayer(FEATURES, HIDDEN, kernel_size, mode, dtype=dtype, **{"activation": "tanh", **options})


def drawn(layer: FastQRNNLayer, steps: int, batch: int = BATCH) -> tuple[Tensor, Tensor]:
    """Return inputs with the window before them, and a first state."""
    dtype = layer.weight.dtype
    seen = torch.randn(batch, steps + layer.kernel_size - 1, FEATURES, dtype=dtype, requires_grad=True)
    return seen, torch.randn(batch, HIDDEN, dtype=dtype, requires_grad=True)


def run_layer(layer: FastQRNNLayer, seen: Tensor, c0: Tensor, keep: Tensor | None = None) -> tuple[Tensor, Tensor]:
    before = layer.kernel_size - 1
    return layer._run(seen[:, :before], seen[:, before:], c0, keep)


def plain(layer: FastQRNNLayer, seen: Tensor, c0: Tensor, keep: Tensor | None = None) -> tuple[Tensor, Tensor]:
    before = layer.kernel_size - 1
    return QRNNLayer._run(layer, seen[:, :before], seen[:, before:], c0, keep)


def outputs_and_gradients(run, layer: FastQRNNLayer, seen: Tensor, c0: Tensor, keep: Tensor | None) -> list[Tensor]:
    torch.manual_seed(1)
    h, c = run(layer, seen, c0, keep)
    loss = sum((array * torch.randn(array.shape)).sum() for array in (h, c))
    return [h, c, *torch.autograd.grad(loss, [seen, c0, *layer.parameters()])]


def assert_same(layer: FastQRNNLayer, seen: Tensor, c0: Tensor, keep: Tensor | None = None) -> None:
    bound = {torch.float32: 2e-6, torch.float64: 1e-13}[layer.weight.dtype]
    assert layer._is_fast(seen, layer.weight.dtype)
    expected = outputs_and_gradients(plain, layer, seen, c0, keep)
    found = outputs_and_gradients(run_layer, layer, seen, c0, keep)
    with torch.no_grad():
        found += run_layer(layer, seen, c0, keep)
    for mine, theirs in zip(found, expected + expected[:2], strict=True):
        assert mine.shape == theirs.shape and mine.dtype == theirs.dtype
        torch.testing.assert_close(mine, theirs, rtol=0, atol=bound * max(theirs.abs().max().item(), 1e-3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("steps", [1, 2, 30, 31])
@pytest.mark.parametrize("mode", ["f", "fo", "ifo"])
@pytest.mark.parametrize("kernel_size", [1, 2, 3])
def test_same_numbers_as_the_plain_layer(kernel_size, mode, steps, dtype):
    layer = built(kernel_size, mode, dtype)
    assert_same(layer, *drawn(layer, steps))


@pytest.mark.parametrize("mode", ["f", "fo", "ifo"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(activation, mode):
    layer = built(mode=mode, activation=activation)
    assert_same(layer, *drawn(layer, 20))


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS.keys() - {"exp"}))
def test_candidates_at_both_ends_of_their_range(activation):
    layer = built(activation=activation, dtype=torch.float32)  # F.softplus is a from 20 on, 2e-9 too little
    with torch.no_grad():
        layer.bias[:HIDDEN] = torch.tensor([-100, -10, 0, 10, 100])
    assert_same(layer, *drawn(layer, 20))


@pytest.mark.parametrize("steps", [1, 40])
@pytest.mark.parametrize(
    "activation",
    ["tanh", "shifted_softplus", pytest.param("elu", marks=skip_in_oldest("its elu loses digits near 0")), "identity"],
)
def test_small_candidates_keep_their_digits(activation, steps):
    layer = built(activation=activation, bias=False, dtype=torch.float32)
    seen, c0 = drawn(layer, steps)
    seen, c0 = seen.detach() * 1e-6, torch.zeros_like(c0)
    for differentiates in (False, True):
        layer.requires_grad_(differentiates)
        exact = plain(copy.deepcopy(layer).double(), seen.double(), c0.double())[0]
        for run in (plain, run_layer):
            error = (run(layer, seen, c0)[0].double() - exact).norm() / exact.norm()
            assert error < 5e-7, (run, differentiates)


def test_both_layers_have_the_same_activations():
    assert set(ACTIVATIONS) == set(qrnn_layer.ACTIVATIONS)


@pytest.mark.parametrize("mode", ["f", "fo", "ifo"])
@pytest.mark.parametrize("columns", [1, HIDDEN])
@pytest.mark.parametrize("steps", [1, 20, 21])
def test_a_kept_state_stays_exactly_as_it_is(steps, columns, mode):
    layer = built(mode=mode)
    seen, c0 = drawn(layer, steps)
    assert_same(layer, seen, c0, torch.rand(BATCH, steps, columns) < 0.4)
    assert torch.equal(run_layer(layer, seen, c0, torch.ones(BATCH, steps, columns, dtype=torch.bool))[1], c0)


def test_without_bias_and_with_one_sequence():
    layer = built(bias=False)
    assert_same(layer, *drawn(layer, 21, batch=1))


@pytest.mark.parametrize("kernel_size", [1, 2])
def test_any_strides(kernel_size):
    layer = built(kernel_size)
    seen, c0 = drawn(layer, 21)
    time_first = seen.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    every_other = seen.detach().repeat_interleave(2, dim=2)[:, :, ::2].requires_grad_()
    for strided in (time_first, every_other):
        assert not strided.is_contiguous()
        assert_same(layer, strided, c0)
    h, _ = run_layer(layer, seen, c0, None)
    (expected,) = torch.autograd.grad(h, seen, torch.ones(()).expand(h.shape).double(), retain_graph=True)
    (found,) = torch.autograd.grad(h, seen, torch.ones_like(h))
    assert torch.equal(found, expected)


def test_the_output_has_time_first_in_memory_as_the_next_layer_wants_it():
    layer = built()
    seen, c0 = drawn(layer, 20)
    assert run_layer(layer, seen, c0, None)[0].transpose(0, 1).is_contiguous()


@pytest.mark.parametrize("mode", ["f", "fo", "ifo"])
@pytest.mark.parametrize("share", [0.3, 0.9])
@torch.no_grad()
def test_states_that_are_kept_are_kept_to_the_bit(share, mode):
    layer = built(1, mode=mode, dtype=torch.float32)  # of one tap, so that states are stored in the order of time
    torch.manual_seed(0)
    seen, c0, keep = torch.randn(200, 4, FEATURES), torch.randn(4, HIDDEN), torch.rand(200, 4, HIDDEN) < share
    setting = fast._Setting(seen.dtype, layer)
    *_, pieces = fast._forward(seen[:0], seen, c0, keep, layer.weight, layer.bias, setting, saves=True)
    before, after = (torch.cat([states[part] for states in pieces]) for part in (slice(-1), slice(1, None)))
    assert torch.equal(before[0], c0) and torch.equal(after[keep], before[keep])


@pytest.mark.parametrize("wanted", ["seen", "weight", "c0", "h alone", "c alone"])
def test_only_what_is_asked_for_is_differentiated(wanted):
    layer = built()
    seen, c0 = drawn(layer, 21)
    arguments = {"seen": seen, "weight": layer.weight, "c0": c0}
    for name, array in [*arguments.items(), ("bias", layer.bias)]:
        array.requires_grad_(name == wanted or wanted.endswith("alone"))

    def gradients(run) -> list[Tensor]:
        h, c = run(layer, seen, c0, None)
        outputs = [h] if wanted == "h alone" else [c] if wanted == "c alone" else [h, c]
        inputs = [array for array in arguments.values() if array.requires_grad]
        return torch.autograd.grad(sum(output.sin().sum() for output in outputs), inputs)

    for found, expected in zip(gradients(run_layer), gradients(plain), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("mode", ["f", "fo", "ifo"])
def test_first_and_second_derivatives(mode):
    layer = built(mode=mode)
    seen, c0 = drawn(layer, 5, batch=1)
    keep = torch.rand(1, 5, HIDDEN) < 0.2

    def run(seen: Tensor, c0: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        setting = fast._Setting(torch.float64, layer)
        window, x = seen.transpose(0, 1).split([1, 5])
        return fast._Layer.apply(window, x, c0, keep.transpose(0, 1), weight, bias, setting)

    assert torch.autograd.gradcheck(run, (seen, c0, layer.weight, layer.bias))
    assert torch.autograd.gradgradcheck(run, (seen, c0, layer.weight, layer.bias))


def test_second_derivatives_of_two_layers_that_share_a_weight():
    torch.manual_seed(0)
    layer = FastQRNNLayer(HIDDEN, HIDDEN, 1, activation="tanh", dtype=torch.float64)
    seen, c0 = torch.randn(2, 9, HIDDEN, dtype=torch.float64), torch.zeros(2, HIDDEN, dtype=torch.float64)

    def penalty(run) -> Tensor:
        h, _ = run(layer, run(layer, seen, c0, None)[0], c0, None)
        (grad,) = torch.autograd.grad(h.sin().sum(), layer.weight, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), layer.weight)[0]

    torch.testing.assert_close(penalty(run_layer), penalty(plain))


def test_the_graph_can_be_walked_twice():
    layer = built()
    h, c = run_layer(layer, *drawn(layer, 21), None)
    first, second = (torch.autograd.grad(h.sum() + c.sum(), layer.weight, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("later", [1e4, float("nan")])
@pytest.mark.parametrize("kernel_size", [1, 2, 3])
def test_the_future_changes_nothing(kernel_size, later):
    layer = built(kernel_size, dtype=torch.float32)
    seen, c0 = drawn(layer, 31)
    h, _ = run_layer(layer, seen, c0, None)
    for step in range(31):
        changed = seen.detach().clone()
        changed[:, step + kernel_size - 1] = later
        assert torch.equal(run_layer(layer, changed.requires_grad_(), c0, None)[0][:, :step], h[:, :step])


def test_a_gate_of_zero_lets_nothing_of_a_large_state_through():
    layer = built(1, "ifo", torch.float32, activation="identity")
    with torch.no_grad():
        layer.bias[HIDDEN : 2 * HIDDEN] = -200
    seen, c0 = drawn(layer, 20)
    h, c = run_layer(layer, seen, c0, None)
    h_large, c_large = run_layer(layer, seen, 1e8 * c0, None)
    assert torch.equal(h_large, h) and torch.equal(c_large, c)


@pytest.mark.parametrize("mode", ["fo", "ifo"])
@pytest.mark.parametrize(("forget_bias", "decay"), [(-6.0, False), (0.0, False), (9.21, False), (9.21, True)])
def test_bounds_over_many_steps(forget_bias, decay, mode, monkeypatch):
    monkeypatch.undo()  # with the constants of the module
    torch.manual_seed(0)
    layer = FastQRNNLayer(FEATURES, HIDDEN, 2, mode, activation="tanh")
    with torch.no_grad():
        if forget_bias > 9:  # log f = -1e-4 everywhere: rounding errors of equal gates add up
            layer.weight[HIDDEN : 2 * HIDDEN] = 0
            layer.bias[HIDDEN : 2 * HIDDEN] = 0
        layer.bias[HIDDEN : 2 * HIDDEN] += forget_bias
        if decay:  # z = 0, nothing enters
            layer.weight[:HIDDEN] = 0
            layer.bias[:HIDDEN] = 0
    seen, c0 = torch.randn(1, 16385, FEATURES, requires_grad=True), torch.ones(1, HIDDEN, requires_grad=True)
    found = outputs_and_gradients(run_layer, layer, seen, c0, None)
    exact = layer.double()
    in_float64 = [array.detach().double().requires_grad_() for array in (seen, c0)]

    def loop(layer: FastQRNNLayer, seen: Tensor, c0: Tensor, keep: None) -> tuple[Tensor, Tensor]:
        y = F.linear(torch.cat([seen[:, :-1], seen[:, 1:]], dim=2), layer.weight, layer.bias)
        blocks, c, states = y.chunk(len(y[0, 0]) // HIDDEN, dim=2), c0, []
        i = torch.sigmoid(blocks[2] if mode == "ifo" else -blocks[1])
        for f_t, x_t in zip(blocks[1].sigmoid().unbind(1), (i * blocks[0].tanh()).unbind(1), strict=True):
            c = f_t * c + x_t
            states.append(c)
        return torch.stack(states, dim=1) * blocks[-1].sigmoid(), c

    expected = outputs_and_gradients(loop, exact, *in_float64, None)
    h = expected[0]
    for name, mine, theirs in zip(("h", "c", "seen", "c0", "weight", "bias"), found, expected, strict=True):
        bound = 1e-5 if name in ("h", "c") else 2e-5
        assert (mine - theirs).norm() <= bound * theirs.norm(), name
    scale = h.detach().abs().amax(dim=1, keepdim=True)  # of each channel
    assert ((found[0] - h).abs() / scale).max() <= 1e-5


@pytest.mark.parametrize("kernel_size", [1, 2])
@pytest.mark.parametrize("steps", [1, 21])
def test_bfloat16_as_the_plain_layer(steps, kernel_size, small):
    layer = built(kernel_size, dtype=torch.float32)
    seen, c0 = drawn(layer, steps)
    exact = outputs_and_gradients(plain, layer, seen, c0, None)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, theirs = (outputs_and_gradients(run, layer, seen, c0, None) for run in (run_layer, plain))
    assert found[0].dtype == torch.bfloat16 and found[1].dtype == torch.float32
    for mine, other, truth in zip(found, theirs, exact, strict=True):
        assert mine.dtype == other.dtype
        assert (mine - truth).norm() <= 1.5 * (other - truth).norm() + 2**-8 * truth.norm()
    half = FastQRNNLayer(FEATURES, HIDDEN, kernel_size, dtype=torch.bfloat16)
    h, c = run_layer(half, seen.bfloat16(), c0)
    h.sum().backward()
    assert h.dtype == half.weight.grad.dtype == torch.bfloat16 and c.dtype == torch.float32


def test_where_the_plain_layer_takes_over():
    layer = built()
    seen, c0 = drawn(layer, 6)
    expected, _ = plain(layer, seen, c0)

    def run(seen: Tensor) -> Tensor:
        return run_layer(layer, seen, c0, None)[0]

    _, tangent = torch.func.jvp(run, (seen,), (torch.ones_like(seen),))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(seen, torch.ones_like(seen))
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(run(dual)).tangent, tangent)
    jacobian = torch.autograd.functional.jacobian(run, seen)
    torch.testing.assert_close(jacobian.sum((3, 4, 5)), tangent)
    mapped = torch.func.vmap(lambda one: run_layer(layer, one.unsqueeze(0), c0[:1], None)[0])(seen)
    torch.testing.assert_close(mapped[0], expected[:1])
    for method in ("loop", "blocked", "log"):
        other = built(method=method)
        assert not other._is_fast(seen, torch.float64)
    assert not layer._is_fast(seen, torch.float16)
    assert not layer._is_fast(seen.detach().as_subclass(type("Subclass", (Tensor,), {})), torch.float64)
    assert not layer._is_fast(seen[:, :0], torch.float64) and not layer._is_fast(seen[:0], torch.float64)


def test_compiled_and_exported():
    layer = built(dtype=torch.float32)
    x = torch.randn(BATCH, 6, FEATURES)
    expected, _ = layer(x)
    exported = torch.export.export(layer, (x,)).module()
    torch.testing.assert_close(exported(x)[0], expected)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x)[0], expected)


@pytest.mark.parametrize("mode", ["f", "fo", "ifo"])
def test_many_derivatives_at_once(mode):
    """`vectorize=True` maps the backward pass over a batch of gradients, which writes in place cannot be."""
    layer = built(mode=mode)
    seen, c0 = (array.detach() for array in drawn(layer, 5, batch=1))

    def run(seen: Tensor, c0: Tensor) -> Tensor:
        return run_layer(layer, seen, c0, None)[0]

    found = torch.autograd.functional.jacobian(run, (seen, c0), vectorize=True)
    for mine, theirs in zip(found, torch.autograd.functional.jacobian(run, (seen, c0)), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("batched", [False, True])
def test_second_and_many_derivatives_of_a_checkpoint(batched):
    """A checkpoint gives each saved tensor once, and those of its recomputation stand for it."""
    layer = built()
    seen, c0 = drawn(layer, 6)

    def derivatives(run) -> list[Tensor]:
        h = run(seen, c0)
        if batched:
            weights = torch.stack([torch.ones_like(h), h.detach()])
            return list(torch.autograd.grad(h, [seen, c0], weights, is_grads_batched=True))
        first = torch.autograd.grad(h.sin().sum(), [seen, layer.weight], create_graph=True)
        return list(torch.autograd.grad(sum(grad.square().sum() for grad in first), [seen, c0, layer.weight]))

    def run(seen: Tensor, c0: Tensor) -> Tensor:
        return run_layer(layer, seen, c0)[0]

    found = derivatives(lambda *inputs: checkpoint(run, *inputs, use_reentrant=False))
    torch.testing.assert_close(found, derivatives(run), rtol=0, atol=1e-12)


@pytest.mark.parametrize("mode", ["f", "fo", "ifo"])
@pytest.mark.parametrize("steps", [1, 2, 20, 21])
def test_large_steps_go_one_by_one(steps, mode, monkeypatch):
    monkeypatch.setattr(fast, "LOOP_SIZE", 1)
    layer = built(mode=mode)
    assert_same(layer, *drawn(layer, steps))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("steps", [2, 40])
def test_factors_in_the_weight_or_in_the_projection(steps, activation):
    layer = built(activation=activation)
    seen, c0 = drawn(layer, steps)
    rows = len(layer.weight)
    assert (layer.weight.numel() < steps * BATCH * rows) == (steps == 40)  # the fewer numbers of the two
    assert_same(layer, seen, c0)


@pytest.mark.parametrize(("rows", "dtype"), [(192, torch.float32), (1920, torch.float32), (1920, torch.bfloat16)])
@pytest.mark.parametrize(("steps", "batch"), [(1, 1), (513, 8), (128, 32), (31, 5000)])
def test_pieces_cover_all_steps_and_are_even_and_long_enough(steps, batch, rows, dtype, monkeypatch):
    monkeypatch.undo()
    pieces = fast._pieces(steps, batch, rows, dtype)
    assert [step for piece in pieces for step in range(piece.start, piece.stop)] == list(range(steps))
    lengths = [piece.stop - piece.start for piece in pieces]
    size = fast.HALF_PIECE if dtype == torch.bfloat16 else fast.PIECE
    for length in lengths[:-1]:
        assert length % 2 == 0 and (length == 2 or length * batch * rows <= max(size, fast.PIECE_ROWS * rows))
        assert length == 2 or (length + 2) * batch > fast.PIECE_ROWS


@pytest.mark.parametrize("kernel_size", [1, 2, 3, 4])
@pytest.mark.parametrize("steps", [0, 1, 2, 5])
def test_the_window_that_is_left_is_that_of_the_whole(steps, kernel_size):
    layer = built(kernel_size)
    x, before = torch.randn(BATCH, steps, FEATURES).double(), torch.randn(BATCH, 3, FEATURES).double()
    _, state = layer(before)
    _, after = layer(x, state)
    seen = torch.cat([torch.zeros_like(before), before, x], dim=1)
    expected = seen[:, seen.shape[1] - kernel_size + 1 :]
    assert torch.equal(after.window, expected)
    assert after.window.untyped_storage().nbytes() == expected.numel() * 8  # it keeps no more than itself in memory


@pytest.mark.parametrize("kernel_size", [2, 3])
@pytest.mark.parametrize("steps", [1, 2, 3, 30, 31])
def test_gradients_reach_the_window(steps, kernel_size):
    layer = built(kernel_size)
    seen, c0 = drawn(layer, steps)
    x = seen[:, kernel_size - 1 :].detach()
    window = seen[:, : kernel_size - 1].detach().requires_grad_()

    def gradient(run) -> Tensor:
        return torch.autograd.grad(run(layer, torch.cat([window, x], dim=1), c0)[0].sin().sum(), window)[0]

    torch.testing.assert_close(gradient(run_layer), gradient(plain), rtol=0, atol=1e-13)
