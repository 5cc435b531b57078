"""The initial weights of the compared recurrent layers, for a QRNN and an LSTM alike."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lab.settings import Networks
from qrnn_layer import MODES, QRNNLayer

LSTM_GATES = ("input", "forget", "cell", "output")  # in the order of nn.LSTM


@torch.no_grad()
def initialise(model: nn.Module, config: Networks) -> None:
    """Draw the weights of all recurrent layers in a model as the settings say, and raise their forget biases."""
    for layer in model.modules():
        if isinstance(layer, QRNNLayer):
            blocks = MODES[layer.mode]
        elif isinstance(layer, nn.LSTM):
            blocks = len(LSTM_GATES)
        else:
            continue
        for name, parameter in layer.named_parameters(recurse=False):
            if config.initialisation == "xavier":
                draw(name, parameter, blocks)
            if name == "bias" or "bias_ih" in name:
                parameter.chunk(blocks)[1].add_(config.forget_bias)  # in both the second block is the forget gate


def draw(name: str, parameter: Tensor, blocks: int) -> None:
    """Draw each gate's weights by themselves: orthogonal from a state to a state, else as Glorot & Bengio 2010."""
    for block in parameter.chunk(blocks):
        if "bias" in name:
            nn.init.zeros_(block)
        elif "weight_hh" in name:
            nn.init.orthogonal_(block)
        else:
            nn.init.xavier_uniform_(block)
