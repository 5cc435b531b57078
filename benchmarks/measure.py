"""Measure how exact and how fast pooling and layers are: `python -m benchmarks` does it.

The numbers go into research/results/benchmark-DEVICE.json; benchmarks/tables.py makes tables of them.

Every time is the median of rounds in which the compared things take turns, so that a busy machine slows all of them
alike; what to read are the ratios, not the milliseconds. Memory is handed out as the system does it by default, but in
`layer_kept` and `experiment`, which keep what is freed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.instruments import Call, Row, Shape, interleaved, peak_mib, speed_rows, time_by_kind
from benchmarks.peers import (
    LOOPS,
    PEERS,
    QUADRATIC,
    WAYS,
    Missing,
    Way,
    compiled,
    indexing_loop_by_autograd,
    load,
    loop_by_autograd,
    one_line,
    versions,
)
from benchmarks.record import INFERENCE, RESULTS, STACK, STACKED, STEP
from experiment import build_model
from lab.batches import SentenceBatches
from lab.checkpoint import write_file
from lab.language_model import next_word_loss
from lab.parser import Parser
from lab.presets import PRESETS, Config
from lab.provenance import keep_freed_memory, provenance
from lab.settings import InputError
from lab.training import Trainer
from qrnn import QRNN
from qrnn.convolution import SHORT_FILTER_ROWS
from qrnn.fast import FastQRNNLayer
from qrnn.onednn import linear
from qrnn_layer import QRNNState, pool

ROOT = Path(__file__).parents[1]
Problem = tuple[Tensor, Tensor]  # log_f and log_x, (B, T, H) both


class TimeFirst(FastQRNNLayer):
    """Call a layer of mode "fo" with tanh as nn.LSTM is called: time first, also in memory."""

    def __init__(self, width: int, kernel_size: int) -> None:
        super().__init__(width, width, kernel_size, "fo", activation="tanh")

    def forward(
        self, x: Tensor, state: QRNNState | None = None, lengths: Tensor | Sequence[int] | None = None
    ) -> tuple[Tensor, QRNNState]:
        h, state = super().forward(x.transpose(0, 1), state, lengths)
        return h.transpose(0, 1), state


LAYERS: dict[str, Callable[[int], nn.Module]] = {
    "QRNN": lambda width: TimeFirst(width, 2),
    "QRNN, k = 1": lambda width: TimeFirst(width, 1),
    "LSTM": lambda width: nn.LSTM(width, width),
    "GRU": lambda width: nn.GRU(width, width),
    STACK: lambda width: QRNN(width, width, first_kernel_size=2, activation="tanh"),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
progress = partial(tqdm, mininterval=0.5 if sys.stderr.isatty() else 60)
SENTENCE = 25  # words, about the mean of WikiText-2


class Grid(NamedTuple):
    """Name the layers to compare, as wide as their input, and where."""

    widths: tuple[int, ...]
    cells: tuple[tuple[int, int], ...]  # B and T
    parts: tuple[str, ...]
    layers: tuple[str, ...]
    memory: bool = False  # whether to measure that as well, of the QRNN and the LSTM


WIDTHS = (64, 208, 320, 640)
LAYER_GRID = Grid(
    WIDTHS,
    ((8, 32), (8, 512), (32, 128), (128, 32), (128, 128)),
    (STACKED, INFERENCE),
    ("QRNN", "QRNN, k = 1", "LSTM", "GRU"),
    memory=True,
)
STEP_GRID = Grid(WIDTHS, ((1, 1), (32, 1)), (STEP,), ("QRNN", "QRNN, k = 1", STACK, "LSTM", "GRU"))
KEPT_GRID = Grid((208, 320, 640), ((32, 128),), (STACKED, INFERENCE), ("QRNN", "LSTM"))
FIGURE_4 = tuple(product((8, 16, 32, 64, 128, 256), (32, 64, 128, 256, 512)))
PAPER_GRID = Grid((320,), FIGURE_4, (INFERENCE, STACKED), ("QRNN", "LSTM"))


@dataclass(frozen=True)
class Plan:
    """Hold the sizes of everything that is measured."""

    precision_lengths: tuple[int, ...] = (128, 1024, 16_384)
    precision_biases: tuple[float, ...] = (-6.0, -2.0, 0.0, 6.0)
    pool_shapes: tuple[Shape, ...] = (
        *((65_536 // time, time, 64) for time in (32, 512, 16_384, 65_536)),
        (32, 128, 640),
    )
    longest_loop: int = 2048
    compiled_shapes: tuple[Shape, ...] = ((32, 128, 640),)  # compiling takes minutes each
    pool_memory_shape: Shape = (32, 128, 640)  # where that of every way is measured
    threads: tuple[int, ...] = (1, 2)  # of a CPU, for the grids
    grid: Grid = LAYER_GRID
    step_grid: Grid = STEP_GRID
    kept_grid: Grid = KEPT_GRID
    paper_grid: Grid = PAPER_GRID
    largest_gru: int = 4096 * 320  # B T H: on a CPU it is the slowest of all
    presets: tuple[Config, ...] = (PRESETS["girrbach"], PRESETS["small"])
    scaling_shapes: tuple[Shape, ...] = (
        *((65_536 // time, time, 64) for time in (32, 512, 16_384, 65_536)),
        *((batch, 512, 64) for batch in (1, 8, 32, 512)),
    )
    roofline_shape: Shape = (32, 512, 640)
    matrix_size: int = 4096
    profile_shapes: tuple[Shape, ...] = tuple((32, 128, width) for width in WIDTHS)
    processes: tuple[int, ...] = (1, 2, 1, 2)
    process_flags: str = "--preset small --corpus synthetic --vocabulary None --epochs 1 --models qrnn"


PLAN = Plan()


# --- exactness -------------------------------------------------------------------------------------------------------


def gates(shape: Shape, bias: float, device: str, dtype: torch.dtype = torch.float32) -> Problem:
    """Return log_f and log_x as a layer of mode "fo" with softplus makes them, from random numbers."""
    a = torch.randn(shape, device=device) + bias
    log_x = F.logsigmoid(-a) + F.softplus(torch.randn(shape, device=device)).log()
    return F.logsigmoid(a).to(dtype), log_x.to(dtype)


def gradients(way: Way, problem: Problem, weights: Tensor) -> tuple[Tensor, ...]:
    """Return the gradients of log_f and log_x, by a forward and a backward pass."""
    leaves = [array.detach().requires_grad_() for array in problem]
    return torch.autograd.grad(way(*leaves), leaves, weights)


def precision(plan: Plan, device: str, budget: float) -> list[Row]:
    """Measure the largest relative error of h and the relative L2 error of the gradient of log_f.

    Both are held against the loop in float64.
    """
    rows = []
    for time in progress(plan.precision_lengths, desc="precision", unit="length"):
        for bias in plan.precision_biases:
            problem = gates((2, time, 16), bias, device)
            weights = torch.randn_like(problem[0])
            doubles = problem[0].double(), problem[1].double()
            want = pool(*doubles, method="loop")
            want_gradient = gradients(loop_by_autograd, doubles, weights.double())[0]
            for name, way in WAYS.items():
                if way is indexing_loop_by_autograd:  # rounds as the other loop does, and takes minutes
                    continue
                error = ((way(*problem).double() - want).abs() / want).max().item()
                gradient = gradients(way, problem, weights)[0].double()
                rows.append(
                    {"T": time, "gate bias": bias, "method": name, "forward": error}
                    | {"gradient": ((gradient - want_gradient).norm() / want_gradient.norm()).item()}
                )
    return rows


# --- pooling ---------------------------------------------------------------------------------------------------------


def pool_call(shape: Shape, name: str, dtype: str, backward: bool, device: str) -> Call:
    """Return a call that pools random gates in one way, forward alone or with the backward pass.

    Raises:
        Missing: if the way cannot run on this device.
    """
    return call_way(load(name, device), gates(shape, 0.0, device, DTYPES[dtype]), backward)


def call_way(way: Way, problem: Problem, backward: bool) -> Call:
    if backward:
        return partial(gradients, way, problem, torch.randn_like(problem[0]))
    return torch.no_grad()(partial(way, *problem))


def try_way(way: Way, problem: Problem) -> None:
    """Check that a way runs on a problem, and that it computes the right thing.

    Raises:
        Missing: if it does not.
    """
    try:
        gradients(way, problem, torch.ones_like(problem[0]))
        h = way(*problem).double()
    except Exception as error:  # other people's code: anything can go wrong
        raise Missing(one_line(error)) from error
    want = pool(*problem).double()
    off = ((h - want).norm() / want.norm()).item()
    if not off < 0.1:  # the plain closed form is off by 2 % at T = 65,536
        raise Missing(f"wrong: relative error {off:.0e}")


def runnable(loaders: dict[str, Callable[[], Way]], problem: Problem) -> tuple[dict[str, Way], list[Row]]:
    """Return the ways to pool that run on a problem, and a row with the reason for each that does not."""
    ways, skipped = {}, []
    for name, loader in loaders.items():
        try:
            way = loader()
            try_way(way, problem)
            ways[name] = way
        except Missing as reason:
            skipped.append({"what": name, "skipped": str(reason)})
    return ways, skipped


def loaders(plan: Plan, shape: Shape, device: str) -> dict[str, Callable[[], Way]]:
    """Return what to try at a shape. Compiling takes too long to do it at every one."""
    tried: dict[str, Callable[[], Way]] = {name: partial(load, name, device) for name in (*WAYS, *PEERS)}
    longest = QUADRATIC | {name: min(plan.longest_loop, QUADRATIC.get(name, plan.longest_loop)) for name in LOOPS}
    tried |= {name: partial(too_long, limit) for name, limit in longest.items() if shape[1] > limit}
    if device == "cuda" and shape in plan.compiled_shapes:
        tried |= compiled()
    return tried


def too_long(limit: int) -> Way:
    """Load nothing, for a way that is too slow at this length.

    Raises:
        Missing: always.
    """
    raise Missing(f"slow: not tried beyond T = {limit:,}")


def pooling(plan: Plan, device: str, budget: float) -> list[Row]:
    """Measure milliseconds and memory of every way to pool."""
    rows = []
    dtypes = ("float32", "bfloat16") if device == "cuda" else ("float32",)
    cells = [(shape, dtype) for shape in plan.pool_shapes for dtype in dtypes]
    for shape, dtype in progress(cells, desc="pooling", unit="cell"):
        problem = gates(shape, 0.0, device, DTYPES[dtype])
        ways, skipped = runnable(loaders(plan, shape, device), problem)
        cell = dict(zip("BTH", shape, strict=True)) | {"dtype": dtype}
        rows += [cell | row for row in skipped]
        for part, backward in (("forward", False), ("forward + backward", True)):
            calls = {name: call_way(way, problem, backward) for name, way in ways.items()}
            new = speed_rows(interleaved(calls, budget), **cell, part=part)
            for row in new:
                named = row["what"] in (*WAYS, *PEERS)  # the compiled ones are not
                if backward and named and (row["what"] == "auto" or shape == plan.pool_memory_shape):
                    row["mib"] = peak_mib(pool_call, shape, row["what"], dtype, backward, device=device)
            rows += new
    return rows


# --- layers ----------------------------------------------------------------------------------------------------------


def layer_call(shape: Shape, name: str, part: str, device: str) -> Call:
    """Return a call of a layer as wide as its input, on random numbers. Step by step it carries the state on."""
    batch, time, width = shape
    layer = LAYERS[name](width).to(device)
    x = torch.randn(time, batch, width, device=device, requires_grad=part == STACKED)
    if part == INFERENCE:
        return torch.no_grad()(partial(layer.eval(), x))
    if part == STEP:
        return torch.no_grad()(Steps(layer.eval(), x))
    weights = torch.randn(time, batch, width, device=device)
    return lambda: torch.autograd.grad(layer(x)[0], [x, *layer.parameters()], weights)


class Steps:
    """Call a layer again and again with the state that it left."""

    def __init__(self, layer: nn.Module, x: Tensor) -> None:
        self.layer, self.x, self.state = layer, x, None

    def __call__(self) -> None:
        _, self.state = self.layer(self.x, self.state)


def layer_rows(shape: Shape, names: Sequence[str], part: str, memory: bool, device: str, budget: float) -> list[Row]:
    calls = {name: layer_call(shape, name, part, device) for name in names}
    rows = speed_rows(interleaved(calls, budget), **dict(zip("BTH", shape, strict=True)), part=part)
    for row in rows:
        if memory and row["what"] in ("QRNN", "LSTM"):
            row["mib"] = peak_mib(layer_call, shape, row["what"], part, device=device)
    return rows


def grid_rows(name: str, grid: Grid, plan: Plan, device: str, budget: float) -> list[Row]:
    """Measure every cell of a grid; on a CPU with each number of threads."""
    before = torch.get_num_threads()
    counts = plan.threads if device == "cpu" else (before,)
    rows = []
    for threads, width, (batch, time), part in progress(
        list(product(counts, grid.widths, grid.cells, grid.parts)), desc=name, unit="cell"
    ):
        short = device == "cuda" or batch * time * width <= plan.largest_gru
        names = [layer for layer in grid.layers if layer != "GRU" or short]
        torch.set_num_threads(threads)
        memory = grid.memory and threads == counts[0]
        rows += layer_rows((batch, time, width), names, part, memory, device, budget)
    torch.set_num_threads(before)
    return rows


def layer(plan: Plan, device: str, budget: float) -> list[Row]:
    """Measure milliseconds and memory of a QRNN layer, nn.LSTM and nn.GRU of the same width."""
    return grid_rows("layer", plan.grid, plan, device, budget)


def step(plan: Plan, device: str, budget: float) -> list[Row]:
    """Measure milliseconds of one step after another, as in generation."""
    return grid_rows("step", plan.step_grid, plan, device, budget)


def layer_kept(plan: Plan, device: str, budget: float) -> list[Row]:
    """Measure a part of `layer` again, with freed memory kept, as experiment.py does."""
    keep_freed_memory()
    return grid_rows("layer_kept", plan.kept_grid, plan, device, budget)


def paper(plan: Plan, device: str, budget: float) -> list[Row]:
    """Measure the layer in the grid of the paper's Fig. 4."""
    return grid_rows("paper", plan.paper_grid, replace(plan, threads=(torch.get_num_threads(),)), device, budget)


