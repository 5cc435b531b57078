"""Pooling and the layer against definitions written out here: float64, one step at a time, autograd as it comes."""

import copy
import io
import itertools
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from qrnn_layer import (
    ACTIVATIONS,
    METHODS,
    MODES,
    QRNNLayer,
    QRNNState,
    _cache_sized,
    _cells,
    _FusedCells,
    pool,
    signed_pool,
)

LENGTHS = (1, 2, 3, 31, 32, 33, 127, 1000, 65_536)
FORWARD_BOUND = {"loop": 5e-6, "scan": 5e-6, "blocked": 1e-5, "auto": 1e-5}  # design, section 3
GRADIENT_BOUND = 2e-5
BIASES = torch.linspace(-6, 6, 7)
INF = math.inf

every_method = pytest.mark.parametrize("method", METHODS)
every_mode = pytest.mark.parametrize("mode", MODES)


def oracle(f, x, h0):
    """h_t = f_t h_{t-1} + x_t in float64. f, x: (B, T, H), h0: (B, H)."""
    f, x, h, steps = f.double(), x.double(), h0.double(), []
    for f_t, x_t in zip(f.unbind(1), x.unbind(1), strict=True):
        h = f_t * h + x_t
        steps.append(h)
    return torch.stack(steps, 1)


