"""How to train, whatever the task: the fields that every experiment has on its command line, and errors of input."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, get_args, get_type_hints

import torch

from lab.provenance import memory_bytes

BYTES_PER_PARAMETER = 16  # in training: the weight, its gradient and two averages of the optimiser, float32 each


class InputError(ValueError):
    """Say that the user asked for something impossible; the message is one line."""


class Range(NamedTuple):
    """Name the values that a number may have: low <= value <= high, above < value; infinity and NaN never."""

    low: float = -math.inf
    high: float = math.inf
    above: float = -math.inf


Count = Annotated[int, Range(low=1, high=10**6)]
Layers = Annotated[int, Range(low=1, high=256)]
KernelSize = Annotated[int, Range(low=1, high=1000)]
Words = Annotated[int, Range(low=3)]  # <eos>, <unk> and a word
Probability = Annotated[float, Range(low=0, high=1)]
Positive = Annotated[float, Range(above=0)]
NotNegative = Annotated[float, Range(low=0)]


@dataclass(frozen=True)
class Settings:
    """Say how to train, whatever the task."""

    epochs: Count = 40
    """How often to read the training data."""
    optimizer: Literal["adamw", "adam", "rmsprop", "sgd"] = "adamw"
    """Optimiser, as PyTorch sets it up; only rmsprop's alpha is the QRNN paper's, 0.9."""
    lr: Positive = 1e-3
    """Learning rate, the highest one with --schedule one-cycle. The loss is the mean over a batch."""
    schedule: Literal["constant", "one-cycle", "decay"] = "constant"
    """How the learning rate changes. one-cycle: it rises in a straight line, then falls along a cosine to 0.
    decay: it shrinks from epoch to epoch, see --lr-decay."""
    warmup: Probability = 0.1
    """one-cycle: the part of all steps during which the learning rate rises."""
    lr_decay: Annotated[float, Range(above=0, high=1)] = 0.95
    """decay: the factor of the learning rate after each epoch, once --lr-decay-after epochs are over."""
    lr_decay_after: Annotated[int, Range(low=0)] = 6
    """decay: epochs at the full learning rate."""
    weight_decay: NotNegative = 0.01
    """Weight decay of the optimiser."""
    clip: Positive | None = None
    """Shorten the gradient of a step to this L2 norm where it is longer. none: never."""
    seed: Annotated[int, Range(low=0, high=2**63 - 1)] = 0
    """Seed of all random numbers: initial weights, order of the batches, dropout, zoneout, generated data."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to compute. auto: on a GPU if there is one."""
    amp: Literal["bf16"] | None = None
    """bf16: train in mixed precision. Evaluation is always in float32."""
    compile: bool = False
    """Compile the models with torch.compile: minutes at the start, faster steps on a GPU."""
    checkpoint_minutes: NotNegative = 10.0
    """Minutes between checkpoints inside an epoch; there is always one at its end."""

    def check(self) -> None:
        """Check every value before any work starts.

        Raises:
            InputError: if one is out of its `Range`, or this machine does not have the device.
        """
        for name, hint in get_type_hints(type(self), include_extras=True).items():
            value = getattr(self, name)
            for allowed in _ranges(hint):
                if value is not None:
                    check_range(name, value, allowed)
        here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
        if not here.get(self.device, True):
            raise InputError(f"--device {self.device}: this machine has none that PyTorch can use; take auto or cpu")

    def learning_rate(self, step: int, steps_per_epoch: int) -> float:
        """Return the learning rate of a step, counted from 0.

        It needs the number of the step alone, so that a checkpoint holds no state of it.
        """
        if self.schedule == "one-cycle":
            done = (step + 0.5) / (self.epochs * steps_per_epoch)  # 0 to 1
            if done < self.warmup:
                return self.lr * done / self.warmup
            return self.lr * 0.5 * (1 + math.cos(math.pi * (done - self.warmup) / (1 - self.warmup)))
        if self.schedule == "decay":
            return self.lr * self.lr_decay ** max(0, step // steps_per_epoch - self.lr_decay_after + 1)
        return self.lr


class Chosen:
    """Name the fields that every experiment declares itself, because their values are its own.

    They are properties, so that a field of a frozen dataclass can take their place.
    """

    @property
    def preset(self) -> str:
        raise NotImplementedError

    @property
    def corpus(self) -> str:
        raise NotImplementedError


@dataclass(frozen=True)
class Networks:
    """Say which networks are compared.

    Attributes:
        names: of the models that there are: what they are called on the command line -> in reports.
    """

    names: ClassVar[dict[str, str]] = {"qrnn": "QRNN", "lstm": "LSTM"}

    models: tuple[Literal["qrnn", "lstm"], ...] = ("qrnn", "lstm")
    """Which models to train, in this order."""
    embedding: Count = 300
    """Width of the word vectors."""
    hidden: Count = 256
    """Width of each QRNN layer. The LSTM's follows from it, see --match."""
    layers: Layers = 2
    """Recurrent layers of either model."""
    match: bool = True
    """Give the LSTM as many recurrent parameters as the QRNN. --no-match: the same width."""
    kernel_size: KernelSize = 2
    """QRNN: how many inputs each step sees, its own and those before it."""
    mode: Literal["f", "fo", "ifo"] = "fo"
    """QRNN: its gates, by their letters. f: forget. fo: forget and output. ifo: input, forget and output."""
    activation: Literal["softplus", "shifted_softplus", "exp", "sigmoid", "relu", "tanh", "elu", "identity"] = "tanh"
    """QRNN: function that makes the candidate, the new value that the gates let in. The paper's is tanh.
    In log space, one without a lower bound (identity; in the mode ifo all that can be negative) is pooled slower."""
    zoneout: Probability = 0.0
    """QRNN: probability that a unit keeps its state for a step, in training. Validation and test take the mean."""
    method: Literal["auto", "loop", "log", "blocked", "scan"] = "auto"
    """QRNN: how the recurrence is computed; all give the same result up to rounding. auto: scan."""
    dropout: Probability = 0.0
    """Dropout between the recurrent layers."""
    initialisation: Literal["scaled", "uniform", "xavier"] = "scaled"
    """Initial weights of the recurrent layers, in either model. uniform: as nn.LSTM draws them.
    scaled: those of the candidates larger, four times mostly, so that signals do not die out in a deep stack.
    xavier: Glorot's, orthogonal ones from a state to a state, biases 0."""
    forget_bias: Annotated[float, Range(low=-20, high=20)] = 0.0
    """Number added to the bias of the forget gates at the start, in either model; more remembers longer."""

    @property
    def dropout_between(self) -> float:
        """Return the dropout between layers; with one layer there is none, and both classes would warn."""
        return self.dropout if self.layers > 1 else 0.0


def _ranges(hint: Any) -> list[Range]:
    """Return the ranges in a type hint: Annotated[int, Range(...)], or that or None."""
    parts = (hint, *get_args(hint))
    return [extra for part in parts for extra in getattr(part, "__metadata__", ()) if isinstance(extra, Range)]


def check_range(name: str, value: float, allowed: Range) -> None:
    """Check a number.

    Raises:
        InputError: if it is out of range, infinite or NaN.
    """
    low, high, above = allowed
    if not (low <= value <= high and above < value < math.inf):
        limits = [f"more than {above:g}"] * (above > -math.inf) + [f"at least {low:g}"] * (low > -math.inf)
        limits += [f"at most {high:,}"] * (high < math.inf)
        raise InputError(f"{flag(name)} {value}: {' and '.join(limits) or 'a finite number'} expected")


def check_text(name: str, text: str) -> None:
    """Check a text of the command line.

    Raises:
        InputError: if its bytes were not in the encoding of the terminal: then it holds lone surrogates.
    """
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise InputError(f"{flag(name)} {text!r}: these bytes are no text here; give it in UTF-8")


def check_memory(what: str, parameters: int, device: torch.device) -> None:
    """Check that a model can be trained, before it is built.

    Args:
        what: to be trained, with the flags that decide about its size.
        parameters: how many it has.
        device: where.

    Raises:
        InputError: if they, their gradients and the state of the optimiser are larger than the memory.
    """
    needed, there = parameters * BYTES_PER_PARAMETER, memory_bytes(device)
    if there is not None and needed > there:
        raise InputError(
            f"{what}: {parameters:,} parameters need {needed / 2**30:,.1f} GiB in training, "
            f"{device.type} has {there / 2**30:,.1f}; smaller widths or fewer layers needed"
        )


def flag(name: str) -> str:
    """Return the flag of a setting."""
    return f"--{name.replace('_', '-')}"
