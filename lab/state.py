"""What a training is made of beside its model: what a checkpoint has to hold, and whether it fits."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lab.checkpoint import CheckpointError, Weights

Batch = tuple[Tensor, ...]  # each tensor has one row a sequence
Carried = Tensor | tuple | None  # what a model remembers from one batch to the next, tuples nested as it likes


@dataclass
class Progress:
    """Hold how far the training of a model has come."""

    step: int = 0
    epoch: int = 0  # epochs completed
    batch: int = 0  # batches done of the epoch that is running
    items: int = 0
    seconds: float = 0.0  # of training steps alone
    wall_seconds: float = 0.0  # with evaluations and checkpoints
    peak_memory: int = 0  # bytes, see `peak_memory`
    best_loss: float = math.inf  # validation, nats an item
    best_epoch: int = 0  # counted from 1
    epoch_loss: float = 0.0  # sum over the running epoch
    epoch_items: int = 0
    window: list[tuple[float, float, float]] = field(default_factory=list)  # steps since the last line of the log


def progress_from(values: dict[str, Any]) -> Progress:
    """Return the progress that a checkpoint holds.

    Raises:
        CheckpointError: if a value is of another type.
        TypeError: if one is unknown.
    """
    progress, types = Progress(**values), {name: type(value) for name, value in vars(Progress()).items()}
    wrong = [name for name, value in vars(progress).items() if type(value) is not types[name]]
    if wrong:
        raise CheckpointError(f"progress: {', '.join(wrong)} of another type")
    return progress


# --- whether it fits -------------------------------------------------------------------------------------------------


def check_weights(model: nn.Module, weights: Weights) -> None:
    """Check that weights are those of the model, before any of them is put into it.

    Raises:
        CheckpointError: if a name, a shape or a dtype is another, or a value is not finite.
    """
    form = {name: (tensor.shape, tensor.dtype) for name, tensor in weights.items()}
    expected = {name: (tensor.shape, tensor.dtype) for name, tensor in model.state_dict().items()}
    if form != expected:
        names = sorted(dict(form.items() ^ expected.items()))
        raise CheckpointError(f"weights of another model: {', '.join(names)}")
    if not all(bool(tensor.isfinite().all()) for tensor in weights.values()):
        raise CheckpointError("weights are not finite")


def check_optimizer(model: nn.Module, state: dict[str, Any]) -> None:
    """Check the `state_dict` of an optimiser, before any of it is put into it.

    Raises:
        CheckpointError: if a moment has not the shape of its parameter.
    """
    parameters = list(model.parameters())
    for index, moments in state["state"].items():
        shape = parameters[index].shape
        if any(value.dim() and value.shape != shape for value in moments.values() if isinstance(value, Tensor)):
            raise CheckpointError(f"the optimiser's state of parameter {index} has another shape")


# --- tensors in tuples, random numbers -------------------------------------------------------------------------------


def mapped(function: Callable[[Tensor], Tensor], carried: Carried) -> Carried:
    """Apply a function to each tensor; every kind of tuple becomes a plain one, which a checkpoint can hold."""
    if isinstance(carried, tuple):
        return tuple(mapped(function, part) for part in carried)
    return None if carried is None else function(carried)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Return a batch of the same type on the device."""
    return type(batch)(*(tensor.to(device, non_blocking=True) for tensor in batch))


def generator_states(device: torch.device) -> dict[str, Tensor]:
    """Return the states of all random number generators that training on the device draws from."""
    states = {"cpu": torch.get_rng_state()}
    if device.type in ("cuda", "mps"):
        states[device.type] = getattr(torch, device.type).get_rng_state()
    return states


def set_generator_states(states: dict[str, Tensor]) -> None:
    """Set the states that `generator_states` returned."""
    for name, state in states.items():
        torch.set_rng_state(state) if name == "cpu" else getattr(torch, name).set_rng_state(state)