def make(time, *, batch=2, bias=BIASES, seed=0, dtype=torch.float32):
    """log_f, log_x as a layer makes them, one gate bias a channel, z of both signs and h0 of both signs."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    a = draw(batch, time, len(bias)) + bias
    log_x = F.logsigmoid(-a) + F.softplus(draw(batch, time, len(bias))).log()
    return [array.to(dtype) for array in (F.logsigmoid(a), log_x, draw(batch, time, len(bias)), draw(batch, len(bias)))]


def forward_error(h, log_f, x, h0):
    """Largest error relative to the pooling of magnitudes, which is h itself if everything is positive."""
    f = log_f.double().exp()
    scale = oracle(f, x.abs(), h0.abs())
    error = (h.double() - oracle(f, x, h0)).abs()
    assert h.isfinite().all()
    tiny = scale < 1e-30  # float32 has no digits left for these
    assert (error[tiny] < 1e-30).all()
    return (error / scale)[~tiny].max().item() if not tiny.all() else 0.0


def bound(method, log_f, *log_x):
    """The documented bound; that of "log" depends on its input."""
    eps = torch.finfo(log_f.dtype).eps
    if method == "log":
        c = log_f.clamp(min=math.log(torch.finfo(log_f.dtype).tiny)).double().cumsum(1)
        sizes = [array[array.isfinite()].abs() for array in log_x]
        largest = c.abs().max().item() + sum(size.max().item() for size in sizes if len(size))
        return 4 * eps * (1 + math.log(log_f.shape[1]) + largest)
    return FORWARD_BOUND[method] if log_f.dtype == torch.float32 else 1e-11


def relative(got, want):
    """Relative L2 error; 0 wanted must be 0."""
    return ((got.double() - want).norm() / want.norm().clamp(min=1e-30)).item()


def gradients(function, arguments, weights):
    leaves = [argument.detach().clone().requires_grad_() for argument in arguments]
    return torch.autograd.grad((function(*leaves) * weights).sum(), leaves)


# --- pooling: values -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("time", LENGTHS)
@pytest.mark.parametrize("method", ("auto", *METHODS))
def test_forward_error_is_within_the_bound(method, time):
    log_f, log_x, _, h0 = make(time)
    h = pool(log_f, log_x, h0, method=method)
    assert h.dtype == torch.float32
    assert forward_error(h, log_f, log_x.double().exp(), h0) < bound(method, log_f, log_x)


@pytest.mark.parametrize("time", (1, 33, 1000))
@pytest.mark.parametrize("method", ("auto", *METHODS))
def test_signed_forward_error_is_within_the_bound(method, time):
    log_f, _, z, h0 = make(time)
    log_i = make(time, seed=1)[0]
    h = signed_pool(log_f, log_i, z, h0, method=method)
    x = log_i.double().exp() * z
    assert forward_error(h, log_f, x, h0) < bound(method, log_f, x.abs().log())


@pytest.mark.parametrize("time", (3, 127, 65_536))
@every_method
def test_float64_error_is_below_1e_11(method, time):
    log_f, log_x, _, h0 = make(time, dtype=torch.float64)
    error = forward_error(pool(log_f, log_x, h0, method=method), log_f, log_x.exp(), h0)
    assert error < bound(method, log_f, log_x)
    if method == "log" and time < 65_536:  # at 65,536 steps and a bias of -6, eps |c_t| alone is 9e-11
        assert error < 1e-11


@pytest.mark.parametrize("share", (0.01, 0.1, 0.5, 1.0))
@pytest.mark.parametrize("what", ("log_f", "log_x", "both", "saturated"))
@every_method
def test_resets_missing_inputs_and_saturated_gates(method, what, share):
    log_f, log_x, z, h0 = make(300)
    chosen = torch.rand(log_f.shape, generator=torch.Generator().manual_seed(1)) < share
    if what in ("log_f", "both"):
        log_f = log_f.masked_fill(chosen, -INF)
    if what in ("log_x", "both"):
        log_x = log_x.masked_fill(chosen, -INF)
    if what == "saturated":
        gate = torch.where(z > 0, 300.0, -300.0)
        log_f = torch.where(chosen, F.logsigmoid(gate), log_f)
        log_x = torch.where(chosen, F.logsigmoid(-gate), log_x)
    h = pool(log_f, log_x, h0, method=method)
    assert forward_error(h, log_f, log_x.double().exp(), h0) < bound(method, log_f, log_x)

    weights = torch.randn(h.shape, generator=torch.Generator().manual_seed(2))
    got = gradients(lambda *a: pool(*a, method=method), (log_f, log_x, h0), weights)
    want = gradients(
        lambda f, x, h: oracle(f.exp(), x.exp(), h), [a.double() for a in (log_f, log_x, h0)], weights.double()
    )
    for name, g, w in zip(("log_f", "log_x", "h0"), got, want, strict=True):
        assert g.isfinite().all(), name
        if method != "log":
            assert relative(g, w) < GRADIENT_BOUND, name


@pytest.mark.parametrize("method", ("loop", "blocked", "scan"))
def test_a_hard_reset_forgets_even_huge_states(method):
    log_f, log_x = torch.zeros(1, 100, 1), torch.zeros(1, 100, 1)
    log_f[:, 50], log_x[:, 49] = -INF, 80.0
    h = pool(log_f, log_x, method=method)
    torch.testing.assert_close(h[0, 50:, 0], torch.arange(1.0, 51.0), rtol=1e-6, atol=0)


@every_method
def test_without_h0_it_starts_from_zeros(method):
    log_f, log_x, _, h0 = make(9)
    assert torch.equal(pool(log_f, log_x, method=method), pool(log_f, log_x, torch.zeros_like(h0), method=method))


@pytest.mark.parametrize("shape", ((0, 5, 3), (2, 5, 0), (1, 5, 1), (2, 0, 3), (0, 0, 0)))
@every_method
def test_empty_and_single_dimensions(method, shape):
    log_f = -torch.rand(shape, generator=torch.Generator().manual_seed(0))
    h0 = torch.ones(shape[0], shape[2])
    h = pool(log_f, log_f, h0, method=method)
    assert h.shape == shape
    for argument, gradient in zip(
        (log_f, log_f, h0), gradients(lambda *a: pool(*a, method=method), (log_f, log_f, h0), 1), strict=True
    ):
        assert gradient.shape == argument.shape
    if shape == (1, 5, 1):
        torch.testing.assert_close(h.double(), oracle(log_f.exp(), log_f.exp(), h0), rtol=1e-5, atol=0)


@pytest.mark.parametrize("block_size", (1, 2, 7, 64, 1000))
def test_block_size_does_not_matter(block_size):
    log_f, log_x, _, h0 = make(100)
    h = pool(log_f, log_x, h0, method="blocked", block_size=block_size)
    assert forward_error(h, log_f, log_x.double().exp(), h0) < FORWARD_BOUND["blocked"]


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@every_method
def test_half_precision_is_pooled_in_float32(method, dtype):
    log_f, log_x, z, h0 = make(512, dtype=dtype)
    h = pool(log_f, log_x, h0, method=method)
    assert h.dtype == dtype
    in_float32 = pool(log_f.float(), log_x.float(), h0.float(), method=method)
    assert torch.equal(h, in_float32.to(dtype))
    assert torch.equal(
        signed_pool(log_f, log_f, z, h0, method=method),
        signed_pool(log_f.float(), log_f.float(), z.float(), h0.float(), method=method).to(dtype),
    )


@every_method
def test_autocast_changes_nothing(method):
    log_f, log_x, _, h0 = make(512)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = pool(log_f, log_x, h0, method=method)
    assert torch.equal(inside, pool(log_f, log_x, h0, method=method))


@every_method
def test_any_layout_of_memory(method):
    log_f, log_x, _, h0 = make(50)
    want = pool(log_f, log_x, h0, method=method)
    got = pool(log_f.mT.contiguous().mT, log_x.transpose(0, 1).contiguous().transpose(0, 1), h0, method=method)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
    row = log_f[:, :1].expand_as(log_f)
    torch.testing.assert_close(pool(row, row, h0, method=method), pool(row.clone(), row.clone(), h0, method=method))


class _CountOperations(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("method", "per_level"), (("log", 0), ("blocked", 40), ("scan", 40)))
def test_no_loop_over_time(method, per_level):
    """64 times as many steps are 6 more levels, not more operations a step, forward and backward."""

    def count(time):
        log_f, log_x, _, h0 = make(time, batch=1, bias=torch.zeros(1))
        with _CountOperations() as counter:
            gradients(lambda *a: pool(*a, method=method), (log_f, log_x, h0), torch.ones(1, time, 1))
        return counter.count

    assert count(64 * 512) - count(512) <= 2 * 6 * per_level


# --- pooling: derivatives --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("time", LENGTHS)
@pytest.mark.parametrize("method", ("auto", "loop", "blocked", "scan"))
def test_gradient_error_is_within_the_bound(method, time, oracle_gradients):
    log_f, log_x, _, h0 = make(time)
    weights = torch.randn(log_f.shape, generator=torch.Generator().manual_seed(3))
    got = gradients(lambda *a: pool(*a, method=method), (log_f, log_x, h0), weights)
    for name, g, w in zip(("log_f", "log_x", "h0"), got, oracle_gradients(time), strict=True):
        assert relative(g, w) < GRADIENT_BOUND, name


@pytest.fixture(scope="module")
def oracle_gradients():
    """By autograd through the definition in float64, once for each length."""
    cache = {}

    def compute(time):
        if time not in cache:
            log_f, log_x, _, h0 = make(time)
            weights = torch.randn(log_f.shape, generator=torch.Generator().manual_seed(3)).double()
            arguments = [array.double() for array in (log_f, log_x, h0)]
            cache[time] = gradients(lambda f, x, h: oracle(f.exp(), x.exp(), h), arguments, weights)
        return cache[time]

    return compute


def test_log_gradient_beats_autograd_through_the_logs():
    """The reason for the derived backward pass: at T = 2048 autograd through the closed form loses its digits."""
    log_f, log_x, _, h0 = make(2048, bias=torch.tensor([-4.0]))
    weights = torch.randn(log_f.shape, generator=torch.Generator().manual_seed(3))

    def through_the_logs(log_f, log_x, h0):
        c = log_f.cumsum(1)
        return (c + (log_x - c).logcumsumexp(1)).exp() + c.exp() * h0.unsqueeze(1)

    doubles = [array.double() for array in (log_f, log_x, h0)]
    want = gradients(lambda f, x, h: oracle(f.exp(), x.exp(), h), doubles, weights.double())[0]
    naive = gradients(through_the_logs, (log_f, log_x, h0), weights)[0]
    derived = gradients(lambda *a: pool(*a, method="log"), (log_f, log_x, h0), weights)[0]
    assert relative(naive, want) > 0.1 > 0.01 > relative(derived, want)


@every_method
def test_derivatives_of_first_and_second_order(method):
    log_f, log_x, z, h0 = make(7, bias=torch.tensor([-1.0, 0.0, 1.0]), dtype=torch.float64)
    arguments = [array.requires_grad_() for array in (log_f, log_x, h0)]

    def positive(*a):
        return pool(*a, method=method, block_size=3)

    def signed(*a):
        return signed_pool(*a, method=method, block_size=3)

    assert torch.autograd.gradcheck(positive, arguments, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(positive, arguments, check_fwd_over_rev=True)
    arguments = [log_f, log_x.detach().requires_grad_(), z.requires_grad_(), h0]
    assert torch.autograd.gradcheck(signed, arguments, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(signed, arguments)


@every_method
def test_function_transforms(method):
    log_f, log_x, _, h0 = make(6, dtype=torch.float64)

    def f(*a):
        return pool(*a, method=method, block_size=4)

    stacked = [torch.stack([a, 0.5 * a, 0.1 * a], dim=1) for a in (log_f, log_x, h0)]
    for mapped in itertools.product((None, 1), repeat=3):
        if mapped == (None, None, None):
            continue
        arguments = [s if dim else a for s, a, dim in zip(stacked, (log_f, log_x, h0), mapped, strict=True)]
        got = torch.func.vmap(f, in_dims=mapped)(*arguments)
        for k in range(3):
            want = f(*(a[:, k] if dim else a for a, dim in zip(arguments, mapped, strict=True)))
            torch.testing.assert_close(got[k], want)
    reverse = torch.func.jacrev(f, argnums=(0, 1, 2))(log_f, log_x, h0)  # vmap over the backward pass
    forward = torch.func.jacfwd(f, argnums=(0, 1, 2))(log_f, log_x, h0)  # vmap over the forward-mode derivative
    for r, g in zip(reverse, forward, strict=True):
        torch.testing.assert_close(r, g)


@every_method
def test_gradients_of_expanded_and_strided_outputs(method):
    arguments = make(40)[:2]
    by_sum = gradients(lambda *a: pool(*a, method=method).transpose(0, 2), arguments, torch.ones(()).expand(7, 40, 2))
    by_weights = gradients(lambda *a: pool(*a, method=method), arguments, torch.ones(2, 40, 7))
    for expanded, dense in zip(by_sum, by_weights, strict=True):
        torch.testing.assert_close(expanded, dense, rtol=1e-5, atol=1e-6)


@every_method
def test_compiles_without_a_graph_break(method):
    torch._dynamo.reset()
    log_f, log_x, z, h0 = make(37)
    weights = torch.randn(log_f.shape, generator=torch.Generator().manual_seed(3))

    def f(log_f, log_x, z, h0):
        return pool(log_f, log_x, h0, method=method) + signed_pool(log_f, log_x.clamp(max=0), z, h0, method=method)

    compiled = torch.compile(f, fullgraph=True, backend="inductor" if method == "scan" else "aot_eager")
    got = gradients(compiled, (log_f, log_x, z, h0), weights)
    for g, w in zip(got, gradients(f, (log_f, log_x, z, h0), weights), strict=True):
        assert relative(g, w.double()) < (1e-4 if method == "log" else GRADIENT_BOUND)


# --- pooling: properties ---------------------------------------------------------------------------------------------


@st.composite
def problems(draw):
    """Small poolings with gates of exactly 0 and 1, missing inputs and any h0."""
    batch, time, channels = draw(st.integers(1, 3)), draw(st.integers(1, 70)), draw(st.integers(1, 3))
    numbers = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scale = draw(st.sampled_from((0.01, 1.0, 10.0, 60.0)))

    def sprinkle(array):  # exact zeros and -inf at random places
        u = torch.rand(array.shape, generator=numbers)
        return array.masked_fill(u < 0.1, -INF).masked_fill(u > 0.9, 0.0)

    log_f = sprinkle(-scale * torch.rand(batch, time, channels, generator=numbers))
    log_x = sprinkle(torch.randn(batch, time, channels, generator=numbers))
    return log_f, log_x, 3 * torch.randn(batch, channels, generator=numbers)


@settings(deadline=None, max_examples=60)
@given(problems(), st.sampled_from(METHODS), st.integers(1, 80))
def test_any_legal_input_is_within_the_bound(problem, method, block_size):
    log_f, log_x, h0 = problem
    h = pool(log_f, log_x, h0, method=method, block_size=block_size, check=True)
    assert forward_error(h, log_f, log_x.double().exp(), h0) <= bound(method, log_f, log_x)


@settings(deadline=None, max_examples=40)
@given(problems(), st.sampled_from(METHODS), st.data())
def test_pieces_with_carried_state_are_the_whole(problem, method, data):
    log_f, log_x, h0 = problem
    cut = data.draw(st.integers(0, log_f.shape[1]))
    first = pool(log_f[:, :cut], log_x[:, :cut], h0, method=method)
    second = pool(log_f[:, cut:], log_x[:, cut:], first[:, -1] if cut else h0, method=method)
    pieces = torch.cat([first, second], dim=1)
    assert forward_error(pieces, log_f, log_x.double().exp(), h0) <= 2 * bound(method, log_f, log_x)


@settings(deadline=None, max_examples=40)
@given(problems(), st.sampled_from(METHODS), st.data())
def test_the_past_does_not_see_the_future(problem, method, data):
    log_f, log_x, h0 = problem
    time = data.draw(st.integers(0, log_f.shape[1] - 1))
    changed_f, changed_x = log_f.clone(), log_x.clone()
    changed_f[:, time:], changed_x[:, time:] = -0.3, 0.7
    before, after = (pool(f, x, h0, method=method) for f, x in ((log_f, log_x), (changed_f, changed_x)))
    assert torch.equal(before[:, :time], after[:, :time])


# --- pooling: errors -------------------------------------------------------------------------------------------------

GOOD = torch.zeros(2, 5, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    (
        (lambda: pool(GOOD[0], GOOD), r"log_f: shape \(5, 3\) given, three dimensions"),
        (lambda: pool(GOOD, GOOD[:, :4]), r"log_x: shape \(2, 4, 3\) given, \(B, T, H\) = \(2, 5, 3\) expected"),
        (lambda: pool(GOOD, GOOD, GOOD[:, 0, :2]), r"h0: shape \(2, 2\) given, \(B, H\) = \(2, 3\) expected"),
        (lambda: pool(GOOD, GOOD.double()), r"log_x: dtype torch.float64 given, torch.float32 expected"),
        (lambda: pool(GOOD.long(), GOOD.long()), "log_f: dtype torch.int64 given, a floating dtype expected"),
        (lambda: pool(GOOD, GOOD.to("meta")), r"log_x: device meta given, cpu expected"),
        (lambda: pool(GOOD, GOOD, method="fast"), r"method: 'fast' given, one of 'auto', 'loop'"),
        (lambda: pool(GOOD, GOOD, block_size=0), r"block_size: 0 given, a whole number of at least 1"),
        (lambda: pool(GOOD + 1, GOOD, check=True), r"log_f: 1.0 given at \(0, 0, 0\), numbers <= 0 or -inf"),
        (lambda: pool(GOOD, GOOD * math.nan, check=True), r"log_x: nan given at \(0, 0, 0\)"),
        (lambda: pool(GOOD, GOOD, GOOD[:, 0] - INF, check=True), r"h0: -inf given at \(0, 0\), numbers expected"),
        (lambda: signed_pool(GOOD, GOOD, GOOD[:1]), r"z: shape \(1, 5, 3\) given"),
        (lambda: signed_pool(GOOD, GOOD + 1, GOOD, check=True), r"log_i: 1.0 given"),
    ),
)
def test_pool_errors_say_what_was_given_and_expected(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_legal_values_pass_the_check():
    pool(GOOD - INF, GOOD - INF, check=True)
    signed_pool(GOOD, GOOD - INF, GOOD - 3, GOOD[:, 0] - 2, check=True)


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
        c = f * c + (blocks[2].sigmoid() if layer.mode == "ifo" else 1 - f) * z
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
@pytest.mark.parametrize("activation", ("softplus", "tanh"))
def test_method_does_not_matter(method, activation):
    torch.manual_seed(0)
    layer = QRNNLayer(4, 6, mode="ifo", activation=activation, method=method)
    x = torch.randn(3, 40, 4)
    torch.testing.assert_close(layer(x)[0].double(), reference_layer(layer, x)[0], rtol=1e-4, atol=1e-5)


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


def test_zoneout_of_one_freezes_the_state():
    layer = QRNNLayer(4, 6, zoneout=1.0)
    state = QRNNState(torch.randn(3, 6), torch.zeros(3, 1, 4))
    assert torch.equal(layer(torch.randn(3, 9, 4), state)[1].c, state.c)


# --- the layer: padded batches ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", (False, True))
@pytest.mark.parametrize("kernel_size", (1, 2, 5))
@pytest.mark.parametrize("method", METHODS)
@every_mode
def test_padding_is_never_seen(mode, method, kernel_size, training):
    torch.manual_seed(0)
    layer = QRNNLayer(4, 6, kernel_size, mode, method=method).train(training).double()
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


def test_forget_bias_is_added_to_the_forget_gate_only():
    layer = QRNNLayer(4, 6, mode="ifo")
    torch.manual_seed(0)
    layer.reset_parameters()
    plain = layer.bias.detach().clone()
    torch.manual_seed(0)
    layer.reset_parameters(forget_bias=2.0)
    torch.testing.assert_close(layer.bias - plain, torch.tensor([0.0] * 6 + [2.0] * 6 + [0.0] * 12))


def test_a_size_that_is_no_whole_number_is_a_type_error():
    with pytest.raises(TypeError, match=r"hidden_size: 2.5 given, a whole number expected"):
        QRNNLayer(4, 2.5)


def test_repr_names_what_was_chosen():
    assert "4, 6, kernel_size=2, mode='fo', zoneout=0.0" in repr(QRNNLayer(4, 6))


def test_a_centred_layer_sees_as_far_ahead_as_behind_and_no_padding():
    torch.manual_seed(0)
    layer = QRNNLayer(4, 6, kernel_size=6, causal=False).double()  # t - 3 ... t + 2
    x = torch.randn(2, 12, 4, dtype=torch.float64)
    changed = x.clone()
    changed[:, 7] += 1
    assert torch.equal(layer(x)[0][:, :5], layer(changed)[0][:, :5])
    assert not torch.equal(layer(x)[0][:, 5], layer(changed)[0][:, 5])

    bias = layer.bias.view(3, 6)
    padded = torch.nn.functional.pad(x, (0, 0, 3, 2))
    z, f, o = (  # the definition, tap by tap
        bias[block] + sum(padded[:, k : k + 12] @ layer.weight.view(3, 6, 6, 4)[block, :, k].T for k in range(6))
        for block in range(3)
    )
    want = torch.sigmoid(o) * signed_pool(
        torch.nn.functional.logsigmoid(f), torch.nn.functional.logsigmoid(-f), torch.nn.functional.softplus(z)
    )
    torch.testing.assert_close(layer(x)[0], want)

    padded, lengths = x.clone(), [12, 7]
    padded[1, 7:] = torch.nan
    h, state = layer(padded, lengths=lengths)
    alone, state_alone = layer(x[1:, :7])
    torch.testing.assert_close(h[1:, :7], alone)
    torch.testing.assert_close(state.c[1:], state_alone.c)


@every_mode
def test_a_condition_is_added_at_every_step_as_a_bias_of_each_sequence(mode):
    torch.manual_seed(0)
    layer = QRNNLayer(4, 6, mode=mode)
    x, condition = torch.randn(2, 9, 4), torch.randn(2, len(layer.weight))
    got, _ = layer(x, condition=condition)
    for row in range(2):
        told = copy.deepcopy(layer)
        with torch.no_grad():
            told.bias += condition[row]
        torch.testing.assert_close(got[row : row + 1], told(x[row : row + 1])[0])


@every_mode
def test_cells_are_the_output_before_its_gate(mode):
    torch.manual_seed(0)
    layer = QRNNLayer(4, 6, mode=mode)
    x, lengths = torch.randn(2, 9, 4), [9, 3]
    h, state = layer(x, lengths=lengths)
    c, o, state_of_cells = layer.cells(x, lengths=lengths)
    torch.testing.assert_close(h, c if mode == "f" else o * c)
    torch.testing.assert_close(state.c, state_of_cells.c)
    assert torch.equal(state_of_cells.c[1], c[1, 2])


@pytest.mark.parametrize("keeps", (False, True))
@pytest.mark.parametrize("activation", ACTIVATIONS)
@every_mode
def test_the_fused_form_is_its_definition_with_all_derivatives(mode, activation, keeps):
    torch.manual_seed(0)
    shape = 3, 7, 2
    projection = torch.randn(*shape[:2], MODES[mode] * shape[2], dtype=torch.float64, requires_grad=True)
    c0 = torch.randn(shape[0], shape[2], dtype=torch.float64, requires_grad=True)
    keep = torch.rand(shape) < 0.3 if keeps else None

    def fused(projection, c0):
        c, h = _FusedCells.apply(projection, c0, keep, mode, activation)
        return c if h is None else torch.stack([c, h])

    def definition(projection, c0):
        c, o = _cells(projection, c0, keep, mode, activation, "loop")
        return c if o is None else torch.stack([c, o * c])

    torch.testing.assert_close(fused(projection, c0), definition(projection, c0))
    weights = torch.randn_like(fused(projection, c0))
    for got, want in zip(
        torch.autograd.grad(fused(projection, c0), (projection, c0), weights),
        torch.autograd.grad(definition(projection, c0), (projection, c0), weights),
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-13)
    assert torch.autograd.gradgradcheck(fused, (projection, c0))


def test_the_fused_form_takes_the_batch_in_pieces_and_any_gradient():
    torch.manual_seed(0)
    projection = torch.randn(5, 300, 3 * 600, requires_grad=True)  # more than fits a piece
    assert len(_cache_sized(projection[:, :, :600])) > 1
    c0 = torch.randn(5, 600)
    got_c, got_h = _FusedCells.apply(projection, c0, None, "fo", "tanh")
    c, o = _cells(projection, c0, None, "fo", "tanh", "scan")
    for got, want in ((got_h, o * c), (got_c, c), (got_c + got_h, c + o * c)):
        got, want = (torch.autograd.grad(array.sum(), projection, retain_graph=True)[0] for array in (got, want))
        torch.testing.assert_close(
            got, want
        )  # gradients of one output, of the other, of both; expanded ones, as of sum


@pytest.mark.parametrize("causal", (True, False))
@pytest.mark.parametrize("kernel_size", (1, 2, 5))
def test_large_inference_convolves_and_is_what_training_computes(kernel_size, causal):
    torch.manual_seed(0)
    layer = QRNNLayer(16, 6, kernel_size, causal=causal)
    for shape in ((30, 20, 16), (1, 600, 16), (600, 1, 16)):
        x = torch.randn(shape)
        trained, _ = layer(x)
        with torch.no_grad():
            inferred, _ = layer(x)
        torch.testing.assert_close(inferred, trained)


def test_the_state_of_chosen_sequences_continues_them():
    torch.manual_seed(0)
    layer = QRNNLayer(4, 6, kernel_size=3)
    x, index = torch.randn(3, 9, 4), torch.tensor([2, 2, 0])
    _, state = layer(x[:, :5])
    got, _ = layer(x[index, 5:], state.index_select(index))
    torch.testing.assert_close(got, layer(x)[0][index, 5:])


# --- the layer: errors -----------------------------------------------------------------------------------------------

X = torch.zeros(2, 5, 4)
STATE = QRNNState(torch.zeros(2, 6), torch.zeros(2, 1, 4))


@pytest.mark.parametrize(
    ("call", "message"),
    (
        (lambda: QRNNLayer(0, 6), "input_size: 0 given"),
        (lambda: QRNNLayer(4, 6, 0), "kernel_size: 0 given"),
        (lambda: QRNNLayer(4, 6, mode="of"), "mode: 'of' given, one of 'f', 'fo', 'ifo' expected"),
        (lambda: QRNNLayer(4, 6, activation="gelu"), "activation: 'gelu' given, one of 'softplus'"),
        (lambda: QRNNLayer(4, 6, method="cuda"), "method: 'cuda' given"),
        (lambda: QRNNLayer(4, 6, zoneout=1.5), "zoneout: 1.5 given, a probability"),
        (lambda: QRNNLayer(4, 6, bias=False).reset_parameters(1.0), "forget_bias: 1.0 given"),
        (lambda: QRNNLayer(4, 6)(X[0]), r"x: shape \(5, 4\) given, \(B, T, 4\) expected"),
        (lambda: QRNNLayer(4, 6)(X[:, :, :3]), r"x: shape \(2, 5, 3\) given, \(B, T, 4\) expected"),
        (lambda: QRNNLayer(4, 6)(X.double()), "x: dtype torch.float64 given, torch.float32 expected"),
        (lambda: QRNNLayer(4, 6)(X.to("meta")), "x: device meta given, cpu expected"),
        (lambda: QRNNLayer(4, 6, causal=False)(X, STATE), "state: given to a layer with causal=False"),
        (lambda: QRNNLayer(4, 6)(X, condition=X[:, 0]), r"condition: shape \(2, 4\) given, \(2, 18\) expected"),
        (lambda: QRNNLayer(4, 6)(X[:1], STATE), r"state.c: shape \(2, 6\) given, \(1, 6\) expected"),
        (lambda: QRNNLayer(4, 6, 3)(X, STATE), r"state.window: shape \(2, 1, 4\) given, \(2, 2, 4\) expected"),
        (lambda: QRNNLayer(4, 6)(X, QRNNState(STATE.c.double(), STATE.window)), "state.c: dtype torch.float64"),
        (lambda: QRNNLayer(4, 6)(X, torch.zeros(2, 6)), "state: Tensor of length 2 given, QRNNState"),
        (lambda: QRNNLayer(4, 6)(X, lengths=[5]), r"lengths: shape \(1,\)"),
        (lambda: QRNNLayer(4, 6)(X, lengths=[5, 6]), r"lengths: \[5, 6\] given, numbers from 0 to T = 5"),
        (lambda: QRNNLayer(4, 6)(X, lengths=[5, -1]), r"lengths: \[5, -1\] given"),
        (lambda: QRNNLayer(4, 6)(X, lengths=torch.tensor([5.0, 2.0])), "lengths: .*torch.float32 given"),
    ),
)
def test_layer_errors_say_what_was_given_and_expected(call, message):
    with pytest.raises(ValueError, match=message):
        call()
