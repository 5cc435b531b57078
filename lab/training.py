"""The training loop shared by all tasks: device, mixed precision, several processes, checkpoints, resuming, logs.

It knows nothing of words. A task gives it a model, the batches and a `Step`, which says what a batch costs.
"""

from __future__ import annotations

import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from tqdm import tqdm

from lab.checkpoint import CheckpointError, State, Weights
from lab.processes import StopSignal, agree, main_first, main_only
from lab.provenance import peak_memory, reset_peak_memory
from lab.run_folder import ModelFolder, parse_log
from lab.settings import Settings
from lab.state import (
    Batch,
    Carried,
    Progress,
    check_optimizer,
    check_weights,
    generator_states,
    mapped,
    progress_from,
    set_generator_states,
    to_device,
)

LOG_LINES = 500  # lines of metrics.jsonl a run, about
TIMED_STEPS = 4  # to estimate how long a run takes
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": partial(torch.optim.AdamW, fused=True),  # one pass over the weights, not one an operation
    "adam": torch.optim.Adam,
    "rmsprop": partial(torch.optim.RMSprop, alpha=0.9),
    "sgd": torch.optim.SGD,
}
FLOOR_TOLERANCE = 1e-3  # nats: by chance a perfect model of a finite split lies this close to the exact entropy

ADVICE = "the last good checkpoint is kept; a lower --lr or --clip may help, under another --name"

# Step(model, batch, carried) -> sum of the losses, number of items they are of, what to carry.
# The batch is Any because each task has a NamedTuple of its own.
Step = Callable[[nn.Module, Any, Carried], tuple[Tensor, Tensor, Carried]]


class Batches(Protocol):
    """Give the batches of a split: `epoch(n)` must return the same ones whenever it is called with the same n."""

    carry: bool  # whether rows continue from batch to batch, so that the model's state is carried
    tokens: int  # items in an epoch

    def __len__(self) -> int: ...

    def epoch(self, n: int) -> Iterator[Batch]: ...


class TrainingError(RuntimeError):
    """Say that training cannot go on; the message is one line, and the checkpoints are good."""


class FutureLeakWarning(UserWarning):
    """Warn of a model that is better than possible."""


@dataclass(frozen=True)
class Outcome:
    """Hold what training came to.

    Attributes:
        progress: at its end.
        interrupted_loss: the validation loss where it was stopped; None if it is finished.
    """

    progress: Progress
    interrupted_loss: float | None