def scaling(plan: Plan, device: str, budget: float) -> list[Row]:
    """Measure milliseconds and memory of training a layer, as T and B grow."""
    bar = progress(plan.scaling_shapes, desc="scaling", unit="shape")
    return [row for shape in bar for row in layer_rows(shape, ("QRNN", "LSTM"), STACKED, True, device, budget)]


# --- the language models ---------------------------------------------------------------------------------------------


def experiment(plan: Plan, device: str, budget: float) -> list[Row]:
    """Measure tokens a second of training the models of experiment.py on random words, and their recurrent layers."""
    keep_freed_memory()  # as experiment.py does
    rows = []
    for config in progress(plan.presets, desc="experiment", unit="preset"):
        for amp in (None, "bf16") if device == "cuda" else (None,):
            # epochs: a one-cycle schedule goes on for as long as the rounds do
            settings = replace(config, device=device, amp=amp, epochs=10**6)
            sentences = list(torch.randint(config.vocabulary, (config.batch_size, SENTENCE)))
            batches = SentenceBatches(sentences, config.batch_size)
            batch = next(batches.epoch(0))
            models = {name: build_model(settings, name, config.vocabulary) for name in ("qrnn", "lstm")}
            trainers = {name: Trainer(model, next_word_loss, batches, settings) for name, model in models.items()}
            updates: dict[str, Call] = {name: partial(trainer.update, batch) for name, trainer in trainers.items()}
            parts = {"training": updates}
            if amp is None:
                x = torch.randn(*batch.inputs.shape, config.embedding, device=device, requires_grad=True)
                parts["recurrent layers alone"] = {name: stack_call(model.rnn, x) for name, model in models.items()}
            for part, calls in parts.items():
                for row in speed_rows(interleaved(calls, budget), preset=config.preset, part=part, amp=amp):
                    rows.append(
                        row | {"hidden": models[row["what"]].hidden, "tokens_per_s": 1e3 * batches.tokens / row["ms"]}
                    )
    return rows


