"""A sequence sharded over 2 and 4 processes against the same sequence in one piece, in every process of a gloo group.

The processes are started once for each world size and run all checks, the functions in CHECKS; the tests below report
them one by one. A check is a collective too: it asserts after its last exchange, or what is the same on all ranks, so
that a failure on one leaves no other waiting.
"""

import contextlib
import io
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from qrnn.sequence_parallel import sequence_parallel_pool, sequence_parallel_signed_pool
from qrnn_layer import METHODS, QRNNLayer, pool, signed_pool
from tests.processes import run_in_processes

SCALING = Path(__file__).parents[2] / "docs" / "scaling.md"
WORLD_SIZES = (2, 4)
INF = float("inf")
SHARDED = {pool: sequence_parallel_pool, signed_pool: sequence_parallel_signed_pool}
COLLECTIVES = ("all_gather", "all_gather_into_tensor", "all_gather_object", "all_reduce", "all_to_all", "barrier")
COLLECTIVES += ("broadcast", "reduce_scatter", "send", "recv", "isend", "irecv", "batch_isend_irecv")
CHECKS: dict[str, Callable[[], None]] = {}


def check(function: Callable[[], None]) -> Callable[[], None]:
    CHECKS[function.__name__] = function
    return function


@contextlib.contextmanager
def exchanges():
    """Lists (name, bytes this rank contributes) of every collective that is called."""
    seen: list[tuple[str, int]] = []

    def listed(name: str, collective: Callable) -> Callable:
        def call(*args, **kwargs):
            seen.append((name, args[-1].nbytes))
            return collective(*args, **kwargs)

        return call

    with contextlib.ExitStack() as patches:
        for name in COLLECTIVES:
            patches.enter_context(mock.patch.object(dist, name, listed(name, getattr(dist, name))))
        yield seen


# --- what the checks share -------------------------------------------------------------------------------------------


def make(length, *, bias=(-2.0, 0.0, 2.0), batch=2, dtype=torch.float64):
    """log_f, log_x, z, and h0 of a sequence, the same on every rank; one gate bias a channel."""
    generator = torch.Generator().manual_seed(length)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    shape = (batch, length, len(bias))
    a = draw(*shape) + torch.tensor(bias, dtype=torch.float64)
    arrays = F.logsigmoid(a), F.logsigmoid(-a) + F.softplus(draw(*shape)).log(), draw(*shape), draw(batch, len(bias))
    return [array.to(dtype) for array in arrays]


def splits():
    """T_r of all ranks: even, uneven, single steps, and every way to be empty."""
    world = dist.get_world_size()
    uneven = [5 * rank + 1 for rank in range(world)]
    yield [8] * world
    yield uneven
    yield uneven[::-1]
    yield [1] * world
    yield [0] * world
    for rank in range(world):
        yield [0 if r == rank else 3 + r for r in range(world)]  # one empty
        yield [7 if r == rank else 0 for r in range(world)]  # all empty but one


def mine(array, lengths, rank=None):
    """This rank's shard of a (B, T, H)."""
    return array.split(lengths, dim=1)[dist.get_rank() if rank is None else rank]


def with_gradients(function, arguments, weights):
    """The output, and the gradients of its weighted sum for all arguments that are given."""
    leaves = [None if argument is None else argument.detach().clone().requires_grad_() for argument in arguments]
    h = function(*leaves)
    h.backward(weights)
    return h.detach(), [None if leaf is None else leaf.grad for leaf in leaves]


def errors(function, arguments, lengths, weights=None, **options):
    """Of the sharded `function` against the float64 pooling of the whole: forward, relative to the pooling of
    magnitudes, and the largest relative L2 error of a gradient; the worst of all ranks. The last argument is h0."""
    *arrays, h0 = arguments
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(arrays[0].shape, generator=generator, dtype=torch.float64) if weights is None else weights
    shards = [mine(array, lengths) for array in arrays]
    sharded = partial(SHARDED[function], **options)
    got, got_gradients = with_gradients(sharded, [*shards, h0], mine(weights, lengths).to(arrays[0].dtype))

    whole = [None if argument is None else argument.double() for argument in arguments]
    want, want_gradients = with_gradients(function, whole, weights)
    magnitudes = [*whole[:2], *(None if argument is None else argument.abs() for argument in whole[2:])]
    scale = mine(function(*magnitudes), lengths).clamp(min=1e-30)  # float32 has no digits left below

    error = (got.double() - mine(want, lengths)).abs() / scale
    worst = torch.zeros(2, dtype=torch.float64)
    worst[0] = error.max() if error.numel() else 0
    for gradient, wanted in zip(got_gradients, want_gradients, strict=True):
        if wanted is None:
            continue
        if wanted.dim() == 3:
            part = mine(wanted, lengths)
        else:  # h0: all of it on the first rank
            part = wanted if dist.get_rank() == 0 else torch.zeros_like(wanted)
        worst[1] = worst[1].maximum((gradient - part).norm() / wanted.norm().clamp(min=1e-30))
    worst.nan_to_num_(nan=INF)
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    return tuple(worst.tolist())