class Trainer:
    """Train one model.

    With several processes, each iterates over the same batches and takes its share of the rows, so that the result is
    that of one process with the same batches.

    Args:
        model: moved to the device, and compiled there, in place.
        step: what a batch costs.
        batches: of the training split.
        settings: checked already.
        unit: of the items, in the plural, for the progress bar.
    """

    def __init__(self, model: nn.Module, step: Step, batches: Batches, settings: Settings, unit: str = "items") -> None:
        self.accelerator = Accelerator(cpu=settings.device == "cpu")
        self.device = self.accelerator.device
        if self.device.type == "cuda":
            torch.set_float32_matmul_precision("high")  # TF32 for both models: by itself only nn.LSTM uses it there
        self.model = model.to(self.device)
        if settings.compile:
            self.model.compile()  # in place: the names in the state_dict stay
        self.parallel_model = self.accelerator.prepare_model(self.model)
        self.step, self.batches, self.settings, self.unit = step, batches, settings, unit
        self.optimizer = OPTIMIZERS[settings.optimizer](
            self.model.parameters(), lr=settings.lr, weight_decay=settings.weight_decay
        )
        self.log_every = max(1, settings.epochs * len(batches) // LOG_LINES)
        self.progress = Progress()
        self.carried: Carried = None
        self.unread: list[Tensor] = []  # one (3,) a step: sum of losses, items, gradient norm; reading stops a GPU
        self._resume_clock()
        torch.manual_seed(settings.seed + self.accelerator.process_index)

    # --- one step ----------------------------------------------------------------------------------------------------

    def update(self, batch: Batch) -> None:
        """Make a step of the optimiser on the mean loss of an item of the whole batch, whoever computes it."""
        learning_rate = self.settings.learning_rate(self.progress.step, len(self.batches))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        rows, share = self._share(batch)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.amp == "bf16"):
            loss, items, carried = self.step(self.parallel_model, rows, self.carried)
        loss, items = loss * share, items * share
        sums = self.accelerator.reduce(torch.stack([loss.detach().float(), items.float()]), "sum")
        # gradients are averaged over the processes: times their number, that is a sum
        self.accelerator.backward(loss * (self.accelerator.num_processes / sums[1]))
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.settings.clip or math.inf)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.carried = mapped(Tensor.detach, carried) if self.batches.carry else None
        self.unread.append(torch.stack([*sums, norm.detach().float()]))
        self.progress.step += 1
        self.progress.batch += 1

    def _share(self, batch: Batch) -> tuple[Batch, int]:
        """Return the rows of this process and the weight 1; where it has none, any row with the weight 0."""
        rank, count = self.accelerator.process_index, self.accelerator.num_processes
        share = int(rank < len(batch[0]))
        rows = slice(rank, None, count) if share else slice(0, 1)
        return to_device(type(batch)(*(tensor[rows] for tensor in batch)), self.device), share

    # --- the whole training ------------------------------------------------------------------------------------------

    def run(
        self,
        folder: ModelFolder,
        evaluate: Callable[[nn.Module], float],
        stop: StopSignal,
        label: str,
        show: Callable[[float], float] = float,
    ) -> Outcome:
        """Train to the end, or on from the last checkpoint in the folder, or until asked to stop.

        Args:
            folder: of the model; metrics.jsonl and the checkpoints "last" and "best" are kept there.
            evaluate: the model's mean validation loss of an item.
            stop: looked at after each step; with several processes, at each line of the log.
            label: of the line that is printed after each epoch.
            show: what to print in the place of a loss.

        Raises:
            CheckpointError: if there are checkpoints, none of them usable.
            OSError: if a file cannot be written; it is named.
            TrainingError: if the loss is not finite.
        """
        self._folder, self._label, self._show = folder, label, show
        main_only(self.accelerator, folder.make)
        main_first(self.accelerator, self.restore)
        reset_peak_memory(self.device)
        with tqdm(
            total=self.settings.epochs * len(self.batches),
            initial=self.progress.step,
            desc=label,
            unit="step",
            mininterval=0.5,
            disable=not (self.accelerator.is_main_process and sys.stderr.isatty()),
        ) as self._bar:
            return self._epochs(evaluate, stop)

    def _epochs(self, evaluate: Callable[[nn.Module], float], stop: StopSignal) -> Outcome:
        progress = self.progress
        self._resume_clock()
        saved = time.perf_counter()
        while progress.epoch < self.settings.epochs:
            for batch in islice(self.batches.epoch(progress.epoch), progress.batch, None):
                self.update(batch)
                self._bar.update()
                logging = progress.step % self.log_every == 0
                if logging:
                    self._log_window()
                if logging or self.accelerator.num_processes == 1:
                    due = logging and time.perf_counter() - saved > 60 * self.settings.checkpoint_minutes
                    stopping, due = agree(self.accelerator, stop.requested, due)
                    if stopping or due:
                        self._save()
                        saved = time.perf_counter()
                    if stopping:
                        return Outcome(progress, interrupted_loss=evaluate(self.model))
            self._end_epoch(evaluate)
            saved = time.perf_counter()
        return Outcome(progress, interrupted_loss=None)

    def _end_epoch(self, evaluate: Callable[[nn.Module], float]) -> None:
        progress = self.progress
        self.read_steps()
        train_loss = progress.epoch_loss / progress.epoch_items
        progress.epoch_loss, progress.epoch_items, progress.batch, self.carried = 0.0, 0, 0, None
        progress.epoch += 1
        valid_loss = evaluate(self.model)
        if not math.isfinite(valid_loss):
            raise TrainingError(f"stopped after epoch {progress.epoch}: validation loss {valid_loss:g}; {ADVICE}")
        self._write(epoch=progress.epoch, step=progress.step, train_loss=train_loss, valid_loss=valid_loss)
        main_only(self.accelerator, lambda: self._keep_best(valid_loss))
        self._training_since = time.perf_counter()
        self._save()
        if self.accelerator.is_main_process:
            self._bar.write(self._epoch_line(valid_loss))

    def _keep_best(self, valid_loss: float) -> None:
        progress = self.progress
        if valid_loss < progress.best_loss:
            progress.best_loss, progress.best_epoch = valid_loss, progress.epoch
            best = {"epoch": progress.epoch, "valid_loss": valid_loss}
            self._folder.save("best", self.model.state_dict(), best)

    def _epoch_line(self, valid_loss: float) -> str:
        """Return a line such as "qrnn epoch 2/4: valid 95.2, 9 min left".

        The speed is that since the beginning, resumed or not.
        """
        progress, total = self.progress, self.settings.epochs * len(self.batches)
        line = f"{self._label} epoch {progress.epoch}/{self.settings.epochs}: valid {self._show(valid_loss):.4g}"
        left = progress.wall_seconds / progress.step * (total - progress.step)
        return f"{line}, {describe_time(left)} left" if left else line

    # --- reading the losses, which is where a GPU has to wait --------------------------------------------------------

    def read_steps(self) -> None:
        """Bring the steps since the last time into `progress`, with the time they took.

        Raises:
            TrainingError: if one of them was not finite. No checkpoint can have been written since.
        """
        progress = self.progress
        steps = torch.stack(self.unread).tolist() if self.unread else []
        self.unread = []
        now = time.perf_counter()
        progress.seconds += now - self._training_since
        self._training_since = now
        for age, (loss, items, norm) in enumerate(steps):
            if not (math.isfinite(loss) and math.isfinite(norm)):
                step = progress.step - len(steps) + age + 1
                what = f"loss {loss / items:g}, gradient norm {norm:g}"
                raise TrainingError(f"stopped at step {step}, epoch {progress.epoch + 1}: {what}; {ADVICE}")
            progress.epoch_loss += loss
            progress.epoch_items += int(items)
            progress.items += int(items)
            progress.window.append((loss, items, norm))

    def _log_window(self) -> None:
        """Write a line of metrics.jsonl on the steps since the line before."""
        self.read_steps()
        progress, window = self.progress, self.progress.window
        loss = sum(loss for loss, _, _ in window) / sum(items for _, items, _ in window)
        norm = sum(norm for _, _, norm in window) / len(window)
        rate = self.settings.learning_rate(progress.step - 1, len(self.batches))
        epoch = progress.step / len(self.batches)
        self._write(step=progress.step, epoch=epoch, loss=loss, learning_rate=rate, gradient_norm=norm)
        progress.window = []
        speed = progress.items / progress.seconds
        self._bar.set_postfix_str(f"loss {loss:.3f}, {speed:,.0f} {self.unit}/s", refresh=False)

    def _write(self, **line: float) -> None:
        main_only(self.accelerator, lambda: self._folder.append(line | {"seconds": self.progress.seconds}))

    # --- checkpoints -------------------------------------------------------------------------------------------------

    def _save(self) -> None:
        self.read_steps()
        progress = self.progress
        if not all(bool(parameter.isfinite().all()) for parameter in self.model.parameters()):
            raise TrainingError(f"stopped at step {progress.step}: weights are not finite; {ADVICE}")
        progress.wall_seconds += time.perf_counter() - self._wall_since
        progress.peak_memory = max(progress.peak_memory, peak_memory(self.device))
        carried = mapped(Tensor.cpu, self.carried)
        ranks = gather_object([{"generators": generator_states(self.device), "carried": carried}])
        state = {"progress": asdict(progress), "optimizer": self.optimizer.state_dict(), "ranks": ranks}
        main_only(self.accelerator, lambda: self._folder.save("last", self.model.state_dict(), state))
        self._resume_clock()

    def _resume_clock(self) -> None:
        self._training_since = self._wall_since = time.perf_counter()

    def restore(self) -> None:
        """Go on from the last good checkpoint in the folder, if there is one, and bring metrics.jsonl to where it was.

        Raises:
            CheckpointError: if all are damaged.
        """
        main = self.accelerator.is_main_process
        found = self._folder.load("last", self._accept, training=main)
        if main:
            self._folder.restart_log([] if found is None else parse_log(found[1]["log"]))

    def _accept(self, weights: Weights, state: State) -> None:
        """Take over a checkpoint.

        Raises:
            Exception: if it does not fit this model.
        """
        check_weights(self.model, weights)
        check_optimizer(self.model, state["optimizer"])
        parse_log(state["log"])
        progress = progress_from(state["progress"])
        if not (0 <= progress.epoch <= self.settings.epochs and 0 <= progress.batch <= len(self.batches)):
            raise CheckpointError(f"epoch {progress.epoch}, batch {progress.batch} are not of this training")
        mine = state["ranks"][self.accelerator.process_index]
        carried = mapped(lambda tensor: tensor.to(self.device), mine["carried"])
        self.model.load_state_dict(weights)
        self._try(carried)
        self.optimizer.load_state_dict(state["optimizer"])
        set_generator_states(mine["generators"])
        self.carried, self.progress = carried, progress

    @torch.no_grad()
    def _try(self, carried: Carried) -> None:
        """See that the model can go on from what was carried."""
        if carried is not None:
            rows, _ = self._share(next(iter(self.batches.epoch(0))))
            try:
                self.step(self.model.eval(), rows, carried)
            finally:
                self.model.train()  # also if an older checkpoint is taken


