"""How exact and how fast the pooling and the layer are: `python benchmark.py` writes results/benchmark-<device>.json.

Every time is the median of rounds in which the compared things take turns, so that a busy machine slows all of them
alike; what to read are the ratios, not the milliseconds. results/readme.py makes the README's tables from the file.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from torch.utils.benchmark import Timer
from tqdm import tqdm

from machine import provenance
from qrnn_layer import METHODS, QRNNLayer, pool

Row = dict[str, Any]
Problem = tuple[Tensor, Tensor, Tensor]  # log_f (B, T, H), log_x (B, T, H), h0 (B, H)

PRECISION_LENGTHS = (128, 1024, 16_384)
PRECISION_BIASES = (-6.0, -2.0, 0.0, 6.0)
POOL_SHAPES = ((32, 128, 640), (32, 128, 64), (1, 1024, 64), (8, 512, 640), (1, 65_536, 64))  # (B, T, H)
LAYER_BATCHES, LAYER_LENGTHS, LAYER_WIDTH = (8, 32), (32, 128, 512), 640


def gates(shape: tuple[int, int, int], bias: float, device: str) -> Problem:
    """log_f and log_x as a layer of mode "fo" with softplus makes them, and h0, all in float32."""
    a = torch.randn(shape, device=device) + bias
    log_x = F.logsigmoid(-a) + F.softplus(torch.randn(shape, device=device)).log()
    return F.logsigmoid(a), log_x, torch.randn(shape[0], shape[2], device=device)


def closed_form_by_autograd(log_f: Tensor, log_x: Tensor, h0: Tensor) -> Tensor:
    """What one would write first: the closed form, left to autograd."""
    c = log_f.cumsum(1)
    return (c + (log_x - c).logcumsumexp(1)).exp() + c.exp() * h0.unsqueeze(1)


def loop_by_autograd(log_f: Tensor, log_x: Tensor, h0: Tensor) -> Tensor:
    """What one would write before that: a Python loop, left to autograd."""
    h, steps = h0, []
    for f_t, x_t in zip(log_f.exp().unbind(1), log_x.exp().unbind(1), strict=True):
        h = f_t * h + x_t
        steps.append(h)
    return torch.stack(steps, 1)


def candidates() -> dict[str, Callable[..., Tensor]]:
    ours = {method: lambda *problem, m=method: pool(*problem, method=m) for method in ("auto", *METHODS)}
    return ours | {"closed form, autograd": closed_form_by_autograd, "Python loop, autograd": loop_by_autograd}


def gradients(function: Callable[..., Tensor], problem: Problem, weights: Tensor) -> tuple[Tensor, ...]:
    leaves = [array.detach().clone().requires_grad_() for array in problem]
    return torch.autograd.grad(function(*leaves), leaves, weights)


def precision(device: str) -> list[Row]:
    """Largest relative error of h, and relative L2 error of the gradient of log_f, against the loop in float64."""
    rows = []
    for time in tqdm(PRECISION_LENGTHS, desc="precision", unit="length"):
        for bias in PRECISION_BIASES:
            log_f, log_x, _ = gates((2, time, 16), bias, device)
            problem = log_f, log_x, torch.zeros(2, 16, device=device)
            weights = torch.randn_like(log_f)
            doubles = tuple(array.double() for array in problem)
            want, want_gradient = (
                pool(*doubles, method="loop"),
                gradients(loop_by_autograd, doubles, weights.double())[0],
            )
            for name, function in candidates().items():
                error = ((function(*problem).double() - want).abs() / want).max().item()
                gradient = gradients(function, problem, weights)[0].double()
                rows.append(
                    {"T": time, "gate bias": bias, "method": name, "forward": error}
                    | {"gradient": ((gradient - want_gradient).norm() / want_gradient.norm()).item()}
                )
    return rows


def interleaved(functions: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each function in each round; one round before that warms up."""
    timers = {
        name: Timer("f()", globals={"f": f}, num_threads=torch.get_num_threads()) for name, f in functions.items()
    }
    times: dict[str, list[float]] = {name: [] for name in functions}
    for round_ in range(rounds + 1):
        for name, timer in timers.items():
            seconds = timer.timeit(1).median
            if round_ > 0:
                times[name].append(seconds)
    return times


def speed_rows(times: dict[str, list[float]], **labels: object) -> list[Row]:
    return [
        {**labels, "what": name, "ms": 1e3 * median(t), "ms_low": 1e3 * min(t), "ms_high": 1e3 * max(t)}
        for name, t in times.items()
    ]


def pooling_speed(device: str, rounds: int) -> list[Row]:
    """Milliseconds of every way to pool, forward alone and with the backward pass."""
    rows = []
    for shape in tqdm(POOL_SHAPES, desc="pooling", unit="shape"):
        problem = gates(shape, 0.0, device)
        weights = torch.randn(shape, device=device)
        chosen = {name: f for name, f in candidates().items() if shape[1] <= 2048 or "oop" not in name}
        forward = {name: partial(f, *problem) for name, f in chosen.items()}
        both = {name: partial(gradients, f, problem, weights) for name, f in chosen.items()}
        labels = {"B": shape[0], "T": shape[1], "H": shape[2]}
        with torch.no_grad():
            rows += speed_rows(interleaved(forward, rounds), **labels, part="forward")
        rows += speed_rows(interleaved(both, rounds), **labels, part="forward + backward")
    return rows


def infer(layer: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        layer(x)


def train(layer: nn.Module, x: Tensor) -> None:
    layer.zero_grad()
    layer(x)[0].sum().backward()


def layer_speed(device: str, rounds: int) -> list[Row]:
    """Milliseconds of a QRNN layer, nn.LSTM and nn.GRU of the same width, inference and training."""
    rows = []
    width = LAYER_WIDTH
    layers = {
        "QRNN": QRNNLayer(width, width, 2, "fo"),
        "LSTM": nn.LSTM(width, width, batch_first=True),
        "GRU": nn.GRU(width, width, batch_first=True),
    }
    layers = {name: layer.to(device) for name, layer in layers.items()}
    for batch in tqdm(LAYER_BATCHES, desc="layer", unit="batch size"):
        for time in LAYER_LENGTHS:
            x = torch.randn(batch, time, width, device=device)
            for part, run in (("inference", infer), ("training", train)):
                times = interleaved({name: partial(run, layer, x) for name, layer in layers.items()}, rounds)
                rows += speed_rows(times, B=batch, T=time, H=width, part=part)
    return rows


def main(device: str = "cuda" if torch.cuda.is_available() else "cpu", rounds: int = 7, seed: int = 0) -> None:
    """Measure precision and speed, and write results/benchmark-<device>.json.

    Args:
        device: cpu or cuda.
        rounds: how often each time is taken; the median counts.
        seed: of the random inputs.
    """
    torch.manual_seed(seed)
    result = {
        "provenance": provenance(seed=seed, device=device),
        "precision": precision(device),
        "pooling": pooling_speed(device, rounds),
        "layer": layer_speed(device, rounds),
    }
    path = Path(__file__).parent / "results" / f"benchmark-{device}.json"
    path.parent.mkdir(exist_ok=True)
    aside = path.with_suffix(".tmp")
    aside.write_text(json.dumps(result, indent=1) + "\n")
    aside.replace(path)
    print(f"wrote results/{path.name}; `make results` brings it into the README")


if __name__ == "__main__":
    tyro.cli(main)
