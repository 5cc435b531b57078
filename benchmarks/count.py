"""Count kernels, bytes and FLOPs of a call, on the device "meta": its tensors have shapes and no numbers.

So nothing is computed: large shapes take no time, and the counts are the same on every machine.
"""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.gpu import PLAN, layer, layer_call
from benchmarks.gpu_ways import WAYS, pooling_call, problem_of
from benchmarks.instruments import Call, Shape


class Work(NamedTuple):
    """Hold what a call makes a GPU do."""

    kernels: int
    bytes: int  # read and written
    flops: int  # of matrix products


class KernelCounter(TorchDispatchMode):
    """Count the kernels that calls launch, and the bytes that these read and write: one kernel an operation.

    Views cost nothing. An argument is read once and a result written once; what is repeated without a copy counts once.
    """

    FILLS = ("aten::copy_", "aten::fill_", "aten::zero_")  # do not read what they fill

    def __init__(self) -> None:
        super().__init__()
        self.kernels = self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func._schema.name
        if not func.is_view and "empty" not in name:
            read = args[1:] if name in self.FILLS else args
            self.kernels += 1
            self.bytes += sum(map(stored_bytes, tree_leaves((read, kwargs, result))))
        return result


def stored_bytes(array: object) -> int:
    """Return the bytes of an array in memory, 0 for anything else."""
    if not isinstance(array, Tensor):
        return 0
    sizes = (size for size, stride in zip(array.shape, array.stride(), strict=True) if stride)
    return math.prod(sizes) * array.element_size()


def work_of(call: Call) -> Work:
    """Return what a call makes a GPU do."""
    with FlopCounterMode(display=False) as products, KernelCounter() as passes:
        call()
    return Work(passes.kernels, passes.bytes, products.get_total_flops())


@cache
def pooling(shape: Shape, name: str, backward: bool) -> Work:
    """Count the way to pool of that name, forward or, with `backward`, forward and backward."""
    return work_of(pooling_call(WAYS[name], problem_of(shape, "meta"), backward))


@cache
def qrnn(batch: int, length: int, training: bool) -> Work:
    """Count a QRNN layer of Fig. 4, in inference or in training."""
    x = torch.empty(batch, length, PLAN.width, device="meta")
    return work_of(layer_call(layer("QRNN", PLAN.width, "meta").train(training), x, training))
