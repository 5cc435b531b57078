"""Hold the ways to pool that are compared: this project's, what one would write first, and other projects'.

Each is a function of log_f and log_x, (B, T, H) both, from h_0 = 0 to h, (B, T, H). A peer that wants another layout or
linear gates gets them inside its function, so that the conversion counts: a QRNN would have to make it as well.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import NamedTuple

import torch
from torch import Tensor

from lab.provenance import installed_version
from qrnn_layer import METHODS, closed_form, pool

Way = Callable[[Tensor, Tensor], Tensor]


class Missing(RuntimeError):
    """Say in one line why a peer cannot run here."""


# --- this project's, and what one would write first ------------------------------------------------------------------


def closed_form_by_autograd(log_f: Tensor, log_x: Tensor) -> Tensor:
    """Pool by the closed form, left to autograd: what one would write first."""
    return closed_form(log_f, log_x)[0].exp()


def indexing_loop_by_autograd(log_f: Tensor, log_x: Tensor) -> Tensor:
    """Pool by a Python loop that indexes. Each index costs zeros of (B, T, H) in the backward pass."""
    f, x, h, steps = log_f.exp(), log_x.exp(), torch.zeros_like(log_f[:, 0]), []
    for t in range(log_f.shape[1]):
        h = f[:, t] * h + x[:, t]
        steps.append(h)
    return torch.stack(steps, 1)


def loop_by_autograd(log_f: Tensor, log_x: Tensor) -> Tensor:
    """Pool by a Python loop without indices, which is the best that one left to autograd can do."""
    h, steps = torch.zeros_like(log_f[:, 0]), []
    for f_t, x_t in zip(log_f.exp().unbind(1), log_x.exp().unbind(1), strict=True):
        h = f_t * h + x_t
        steps.append(h)
    return torch.stack(steps, 1)


WAYS: dict[str, Way] = {method: partial(pool, method=method) for method in ("auto", *METHODS)} | {
    "closed form, autograd": closed_form_by_autograd,
    "Python loop, autograd": indexing_loop_by_autograd,
    "Python loop, unbind, autograd": loop_by_autograd,
}
LOOPS = ("loop", "Python loop, autograd", "Python loop, unbind, autograd")
QUADRATIC = {"Python loop, autograd": 128, "torch.associative_scan": 32}  # in T, going backward: the longest T to try


def compiled() -> dict[str, Callable[[], Way]]:
    """Return the ways without a loop through torch.compile, which fuses the sums over time to Triton scans on CUDA."""
    torch.compiler.reset()  # else the ways of the shape before count against its limit of recompilations
    names = [name for name in WAYS if name not in ("auto", *LOOPS)]
    return {f"{name}, compiled": partial(torch.compile, WAYS[name], dynamic=False) for name in names}


# --- other projects' -------------------------------------------------------------------------------------------------


def _associative_scan() -> Way:
    from torch._higher_order_ops import associative_scan  # a prototype: not public yet

    def combine(left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return left[0] * right[0], right[0] * left[1] + right[1]

    return lambda log_f, log_x: associative_scan(combine, (log_f.exp(), log_x.exp()), 1, combine_mode="generic")[1]


def _mambapy() -> Way:
    pscan = import_module("mambapy.pscan").pscan  # (B, T, H, N)

    return lambda log_f, log_x: pscan(log_f.exp().unsqueeze(-1), log_x.exp().unsqueeze(-1)).squeeze(-1)


def _accelerated_scan(backend: str) -> Way:
    scan = import_module(f"accelerated_scan.{backend}").scan  # (B, H, T), contiguous; warp: T a power of 2

    def way(log_f: Tensor, log_x: Tensor) -> Tensor:
        f, x = (array.exp().transpose(1, 2).contiguous() for array in (log_f, log_x))
        return scan(f, x).transpose(1, 2)

    return way


def _hgrn(name: str) -> Way:
    function = getattr(import_module("fla.ops.hgrn"), name)
    return lambda log_f, log_x: function(log_x.exp(), log_f)[0]


class Peer(NamedTuple):
    """Say how to load a way of another project, and what it needs."""

    load: Callable[[], Way]
    package: str
    cuda_only: bool = True


PEERS = {
    "torch.associative_scan": Peer(_associative_scan, "torch", cuda_only=False),
    "mamba.py pscan": Peer(_mambapy, "mambapy", cuda_only=False),
    "accelerated-scan, Triton": Peer(partial(_accelerated_scan, "scalar"), "accelerated-scan"),
    "accelerated-scan, warp": Peer(partial(_accelerated_scan, "warp"), "accelerated-scan"),
    "fla chunk_hgrn": Peer(partial(_hgrn, "chunk_hgrn"), "flash-linear-attention"),
    "fla fused_recurrent_hgrn": Peer(partial(_hgrn, "fused_recurrent_hgrn"), "flash-linear-attention"),
}


def load(name: str, device: str) -> Way:
    """Return the way of that name.

    Raises:
        Missing: if it is a peer that cannot run here.
    """
    if name in WAYS:
        return WAYS[name]
    peer = PEERS[name]
    if peer.cuda_only and device != "cuda":
        raise Missing("runs on CUDA only")
    try:
        return peer.load()
    except ModuleNotFoundError as error:
        raise Missing(f"not installed: {error}") from error
    except Exception as error:  # other people's code, which may compile itself on import: anything can go wrong
        raise Missing(one_line(error)) from error


def versions() -> dict[str, str | None]:
    """Return the versions of the peers' packages. None: not installed."""
    return {
        package: installed_version(package) for package in sorted({peer.package for peer in PEERS.values()} - {"torch"})
    }


def one_line(error: BaseException) -> str:
    """Return an error as a reason: its class and the first line of its text."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__