def stack_call(stack: nn.Module, x: Tensor) -> Call:
    """Return a call of a stack forward and backward, with the gradient of the input."""
    return lambda: torch.autograd.grad(stack(x)[0].sum(), [x, *stack.parameters()])


def processes(plan: Plan, device: str, budget: float) -> list[Row]:
    """Measure tokens a second of experiment.py under torchrun. Each process has a core or a GPU of its own.

    The global batch is the same. The artificial language has a small softmax: what processes send each other is then
    much of the cost.
    """
    rows = []
    most = torch.cuda.device_count() if device == "cuda" else os.cpu_count() or 1
    counts = [count for count in plan.processes if count <= most]
    for turn, count in enumerate(progress(counts, desc="processes", unit="run")):
        with TemporaryDirectory() as folder:
            launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
            command = [*launcher, str(ROOT / "experiment.py"), *plan.process_flags.split()]
            command += ["--device", device, "--name", "run"]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True)
            result = json.loads((Path(folder) / "runs" / "run" / "results.json").read_text())["models"][0]
        rows.append({"processes": count, "turn": turn, "tokens_per_s": result["tokens_per_second"]})
    return rows


# --- the machine's limits --------------------------------------------------------------------------------------------


def roofline(plan: Plan, device: str, budget: float) -> list[Row]:
    """Hold pooling and a layer against the bandwidth of a copy and the rate of matrix products, measured beside them.

    Bytes are the least that any implementation moves: in each pass every argument read once, every result written once.
    FLOPs are those of the definition, exponentials not counted.
    """
    shape, size = plan.roofline_shape, plan.matrix_size
    source = torch.randn(4 * torch.Size(shape).numel(), device=device)
    target, square = torch.empty_like(source), torch.randn(size, size, device=device)
    problem = gates(shape, 0.0, device)
    states, weights = problem[0].numel(), sum(parameter.numel() for parameter in LAYERS["QRNN"](shape[2]).parameters())
    products = 2 * shape[0] * shape[1] * weights
    calls = {  # name: call, arrays' elements moved, FLOPs
        "copy": (lambda: target.copy_(source), 2 * source.numel(), 0),
        "matrix product": (lambda: linear(square, square), 3 * size**2, 2 * size**3),
        "pooling, forward": (call_way(WAYS["auto"], problem, False), 3 * states, 2 * states),
        "pooling, forward + backward": (call_way(WAYS["auto"], problem, True), 9 * states, 7 * states),
        "layer, inference": (layer_call(shape, "QRNN", INFERENCE, device), 2 * states + weights, products),
        f"layer, {STACKED}": (layer_call(shape, "QRNN", STACKED, device), 5 * states + 3 * weights, 3 * products),
    }
    rows: list[Row] = []
    if device == "cuda":
        ways, rows = runnable(compiled(), problem)
        for name, way in ways.items():
            calls[f"pooling, forward: {name}"] = call_way(way, problem, False), 3 * states, 2 * states
    times = interleaved({name: call for name, (call, _, _) in calls.items()}, budget)
    for row in speed_rows(times, **dict(zip("BTH", shape, strict=True))):
        _, elements, flops = calls[row["what"]]
        rows.append(row | {"gb_per_s": 4e-6 * elements / row["ms"], "gflop_per_s": 1e-6 * flops / row["ms"]})
    return rows


