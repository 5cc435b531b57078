"""oneDNN in the place of MKL, where it is faster.

PyTorch's own matrix products in float32 are those of MKL, and so is tanh. MKL keeps its kernels for AVX-512 to CPUs of
Intel, so on those of AMD oneDNN is the faster one. PyTorch has oneDNN with it, and computes `nn.LSTM` by it. Rule:
oneDNN on a CPU of AMD with AVX-512, in float32, from MULTIPLICATIONS or NUMBERS on, for a call of it takes longer. All
else is left to PyTorch. Nothing here has a derivative.
"""

from __future__ import annotations

import math
import platform
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

MULTIPLICATIONS = 2**20  # of a product
SHORTEST = 8  # of its three sizes
NUMBERS = 2**15


@cache
def is_faster() -> bool:
    """Tell by the CPU: if it were measured, the last digits would differ from run to run."""
    try:
        with open("/proc/cpuinfo") as file:
            cpu = file.read(4096)  # the first core is enough
    except OSError:
        cpu = platform.processor()
    libraries = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    return libraries and "AuthenticAMD" in cpu and torch.backends.cpu.get_cpu_capability() == "AVX512"


def _multiplies(a: Tensor, b: Tensor) -> bool:
    """Tell whether oneDNN makes the product of (M, K) and (K, N)."""
    if not (is_faster() and a.is_cpu and a.dtype == torch.float32):
        return False
    sizes = (*a.shape, b.shape[1])
    return math.prod(sizes) >= MULTIPLICATIONS and min(sizes) >= SHORTEST


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if not (weight.is_contiguous() or weight.t().is_contiguous()):
        weight = weight.contiguous()  # for a part of a matrix oneDNN has a loop that takes a thousand times as long
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x W^T + b as `F.linear` does: (M, K), (N, K), (N,) -> (M, N)."""
    return (_linear if _multiplies(x, weight.t()) else F.linear)(x, weight, bias)


def product(a: Tensor, b: Tensor, out: Tensor, bias: Tensor | None = None) -> None:
    """Fill `out`, (M, N), with a b + bias: (M, K), (K, N), (N,)."""
    if _multiplies(a, b):
        out.copy_(_linear(a, b.t(), bias))
    elif bias is None:
        torch.mm(a, b, out=out)
    else:
        torch.addmm(bias, a, b, out=out)


def add_product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """Add a b to `out`: (M, K), (K, N), (M, N)."""
    if not _multiplies(a, b):
        out.addmm_(a, b)
    elif a.is_contiguous():
        out += _linear(a, b.t())
    else:  # oneDNN copies a first factor that is transposed: rather b, for a gradient has more rows
        out += _linear(b.t(), a).t()


def tanh_(a: Tensor) -> Tensor:
    """Replace the numbers by their tanh, and return them."""
    if is_faster() and a.is_cpu and a.dtype == torch.float32 and a.numel() >= NUMBERS:
        return a.copy_(a.to_mkldnn().tanh().to_dense())
    return a.tanh_()
