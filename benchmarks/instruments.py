"""Measure how long calls take, how much memory, and which operations take the time."""

from __future__ import annotations

import math
import multiprocessing
import os
from collections import Counter
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import ProcessPoolExecutor
from statistics import median, quantiles
from typing import Any, TypeVar

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils.benchmark import Timer

from lab.provenance import peak_memory, reset_peak_memory

Row = dict[str, Any]
Shape = tuple[int, int, int]  # (B, T, H)
Call = Callable[[], object]
Name = TypeVar("Name", bound=Hashable)

SHORTEST = 5e-3  # seconds of a turn: calls shorter than that are repeated, and their mean counts
LEAST, MOST = 3, 50  # rounds
MATRIX_PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm", "mkldnn::_linear_pointwise")
COPIES = ("aten::copy_", "aten::cat", "aten::flip", "aten::fill_", "aten::zero_", "aten::stack")


def interleaved(calls: Mapping[Name, Call], budget: float) -> dict[Name, list[float]]:
    """Return the seconds of each call in each round. They take turns, so that a busy machine slows all of them alike.

    Args:
        calls: by name. Each is called before the first round, to warm up; if that takes less than a second, once more,
            to see how often to repeat it in a turn.
        budget: seconds; rounds go on until it is spent, but there are 3 of them at least and 50 at most.
    """
    turns = {}
    for name, call in calls.items():
        timer = Timer("f()", globals={"f": call}, num_threads=torch.get_num_threads())
        cold = timer.timeit(1).median
        warm = timer.timeit(1).median if cold < 1 else cold
        turns[name] = timer, math.ceil(SHORTEST / warm)
    times: dict[Name, list[float]] = {name: [] for name in calls}
    rounds, spent = 0, 0.0
    while rounds < LEAST or (spent < budget and rounds < MOST):
        for name, (timer, repeats) in turns.items():
            seconds = timer.timeit(repeats).median
            times[name].append(seconds)
            spent += repeats * seconds
        rounds += 1
    return times


def speed_rows(times: dict[Name, list[float]], **labels: object) -> list[Row]:
    """Return a row for each call: median and quartiles of its rounds, in milliseconds, and how many threads it had."""
    rows = []
    for name, seconds in times.items():
        low, _, high = quantiles(seconds, n=4, method="inclusive")
        spread = {"ms": 1e3 * median(seconds), "ms_q1": 1e3 * low, "ms_q3": 1e3 * high, "rounds": len(seconds)}
        rows.append({**labels, "threads": torch.get_num_threads(), "what": name, **spread})
    return rows


def peak_mib(build: Callable[..., Call], shape: Shape, *arguments: object, device: str) -> float:
    """Return the MiB that `build(shape, *arguments, device)()` takes at its peak, on top of what was there before.

    On CUDA what PyTorch allocated. On a CPU the growth of the resident memory of a fresh process, which finds nothing
    to reuse: what nn.LSTM's kernels allocate outside PyTorch counts, what they allocate and never touch does not.
    """
    if device == "cuda":
        return _peak_mib(build, shape, *arguments, device)
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # in the child glibc then returns what is freed, and no heap remains
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.measure"])  # the children find all that they import
    with ProcessPoolExecutor(1, mp_context=context) as executor:
        return executor.submit(_peak_mib, build, shape, *arguments, device).result()


def _peak_mib(build: Callable[..., Call], shape: Shape, *arguments: Any) -> float:
    device = torch.device(arguments[-1])
    build((1, 32, shape[2]), *arguments)()  # libraries take memory the first time
    call = build(shape, *arguments)
    reset_peak_memory(device)
    before = torch.cuda.memory_allocated() if device.type == "cuda" else peak_memory(device)
    call()
    return (peak_memory(device) - before) / 2**20


def time_by_kind(call: Call, device: str) -> dict[str, float]:
    """Return the seconds of a call by what they go into, the most first. On CUDA they are those of its kernels."""
    call()
    cuda = device == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
    with profile(activities=activities, acc_events=True) as profiler:
        call()
    times: Counter[str] = Counter()
    for event in profiler.events():
        if event.device_type == DeviceType.CPU:  # an operation; its kernels' time is counted as its own
            times[_kind(event.name)] += event.self_device_time_total if cuda else event.self_cpu_time_total
    return {kind: 1e-6 * time for kind, time in times.most_common()}


def _kind(operation: str) -> str:
    if operation in MATRIX_PRODUCTS:
        return "matrix products"
    return "copies" if operation in COPIES else "gates, activations and pooling"