def profile(plan: Plan, device: str, budget: float) -> list[Row]:
    """Measure where the time of a layer goes, and at what share of the machine's rate its matrix products run."""
    square = torch.randn(plan.matrix_size, plan.matrix_size, device=device)
    timed = interleaved({"matrix product": lambda: linear(square, square)}, budget)
    rate = 2 * plan.matrix_size**3 / (1e-3 * speed_rows(timed)[0]["ms"])
    rows = []
    for shape in progress(plan.profile_shapes, desc="profile", unit="shape"):
        for part, passes in ((INFERENCE, 1), (STACKED, 3)):
            seconds = time_by_kind(layer_call(shape, "QRNN", part, device), device)
            tokens, width = shape[0] * shape[1], shape[2]
            short = device == "cpu" and tokens >= SHORT_FILTER_ROWS
            flops = passes * 2 * tokens * 3 * width * width * (1.5 if short else 2)  # products for a step: 3/2, or 2
            cell = dict(zip("BTH", shape, strict=True)) | {"part": part, "threads": torch.get_num_threads()}
            for kind, time in seconds.items():
                rows.append(cell | {"what": kind, "share": time / sum(seconds.values())})
                if kind == "matrix products":
                    rows[-1]["of_machine"] = flops / time / rate
    return rows