def relative(got, want):
    """Relative L2 error."""
    return ((got - want).norm() / want.norm().clamp(min=1e-30)).item()


# --- the checks ------------------------------------------------------------------------------------------------------


@check
def every_split_gives_the_whole():
    for lengths in splits():
        log_f, log_x, z, h0 = make(sum(lengths))
        for state in (None, h0):
            assert max(errors(pool, (log_f, log_x, state), lengths)) < 1e-11, lengths
            assert max(errors(signed_pool, (log_f, log_x, z, state), lengths)) < 1e-11, lengths


@check
def every_method_gives_the_whole():
    lengths = [30 + rank for rank in range(dist.get_world_size())]
    log_f, log_x, z, h0 = make(sum(lengths))
    for method in METHODS:
        assert max(errors(pool, (log_f, log_x, h0), lengths, method=method)) < 1e-11, method
        assert max(errors(signed_pool, (log_f, log_x, z, h0), lengths, method=method)) < 1e-11, method


@check
def long_sequences_stay_within_the_bounds_in_float32():
    world = dist.get_world_size()
    log_f, log_x, z, h0 = make(65_536, bias=(-6, -2, 0, 2, 6), batch=1, dtype=torch.float32)
    for function, arguments in ((pool, (log_f, log_x, h0)), (signed_pool, (log_f, log_x, z, h0))):
        for method, bound in (("scan", 5e-6), ("blocked", 1e-5)):
            forward, backward = errors(function, arguments, [65_536 // world] * world, method=method)
            assert forward < bound and backward < 2e-5, (method, forward, backward)


@check
def gates_that_forget_everything_stay_finite():
    lengths = [100] * dist.get_world_size()
    log_f, log_x, z, h0 = make(sum(lengths), bias=(-6, -30, -100, -1e4), dtype=torch.float32)
    for function, arguments in ((pool, (log_f, log_x, h0)), (signed_pool, (log_f, log_x.clamp(max=0), z, h0))):
        forward, backward = errors(function, arguments, lengths)
        assert forward < 1e-5 and backward < 2e-5, (forward, backward)


@check
def resets_and_missing_inputs():
    lengths = [20 + 3 * rank for rank in range(dist.get_world_size())]
    log_f, log_x, z, h0 = make(sum(lengths), dtype=torch.float32)
    generator = torch.Generator().manual_seed(2)
    for share in (0.02, 0.3, 1.0):
        chosen = torch.rand(log_f.shape, generator=generator) < share
        first_of_shards = torch.zeros_like(chosen)
        first_of_shards[:, [sum(lengths[:rank]) for rank in range(len(lengths))]] = True
        for mask in (chosen, first_of_shards):
            reset, silent = log_f.masked_fill(mask, -INF), log_x.masked_fill(mask, -INF)
            for arguments in ((reset, log_x, h0), (log_f, silent, h0), (reset, silent, h0)):
                forward, backward = errors(pool, arguments, lengths)
                assert forward < 1e-5 and backward < 2e-5, (share, forward, backward)
            forward, backward = errors(signed_pool, (reset, log_x, z, h0), lengths)
            assert forward < 1e-5 and backward < 2e-5, (share, forward, backward)


@check
def a_state_that_only_decays_keeps_its_digits():
    """Nothing hides the rounding of the summed log f here: the state falls to 1e-30, and h is nothing else."""
    lengths = [40] * dist.get_world_size()
    log_f, log_x, _, h0 = make(sum(lengths), dtype=torch.float32)
    log_f = log_f * (-66 / log_f.sum(1, keepdim=True))
    forward, backward = errors(pool, (log_f, torch.full_like(log_x, -INF), h0), lengths)
    assert forward < 1e-5 and backward < 2e-5, (forward, backward)


@check
def half_precision_is_pooled_and_exchanged_in_float32():
    lengths = [50] * dist.get_world_size()
    pairs = []
    for dtype in (torch.bfloat16, torch.float16):
        log_f, log_x, _, h0 = make(sum(lengths), bias=(0.0, 4.0), dtype=dtype)
        weights = torch.ones_like(log_f)
        whole, whole_gradients = with_gradients(pool, (log_f, log_x, h0), weights)
        shards = [mine(array, lengths) for array in (log_f, log_x)]
        h, gradients = with_gradients(sequence_parallel_pool, (*shards, h0), mine(weights, lengths))
        pairs += [(h, whole), *zip(gradients[:2], whole_gradients[:2], strict=True)]
    for got, whole in pairs:
        want = mine(whole, lengths)
        assert got.dtype == want.dtype
        difference = (got.double() - want.double()).abs()
        assert (difference <= torch.finfo(want.dtype).eps * want.double().abs() + 1e-6).all()  # one rounding


@check
def one_small_all_gather_each_way():
    carry_bytes = run_snippet()[0]["carry_bytes"]
    dtypes = (torch.float32, torch.float64, torch.bfloat16)
    seen = []
    for dtype in dtypes:
        log_f, log_x, _, h0 = (array.requires_grad_() for array in make(10, dtype=dtype))
        with exchanges() as forward:
            h = sequence_parallel_pool(log_f, log_x, h0)
        with exchanges() as backward:
            h.sum().backward()
        seen.append((forward, backward))
    for (forward, backward), dtype in zip(seen, dtypes, strict=True):
        size_forward, size_backward = carry_bytes(2, 3, itemsize=max(dtype.itemsize, 4))
        assert forward == [("all_gather", size_forward)]
        assert backward == [("all_gather", size_backward)]


@check
def a_loss_of_the_last_state_alone():
    lengths = [9] * dist.get_world_size()
    log_f, log_x, _, h0 = make(sum(lengths))
    weights = torch.zeros_like(log_f)
    weights[:, -1] = 1
    assert max(errors(pool, (log_f, log_x, h0), lengths, weights)) < 1e-11


@check
def two_layers_exchange_in_the_same_order():
    lengths = [6] * dist.get_world_size()
    log_f, log_x, z, h0 = make(sum(lengths))

    def stack(first, second):
        return lambda f, x, z, h0: second(f, x, z * first(f, x, h0), h0)

    weights = torch.ones_like(log_f)
    want, want_gradients = with_gradients(stack(pool, signed_pool), (log_f, log_x, z, h0), weights)
    shards = [mine(array, lengths) for array in (log_f, log_x, z)]
    sharded = stack(sequence_parallel_pool, sequence_parallel_signed_pool)
    got, got_gradients = with_gradients(sharded, (*shards, h0), mine(weights, lengths))
    dist.all_reduce(got_gradients[3])  # h0 is replicated: the sum over ranks is right
    assert relative(got_gradients[3], want_gradients[3]) < 1e-11
    for array, whole in zip((got, *got_gradients[:3]), (want, *want_gradients[:3]), strict=True):
        assert relative(array, mine(whole, lengths)) < 1e-11


@check
def a_gradient_for_some_arguments_only():
    lengths = [4] * dist.get_world_size()
    log_f, log_x, _, h0 = make(sum(lengths))
    shards = [mine(array, lengths) for array in (log_f, log_x)]
    whole = h0.clone().requires_grad_()
    pool(log_f, log_x, whole).sum().backward()
    learned = h0.clone().requires_grad_()
    sequence_parallel_pool(*shards, learned).sum().backward()
    dist.all_reduce(learned.grad)
    assert relative(learned.grad, whole.grad) < 1e-11
    assert not sequence_parallel_pool(*shards, h0).requires_grad
    with torch.no_grad():
        assert not sequence_parallel_pool(*shards, learned).requires_grad


@check
def only_the_h0_of_the_first_rank_counts():
    lengths = [4] * dist.get_world_size()
    log_f, log_x, _, h0 = make(sum(lengths))
    given = h0 if dist.get_rank() == 0 else torch.full_like(h0, float("nan"))
    h = sequence_parallel_pool(mine(log_f, lengths), mine(log_x, lengths), given)
    assert relative(h, mine(pool(log_f, log_x, h0), lengths)) < 1e-11


@check
def the_gradient_that_comes_in_is_left_as_it_was():
    log_f, log_x, _, h0 = (array.requires_grad_() for array in make(5))
    weights = torch.ones(log_f.shape, dtype=torch.float64)
    sequence_parallel_pool(log_f, log_x, h0).backward(weights)
    assert (weights == 1).all()


@check
def an_empty_batch():
    log_f, log_x, _, h0 = (array.requires_grad_() for array in make(5, batch=0))
    h = sequence_parallel_pool(log_f, log_x, h0)
    h.sum().backward()
    assert h.shape == (0, 5, 3) and h0.grad.shape == (0, 3)


@check
def layouts_that_are_not_contiguous():
    lengths = [5] * dist.get_world_size()
    arguments = [array.transpose(0, 1).contiguous().transpose(0, 1) for array in make(sum(lengths))]
    arguments[0] = arguments[0][:, :1].expand_as(arguments[0])
    assert max(errors(pool, (arguments[0], arguments[1], arguments[3]), lengths)) < 1e-11


@check
def groups_pool_sequences_of_their_own():
    world, rank = dist.get_world_size(), dist.get_rank()
    half = world // 2
    members = [list(range(half)), list(range(half, world))]
    groups = [dist.new_group(ranks) for ranks in members]
    own = rank // half
    log_f, log_x, _, h0 = (array + 0.0 for array in make(7 * half + own))  # two different sequences
    lengths = [7] * (half - 1) + [7 + own]
    shards = [mine(array, lengths, rank % half) for array in (log_f, log_x)]
    h = sequence_parallel_pool(*shards, h0, group=groups[own])
    assert relative(h, mine(pool(log_f, log_x, h0), lengths, rank % half)) < 1e-11
    with pytest.raises(ValueError, match="group: one without this process given"):
        sequence_parallel_pool(*shards, h0, group=groups[1 - own])


@check
def wrong_arguments_are_refused_before_any_exchange():
    log_f, log_x, z, h0 = make(5)
    calls = (
        (lambda: sequence_parallel_pool(log_f[0], log_x), r"log_f: .*\(B, T, H\)"),
        (lambda: sequence_parallel_pool(log_f, log_x[:, 1:]), "log_x: shape"),
        (lambda: sequence_parallel_pool(log_f, log_x, h0[:, 1:]), "h0: shape"),
        (lambda: sequence_parallel_pool(log_f, log_x.float()), "log_x: dtype torch.float32 given, torch.float64"),
        (lambda: sequence_parallel_pool(log_f, log_x, h0.half()), "h0: dtype torch.float16 given, torch.float64"),
        (lambda: sequence_parallel_pool(log_f.long(), log_x.long()), "log_f: dtype torch.int64 given, a floating"),
        (lambda: sequence_parallel_pool(log_f.tolist(), log_x), "log_f: list given"),
        (lambda: sequence_parallel_pool(log_f, log_x, h0.tolist()), "h0: list given"),
        (lambda: sequence_parallel_pool(log_f, log_x, method="magic"), "'magic' given"),
        (lambda: sequence_parallel_signed_pool(log_f, log_x, z[:1]), "z: shape"),
        (lambda: sequence_parallel_signed_pool(log_f, log_x, z, method="magic"), "'magic' given"),
    )
    with exchanges() as seen:
        for call, words in calls:
            with pytest.raises((TypeError, ValueError), match=words):
                call()
    assert not seen


@check
def pytorchs_debug_level_finds_ranks_that_disagree():
    before, rank = dist.get_debug_level(), dist.get_rank()
    dist.set_debug_level(dist.DebugLevel.DETAIL)
    group = dist.new_group()
    dist.set_debug_level(before)
    for shape, dtype in (((2 + rank, 5, 3), torch.float32), ((2, 5, 3), torch.float32 if rank else torch.float64)):
        log_f = torch.zeros(shape, dtype=dtype)
        with pytest.raises(RuntimeError, match="mismatch between collectives"):
            sequence_parallel_pool(log_f, log_f, group=group)


@check
def second_derivatives_are_refused():
    log_f, log_x, _, _ = (array.requires_grad_() for array in make(5))
    h = sequence_parallel_pool(log_f, log_x)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        torch.autograd.grad(h.sum(), log_f, create_graph=True)


# --- what pytest sees ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=WORLD_SIZES, ids="{} processes".format)
def failures(request, tmp_path_factory):
    return run_in_processes(CHECKS, request.param, tmp_path_factory.mktemp("processes"))


@pytest.mark.parametrize("name", CHECKS)
def test_in_processes(failures, name):
    assert not failures[name], "\n".join(failures[name])


def test_without_a_process_group():
    log_f, log_x, _, _ = make(5)
    with pytest.raises(ValueError, match="init_process_group"):
        sequence_parallel_pool(log_f, log_x)


# --- the numbers of docs/scaling.md ----------------------------------------------------------------------------------


def run_snippet() -> tuple[dict, str]:
    """The names that the document's code defines, and what it prints."""
    (code,) = re.findall(r"```python\n(.*?)```", SCALING.read_text(), re.DOTALL)
    names: dict = {}
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(code, names)
    return names, printed.getvalue()


def test_the_table_is_what_the_snippet_prints():
    _, printed = run_snippet()
    assert "| computed |\n|---|---|\n" + printed + "\n" in SCALING.read_text()


def test_the_snippet_counts_the_arrays_that_are_kept(tmp_path):
    log_f, log_x, _, _ = (array.requires_grad_() for array in make(50))
    kept = {}
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
            sequence_parallel_pool(log_f, log_x)
    finally:
        dist.destroy_process_group()
    assert sum(array.shape == log_f.shape for array in kept.values()) == 3


def test_the_snippet_counts_the_parameters_of_a_layer():
    names, _ = run_snippet()
    with torch.device("meta"):
        layer = QRNNLayer(names["H"], names["H"], names["K"], "fo")
    size = sum(parameter.nbytes for parameter in layer.parameters())
    assert names["all_reduce"] == 2 * (names["P"] - 1) / names["P"] * size
