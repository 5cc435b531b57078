"""Train the models of a task one after the other in the same way, and report: what all experiments share."""

from __future__ import annotations

import contextlib
import json
import re
import sys
import time
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from accelerate import Accelerator
from filelock import FileLock, Timeout
from torch import nn

from lab.checkpoint import CheckpointError, load_checkpoint, write_file
from lab.provenance import keep_freed_memory, provenance
from lab.report import Layout, describe_time, write_report
from lab.settings import InputError, Settings
from lab.training import Batches, Step, StopSignal, Trainer, agree, evaluate, seconds_per_item

RUNS = Path("runs")
PATIENCE_HOURS = 2  # on a CPU, a longer run is worth a hint
# when a run is resumed
FREE_TO_CHANGE = ("data", "glove", "name", "resume", "generate", "translate", "checkpoint_minutes")


@dataclass(frozen=True)
class Run:
    """What is trained, and where it goes."""

    models: tuple[Literal["qrnn", "lstm"], ...] = ("qrnn", "lstm")
    """Which models to train, in this order."""
    name: str | None = None
    """Name of the run: its folder is runs/NAME. None: after the task, the preset and the seed."""
    test: bool = True
    """Read the test split when a model is finished. --no-test: not while you still choose settings."""
    resume: bool = False
    """Go on with a run that was stopped or killed. Give the same flags as before."""


@dataclass(frozen=True)
class RunConfig(Settings, Run):  # in --help the fields of the last base come first
    """What every experiment has on its command line; it adds its own fields, and a `preset`."""

    prefix: ClassVar[str] = ""  # of a run without a name, so that experiments keep out of each other's way

    def check(self) -> None:
        """Raises InputError: a value out of range."""
        super().check()
        if not self.models or len(set(self.models)) < len(self.models):
            raise InputError(f"--models {' '.join(self.models)}: one or two different ones expected")
        if self.name is not None and not re.fullmatch(r"\w[\w.-]*", self.name):
            raise InputError(
                f"--name {self.name}: letters, digits and underscores expected, later points and dashes too"
            )

    @property
    def folder(self) -> Path:
        return RUNS / (f"{self.prefix}{self.preset}-{self.seed}" if self.name is None else self.name)


class Task(ABC):
    """What an experiment brings: the data, the models, and what to say of them.

    Attributes:
        config: checked.
        train, valid: the batches of two splits; the third is read by `judge`.
        head: a little of `valid`, to estimate the time that all of it takes.
        fingerprint: of the data, as JSON values: "name", "source" and all that a resumed run must find unchanged.
        files: name -> text, to be kept in the folder of the run.
        step: what a batch costs, see `training.Step`.
        layout: of the report.
        hint: what to say to someone who starts a long run on a CPU.
    """

    config: RunConfig
    train: Batches
    valid: Batches
    head: Batches
    fingerprint: dict[str, Any]
    files: dict[str, str]
    step: Step
    layout: Layout
    hint: ClassVar[str] = ""

    @abstractmethod
    def build(self, name: str) -> nn.Module:
        """The model of the name, initialised from the seed; its attribute `hidden` is the width of its layers."""

    @abstractmethod
    def recurrent(self, model: nn.Module) -> nn.Module:
        """The part of a model that is compared; the rest is the same in all."""

    @abstractmethod
    def judge(self, model: nn.Module, valid_loss: float, test: bool) -> dict[str, Any]:
        """What the result of a model says beside what is measured in training, as JSON values.

        Args:
            model: with the weights of its best epoch, or where it was interrupted.
            valid_loss: of these weights.
            test: whether to read the test split: training is over, and nobody said --no-test.
        """

    def validate(self, model: nn.Module) -> float:
        """The validation loss, by which the best epoch is chosen."""
        return evaluate(model, self.step, self.valid)


# --- the run ---------------------------------------------------------------------------------------------------------