# --- evaluation ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(model: nn.Module, step: Step, batches: Batches, floor: float | None = None) -> float:
    """Return the mean loss of an item over a whole split, in nats, in eval mode; exp of it is the perplexity.

    It does not depend on how the split is cut into batches: losses are summed in float64 and divided once.

    Args:
        floor: the lowest perplexity that is possible without seeing the future, if it is known.

    Warns:
        FutureLeakWarning: if the model is better than that.
    """
    device = next(model.parameters()).device
    total: Tensor | float = 0.0
    count: Tensor | int = 0
    carried: Carried = None
    was_training = model.training
    model.eval()
    try:
        for batch in batches.epoch(0):
            loss, items, carried = step(model, to_device(batch, device), carried if batches.carry else None)
            total, count = total + loss, count + items  # tensors: a GPU need not wait
    finally:
        model.train(was_training)
    mean = float(total) / int(count)
    if floor is not None and mean < math.log(floor) - FLOOR_TOLERANCE:
        warnings.warn(
            f"perplexity {math.exp(mean):.2f} is below {floor:.2f}, the best possible: the model sees the future",
            FutureLeakWarning,
            stacklevel=2,
        )
    return mean


def perplexity(loss: float) -> float:
    """Return exp(loss), and infinity where that is too large for a float."""
    return math.exp(loss) if loss < 700 else math.inf


def seconds_per_item(model: nn.Module, step: Step, batches: Batches, settings: Settings) -> float:
    """Measure how many seconds an item takes in training.

    That takes a few real steps, which change the model: give one to throw away.
    """
    trainer = Trainer(model, step, batches, settings)
    first, *rest = islice(batches.epoch(0), TIMED_STEPS + 1)
    trainer.update(first)  # slower than the others: memory, compilation
    trainer.read_steps()
    trainer.progress = Progress()
    for batch in rest or [first]:
        trainer.update(batch)
    trainer.read_steps()
    return trainer.progress.seconds / trainer.progress.items


def describe_time(seconds: float) -> str:
    """Describe a time, for example "45 s", "12 min" or "3 h 20 min"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"
