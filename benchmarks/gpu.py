"""Measure on a GPU what had to be decided without one: benchmarks/gpu.sh runs the steps of this module.

    python -m benchmarks.gpu STEP FOLDER

Each step writes FOLDER/STEP.json, anew after every comparison: what is cut off loses little. What does not run leaves a
row that says why. All steps but `bradbury` and `training_steps` need no package but PyTorch (`tests`: and pytest).
"""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import product
from multiprocessing.synchronize import Barrier
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from benchmarks.gpu_ways import WAYS, Way, pooling_call, problem_of, way
from benchmarks.instruments import Call, Row, Shape, interleaved, speed_rows
from benchmarks.peers import one_line
from lab.parser import Parser
from lab.provenance import provenance
from qrnn_layer import QRNNLayer

ROOT = Path(__file__).parents[1]
TESTS = ROOT / "tests" / "library" / "test_cuda.py"


@dataclass(frozen=True)
class Plan:
    """Hold the sizes of everything that is measured. The budgets are seconds of rounds, for each comparison."""

    shapes: tuple[Shape, ...] = ((32, 512, 640), (8, 512, 320), (128, 32, 320), (1, 65_536, 64))
    longest_loop: int = 2048
    longest_compiled_loop: int = 32  # the compiler unrolls it
    width: int = 320  # from here on Fig. 4 of the paper
    batches: tuple[int, ...] = (8, 16, 32, 64, 128, 256)
    lengths: tuple[int, ...] = (32, 64, 128, 256, 512)
    copy_size: int = 2**28  # numbers
    matrix_size: int = 8192
    launches: int = 1000
    budget: float = 1.0
    cell_budget: float = 0.2
    backend: str = "inductor"


PLAN = Plan()


class Record:
    """Write a JSON file that says where its rows come from, anew whenever some are added."""

    def __init__(self, path: Path, device: str) -> None:
        self.path = path
        self.content: dict[str, Any] = {"provenance": provenance(seed=0, device=device)}
        if commit := os.environ.get("COMMIT"):  # a copy of the project without its history cannot tell
            self.content["provenance"] |= {"commit": commit.removesuffix("-dirty"), "dirty": commit.endswith("-dirty")}
        self.add("rows", [])

    def add(self, table: str, rows: Iterable[Row]) -> None:
        self.content.setdefault(table, []).extend(rows)
        aside = self.path.with_suffix(".json.part")  # not by `lab.checkpoint`, which needs more than PyTorch
        aside.write_text(json.dumps(self.content, indent=1) + "\n")
        aside.replace(self.path)


# --- calls on a GPU --------------------------------------------------------------------------------------------------


def graphed(call: Call) -> Call:
    """Return a call that replays all kernels of this one by a single launch."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()

    def replay() -> object:
        graph.replay()
        return result

    return replay


def allocated_mib(call: Call) -> float | None:
    """Return the MiB that PyTorch allocates on the GPU during a call, at its peak. Without a GPU: None."""
    if not torch.cuda.is_available():
        return None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


# --- step 2: which method should be "auto" ---------------------------------------------------------------------------


def limits(plan: Plan, device: str) -> list[Row]:
    """Measure what the machine can do at most: copy, multiply matrices, launch kernels."""
    source, small = torch.randn(plan.copy_size, device=device), torch.zeros(1, device=device)
    target, square = torch.empty_like(source), torch.randn(plan.matrix_size, plan.matrix_size, device=device)
    half = square.bfloat16()

    def launch() -> None:
        for _ in range(plan.launches):
            small.add_(1)

    calls: dict[str, Call] = {"copy": lambda: target.copy_(source), "launches": launch}
    calls["matrix product, bfloat16"] = lambda: half @ half
    if device == "cuda":
        calls["launches, graph"] = graphed(launch)
    rows = speed_rows(interleaved(calls, plan.budget))
    for tf32 in (False, True):
        allow_tf32(tf32)
        name = f"matrix product, {'TF32' if tf32 else 'float32'}"
        rows += speed_rows(interleaved({name: lambda: square @ square}, plan.budget))
    for row in rows:
        if row["what"] == "copy":
            row["gb_per_s"] = 8e-6 * plan.copy_size / row["ms"]
        elif "launches" in row["what"]:
            row["us_a_launch"] = 1e3 * row["ms"] / plan.launches
        else:
            row["tflop_per_s"] = 2e-9 * plan.matrix_size**3 / row["ms"]
    return rows


def allow_tf32(allowed: bool) -> None:
    """Allow or forbid TF32, for all alike: by itself PyTorch lets cuDNN's LSTM use it and `F.linear` not."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed


