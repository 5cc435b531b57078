"""Train the models of a task one after the other in the same way, and report: what all experiments share."""

from __future__ import annotations

import contextlib
import json
import re
import sys
import time
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import torch
from accelerate import Accelerator
from torch import nn

from lab.checkpoint import CheckpointError
from lab.processes import StopSignal, agree, main_first, main_only
from lab.provenance import keep_freed_memory, provenance
from lab.report import Layout, write_report
from lab.run_folder import Content, ModelFolder, RunFolder
from lab.settings import Chosen, InputError, Networks, Settings, check_memory
from lab.state import check_weights
from lab.training import Batches, Step, Trainer, describe_time, evaluate, seconds_per_item

AnyConfig = TypeVar("AnyConfig", bound="RunConfig")
Model = TypeVar("Model", bound=nn.Module)
RUNS = Path("runs")
PATIENCE_HOURS = 2  # on a CPU, a longer run is worth a hint


@dataclass(frozen=True)
class Run:
    """Say where it goes, and how far."""

    name: str | None = None
    """Name of the run: its folder is runs/NAME. none: after the task, the preset, the corpus and the seed."""
    test: bool = True
    """Read the test split when a model is finished. --no-test: not while you still choose settings."""
    resume: bool = False
    """Go on with a run that was stopped or killed. Give the same flags as before. Without such a run start anew."""


@dataclass(frozen=True)
class RunConfig(Settings, Run, Networks, Chosen):  # in --help the fields of the last base come first
    """Hold what every experiment has on its command line.

    An experiment adds its own fields, a `preset` and a `corpus` among them.

    Attributes:
        free: fields that decide about no number: they may be others when a run is resumed.
        prefix: of a run without a name, so that experiments keep out of each other's way.
    """

    free: ClassVar[frozenset[str]] = frozenset({"name", "resume", "checkpoint_minutes"})
    prefix: ClassVar[str] = ""

    def check(self) -> None:
        """Check every value before any work starts.

        Raises:
            InputError: if one is out of range.
        """
        super().check()
        if not self.models or len(set(self.models)) < len(self.models):
            raise InputError(f"--models {' '.join(self.models) or 'with nothing'}: one or two different ones expected")
        if self.name is not None and not re.fullmatch(r"\w[\w.-]*", self.name):
            raise InputError(
                f"--name {self.name!r}: letters, digits and underscores expected, later points and dashes too"
            )

    @property
    def folder(self) -> Path:
        return RUNS / (self.name or f"{self.prefix}{self.preset}-{self.corpus}-{self.seed}")

    @property
    def experiment(self) -> str:
        """Name the experiment, by which its runs are told from those of others."""
        return self.prefix.rstrip("-") or "experiment"

    def deciding(self) -> dict[str, Any]:
        """Return the fields that decide about the numbers, as JSON values."""
        return json.loads(json.dumps({name: value for name, value in asdict(self).items() if name not in self.free}))


class Task(ABC, Generic[Model]):
    """Say what an experiment brings: the data, the models of type `Model`, and what to say of them.

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
    def build(self, name: str) -> Model:
        """Return the model of the name, initialised from the seed; its `hidden` is the width of its layers."""

    @abstractmethod
    def recurrent(self, model: Model) -> nn.Module:
        """Return the part of a model that is compared; the rest is the same in all."""

    @abstractmethod
    def judge(self, model: Model, valid_loss: float, test: bool) -> dict[str, Any]:
        """Return what the result of a model says beside what is measured in training, as JSON values.

        Args:
            model: with the weights of its best epoch, or where it was interrupted.
            valid_loss: of these weights.
            test: whether to read the test split: training is over, and nobody said --no-test.
        """

    def validate(self, model: nn.Module) -> float:
        """Compute the validation loss, by which the best epoch is chosen."""
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
        InputError, CorpusError, CheckpointError: if the run cannot start; nothing was overwritten.
        TrainingError, OSError: if it cannot go on; nothing that was written is lost.
        ElsewhereError: if one of these came up in another process.
    """
    accelerator = Accelerator(cpu=config.device == "cpu")
    keep_freed_memory()
    folder = RunFolder(config.folder)
    main_first(accelerator, lambda: folder.look(config.experiment, config.resume))  # before data takes its time
    task = main_first(accelerator, lambda: prepare(accelerator.num_processes))
    check_sizes(task, accelerator.device)
    with contextlib.ExitStack() as held:

        def begin() -> None:
            held.enter_context(folder.locked())
            before = folder.look(config.experiment, config.resume)  # again: nobody else writes now
            record = new_record(task, accelerator.num_processes)
            if before is not None:
                check_same(config, record, before)
            elif config.resume:
                print(f"{folder.path}: nothing to resume there; starting anew")
            folder.begin(before or record, task.files)

        main_only(accelerator, begin)
        record = main_first(accelerator, lambda: folder.record(config.experiment))
        return train_all(task, accelerator, folder, record)


