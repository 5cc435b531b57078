"""experiment.py with pooling as one would write it first: the closed form over the whole sequence, left to autograd.

It shows what lost digits cost in training (results/numerics.json). The flags are those of experiment.py, whose --help
it prints; --method counts for nothing, and the activation must not be negative: `--activation softplus`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from torch import Tensor

import experiment
import qrnn_layer
from lab.command_line import exit_code, parse
from lab.presets import PRESETS
from lab.settings import InputError

exact_recurrence = qrnn_layer._recurrence


def recurrence(
    log_f: Tensor, x: Tensor, h0: Tensor, method: str, block_size: int = 64, positive: bool = False
) -> Tensor:
    """In the place of `qrnn_layer._recurrence`, for x >= 0: no derived backward pass, no blocks.

    Evaluation keeps the exact one: what is asked is what training comes to.
    """
    if not torch.is_grad_enabled():
        return exact_recurrence(log_f, x, h0, "scan", block_size, positive)
    log_x = x.clamp(min=torch.finfo(x.dtype).tiny).log()  # log 0 has no gradient; zoneout makes zeros
    log_h, c = qrnn_layer.closed_form(log_f, log_x)
    return log_h.exp() + c.exp() * h0.unsqueeze(1)


def check(flags: Sequence[str]) -> None:
    """Raises InputError: an activation whose values have no logarithm."""
    activation = parse(flags, PRESETS).activation
    if activation in qrnn_layer.SIGNED_ACTIVATIONS:
        raise InputError(f"--activation {activation}: softplus or another one that is never negative expected")


def main(arguments: Sequence[str]) -> int:
    """The exit code of the experiment."""
    flags = [*arguments, "--method", "log"]  # auto takes another way on a CPU
    wrong = exit_code(lambda: check(flags) or 0)
    qrnn_layer._recurrence = recurrence
    experiment.Config.prefix = "closed-form-"  # its runs are others than those of experiment.py
    return wrong or experiment.main(flags)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
