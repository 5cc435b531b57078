"""Pooling against definitions written out here: float64, one step at a time, autograd as it comes."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from qrnn import QRNN
from qrnn_layer import METHODS, MODES, pool, signed_pool

LENGTHS = (1, 2, 3, 31, 32, 33, 127, 1000, 65_536)
FORWARD_BOUND = {"loop": 5e-6, "scan": 5e-6, "blocked": 1e-5, "auto": 5e-6}  # of `pool`
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


def outputs(method):
    """Functions of one number t whose second and third derivatives go through a pooling or a whole QRNN."""
    log_f, log_x, z, h0 = make(5, dtype=torch.float64)
    lines = make(5, dtype=torch.float64, seed=1)  # where the arguments go as t grows
    rnn = QRNN(7, 4, num_layers=2, first_kernel_size=2, method=method, dtype=torch.float64)
    yield lambda t: pool(log_f - t * lines[0].square(), log_x + t * lines[1], h0 + t * lines[3], method=method)
    yield lambda t: signed_pool(
        log_f, log_f - t * lines[0].square(), z + t * lines[2], h0 + t * lines[3], method=method
    )
    yield lambda t: rnn(z + t * lines[2])[0]


@every_method
def test_forward_derivatives_of_forward_derivatives(method):
    """The reference is a numerical difference: nothing that differentiates a Function of our own."""
    step, zero, one = 3e-4, torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
    for output in outputs(method):

        def loss(t, output=output):
            return output(t).sin().sum()

        def derivative(function):
            return lambda t: torch.func.jvp(function, (t,), (one,))[1]

        *values, value = (loss(zero + n * step) for n in (-2, -1, 1, 2, 0))
        second = (values[1] + values[2] - 2 * value) / step**2
        third = (values[3] - 2 * values[2] + 2 * values[1] - values[0]) / (2 * step**3)
        assert derivative(derivative(loss))(zero).item() == pytest.approx(second.item(), rel=1e-3)
        jacfwd, grad = torch.func.jacfwd, torch.func.grad
        assert jacfwd(jacfwd(loss))(zero).item() == pytest.approx(second.item(), rel=1e-3)
        for orders in itertools.product((derivative, grad), repeat=3):
            function = loss
            for order in orders:
                function = order(function)
            assert function(zero).item() == pytest.approx(third.item(), rel=1e-2), orders


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


# --- pooling: gates that hardly forget, and all others ----------------------------------------------------------------

GATES = (-1e-8, -1e-6, -1e-4, -1e-2, -1.0, -6.0, -87.0)


@pytest.mark.parametrize("random", (False, True))
@pytest.mark.parametrize("time", (1024, 65_536))
@pytest.mark.parametrize("method", ("auto", "scan", "blocked"))
def test_the_bound_holds_however_little_the_gates_forget(method, time, random):
    """A plain gate in float32 has lost the digits of 1 - f: with it these are off by up to 1e-3."""
    generator = torch.Generator().manual_seed(time)
    log_f = torch.tensor(GATES, dtype=torch.float64).expand(1, time, -1)
    if random:
        log_f = log_f * 2 * torch.rand(log_f.shape, generator=generator, dtype=torch.float64)
    log_f = log_f.float()
    decay = torch.full_like(log_f, -INF)
    average = (-torch.expm1(log_f.double())).log().float()  # 1 - f enters: h is an average of ones
    for log_x, h0 in ((decay, torch.ones(1, len(GATES))), (average, None)):
        h = pool(log_f, log_x, h0, method=method)
        want = oracle(log_f.double().exp(), log_x.double().exp(), h0 if h0 is not None else torch.zeros(1, len(GATES)))
        seen = want.abs() > 1e-30  # smaller numbers have few digits in float32
        assert ((h - want).abs() / want.abs())[seen].max() < FORWARD_BOUND[method]

    arrays = [log_f.requires_grad_(), torch.zeros_like(log_f, requires_grad=True)]
    weights = torch.rand(log_f.shape, generator=generator)
    got = torch.autograd.grad((pool(*arrays, method=method) * weights).sum(), arrays)
    doubles = [array.detach().double().requires_grad_() for array in arrays]
    want = torch.autograd.grad((pool(*doubles, method="blocked") * weights.double()).sum(), doubles)
    for name, ours, theirs in zip(("log_f", "log_x"), got, want, strict=True):
        for channel in range(len(GATES) - 1):  # where gates are 0, so is the gradient
            assert relative(ours[..., channel], theirs[..., channel]) < GRADIENT_BOUND, (name, GATES[channel])


@every_method
def test_many_derivatives_at_once(method):
    """`vectorize=True` and `is_grads_batched=True` map the backward pass over a batch of gradients."""
    torch.manual_seed(0)
    log_f, log_x = -torch.rand(1, 5, 2, dtype=torch.float64), torch.randn(1, 5, 2, dtype=torch.float64)

    def run(log_f, log_x):
        return pool(log_f, log_x, method=method)

    for got, want in zip(
        torch.autograd.functional.jacobian(run, (log_f, log_x), vectorize=True),
        torch.autograd.functional.jacobian(run, (log_f, log_x)),
        strict=True,
    ):
        torch.testing.assert_close(got, want)
    got, want = (
        torch.autograd.functional.hessian(lambda log_f: run(log_f, log_x).square().sum(), log_f, vectorize=vectorize)
        for vectorize in (True, False)
    )
    torch.testing.assert_close(got, want)


def test_what_underflows_on_the_way_is_lost_in_the_scan_and_kept_by_the_logs():
    log_f, log_x = torch.full((1, 8, 1), math.log(3e-12)), torch.full((1, 8, 1), -INF)
    log_x[:, 3] = math.log(1e36)
    got = {method: pool(log_f, log_x, method=method)[0, -1].item() for method in METHODS}
    assert got["scan"] == 0
    assert got["blocked"] == pytest.approx(8.1e-11, rel=1e-4) and got["log"] == pytest.approx(8.1e-11, rel=1e-3)


# --- pooling: errors -------------------------------------------------------------------------------------------------

GOOD = torch.zeros(2, 5, 3)


@pytest.mark.parametrize(
    ("call", "parts"),
    (
        (lambda: pool(GOOD[0], GOOD), ("log_f", "(5, 3)", "(B, T, H)")),
        (lambda: pool(GOOD, GOOD[:, :4]), ("log_x", "(2, 4, 3)", "(2, 5, 3)")),
        (lambda: pool(GOOD, GOOD, GOOD[:, 0, :2]), ("h0", "(2, 2)", "(2, 3)")),
        (lambda: pool(GOOD, GOOD.double()), ("log_x", "torch.float64", "torch.float32")),
        (lambda: pool(GOOD.long(), GOOD.long()), ("log_f", "torch.int64", "floating")),
        (lambda: pool(GOOD, GOOD.to("meta")), ("log_x", "meta", "cpu")),
        (lambda: pool(GOOD, GOOD, method="fast"), ("method", "'fast'", "blocked")),
        (lambda: pool(GOOD, GOOD, block_size=0), ("block_size", "0")),
        (lambda: pool(GOOD + 1, GOOD, check=True), ("log_f", "1.0", "(0, 0, 0)")),
        (lambda: pool(GOOD, GOOD * math.nan, check=True), ("log_x", "nan", "(0, 0, 0)")),
        (lambda: pool(GOOD, GOOD + 90, check=True), ("log_x", "90.0", "(0, 0, 0)", "finite exp")),
        (lambda: pool(GOOD, GOOD, GOOD[:, 0] - INF, check=True), ("h0", "-inf", "(0, 0)", "finite")),
        (lambda: signed_pool(GOOD, GOOD, GOOD - INF, check=True), ("z", "-inf", "(0, 0, 0)", "finite")),
        (lambda: signed_pool(GOOD, GOOD, GOOD[:1]), ("z", "(1, 5, 3)", "(2, 5, 3)")),
        (lambda: signed_pool(GOOD, GOOD + 1, GOOD, check=True), ("log_i", "1.0")),
    ),
)
def test_pool_errors_name_the_argument_and_what_was_given(call, parts):
    with pytest.raises(ValueError) as caught:
        call()
    assert all(part in str(caught.value) for part in parts), caught.value


NESTED = torch.nested.nested_tensor([GOOD[0]], layout=torch.jagged)
NO_TENSORS = ([[0.0]], 0.5, None, "a", GOOD.numpy(), GOOD.to_sparse(), NESTED)


@pytest.mark.parametrize("wrong", NO_TENSORS, ids=lambda wrong: type(wrong).__name__)
@pytest.mark.parametrize("name", ("log_f", "log_i", "z", "h0"))
def test_what_is_no_dense_tensor_is_a_type_error(name, wrong):
    arguments = {"log_f": GOOD, "log_i": GOOD, "z": GOOD, "h0": GOOD[:, 0]} | {name: wrong}
    if wrong is None and name == "h0":
        return  # the default
    with pytest.raises(TypeError, match=f"{name}: {type(wrong).__name__} given"):
        signed_pool(**arguments)


def test_legal_values_pass_the_check():
    pool(GOOD - INF, GOOD - INF, check=True)
    signed_pool(GOOD, GOOD - INF, GOOD - 3, GOOD[:, 0] - 2, check=True)