def not_tried(name: str, length: int, compiled: bool, plan: Plan) -> str | None:
    """Return why a way is not tried at a length. None: it is."""
    if compiled and name == "torch.associative_scan, generic":
        return "slow to compile: pointwise is compiled instead"
    limit = plan.longest_compiled_loop if compiled else plan.longest_loop
    return f"slow: not tried beyond T = {limit:,}" if name == "loop" and length > limit else None


def forms_of(call: Call, compiled: bool, device: str) -> dict[str, Callable[[], Call]]:
    """Return the forms in which to measure a call."""
    name = "compiled" if compiled else "eager"
    return {name: lambda: call} | ({f"{name}, graph": lambda: graphed(call)} if device == "cuda" else {})


def errors(result: object, wanted: object) -> list[float]:
    """Return the relative L2 error of each array: of a tensor alone, or of those in a tuple."""
    pairs = zip(tree_leaves(result), tree_leaves(wanted), strict=True)
    return [((a.double() - b).norm() / b.norm()).item() for a, b in pairs]


def method_rows(shape: Shape, compiled: bool, plan: Plan, device: str) -> list[Row]:
    """Compare all ways to pool at a shape, and a copy of an array of that shape."""
    problem, rows = problem_of(shape, device), []
    log_f, x, h0 = problem
    exact, target = (log_f.double(), x.double(), h0.double()), torch.empty_like(log_f)
    for backward, part in ((False, "forward"), (True, "forward + backward")):
        wanted = pooling_call(way("scan"), exact, backward)()
        cell = dict(zip("BTH", shape, strict=True)) | {"part": part}
        torch.compiler.reset()
        calls: dict[tuple[str, str], Call] = {("copy", "eager"): lambda: target.copy_(log_f)}
        facts: dict[tuple[str, str], dict[str, Any]] = {}
        for name, function in WAYS.items():
            reason = not_tried(name, shape[1], compiled, plan)
            if reason is not None:
                rows.append(cell | {"what": name, "skipped": reason})
                continue
            call = pooling_call(compile_way(function, plan) if compiled else function, problem, backward)
            for form, make in forms_of(call, compiled, device).items():
                try:
                    made = make()
                    facts[name, form] = {"errors": errors(made(), wanted)}
                    if "graph" not in form:  # a graph has its memory from the start
                        facts[name, form]["mib"] = allocated_mib(made)
                    calls[name, form] = made
                except Exception as error:  # prototypes and compilers: anything can go wrong
                    rows.append(cell | {"what": name, "form": form, "skipped": one_line(error)})
        for row in speed_rows(interleaved(calls, plan.budget), **cell):
            name, form = row["what"]
            rows.append(row | {"what": name, "form": form} | facts.get((name, form), {}))
    return rows


def compile_way(function: Way, plan: Plan) -> Way:
    return torch.compile(function, dynamic=False, backend=plan.backend)


def methods(plan: Plan, device: str, record: Record) -> None:
    """Measure the machine's limits, and every way to pool at every shape."""
    record.add("limits", limits(plan, device))
    allow_tf32(False)
    for compiled in (False, True):  # what takes the compiler's time comes last
        for shape in plan.shapes:
            record.add("rows", method_rows(shape, compiled, plan, device))
            print(f"methods: {shape}{', compiled' if compiled else ''}", flush=True)


# --- step 3: Fig. 4 of the paper -------------------------------------------------------------------------------------

LAYERS = ("QRNN", "LSTM")


def layer(name: str, width: int, device: str) -> nn.Module:
    """Build one of the `LAYERS`, as wide as its input."""
    torch.manual_seed(0)
    if name == "LSTM":
        return nn.LSTM(width, width, batch_first=True, device=device)
    return QRNNLayer(width, width, 2, "fo", activation="tanh", device=device)


def layer_call(module: nn.Module, x: Tensor, training: bool) -> Call:
    """Return a call that gives the output or, in training, the gradients of the parameters."""
    if not training:
        return torch.no_grad()(lambda: module(x)[0])
    parameters, weights = list(module.parameters()), torch.linspace(-1, 1, x.numel(), device=x.device).view_as(x)
    return lambda: torch.autograd.grad(module(x)[0], parameters, weights)


def part_of(training: bool) -> str:
    return "training" if training else "inference"


def cell_calls(
    length: int, training: bool, plan: Plan, device: str, compiled: bool, rows: list[Row], **labels: object
) -> Iterable[tuple[Row, dict[tuple[str, str], Call]]]:
    """Prepare the layers at all batch sizes of a length. Add to `rows` why what cannot be prepared."""
    layers = {name: layer(name, plan.width, device).train(training) for name in LAYERS}
    fixed_sizes = cast(nn.Module, torch.compile(layers["QRNN"], dynamic=False, backend=plan.backend))
    for batch in plan.batches:
        x = torch.randn(batch, length, plan.width, device=device)
        cell: Row = {"B": batch, "T": length, "H": plan.width, "part": part_of(training), **labels}
        calls: dict[tuple[str, str], Call] = {}
        for name, module in layers.items():
            forms = forms_of(layer_call(module, x, training), False, device)
            if compiled and name != "LSTM":  # the compiler leaves cuDNN's LSTM as it is
                forms |= forms_of(layer_call(fixed_sizes, x, training), True, device)
            for form, make in forms.items():
                try:
                    call = make()
                    call()
                    calls[name, form] = call
                except Exception as error:  # compilers: anything can go wrong
                    rows.append(cell | {"what": name, "form": form, "skipped": one_line(error)})
        yield cell, calls


