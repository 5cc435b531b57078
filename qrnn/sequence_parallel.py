"""Pooling of one sequence that is sharded over time across processes: rank r of a group holds the r-th run of steps.

A shard, like a single step, maps the state before it to the state after it by a product and a sum:

    h_after = f_shard * h_before + last         log f_shard = sum of the shard's log f
                                                last        = the shard's last state, pooled from 0

So the ranks are the steps of a short sequence, and the pooling of that sequence gives every rank the state before its
shard; from there it pools its shard as if it were alone. The gradient goes the other way round: with delta_t = dL/dh_t
of the whole sequence, what a rank needs from the next one is f delta at the first step there (`_Pool` in
`qrnn_layer`), which again is a product and a sum per shard, ranks counted from the last.

Per call one all-gather of two arrays (B, H), and in the backward pass one of one array (B, H): `docs/scaling.md`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from qrnn_layer import _checked, pool, signed_pool


def sequence_parallel_pool(
    log_f: Tensor,
    log_x: Tensor,
    h0: Tensor | None = None,
    *,
    group: dist.ProcessGroup | None = None,
    method: str = "auto",
) -> Tensor:
    """Pool, as `pool` does, a sequence whose steps are spread over the ranks of a group, in their order.

    A collective: every rank of the group calls it, and every rank runs backward through its result, or the others wait
    for ever. A rank whose loss does not use its h, as when only the last state is read, calls
    `h.backward(torch.zeros_like(h))`. B, H, dtype and which arguments require gradients must be the same on all ranks.
    That is not checked, since it would take another exchange; TORCH_DISTRIBUTED_DEBUG=DETAIL makes PyTorch check it.

    Args:
        log_f: (B, T_r, H), the forget gates of this rank's steps, as in `pool`. T_r may differ from rank to rank and
            may be 0.
        log_x: (B, T_r, H), same dtype and device, as in `pool`.
        h0: (B, H), the state before the first step of the whole sequence. Given on every rank or on none; the values
            on the first rank count. Default: zeros.
        group: the processes. Default: all.
        method: as in `pool`.

    Returns:
        h, (B, T_r, H), in the dtype of log_f: this rank's part of the pooling of the whole sequence, with the error
        bounds of `pool`. bfloat16 and float16 are pooled and exchanged in float32. The gradient of h0 is complete on
        the first rank and zero on the others: as for any replicated parameter, the sum over the ranks is right.

    Raises:
        TypeError, ValueError: as `pool`, before anything is exchanged.
        ValueError: if there is no process group, or if the group is without this process.
        NotImplementedError: if a backward pass has `create_graph=True`.
    """
    f, x, state = _checked(method, 64, False, {"log_f": log_f, "log_x": log_x}, h0)
    return _pool_shard(partial(pool, f, x, method=method), f, state, group, method).to(log_f.dtype)


def sequence_parallel_signed_pool(
    log_f: Tensor,
    log_i: Tensor,
    z: Tensor,
    h0: Tensor | None = None,
    *,
    group: dist.ProcessGroup | None = None,
    method: str = "auto",
) -> Tensor:
    """Pool, as `signed_pool` does, a sequence whose steps are spread over the ranks of a group, in their order.

    Args:
        log_f, log_i, z: (B, T_r, H), the part of this rank, as in `signed_pool`.
        h0, group, method: as in `sequence_parallel_pool`.

    Returns:
        h, (B, T_r, H), as `sequence_parallel_pool`, whose rules for the ranks hold here too.

    Raises:
        TypeError, ValueError, NotImplementedError: as `sequence_parallel_pool`.
    """
    f, i, candidates, state = _checked(method, 64, False, {"log_f": log_f, "log_i": log_i, "z": z}, h0)
    return _pool_shard(partial(signed_pool, f, i, candidates, method=method), f, state, group, method).to(log_f.dtype)


def _pool_shard(
    pool_from: Callable[[Tensor], Tensor],
    log_f: Tensor,
    h0: Tensor,
    group: dist.ProcessGroup | None,
    method: str,
) -> Tensor:
    """Pool the shard from the state that the ranks before it leave; `pool_from` maps that state, (B, H), to h."""
    rank = dist.get_rank(group)
    if rank < 0:
        raise ValueError("group: one without this process given, one that it belongs to expected")
    with torch.no_grad():
        start = h0.detach() if rank == 0 else torch.zeros_like(h0)
        last = _last_step(pool_from(start), start)
        log_decay = log_f.sum(1, dtype=torch.float64).to(last.dtype)  # rounded once; -inf if the shard holds a reset
        log_decays, lasts = _all_gather(torch.stack([log_decay, last]), group).unbind(1)  # (P, B, H) each
        if rank > 0:
            start = _pool_over_ranks(log_decays, lasts)[rank - 1]
    # `start` is a constant here: what it owes to earlier ranks comes back through _GradientOfLaterRanks.
    return _GradientOfLaterRanks.apply(pool_from(start), h0, log_f.detach(), log_decays, group, method)


class _GradientOfLaterRanks(torch.autograd.Function):
    """Return h; in the backward pass, add to the gradient of the shard's last state what later ranks owe to it.

    With e_r = dL/d(state before shard r), all ranks counted: e_r = own_r + f_shard_r e_{r+1}, where own_r is what the
    shard's own outputs contribute. own_r is u_1 of u_t = f_t u_{t+1} + f_t g_t, a pooling backwards in time.
    """

    @staticmethod
    def forward(
        ctx,
        h: Tensor,
        h0: Tensor,
        log_f: Tensor,
        log_decays: Tensor,
        group: dist.ProcessGroup | None,
        method: str,
    ) -> Tensor:  # (B, T, H), (B, H), (B, T, H), (P, B, H) -> (B, T, H)
        ctx.save_for_backward(log_f, log_decays)
        ctx.group, ctx.method = group, method
        return h.view_as(h)

    @staticmethod
    def backward(ctx, grad: Tensor):
        if torch.is_grad_enabled():  # create_graph=True
            raise NotImplementedError("sequence-parallel pooling has no second derivatives")
        log_f, log_decays = ctx.saved_tensors
        rank = dist.get_rank(ctx.group)
        zeros = grad.new_zeros(grad.shape[::2])  # (B, H)
        backwards = log_f.flip(1)
        own = _last_step(signed_pool(backwards, backwards, grad.flip(1), method=ctx.method), zeros)
        all_own = _all_gather(own, ctx.group)  # (P, B, H)
        before = _pool_over_ranks(log_decays.flip(0), all_own.flip(0)).flip(0)  # e_r for every rank
        if rank + 1 < len(before):
            grad = grad.clone()
            grad[:, -1:] += before[rank + 1].unsqueeze(1)  # nowhere if the shard is empty
        return grad, before[0] if rank == 0 else zeros, None, None, None, None


def _pool_over_ranks(log_decays: Tensor, lasts: Tensor) -> Tensor:
    """Return the state after each rank's shard: one step a rank, all (P, B, H)."""
    log_decays, lasts = log_decays.transpose(0, 1), lasts.transpose(0, 1)  # (B, P, H)
    return signed_pool(log_decays, torch.zeros_like(lasts), lasts, method="scan").transpose(0, 1)


def _last_step(h: Tensor, start: Tensor) -> Tensor:
    """Return the last step of h, (B, T, H), or `start`, the state before it, if there is no step: (B, H)."""
    return h[:, -1] if h.shape[1] else start


def _all_gather(array: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Gather (...) of each of the P ranks: (P, ...) on all."""
    array = array.contiguous()  # NCCL takes no other
    gathered = [torch.empty_like(array) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, array, group=group)
    return torch.stack(gathered)
