"""QRNN: a stack of `QRNNLayer`s that is called like `nn.LSTM`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from qrnn_layer import QRNNLayer, QRNNState


class QRNNStackState(NamedTuple):
    """Everything a `QRNN` remembers between two calls.

    Attributes:
        c: (num_layers, B, H), the cell state of each layer after the last step; at least float32.
        window: for each layer (B, K - 1, F_layer), its last K - 1 inputs, oldest first.
    """

    c: Tensor
    window: tuple[Tensor, ...]


class QRNN(nn.Module):
    """A causal stack of QRNN layers with the calling convention of `nn.LSTM`.

    >>> rnn = QRNN(input_size=32, hidden_size=64, num_layers=2, batch_first=True)
    >>> output, state = rnn(torch.randn(8, 100, 32))          # output: (8, 100, 64)
    >>> output, state = rnn(torch.randn(8, 50, 32), state)    # the next 50 steps

    Args:
        input_size: features F of the input.
        hidden_size: channels H of every layer.
        num_layers: layers, each fed with the outputs of the one before.
        bias: whether the projections have a bias.
        batch_first: input and output are (B, T, ...) if True, else (T, B, ...). States are never affected.
        dropout: probability of dropout on the outputs of each layer but the last, in training.
        kernel_size, mode, zoneout, activation, method, device, dtype: of each layer, see `QRNNLayer`.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        *,
        kernel_size: int = 2,
        mode: str = "fo",
        zoneout: float = 0.0,
        activation: str = "softplus",
        method: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(num_layers, int) or num_layers < 1:
            raise ValueError(f"num_layers: {num_layers!r} given, a whole number of at least 1 expected")
        if not 0 <= dropout <= 1:
            raise ValueError(f"dropout: {dropout!r} given, a probability from 0 to 1 expected")
        self.input_size, self.hidden_size = input_size, hidden_size
        self.num_layers, self.batch_first = num_layers, batch_first
        self.layers = nn.ModuleList(
            QRNNLayer(
                input_size if layer == 0 else hidden_size,
                hidden_size,
                kernel_size,
                mode,
                zoneout,
                activation=activation,
                bias=bias,
                method=method,
                device=device,
                dtype=dtype,
            )
            for layer in range(num_layers)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, hx: QRNNStackState | None = None) -> tuple[Tensor, QRNNStackState]:
        """Run the stack over T steps.

        Args:
            x: (T, B, F), or (B, T, F) with `batch_first`.
            hx: what an earlier call returned; the steps of x then follow those of that call. Default: zeros.

        Returns:
            output, (T, B, H) or (B, T, H), of the last layer, and the state after the last step.

        Raises:
            ValueError: a wrong rank, size, dtype or device.
        """
        if x.dim() != 3 or x.shape[2] != self.input_size:
            layout = "B, T" if self.batch_first else "T, B"
            raise ValueError(f"x: shape {tuple(x.shape)} given, ({layout}, {self.input_size}) expected")
        if hx is not None and (not isinstance(hx, tuple) or [len(part) for part in hx] != [self.num_layers] * 2):
            raise ValueError(f"hx: not the state of {self.num_layers} layers; pass on what the last call returned")
        h = x if self.batch_first else x.transpose(0, 1)
        states = []
        for index, layer in enumerate(self.layers):
            if index > 0:
                h = self.dropout(h)
            h, state = layer(h, None if hx is None else QRNNState(hx[0][index], hx[1][index]))
            states.append(state)
        state = QRNNStackState(torch.stack([s.c for s in states]), tuple(s.window for s in states))
        return (h if self.batch_first else h.transpose(0, 1)), state