def grid_rows(plan: Plan, device: str, lock: Path, task: tuple[int, bool]) -> list[Row]:
    """Compare the layers at a length, first with TF32. Compile at once; measure when all have, and the GPU is free."""
    rows: list[Row] = []
    allow_tf32(True)
    try:
        prepared = list(cell_calls(*task, plan, device, True, rows, tf32=True))
    finally:
        ALL_PREPARED[0].wait()
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        rows += measured_cells(prepared, plan)
        prepared.clear()
        allow_tf32(False)
        rows += measured_cells(cell_calls(*task, plan, device, False, rows, tf32=False), plan)
    return rows


def grid_rows_or_why_not(plan: Plan, device: str, lock: Path, task: tuple[int, bool]) -> list[Row]:
    try:
        return grid_rows(plan, device, lock, task)
    except Exception as error:  # too little memory, say: the other cells count
        return [{"T": task[0], "H": plan.width, "part": part_of(task[1]), "what": "all", "skipped": one_line(error)}]


def measured_cells(cells: Iterable[tuple[Row, dict[tuple[str, str], Call]]], plan: Plan) -> list[Row]:
    """Measure the calls of each cell."""
    rows = []
    for cell, calls in cells:
        for row in speed_rows(interleaved(calls, plan.cell_budget), **cell):
            name, form = row["what"]
            rows.append(row | {"what": name, "form": form})
    return rows


ALL_PREPARED: list[Barrier] = []  # one, which a process gets when it starts


def meet_at(barrier: Barrier) -> None:
    ALL_PREPARED.append(barrier)


def fig4(plan: Plan, device: str, record: Record) -> None:
    """Compare the layers in all cells. Each length and part has a process: all compile at once, and measure in turn."""
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    lock, tasks = record.path.with_name("gpu.lock"), list(product(plan.lengths, (False, True)))
    work, context = partial(grid_rows_or_why_not, plan, device, lock), multiprocessing.get_context("spawn")
    with context.Pool(len(tasks), meet_at, (context.Barrier(len(tasks)),)) as pool:
        for rows in pool.imap_unordered(work, tasks):
            record.add("rows", rows)
            print(f"fig4: T = {rows[0]['T']}, {rows[0]['part']}", flush=True)
        pool.close()
        pool.join()
    lock.unlink(missing_ok=True)


# --- step 1: the tests, while other cores fill the compiler's cache --------------------------------------------------


def tests(plan: Plan, device: str, record: Record) -> None:
    """Run tests/library/test_cuda.py; a failure stops nothing."""
    try:
        import pytest
    except ModuleNotFoundError:
        record.add("rows", [{"what": TESTS.name, "skipped": "pytest is not installed"}])
        return

    class Recorder:
        def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
            if report.when == "call" or not report.passed:
                text = {} if report.passed else {"text": str(report.longrepr)[-2000:]}
                test = report.nodeid.partition("::")[2]
                record.add("rows", [{"test": test, "outcome": report.outcome, "seconds": report.duration} | text])

    # Warnings do not fail here: PyTorch has some of its own for each GPU.
    pytest.main([str(TESTS), "-p", "no:cacheprovider", "-W", "default", "--tb=short"], plugins=[Recorder()])


def compile_method(plan: Plan, device: str, shape: Shape, name: str) -> None:
    """Compile a way to pool, both parts, which leaves the result in the compiler's cache."""
    allow_tf32(False)
    for backward in (False, True):
        torch.compiler.reset()
        pooling_call(compile_way(WAYS[name], plan), problem_of(shape, device), backward)()


def compiled_row(task: tuple[str, Callable[[], None]]) -> Row:
    """Compile in a process of its own, and return how long that took."""
    name, work = task
    started = time.perf_counter()
    try:
        work()
    except Exception as error:  # compilers: anything can go wrong
        return {"what": name, "skipped": one_line(error)}
    torch.cuda.empty_cache()  # the tests need much of the memory
    return {"what": name, "seconds": time.perf_counter() - started}


