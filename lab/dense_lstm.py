"""LSTM layers with the dense connections of `QRNN(dense=True)`: what it is compared with."""

from __future__ import annotations

import torch
from torch import Tensor, nn

States = tuple[tuple[Tensor, Tensor], ...]  # (h, c) of each layer, (1, B, H) each


class DenseLSTM(nn.Module):
    """Feed each LSTM layer with the input and the outputs of all layers before it (Bradbury et al. 2016, section 2.1).

    Args:
        input_size: features F of the input.
        hidden_size: units H of every layer.
        num_layers: how many.
        dropout: probability of dropout on the outputs of each layer but the last, in training.
    """

    def __init__(self, input_size: int, hidden_size: int, num_layers: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(
            nn.LSTM(input_size + layer * hidden_size, hidden_size, batch_first=True) for layer in range(num_layers)
        )

    def forward(self, x: Tensor, state: States | None = None) -> tuple[Tensor, States]:
        """Return the outputs of the last layer, (B, T, H), and the state after the last step.

        Args:
            x: (B, T, F).
            state: what an earlier call returned. Default: zeros.
        """
        inputs, output, states = [x], x, []
        for index, layer in enumerate(self.layers):
            if index:
                inputs.append(self.dropout(output))
            output, after = layer(torch.cat(inputs, dim=2), state[index] if state is not None else None)  # (B, T, H)
            states.append(after)
        return output, tuple(states)
