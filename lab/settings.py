"""How to train, whatever the task: the fields that every experiment has on its command line, and errors of input."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch


class InputError(ValueError):
    """The user asked for something impossible; the message is one line."""


@dataclass(frozen=True)
class Settings:
    """How to train, whatever the task."""

    epochs: int = 40
    """Passes over the training data."""
    optimizer: Literal["adamw", "adam", "rmsprop", "sgd"] = "adamw"
    """The optimiser, with PyTorch's defaults for what is not a flag here; alpha of rmsprop is 0.9, as in the paper."""
    lr: float = 1e-3
    """Learning rate (the highest one, with --schedule one-cycle), for the mean loss of a token."""
    schedule: Literal["constant", "one-cycle", "decay"] = "constant"
    """Learning rate over time. one-cycle: up in a straight line, down along a cosine to 0. decay: see --lr-decay."""
    warmup: float = 0.1
    """one-cycle: the part of all steps during which the learning rate goes up."""
    lr_decay: float = 0.95
    """decay: the factor of the learning rate after each epoch, once --lr-decay-after epochs are over."""
    lr_decay_after: int = 6
    """decay: epochs at the full learning rate."""
    weight_decay: float = 0.01
    """Weight decay of the optimiser."""
    clip: float | None = None
    """Gradients longer than this (L2 norm of all together) are shortened to it. None: never."""
    seed: int = 0
    """Of the initial weights, the order of the batches, dropout and zoneout."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to compute. auto: a GPU if there is one."""
    amp: Literal["bf16"] | None = None
    """bf16: train in mixed precision. Evaluation is always in float32."""
    compile: bool = False
    """Compile the models with torch.compile: minutes at the start, faster steps on a GPU."""
    checkpoint_minutes: float = 10.0
    """Minutes between checkpoints inside an epoch; there is always one at its end."""

    def check(self) -> None:
        """Raises InputError: a setting that is out of range or that this machine does not have."""
        for name in ("epochs", "lr", "lr_decay"):
            check_range(name, getattr(self, name), above=0)
        for name in ("lr_decay_after", "weight_decay", "checkpoint_minutes", "seed"):
            check_range(name, getattr(self, name), low=0)
        check_range("warmup", self.warmup, low=0, high=1)
        if self.clip is not None:
            check_range("clip", self.clip, above=0)
        here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
        if not here.get(self.device, True):
            raise InputError(f"--device {self.device}: this machine has none that PyTorch can use; take auto or cpu")

    def learning_rate(self, step: int, steps_per_epoch: int) -> float:
        """The learning rate of a step, counted from 0."""
        if self.schedule == "one-cycle":
            done = (step + 0.5) / (self.epochs * steps_per_epoch)  # 0 to 1
            if done < self.warmup:
                return self.lr * done / self.warmup
            return self.lr * 0.5 * (1 + math.cos(math.pi * (done - self.warmup) / (1 - self.warmup)))
        if self.schedule == "decay":
            return self.lr * self.lr_decay ** max(0, step // steps_per_epoch - self.lr_decay_after + 1)
        return self.lr


def check_range(
    name: str, value: float, *, low: float = -math.inf, high: float = math.inf, above: float = -math.inf
) -> None:
    """Raises InputError: unless low <= value <= high and value > above; NaN is never in range."""
    if not (low <= value <= high and value > above):
        limits = [f"more than {above:g}"] * (above > -math.inf) + [f"at least {low:g}"] * (low > -math.inf)
        limits += [f"at most {high:g}"] * (high < math.inf)
        raise InputError(f"--{name.replace('_', '-')} {value}: {' and '.join(limits)} expected")