def compile_methods(plan: Plan, device: str, record: Record) -> None:
    """Fill the compiler's cache by many processes at once: one alone would take minutes."""
    tasks = [
        (f"{name} {shape}", partial(compile_method, plan, device, shape, name))
        for shape in plan.shapes
        for name in WAYS
        if not_tried(name, shape[1], True, plan) is None
    ]
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    with multiprocessing.get_context("spawn").Pool(max(1, (os.cpu_count() or 1) - 4)) as pool:
        for row in pool.imap_unordered(compiled_row, tasks):
            record.add("rows", [row])
        pool.close()
        pool.join()


# --- steps 3 and 4: language models ----------------------------------------------------------------------------------


def train(runs: dict[str, list[str]], data: Path, seconds: float, device: str, record: Record) -> None:
    """Run experiment.py with each of these flags, all at once, and stop what is not done after `seconds`.

    A run that is stopped is tested at its best epoch so far; its row says at which epoch it was stopped.
    """
    with TemporaryDirectory() as folder, ExitStack() as held:
        started, begun = {}, time.perf_counter()
        for name, flags in runs.items():
            command = [sys.executable, str(ROOT / "experiment.py"), *flags, "--name", name, "--device", device]
            log = held.enter_context((Path(folder) / f"{name}.txt").open("w"))
            started[name] = subprocess.Popen(
                [*command, "--data", str(data.resolve())], cwd=folder, stdout=log, stderr=subprocess.STDOUT
            )
        for process in started.values():
            try:
                process.wait(max(0.0, seconds - (time.perf_counter() - begun)))
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGINT)  # it evaluates, reports and ends
        for name, process in started.items():
            process.wait()
            row: Row = {"run": name, "flags": runs[name], "beside": [other for other in runs if other != name]}
            row["zoneout_in_evaluation"] = "its mean" if "qrnn" in runs[name] else None
            try:
                row["result"] = outcome(Path(folder) / "runs" / name, data, device)
            except Exception as error:  # whatever went wrong, the other runs count
                said = (Path(folder) / f"{name}.txt").read_text()
                row |= {"skipped": one_line(error), "exit_code": process.returncode, "log": said[-2000:]}
            record.add("rows", [row])
            print(f"{name}: {row.get('skipped') or row['result']['test_perplexity']}", flush=True)


def outcome(path: Path, data: Path, device: str) -> Row:
    """Return what the run of one model came to. One that was stopped has not read the test split: it does so here."""
    from experiment import LanguageModelling
    from lab.presets import Config
    from lab.run import load_best, recorded
    from lab.run_folder import RunFolder

    result = json.loads((path / "results.json").read_text())["models"][0]
    if result["test_perplexity"] is not None or not result["epochs"]:
        return result
    run = RunFolder(path)
    record = run.record("experiment")
    task = LanguageModelling(recorded(Config(data=data), record))
    model = task.build(result["model"]).to(device)
    epoch, loss = load_best(run.model(result["model"], record), model)
    return result | {"best_epoch": epoch} | task.judge(model, loss, test=True)


def flags(preset: str, model: str) -> list[str]:
    return ["--preset", preset, "--models", model]


def bradbury(models: Sequence[str], data: Path, seconds: float, device: str, record: Record) -> None:
    """Train the paper's language model on the Penn Treebank, all models at once."""
    train({model: flags("bradbury", model) for model in models}, data, seconds, device, record)


def training_steps(plan: Plan, device: str, record: Record) -> None:
    """Measure the speed of training steps of `girrbach` and `small`, in float32 and bf16."""
    from benchmarks.measure import PLAN as WHOLE
    from benchmarks.measure import experiment

    record.add("rows", experiment(WHOLE, device, plan.budget))


# --- the command line ------------------------------------------------------------------------------------------------

MEASURED = {step.__name__: step for step in (compile_methods, tests, methods, fig4, training_steps)}


def main(arguments: Sequence[str], plan: Plan = PLAN) -> int:
    """Run a step; return the exit code."""
    parser = Parser(__doc__)
    parser.add_argument("step", choices=(*MEASURED, bradbury.__name__))
    parser.add_argument("folder", type=Path, help="where STEP.json is written")
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument(
        "--data", type=Path, default=Path("data"), help="folder that holds ptb/, the Penn Treebank (data)"
    )
    parser.add_argument("--models", nargs="+", default=("qrnn", "lstm"), choices=("qrnn", "lstm"), help="of bradbury")
    parser.add_argument("--seconds", type=float, default=60.0, help="after which trainings are stopped (60)")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this machine has none that PyTorch can use; take cpu")
    if options.step not in MEASURED and not options.data.is_dir():
        print(f"{options.step}: skipped, there is no folder {options.data}")
        return 0
    options.folder.mkdir(parents=True, exist_ok=True)
    record = Record(options.folder / f"{options.step}.json", options.device)
    if options.step in MEASURED:
        MEASURED[options.step](plan, options.device, record)
    else:
        bradbury(options.models, options.data, options.seconds, options.device, record)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