def train_all(task: Task, accelerator: Accelerator, folder: RunFolder, record: Content) -> int:
    """Train the models that are not finished, and report on all; see `run`."""
    config, results, main = task.config, [], accelerator.is_main_process
    folders: dict[str, ModelFolder] = {name: folder.model(name, record) for name in config.models}
    finished = main_first(accelerator, lambda: {name: mine.finished(main) for name, mine in folders.items()})
    left = {name: mine for name, mine in folders.items() if finished[name] is None}
    origin = provenance(seed=config.seed, device=accelerator.device.type) if main else {}
    main_only(accelerator, lambda: folder.sign(record, origin, bool(left)))
    announce(task, accelerator, left)
    with StopSignal() as stop:
        for name, mine in folders.items():
            results.append(finished[name] or train_model(task, name, mine, stop))
            if any(agree(accelerator, stop.requested)):
                break
        interrupted = len(results) < len(config.models) or results[-1]["interrupted_at_epoch"] is not None

    def report() -> None:
        logs = {name: mine.log for name, mine in folders.items() if mine.log}
        table = write_report(folder.path, record, task.layout, config.names, results, logs, interrupted, origin)
        go_on = " Go on with --resume." if interrupted else ""
        print(f"\n{table}\n\nThe report is {folder.path / 'report.md'}.{go_on}")

    main_only(accelerator, report)
    return 130 if interrupted else 0


def new_record(task: Task, processes: int) -> Content:
    """Return what config.json holds: all that decides about the numbers."""
    record = {"experiment": task.config.experiment, "corpus": task.fingerprint, "processes": processes}
    return json.loads(json.dumps(record)) | {"config": task.config.deciding()}


def check_same(config: RunConfig, mine: Content, theirs: Content) -> None:
    """Check that the run to be resumed is this one.

    Raises:
        InputError: if it is another.
    """
    pairs = [("processes", mine["processes"], theirs["processes"])]
    for part in ("config", "corpus"):
        names = [name for name in mine[part] | theirs[part] if name != "source"]
        pairs += [(name, mine[part].get(name), theirs[part].get(name)) for name in names]
    different = [f"{name} {old!r} became {new!r}" for name, new, old in pairs if new != old]
    if different:
        raise InputError(f"{config.folder} was started with other settings: {', '.join(different)}")


def check_sizes(task: Task, device: torch.device) -> None:
    """Check that every model can be trained, before one is built.

    Raises:
        InputError: if the memory does not hold one.
    """
    for name in task.config.models:
        with torch.device("meta"):  # shapes only
            parameters = count_parameters(task.build(name))
        what = f"{name} with --layers {task.config.layers}, --hidden {task.config.hidden}"
        check_memory(f"{what}, --embedding {task.config.embedding}", parameters, device)


def announce(task: Task, accelerator: Accelerator, folders: dict[str, ModelFolder]) -> None:
    """Print what will be trained, in which folders, and about how long it takes."""
    config, data, unit = task.config, task.fingerprint, task.layout.unit
    accelerator.print(f"{data['name']}: {len(task.train):,} batches, {task.train.tokens:,} {unit} an epoch")
    asked = getattr(config, "vocabulary", None)
    if asked is not None and data["vocabulary"] < asked:
        accelerator.print(f"--vocabulary {asked:,}: the training text has {data['vocabulary']:,} words; all are known")
    lines, seconds = [], []
    for name, folder in folders.items():
        model = task.build(name)  # built again, from the seed, to be trained
        step = seconds_per_item(model, task.step, task.train, config)
        epoch = step * task.train.tokens + evaluation_seconds(task, model) * task.valid.tokens
        seconds.append(epoch * max(0, config.epochs - folder.steps() / len(task.train)))
        lines.append(
            f"{name}: {count_parameters(task.recurrent(model)):,} recurrent parameters of "
            f"{count_parameters(model):,}, {1 / step:,.0f} {unit}/s, about"
        )
    seconds = rounded(seconds)
    for line, mine in zip(lines, seconds, strict=True):
        accelerator.print(f"{line} {describe_time(mine)}")
    what = "What is left" if config.resume else "The whole run"
    accelerator.print(f"{what} will take about {describe_time(sum(seconds))}; {config.folder} is its folder.")
    if accelerator.device.type == "cpu" and sum(seconds) > PATIENCE_HOURS * 3600 and task.hint:
        accelerator.print(task.hint)