# --- the command line ------------------------------------------------------------------------------------------------

TABLES = {  # the last two change how the system hands out memory
    table.__name__: table
    for table in (
        precision, pooling, layer, step, paper, scaling, roofline, profile, processes, layer_kept, experiment
    )
}  # fmt: skip
FOR_GPUS = ("paper",)  # on a CPU only if asked for


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Return the options; a wrong one ends the program with a line."""
    parser = Parser(__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--budget", type=float, default=2.0, help="seconds of rounds for each comparison (2); 3 rounds at least"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random inputs (0)")
    parser.add_argument(
        "--only", nargs="+", choices=TABLES, metavar="TABLE", help=f"of {', '.join(TABLES)}; keep others"
    )
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this machine has none that PyTorch can use; take cpu")
    if not options.budget >= 0:
        parser.error(f"--budget {options.budget}: at least 0 expected")
    return options


def kept(path: Path, origin: dict[str, Any]) -> dict[str, Any]:
    """Return what the file already holds.

    Raises:
        InputError: if it was made by another commit, machine or setting.
    """
    if not path.exists():
        return {"provenance": origin}
    content = json.loads(path.read_text())
    before = content["provenance"]
    different = [key for key in origin if key != "command" and origin[key] != before.get(key)]
    if different:
        raise InputError(f"--only: {path.name} differs in {', '.join(different)}; measure all tables")
    return content | {"provenance": before | {"command": f"{before['command']}; {origin['command']}"}}


def main(arguments: Sequence[str], plan: Plan = PLAN, folder: Path = RESULTS) -> int:
    """Measure, and write the file; return the exit code: 0, or 2 if the input was wrong."""
    options = parse(arguments)
    path = folder / f"benchmark-{options.device}.json"
    origin = provenance(seed=options.seed, device=options.device)
    origin |= {"budget_s": options.budget, "peers": versions()}
    try:
        content: dict[str, Any] = kept(path, origin) if options.only else {"provenance": origin}
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    folder.mkdir(exist_ok=True)
    aside = path.with_suffix(".json.part")  # what is on record stays until all of it is measured
    default = [name for name in TABLES if options.device == "cuda" or name not in FOR_GPUS]
    for table in (name for name in TABLES if name in (options.only or default)):
        torch.manual_seed(options.seed)
        content[table] = TABLES[table](plan, options.device, options.budget)
        write_file(aside, json.dumps(content, indent=1) + "\n")
    aside.replace(path)
    print(f"wrote {folder.name}/{path.name}; `make results` brings it into the pages")
    return 0