def run(config: RunConfig, prepare: Callable[[int], Task]) -> int:
    """Train, evaluate and report.

    Args:
        config: checked.
        prepare: makes the task, given the number of processes; it may download or generate data.

    Returns:
        the exit code: 0, or 130 if the run was interrupted.

    Raises:
        InputError, CorpusError, CheckpointError: before anything is overwritten.
        TrainingError, OSError: nothing that was written is lost.
    """
    accelerator = Accelerator(cpu=config.device == "cpu")
    keep_freed_memory()
    record = read_record(config)
    with accelerator.main_process_first():
        task = prepare(accelerator.num_processes)
    check_same(task, accelerator.num_processes, record)
    accelerator.wait_for_everyone()  # until all have looked at the folder
    if not accelerator.is_main_process:
        return train_all(task, accelerator, {})
    if record is None:
        config.folder.mkdir(parents=True, exist_ok=True)
        for name, text in task.files.items():
            write_file(config.folder / name, text)
        record = new_record(task, accelerator.num_processes)
    with only_process(config.folder):
        origin = provenance(seed=config.seed, device=accelerator.device.type)
        return train_all(task, accelerator, sign(record, config, origin))


def train_all(task: Task, accelerator: Accelerator, origin: dict[str, Any]) -> int:
    """Train the models that are not finished, and report on all; see `run`."""
    config = task.config
    announce(task, accelerator)
    results = []
    with StopSignal() as stop:
        for name in config.models:
            results.append(finished_result(config, name) or train_model(task, name, stop))
            if any(agree(accelerator, stop.requested)):
                break
        interrupted = len(results) < len(config.models) or results[-1]["interrupted_at_epoch"] is not None
    if accelerator.is_main_process:
        table = write_report(config.folder, config, task.fingerprint, task.layout, results, interrupted, origin)
        go_on = " Go on with --resume." if interrupted else ""
        print(f"\n{table}\n\nThe report is {config.folder / 'report.md'}.{go_on}")
    return 130 if interrupted else 0


def new_record(task: Task, processes: int) -> dict[str, Any]:
    """What config.json holds: all that decides about the numbers."""
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(task.config).items()}
    return json.loads(json.dumps({"config": settings, "corpus": task.fingerprint, "processes": processes}))


def sign(record: dict[str, Any], config: RunConfig, origin: dict[str, Any]) -> dict[str, Any]:
    """Write config.json, and in it the code that runs now, not that of tomorrow.

    Returns:
        the origin of all that was trained in the folder: a run may be resumed after a change of the code.
    """
    starts = record.setdefault("starts", [])
    start = {"commit": origin["commit"], "dirty": origin["dirty"]}
    trains = not all(finished_result(config, name) for name in config.models)
    if start not in starts and (trains or not starts):
        starts.append(start)
    write_file(config.folder / "config.json", json.dumps(record, indent=1) + "\n")
    return origin | starts[-1] | {"earlier_starts": starts[:-1]}


@contextlib.contextmanager
def only_process(folder: Path) -> Iterator[None]:
    """Raises InputError: another process trains there."""
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        message = f"{folder} is being trained by another process; wait for it, or choose another --name"
        raise InputError(message) from None
    try:
        yield
    finally:
        lock.release()


def read_record(config: RunConfig) -> dict[str, Any] | None:
    """config.json of the run to be resumed; None for a new run.

    Raises:
        InputError: the folder is in use and --resume is not given, or config.json cannot be read.
    """
    path = config.folder / "config.json"
    if not config.resume and config.folder.exists() and any(config.folder.iterdir()):
        raise InputError(f"{config.folder} exists; go on with it by --resume, or choose another --name")
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text())
    except ValueError:
        raise InputError(f"{path} is damaged; start again under another --name") from None


def check_same(task: Task, processes: int, record: dict[str, Any] | None) -> None:
    """Raises InputError: the run to be resumed is another one."""
    if record is None:
        return
    mine = new_record(task, processes)
    theirs = {key: record.get(key, {}) for key in ("config", "corpus")}
    pairs = [("processes", processes, record.get("processes"))]
    for part in ("config", "corpus"):
        pairs += [(name, value, theirs[part].get(name)) for name, value in mine[part].items()]
    different = [
        f"{name} {old!r} became {new!r}"
        for name, new, old in pairs
        if new != old and name not in (*FREE_TO_CHANGE, "source")
    ]
    if different:
        raise InputError(f"{task.config.folder} was started with other settings: {', '.join(different)}")


