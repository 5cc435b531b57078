"""The initial weights of the compared recurrent layers, for a QRNN and an LSTM alike."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lab.settings import Networks
from qrnn_layer import GAINS, MODES, QRNNLayer


@torch.no_grad()
def initialise(model: nn.Module, config: Networks) -> None:
    """Draw the weights of all recurrent layers in a model as the settings say, and raise their forget biases."""
    choice = config.initialisation
    for layer in model.modules():
        if isinstance(layer, QRNNLayer):  # drawn scaled
            blocks, candidate, gain = MODES[layer.mode], 0, 1 / GAINS[layer.mode] if choice == "uniform" else 1.0
        elif isinstance(layer, nn.LSTM):  # drawn uniformly; it has the gates of "ifo", in the order i, f, g, o
            blocks, candidate, gain = 4, 2, GAINS["ifo"] if choice == "scaled" else 1.0
        else:
            continue
        for name, parameter in layer.named_parameters(recurse=False):
            parts = parameter.chunk(blocks)
            if choice == "xavier":
                draw(name, parts)
            elif name == "weight" or "weight_ih" in name:
                parts[candidate].mul_(gain)
            if name == "bias" or "bias_ih" in name:
                parts[1].add_(config.forget_bias)


def draw(name: str, parts: Sequence[Tensor]) -> None:
    """Draw each gate's weights by themselves: orthogonal from a state to a state, else as Glorot & Bengio 2010."""
    for part in parts:
        if "bias" in name:
            nn.init.zeros_(part)
        elif "weight_hh" in name:
            nn.init.orthogonal_(part)
        else:
            nn.init.xavier_uniform_(part)
