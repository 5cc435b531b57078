"""The ways to pool that are compared on a GPU: the methods of the layer and others, each a function of a `Problem`."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from benchmarks.instruments import Call, Shape
from qrnn_layer import METHODS, _closed_form_of_any_sign, _recurrence, _scan

Problem = tuple[Tensor, Tensor, Tensor]  # log_f and x > 0, (B, T, H), and h0, (B, H)
Way = Callable[[Tensor, Tensor, Tensor], Tensor]  # of a problem -> h, (B, T, H)


def _float32_blocks(log_f: Tensor, x: Tensor, h0: Tensor, floor: float) -> Tensor:
    """Pool by the closed form in float32 blocks of 16, short enough for its logs to keep their digits."""
    log_f, x = (array.unflatten(1, (-1, 16)) for array in (log_f, x))
    h, c = _closed_form_of_any_sign(log_f, x, floor)
    ends = _scan(c[:, :, -1], h[:, :, -1], h0)
    starts = torch.cat([h0.unsqueeze(1), ends[:, :-1]], dim=1).unsqueeze(2)
    return torch.addcmul(h, c.exp(), starts).flatten(1, 2)


def _whole_in_float64(log_f: Tensor, x: Tensor, h0: Tensor, floor: float) -> Tensor:
    """Pool by the closed form of the whole sequence at once."""
    h, c = _closed_form_of_any_sign(log_f.double(), x.double(), floor)
    return (h + c.exp() * h0.unsqueeze(1)).to(x.dtype)


def _associated(mode: str, log_f: Tensor, x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Return the running sums of log_f, and h from h_0 = 0."""
    from torch._higher_order_ops import associative_scan  # a prototype: not public yet

    def combine(left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return left[0] + right[0], right[0].exp() * left[1] + right[1]

    return cast(tuple[Tensor, Tensor], associative_scan(combine, (log_f, x), dim, combine_mode=mode))


def _associative_scan(mode: str, log_f: Tensor, x: Tensor, h0: Tensor, floor: float) -> Tensor:
    c, h = _associated(mode, log_f, x, 1)
    return h + c.exp() * h0.unsqueeze(1)


def _associative_blocks(size: int, log_f: Tensor, x: Tensor, h0: Tensor, floor: float) -> Tensor:
    """Scan inside blocks, which is parallel also for one long sequence, and from block to block."""
    size = min(size, x.shape[1])
    c, h = _associated("pointwise", log_f.unflatten(1, (-1, size)), x.unflatten(1, (-1, size)), 2)
    ends = _associative_scan("pointwise", c[:, :, -1], h[:, :, -1], h0, floor)
    starts = torch.cat([h0.unsqueeze(1), ends[:, :-1]], dim=1).unsqueeze(2)
    return torch.addcmul(h, c.exp(), starts).flatten(1, 2)


SOLVERS: dict[str, Callable[..., Tensor]] = {
    "closed form, float32 blocks of 16": _float32_blocks,
    "closed form, float64, whole": _whole_in_float64,
    "torch.associative_scan, generic": partial(_associative_scan, "generic"),
    "torch.associative_scan, pointwise": partial(_associative_scan, "pointwise"),  # one kernel; compiled on CUDA only
    "torch.associative_scan, pointwise, blocks of 64": partial(_associative_blocks, 64),
}


class Derived(torch.autograd.Function):
    """Pool by a solver, with the derived backward pass of `qrnn_layer._Pool`."""

    @staticmethod
    def forward(ctx, log_f: Tensor, x: Tensor, h0: Tensor, solver: str) -> Tensor:
        h = SOLVERS[solver](log_f, x, h0, floor=0)
        ctx.solver = solver
        ctx.save_for_backward(log_f, h0, h)
        return h

    @staticmethod
    def backward(ctx, grad: Tensor):
        log_f, h0, h = ctx.saved_tensors
        log_f_next = torch.cat([log_f[:, :1], log_f[:, 1:].flip(1)], dim=1)
        delta = SOLVERS[ctx.solver](log_f_next, grad.flip(1), torch.zeros_like(h0), floor=-math.inf).flip(1)
        f_delta = log_f.exp() * delta
        return f_delta * torch.cat([h0.unsqueeze(1), h[:, :-1]], dim=1), delta, f_delta[:, 0], None


def way(name: str) -> Way:
    """Return the way to pool of that name, with the derived backward pass."""
    if name in SOLVERS:
        return lambda log_f, x, h0: Derived.apply(log_f, x, h0, name)
    return lambda log_f, x, h0: _recurrence(log_f, x, h0, name, 64, floor=0)


WAYS: dict[str, Way] = {name: way(name) for name in (*METHODS, *SOLVERS)}


def problem_of(shape: Shape, device: str) -> Problem:
    """Return the gates and inputs of a layer of the mode "fo" with softplus, on random numbers."""
    torch.manual_seed(0)
    a, b = torch.randn(2, *shape, device=device)
    h0 = torch.rand(shape[0], shape[2], device=device)
    return nn.functional.logsigmoid(a), torch.sigmoid(-a) * nn.functional.softplus(b), h0


def pooling_call(way: Way, problem: Problem, backward: bool) -> Call:
    """Return a call that gives h or, with `backward`, the gradients of all arguments."""
    if not backward:
        return torch.no_grad()(partial(way, *problem))
    weights = torch.linspace(-1, 1, problem[0].numel(), device=problem[0].device).view_as(problem[0])

    def call() -> tuple[Tensor, ...]:
        leaves = [array.detach().requires_grad_() for array in problem]
        return torch.autograd.grad(way(*leaves), leaves, weights)

    return call
