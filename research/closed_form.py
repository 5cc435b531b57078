"""experiment.py with pooling as one would write it first: the closed form over the whole sequence, left to autograd.

    python -m research.closed_form --preset small --models qrnn --activation softplus

It shows what lost digits cost in training (results/numerics.json). The flags are those of experiment.py, but --method
counts for nothing, and the activation must not be negative.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from experiment import LanguageModelling
from lab.command_line import exit_code, parse
from lab.language_model import LanguageModel
from lab.presets import PRESETS
from lab.run import run
from lab.settings import InputError
from qrnn_layer import FLOORS, QRNNLayer, closed_form


class ClosedFormLayer(QRNNLayer):
    """Pool x >= 0 by the closed form: no derived backward pass, no blocks.

    Evaluation keeps the exact way: what is asked is what training comes to.
    """

    def _pool(self, log_f: Tensor, x: Tensor, c0: Tensor, keep: Tensor | None) -> Tensor:
        if not torch.is_grad_enabled():
            return super()._pool(log_f, x, c0, keep)
        log_x = x.clamp(min=torch.finfo(x.dtype).tiny).log()  # log 0 has no gradient; zoneout makes zeros
        log_h, c = closed_form(log_f, log_x)
        return log_h.exp() + c.exp() * c0.unsqueeze(1)


def by_closed_form(layer: QRNNLayer) -> ClosedFormLayer:
    """Return a layer with the same weights that pools by the closed form; it draws no random numbers."""
    sizes = layer.input_size, layer.hidden_size, layer.kernel_size
    options = {"activation": layer.activation, "mean_zoneout": layer.mean_zoneout}
    options |= {"device": layer.weight.device, "dtype": layer.weight.dtype}
    copy = skip_init(ClosedFormLayer, *sizes, layer.mode, layer.zoneout, **options)
    copy.weight, copy.bias = layer.weight, layer.bias
    return copy


class ClosedFormModelling(LanguageModelling):
    """Predict the next word with such layers."""

    def build(self, name: str) -> LanguageModel:
        model = super().build(name)
        if name == "qrnn":
            layers = cast(Sequence[QRNNLayer], model.rnn.layers)  # a ModuleList cannot say of what
            model.rnn.layers = nn.ModuleList(map(by_closed_form, layers))
        return model


def main(arguments: Sequence[str]) -> int:
    """Return the exit code of the experiment."""

    def command() -> int:
        config = parse(arguments, PRESETS)
        if config.activation in FLOORS:
            raise InputError(
                f"--activation {config.activation}: softplus or another one that is never negative expected"
            )
        if config.generate is not None:
            raise InputError("--generate: use experiment.py, with the --name of this run")
        named = replace(config, name=config.name or f"closed-form-{config.preset}-{config.corpus}-{config.seed}")
        return run(named, lambda processes: ClosedFormModelling(named, processes))

    return exit_code(command)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
