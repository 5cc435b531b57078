"""QRNN: a stack of `QRNNLayer`s with the contract of `nn.LSTM`."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from qrnn_layer import QRNNLayer, QRNNState, ShapeError, check_probability, check_size


class QRNNStackState(NamedTuple):
    """Everything a `QRNN` remembers between two calls; L layers in D directions, forward before reverse in each layer.

    The batch is dimension 1 of every tensor, as in the states of nn.LSTM, and missing if the input had none. Where only
    plain tuples are loaded, as by `torch.load`, save `tuple(state)`: it is a state as well.

    Attributes:
        c: (L * D, B, H), the cell states after the last step; at least float32.
        window: for each layer and direction (K - 1, B, F_layer), its last K - 1 inputs, oldest first.
    """

    c: Tensor
    window: tuple[Tensor, ...]

    def detach(self) -> QRNNStackState:
        """Without the history, for truncated backpropagation through time."""
        return _map_state(Tensor.detach, self)

    def index_select(self, index: Tensor) -> QRNNStackState:
        """The state of the sequences `index`, (N,) int64, of the batch: a beam search goes on with those it keeps.

        Raises:
            ShapeError: the state has no batch.
        """
        if self.c.dim() != 3:
            raise ShapeError(
                f"state: c of shape {tuple(self.c.shape)} has no batch to select from, (L * D, B, H) expected"
            )
        return _map_state(lambda part: part.index_select(1, index), self)


def _map_state(function: Callable[[Tensor], Tensor], state: QRNNStackState) -> QRNNStackState:
    return QRNNStackState(function(state.c), tuple(map(function, state.window)))


class QRNN(nn.Module):
    """A stack of QRNN layers, called like `nn.LSTM`; `nn.LSTM(...)` becomes `QRNN(...)`.

    >>> rnn = QRNN(input_size=32, hidden_size=64, num_layers=2, batch_first=True)
    >>> output, state = rnn(torch.randn(8, 100, 32))          # output: (8, 100, 64)
    >>> output, state = rnn(torch.randn(8, 50, 32), state)    # the next 50 steps

    What differs: the state is (c, window), that of nn.LSTM (h, c). The last output is in the output: it is at the last
    step, of packed sequences at the last step of each, of the reverse direction at the first. There is no `proj_size`.

    Weights of salesforce/pytorch-qrnn: its F is 1 - f here, so negate the rows of F in weight and bias; the blocks are
    in the same order z, f, o. With its window of 2 the input is [x_t, x_{t-1}], here the oldest comes first: swap the
    halves of the columns.

    Args:
        input_size: features F of the input.
        hidden_size: channels H of every layer.
        num_layers: layers L, each fed with the outputs of the one before.
        bias: whether the projections have a bias.
        batch_first: input and output are (B, T, ...) if True, else (T, B, ...). States are never affected.
        dropout: probability of dropout on the outputs of each layer but the last, in training.
        bidirectional: a second QRNN in each layer reads the sequence backwards; outputs are concatenated, (..., 2 * H).
        kernel_size, mode, zoneout, activation, method, device, dtype: of each layer, see `QRNNLayer`.
        first_kernel_size: of the first layer alone; the paper takes 6 for characters. Default: kernel_size.
        dense: each layer is fed with the input and the outputs of all layers before it (paper, section 2.1).

    Raises:
        TypeError: a size that is no whole number, a flag that is no bool.
        ValueError: an argument out of range.

    Warns:
        UserWarning: dropout with a single layer, which has nothing to drop.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        *,
        kernel_size: int = 2,
        first_kernel_size: int | None = None,
        mode: str = "fo",
        zoneout: float = 0.0,
        activation: str = "softplus",
        dense: bool = False,
        method: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_size("num_layers", num_layers)
        if first_kernel_size is not None:
            check_size("first_kernel_size", first_kernel_size)
        check_probability("dropout", dropout)
        flags = {"bias": bias, "batch_first": batch_first, "bidirectional": bidirectional, "dense": dense}
        for name, flag in flags.items():
            if not isinstance(flag, bool):  # a probability of dropout, most likely, one place too early
                raise TypeError(f"{name}: {flag!r} given, True or False expected")
        if dropout > 0 and num_layers == 1:
            warnings.warn(
                f"dropout={dropout} with num_layers=1 drops nothing: it acts on the outputs of all layers but the last",
                stacklevel=2,
            )
        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, num_layers
        self.bias, self.batch_first, self.dropout = bias, batch_first, float(dropout)
        self.bidirectional, self.dense = bidirectional, dense
        directions = 2 if bidirectional else 1
        options = {"activation": activation, "bias": bias, "method": method, "device": device, "dtype": dtype}
        self.layers = nn.ModuleList()
        features, width = input_size, first_kernel_size or kernel_size
        for _ in range(num_layers):
            self.layers.extend(
                QRNNLayer(features, hidden_size, width, mode, zoneout, **options) for _ in range(directions)
            )
            features, width = hidden_size * directions + (features if dense else 0), kernel_size

    def reset_parameters(self, forget_bias: float = 0.0) -> None:
        """`QRNNLayer.reset_parameters` of every layer."""
        for layer in self.layers:
            layer.reset_parameters(forget_bias)

    def flatten_parameters(self) -> None:
        """Nothing: a QRNN keeps its weights in one piece. It is here because users of nn.LSTM call it."""

    def extra_repr(self) -> str:
        return (
            f"{self.input_size}, {self.hidden_size}, num_layers={self.num_layers}, bias={self.bias}, "
            f"batch_first={self.batch_first}, dropout={self.dropout}, bidirectional={self.bidirectional}, "
            f"dense={self.dense}"
        )

    def forward(
        self, input: Tensor | PackedSequence, hx: QRNNStackState | Tensor | None = None
    ) -> tuple[Tensor | PackedSequence, QRNNStackState]:
        """Run the stack over T steps.

        Args:
            input: (T, B, F), or (B, T, F) with `batch_first`, or (T, F), one sequence without a batch, or packed.
            hx: what an earlier call returned, or the same in plain tuples; the steps of the input then follow those of
                that call (for the reverse direction: come before them). Or c alone, (L * D, B, H), as nn.GRU has it;
                the windows are then zeros. Default: zeros.

        Returns:
            output of the last layer, of the kind and layout of the input with D * H features; and the state after the
            last step. The last step of the reverse direction is the first of the sequence. A state of packed sequences,
            given or returned, is in the order that they had before they were packed.

        Raises:
            ShapeError: a wrong rank or size.
            TypeError: an hx that is no state.
            ValueError: a wrong dtype or device.
        """
        if isinstance(input, PackedSequence):
            return self._forward_packed(input, hx)
        if input.dim() not in (2, 3) or input.shape[-1] != self.input_size:
            layout = "B, T" if self.batch_first else "T, B"
            raise ShapeError(
                f"input: shape {tuple(input.shape)} given, ({layout}, {self.input_size}) or (T, {self.input_size}) "
                "expected"
            )
        if input.dim() == 2:
            x = input.unsqueeze(0)  # (1, T, F)
            output, state = self._stack(x, self._checked_state(hx, x, batched=False))
            return output.squeeze(0), _map_state(lambda part: part.squeeze(1), state)
        x = input if self.batch_first else input.transpose(0, 1)  # (B, T, F)
        output, state = self._stack(x, self._checked_state(hx, x))
        return (output if self.batch_first else output.transpose(0, 1).contiguous()), state  # contiguous: for `view`

    def _forward_packed(
        self, packed: PackedSequence, hx: QRNNStackState | Tensor | None
    ) -> tuple[PackedSequence, QRNNStackState]:
        """In the packed order, longest sequence first; the state is sorted on the way in and back on the way out."""
        data, batch_sizes, sorted_indices, unsorted_indices = packed
        if data.dim() != 2 or data.shape[1] != self.input_size:
            raise ShapeError(f"input: packed, of shape {tuple(data.shape)} given, (steps, {self.input_size}) expected")
        x, lengths = pad_packed_sequence(PackedSequence(data, batch_sizes), batch_first=True)  # (B, T, F), (B,)
        state = self._checked_state(hx, x)
        if state is not None and sorted_indices is not None:
            state = state.index_select(sorted_indices)
        output, state = self._stack(x, state, lengths.to(x.device))
        if unsorted_indices is not None:
            state = state.index_select(unsorted_indices)
        output = pack_padded_sequence(output, lengths, batch_first=True).data
        return PackedSequence(output, batch_sizes, sorted_indices, unsorted_indices), state

    def _stack(
        self, x: Tensor, state: QRNNStackState | None, lengths: Tensor | None = None
    ) -> tuple[Tensor, QRNNStackState]:
        """(B, T, F) -> (B, T, D * H), and the state."""
        directions = len(self.layers) // self.num_layers
        seen, states = x, []  # seen: what the next layer is fed with
        for layer in range(self.num_layers):
            outputs = []
            for direction in range(directions):
                index = layer * directions + direction
                before = None if state is None else QRNNState(state.c[index], state.window[index].transpose(0, 1))
                h, after = self.layers[index](_reversed(seen, lengths) if direction else seen, before, lengths)
                outputs.append(_reversed(h, lengths) if direction else h)
                states.append(after)
            output = torch.cat(outputs, dim=2) if self.bidirectional else outputs[0]  # (B, T, D * H)
            if layer < self.num_layers - 1:
                dropped = F.dropout(output, self.dropout, self.training)
                seen = torch.cat([seen, dropped], dim=2) if self.dense else dropped
        window = tuple(after.window.transpose(0, 1) for after in states)  # each (K - 1, B, F_layer)
        return output, QRNNStackState(torch.stack([after.c for after in states]), window)

    def _checked_state(
        self, hx: QRNNStackState | Tensor | None, x: Tensor, batched: bool = True
    ) -> QRNNStackState | None:
        """hx with windows, whether it came with them or not, and with a batch."""
        if hx is None:
            return None
        if isinstance(hx, Tensor):
            hx = hx, None
        if not isinstance(hx, (tuple, list)) or len(hx) != 2 or not isinstance(hx[0], Tensor):
            raise TypeError(
                f"hx: no state but a {type(hx).__name__} given; pass on what the last call returned, or c alone"
            )
        c, windows = hx
        batch = (x.shape[0],) if batched else ()
        if windows is None:
            windows = [x.new_zeros(layer.kernel_size - 1, *batch, layer.input_size) for layer in self.layers]
        if not isinstance(windows, (tuple, list)) or len(windows) != len(self.layers):
            raise ShapeError(
                f"hx: a second part that is not the windows of {len(self.layers)} layers; pass on what the last call "
                "returned, or c alone: there is no (h, c) as in nn.LSTM"
            )
        _check_shape("c", c, (len(self.layers), *batch, self.hidden_size))
        for layer, window in zip(self.layers, windows, strict=True):
            _check_shape("window", window, (layer.kernel_size - 1, *batch, layer.input_size))
        state = QRNNStackState(c.float() if c.dtype in (torch.bfloat16, torch.float16) else c, tuple(windows))
        return state if batched else _map_state(lambda part: part.unsqueeze(1), state)


def _check_shape(name: str, part: Tensor, expected: tuple[int, ...]) -> None:
    if tuple(part.shape) != expected:
        raise ShapeError(f"hx: {name} of shape {tuple(part.shape)} given, {expected} expected, to go with the input")


def _reversed(x: Tensor, lengths: Tensor | None) -> Tensor:
    """(B, T, F) with the real steps of each sequence in reverse order; after them, anything."""
    if lengths is None:
        return x.flip(1)
    index = lengths.unsqueeze(1) - 1 - torch.arange(x.shape[1], device=x.device)  # (B, T)
    return x.take_along_dim(index.clamp(min=0).unsqueeze(2), dim=1)
