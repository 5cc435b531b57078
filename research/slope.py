"""Run experiment.py with the candidate softplus(slope * a) - log 2: `python -m research.slope 3 --preset small`.

The activation "shifted_softplus" has slope 2 in it. Other slopes are the same function of scaled pre-activations.
The flags after the slope are those of experiment.py.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from experiment import LanguageModelling
from lab.command_line import exit_code, parse
from lab.language_model import LanguageModel
from lab.parser import Parser
from lab.presets import PRESETS, Config
from lab.run import run
from lab.settings import Range, check_range
from qrnn_layer import QRNNLayer


class ScaledCandidate(nn.Module):
    """Multiply the rows of the candidate, the first `hidden` ones of a weight or a bias."""

    scale: Tensor

    def __init__(self, parameter: Tensor, hidden: int, factor: float) -> None:
        super().__init__()
        scale = torch.ones(len(parameter), *[1] * (parameter.dim() - 1))
        scale[:hidden] = factor
        self.register_buffer("scale", scale)

    def forward(self, parameter: Tensor) -> Tensor:
        return parameter * self.scale


class SlopeModelling(LanguageModelling):
    """Predict the next word with QRNN layers of another slope."""

    def __init__(self, config: Config, processes: int, slope: float) -> None:
        super().__init__(config, processes)
        self.factor = slope / 2

    def build(self, name: str) -> LanguageModel:
        model = super().build(name)
        for layer in cast(Sequence[QRNNLayer], model.rnn.layers if name == "qrnn" else ()):
            for parameter in ("weight", "bias"):
                scaled = ScaledCandidate(getattr(layer, parameter), layer.hidden_size, self.factor)
                parametrize.register_parametrization(layer, parameter, scaled)
        return model


def main(arguments: Sequence[str]) -> int:
    """Run the experiment; return its exit code."""
    parser = Parser(__doc__)
    parser.add_argument("slope", type=float, help="where a is large; 2 gives the slope 1 at zero, as tanh has")
    options, flags = parser.parse_known_args(arguments)

    def command() -> int:
        check_range("slope", options.slope, Range(above=0))
        config = parse([*flags, "--activation", "shifted_softplus"], PRESETS)
        return run(config, lambda processes: SlopeModelling(config, processes, options.slope))

    return exit_code(command)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