def rounded(seconds: list[float]) -> list[float]:
    """Round all to minutes, or all to seconds if they are few, so that what is printed adds up."""
    unit = 60 if sum(seconds) >= 100 else 1
    return [unit * max(1, round(each / unit)) for each in seconds]


def count_parameters(module: nn.Module) -> int:
    """Count what is trained."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def lstm_width(hidden: int, build_qrnn: Callable[[int], nn.Module], build_lstm: Callable[[int], nn.Module]) -> int:
    """Return the width that brings the LSTM's number of parameters closest to the QRNN's.

    Args:
        hidden: the width of the QRNN.
        build_qrnn, build_lstm: width -> what is counted; on the meta device, where there are shapes only.
    """

    def count(width: int) -> int:
        return count_parameters(build_lstm(width))

    with torch.device("meta"):
        target = count_parameters(build_qrnn(hidden))
        upper = 1
        while count(upper) < target:
            upper *= 2
        above = bisect_left(range(1, upper + 1), target, key=count) + 1
        return min(max(above - 1, 1), above, key=lambda width: abs(count(width) - target))


def evaluation_seconds(task: Task, model: nn.Module) -> float:
    """Measure the seconds that evaluating an item takes."""
    evaluate(model, task.step, task.head)  # the first time is slower
    started = time.perf_counter()
    evaluate(model, task.step, task.head)
    return (time.perf_counter() - started) / task.head.tokens


def train_model(task: Task, name: str, folder: ModelFolder, stop: StopSignal) -> dict[str, Any]:
    """Train one model and, when it is finished, test it at its best epoch."""
    model = task.build(name)
    trainer = Trainer(model, task.step, task.train, task.config, task.layout.unit)
    outcome = trainer.run(folder, task.validate, stop, name, task.layout.convert)
    progress, loss, accelerator = outcome.progress, outcome.interrupted_loss, trainer.accelerator
    best_epoch: float  # a whole number unless the model was interrupted
    if loss is None or progress.best_loss <= loss:
        best_epoch, best_loss = main_first(
            accelerator, lambda: load_best(folder, model, training=accelerator.is_main_process)
        )
        if best_epoch < progress.best_epoch and accelerator.is_main_process:
            print(f"{name}: the weights of epoch {progress.best_epoch}, the best, are lost", file=sys.stderr)
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
    if loss is None:
        main_only(accelerator, lambda: folder.finish(result))
    return result


def load_best(folder: ModelFolder, model: nn.Module, training: bool = False) -> tuple[int, float]:
    """Put the best weights into the model; return their epoch, counted from 1, and validation loss.

    Args:
        folder: of the model.
        model: of the same form.
        training: whether this process holds the lock of the run.

    Raises:
        CheckpointError: if there are none that are undamaged.
    """

    def accept(weights: dict[str, torch.Tensor], state: dict[str, Any]) -> None:
        if type(state["epoch"]) is not int or type(state["valid_loss"]) is not float:
            raise CheckpointError("no epoch, no loss")
        check_weights(model, weights)
        model.load_state_dict(weights)

    found = folder.load("best", accept, training)
    if found is None:
        raise CheckpointError(f"{folder.path} holds no best checkpoint; train to the end of an epoch first")
    return found[1]["epoch"], found[1]["valid_loss"]


def recorded(config: AnyConfig, record: Content) -> AnyConfig:
    """Return the settings of a run, and from `config` those that decide about no number.

    Raises:
        InputError: if the run is of another version of the program, with other settings.
    """
    settings, known = record["config"], config.deciding()
    if settings.keys() != known.keys():
        names = ", ".join(sorted(settings.keys() ^ known.keys()))
        raise InputError(f"{config.folder} is of another version of the program, with other settings: {names}")
    return replace(config, **settings)