def announce(task: Task, accelerator: Accelerator) -> None:
    """Print what will be trained and about how long it takes."""
    config, data = task.config, task.fingerprint
    unit = task.layout.unit
    accelerator.print(f"{data['name']}: {len(task.train):,} batches, {task.train.tokens:,} {unit} an epoch")
    total = 0.0
    for name in config.models:
        if (config.folder / name / "result.json").exists():
            continue
        model = task.build(name)  # built again, from the seed, to be trained
        step = seconds_per_item(model, task.step, task.train, config)
        look = evaluation_seconds(task, model)
        seconds = config.epochs * (step * task.train.tokens + look * task.valid.tokens)
        total += seconds
        recurrent = task.recurrent(model)
        accelerator.print(
            f"{name}: {count_parameters(recurrent):,} recurrent parameters of "
            f"{count_parameters(model):,}, {1 / step:,.0f} {unit}/s, about {describe_time(seconds)} from the beginning"
        )
    accelerator.print(f"The whole run will take about {describe_time(total)}; {config.folder} is its folder.")
    if accelerator.device.type == "cpu" and total > PATIENCE_HOURS * 3600 and task.hint:
        accelerator.print(task.hint)


def count_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def matched_width(target: int, build: Callable[[int], nn.Module]) -> int:
    """The width at which `build(width)` has as close to `target` parameters as it gets."""

    def count(width: int) -> int:
        with torch.device("meta"):  # shapes only
            return count_parameters(build(width))

    upper = 1
    while count(upper) < target:
        upper *= 2
    above = bisect_left(range(1, upper + 1), target, key=count) + 1
    return min(max(above - 1, 1), above, key=lambda width: abs(count(width) - target))


def evaluation_seconds(task: Task, model: nn.Module) -> float:
    """Seconds that evaluating an item takes."""
    evaluate(model, task.step, task.head)  # the first time is slower
    started = time.perf_counter()
    evaluate(model, task.step, task.head)
    return (time.perf_counter() - started) / task.head.tokens


def finished_result(config: RunConfig, name: str) -> dict[str, Any] | None:
    """What came out of a model that was finished before the run was resumed."""
    path = config.folder / name / "result.json"
    return json.loads(path.read_text()) if path.exists() else None


def train_model(task: Task, name: str, stop: StopSignal) -> dict[str, Any]:
    """Train one model and, when it is finished, test it at its best epoch."""
    folder = task.config.folder / name
    model = task.build(name)
    trainer = Trainer(model, task.step, task.train, task.config, task.layout.unit)
    outcome = trainer.run(folder, task.validate, stop, name)
    progress, loss = outcome.progress, outcome.interrupted_loss
    if loss is None or progress.best_loss <= loss:
        best_epoch, best_loss = load_best(folder, model, trainer.accelerator)
    else:  # interrupted where it was best: the weights at hand
        best_epoch, best_loss = progress.step / len(task.train), loss
    result = {
        "model": name,
        "hidden": model.hidden,
        "recurrent_parameters": count_parameters(task.recurrent(model)),
        "parameters": count_parameters(model),
        "best_epoch": best_epoch,
        **task.judge(model, best_loss, loss is None and task.config.test),
        "tokens_per_second": progress.items / progress.seconds,
        "training_seconds": progress.seconds,
        "wall_seconds": progress.wall_seconds,
        "peak_memory_bytes": progress.peak_memory,
        "interrupted_at_epoch": None if loss is None else progress.step / len(task.train),
    }
    if loss is None and trainer.accelerator.is_main_process:
        write_file(folder / "result.json", json.dumps(result, indent=1) + "\n")
    return result


def load_best(folder: Path, model: nn.Module, accelerator: Accelerator) -> tuple[int, float]:
    """Put the best weights into the model; their epoch, counted from 1, and validation loss.

    Raises:
        CheckpointError: there are none that are undamaged.
    """
    with accelerator.main_process_first():
        found = load_checkpoint(folder, "best")
    if found is None:
        raise CheckpointError(f"{folder} holds no best checkpoint; train to the end of an epoch first")
    weights, state, lines = found
    for line in lines:
        print(line, file=sys.stderr)
    model.load_state_dict(weights)
    return state["epoch"], state["valid_loss"]
