"""QRNN: a stack of QRNN layers with the contract of `nn.LSTM`, its state included."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from qrnn.fast import FastQRNNLayer
from qrnn_layer import QRNNState, check_probability, check_size, check_tensor, expect

State = Tensor | tuple  # see `QRNN`
Input = TypeVar("Input", Tensor, PackedSequence)


class QRNN(nn.Module):
    """Stack QRNN layers, called like `nn.LSTM`: `nn.LSTM(...)` becomes `QRNN(...)`.

    >>> rnn = QRNN(input_size=32, hidden_size=64, num_layers=2, batch_first=True)
    >>> output, (h, c) = rnn(torch.randn(8, 100, 32))         # output: (8, 100, 64); h, c: (2, 8, 64)
    >>> output, (h, c) = rnn(torch.randn(8, 50, 32), (h, c))  # the next 50 steps

    The state is that of nn.LSTM: a tuple (h, c), both (L * D, B, H), for L layers in D directions, the reverse one last
    in each layer. h has the last outputs, c the last cell states, at least float32. In the mode "f" there is no output
    gate and h is c: the state is one tensor, as that of nn.GRU. In one direction a sequence in pieces, or step by step,
    gives what the whole gives. In two, a state that goes in is an initial value, as in nn.LSTM.

    That is enough because a layer with a window of two looks back at the last output of the layer below, which is in h.
    The h of the last layer is returned but never read: what a model puts into an initial state belongs in c.
    Wider windows, `dense` and a first layer that looks back need more. There the state is (h, c, window): `window` is a
    tuple of the last K - 1 inputs of each layer and direction, (K - 1, B, F_layer). Such a stack also takes (h, c). It
    then starts from windows of zeros, which is right at the start of a sequence, and warns once where it is not.

    Args:
        input_size: features F of the input.
        hidden_size: channels H of every layer.
        num_layers: layers L, each fed with the outputs of the one before.
        bias: whether the projections have a bias.
        batch_first: input and output are (B, T, ...) if True, else (T, B, ...). States are never affected.
        dropout: probability of dropout on the outputs of each layer but the last, in training.
        bidirectional: a second QRNN in each layer reads the sequence backwards; outputs are concatenated, (..., 2 * H).
        proj_size: 0. It is there because nn.LSTM has it.
        kernel_size: width of the convolution of all layers but the first, see `QRNNLayer`.
        first_kernel_size: that of the first layer; the paper takes 6 for characters. A single layer has only this one.
        mode, zoneout, activation, method, device, dtype: of each layer, see `QRNNLayer`.
        mean_zoneout: forget by f + zoneout (1 - f) in evaluation, the mean of training, as the code of the paper's
            authors does. Without it evaluation forgets by f, faster than training, and perplexities were higher.
        dense: each layer is fed with the input and the outputs of all layers before it (paper, section 2.1).

    Raises:
        TypeError: if a size is no whole number, or a flag no bool.
        ValueError: if an argument is out of range.

    Warns:
        UserWarning: if a single layer is given dropout, which has nothing to drop, or a kernel_size, which it does not
            have.

    Parameters are called layers.N.weight and layers.N.bias; N counts layers and directions. Initialisers that look for
    "weight_ih", "weight_hh" or "bias_ih" in a name find none of them: use `reset_parameters`, or initialise
    `all_weights`. The rows of a weight are the blocks z, f, [i], [o]; its columns are the K inputs, oldest first.
    An initialiser that sets the second quarter of a bias to 1, the forget gates of an LSTM, misses them here: use
    `reset_parameters(1.0)`.

    Weights of salesforce/pytorch-qrnn: its F is 1 - f here, so negate the rows of F in weight and bias; the blocks are
    in the same order. With its window of 2 (kernel_size and first_kernel_size 2 here) its input is [x_t, x_{t-1}]: swap
    the halves of the columns. With zoneout it evaluates as `mean_zoneout` does.

    To quantise to 8 bits, export to ONNX and then call `onnxruntime.quantization.quantize_dynamic("qrnn.onnx",
    "qrnn-int8.onnx")`. That of torch leaves a QRNN as it is, for its weights are in no nn.Linear.
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
        proj_size: int = 0,
        *,
        kernel_size: int = 2,
        first_kernel_size: int = 1,
        mode: str = "fo",
        zoneout: float = 0.0,
        mean_zoneout: bool = False,
        activation: str = "tanh",
        dense: bool = False,
        method: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        flags = {"bias": bias, "batch_first": batch_first, "bidirectional": bidirectional, "dense": dense}
        expect(
            isinstance(proj_size, int) and proj_size == 0,
            "proj_size",
            proj_size,
            "0 (a QRNN has no projection: put nn.Linear after it)",
        )
        self.input_size, self.hidden_size = check_size("input_size", input_size), check_size("hidden_size", hidden_size)
        self.num_layers, self.dropout = check_size("num_layers", num_layers), check_probability("dropout", dropout)
        self.bias, self.batch_first, self.bidirectional, self.dense = map(check_flag, flags, flags.values())
        self.proj_size, self.mode = 0, str(mode)
        if self.dropout > 0 and self.num_layers == 1:
            warnings.warn(
                f"dropout={dropout} with num_layers=1 drops nothing: it acts on the outputs of all layers but the last",
                stacklevel=2,
            )
        directions = 2 if self.bidirectional else 1
        options: dict[str, Any] = {"activation": activation, "bias": self.bias, "method": method}
        options |= {"mean_zoneout": mean_zoneout, "device": device, "dtype": dtype}
        kernel_size = check_size("kernel_size", kernel_size)
        layers, features, width = [], self.input_size, check_size("first_kernel_size", first_kernel_size)
        if self.num_layers == 1 and kernel_size > max(2, width):  # 2 is the default
            warnings.warn(
                f"kernel_size={kernel_size} with num_layers=1 does nothing: the layer has first_kernel_size={width}",
                stacklevel=2,
            )
        for _ in range(self.num_layers):
            for _ in range(directions):
                layers.append(FastQRNNLayer(features, self.hidden_size, width, mode, zoneout, **options))
            features, width = self.hidden_size * directions + (features if self.dense else 0), kernel_size
        self.layers: Sequence[FastQRNNLayer] = nn.ModuleList(layers)  # type: ignore[assignment]  # it cannot say of what
        widths = [layer.kernel_size for layer in layers]
        self._windows = self.dense or widths[0] > 1 or max(widths) > 2  # whether the state has windows beside h and c
        self._warned = False

    @property
    def all_weights(self) -> list[list[nn.Parameter]]:
        """List the parameters of each layer and direction: its weight and, if it has one, its bias."""
        return [list(layer.parameters()) for layer in self.layers]

    def reset_parameters(self, forget_bias: float = 0.0) -> None:
        """Call `QRNNLayer.reset_parameters` of every layer."""
        for layer in self.layers:
            layer.reset_parameters(forget_bias)

    def flatten_parameters(self) -> None:
        """Do nothing: a QRNN keeps its weights in one piece. Users of nn.LSTM call it."""

    def extra_repr(self) -> str:
        names = ("num_layers", "bias", "batch_first", "dropout", "bidirectional", "dense")
        return f"{self.input_size}, {self.hidden_size}, " + ", ".join(f"{n}={getattr(self, n)}" for n in names)

    def forward(self, input: Tensor | PackedSequence, hx: State | None = None) -> tuple[Tensor | PackedSequence, State]:
        """Run the stack over T steps.

        Args:
            input: (T, B, F), or (B, T, F) with `batch_first`, or (T, F), one sequence without a batch, or packed.
            hx: the state before the first step, see `QRNN`; (L * D, H) instead of (L * D, B, H) where the input has no
                batch. Default: zeros.

        Returns:
            output of the last layer, of the kind and layout of the input with D * H features; and the state after the
            last step. The last step of the reverse direction is the first of the sequence. A state of packed sequences,
            given or returned, is in the order that they had before they were packed.

        Raises:
            TypeError: if input or hx is of another kind.
            ShapeError: if a rank, size, dtype or device does not fit.

        Warns:
            UserWarning: once, if (h, c) without windows is given to a stack that needs them, and is not zero.
        """
        if isinstance(input, PackedSequence):
            return self._forward_packed(input, hx)
        shape = ("B", "T") if self.batch_first else ("T", "B")
        batched = not isinstance(input, Tensor) or input.dim() != 2
        check_tensor("input", input, (*shape, self.input_size) if batched else ("T", self.input_size))
        if not batched:
            output, state = self._stack(input.unsqueeze(0), self._checked_state(hx, input.unsqueeze(0), batched=False))
            return output.squeeze(0), _map(lambda part: part.squeeze(1), state)
        x = input if self.batch_first else input.transpose(0, 1)  # (B, T, F)
        output, state = self._stack(x, self._checked_state(hx, x))
        return (output if self.batch_first else output.transpose(0, 1)).contiguous(), state  # contiguous: for `view`

    if TYPE_CHECKING:  # a call of a module is Any, else

        def __call__(self, input: Input, hx: State | None = None) -> tuple[Input, State]: ...

    def _forward_packed(self, packed: PackedSequence, hx: State | None) -> tuple[PackedSequence, State]:
        """Run in the packed order, longest sequence first; sort the state on the way in and back on the way out."""
        data, batch_sizes, sorted_indices, unsorted_indices = packed
        check_tensor("input", data, ("steps", self.input_size))
        x, lengths = pad_packed_sequence(PackedSequence(data, batch_sizes), batch_first=True)  # (B, T, F), (B,)
        before = self._checked_state(hx, x)
        if sorted_indices is not None:
            before = _map(lambda part: part.index_select(1, sorted_indices), before)
        output, state = self._stack(x, before, lengths.to(x.device))
        if unsorted_indices is not None:
            state = _map(lambda part: part.index_select(1, unsorted_indices), state)
        output = pack_padded_sequence(output, lengths, batch_first=True).data
        return PackedSequence(output, batch_sizes, sorted_indices, unsorted_indices), state

    def _stack(self, x: Tensor, state: tuple | None, lengths: Tensor | None = None) -> tuple[Tensor, State]:
        """Run all layers, (B, T, F) -> (B, T, D * H); also return the state. One given comes from `_checked_state`."""
        directions = 2 if self.bidirectional else 1
        seen, last_outputs, cells, windows = x, [], [], []  # seen: what the next layer is fed with
        for layer in range(self.num_layers):
            outputs = []
            for direction in range(directions):
                index = layer * directions + direction
                before = None if state is None else QRNNState(state[1][index], self._window(state, index, x))
                h, after = self.layers[index](_reversed(seen, lengths) if direction else seen, before, lengths)
                last_outputs.append(_last(h, lengths, None if state is None else state[0][index]))
                outputs.append(_reversed(h, lengths) if direction else h)
                cells.append(after.c)
                windows.append(after.window.transpose(0, 1))  # (K - 1, B, F_layer)
            output = torch.cat(outputs, dim=2) if self.bidirectional else outputs[0]  # (B, T, D * H)
            if layer < self.num_layers - 1:
                dropped = F.dropout(output, self.dropout, self.training)
                seen = torch.cat([seen, dropped], dim=2) if self.dense else dropped
        h, c = torch.stack(last_outputs), torch.stack(cells)
        if self._windows:
            return output, (h, c, tuple(windows))
        return output, c if self.mode == "f" else (h, c)

    def _window(self, state: tuple, index: int, x: Tensor) -> Tensor:
        """Return the window of a layer and direction, (B, K - 1, F_layer), from a state with all three parts."""
        h, _, windows = state
        layer = self.layers[index]
        if windows is not None:
            return windows[index].transpose(0, 1)
        if layer.kernel_size == 1:
            return x.new_empty(x.shape[0], 0, layer.input_size)
        directions = 2 if self.bidirectional else 1
        below = (index // directions - 1) * directions
        last = torch.cat(h[below : below + directions].unbind(), dim=1)  # (B, D * H), of the layer below
        return F.dropout(last, self.dropout, self.training).to(x.dtype).unsqueeze(1)

    def _checked_state(self, hx: State | None, x: Tensor, batched: bool = True) -> tuple | None:
        """Check the input too, x, (B, T, F). Return hx as (h, c, windows) with a batch.

        windows is None where those of zeros, or h, take their place.
        """
        self.layers[0]._check_x(x, "input")
        if hx is None:
            return None
        exact = torch.promote_types(x.dtype, torch.float32)
        dtypes = exact, torch.bfloat16, torch.float16  # a state may leave autocast, or enter it
        batch = (x.shape[0],) if batched else ()
        shape = (len(self.layers), *batch, self.hidden_size)
        wanted = f"{'a tensor h' if self.mode == 'f' else '(h, c)'} of shape {shape}"
        if self.mode == "f" and isinstance(hx, Tensor):
            hx = hx, hx
        elif self._windows:
            wanted = f"{wanted}, or (h, c, window),"
        else:
            expect(self.mode != "f", "hx", type(hx), wanted, TypeError)
        expect(isinstance(hx, (tuple, list)) and len(hx) in (2, 3), "hx", type(hx), wanted, TypeError)
        h, c, *windows = hx
        check_tensor("hx[0] (h)", h, shape, x.device, *dtypes)
        check_tensor("hx[1] (c)", c, shape, x.device, *dtypes)
        if windows:
            expect(self._windows, "parts of hx", 3, wanted, TypeError)
            (windows,) = windows
            expect(isinstance(windows, (tuple, list)), "hx[2] (window)", type(windows), "a tuple of tensors", TypeError)
            expect(len(windows) == len(self.layers), "hx[2] (window)", len(windows), f"{len(self.layers)} tensors")
            for layer, window in zip(self.layers, windows, strict=True):
                wanted_shape = layer.kernel_size - 1, *batch, layer.input_size
                check_tensor("hx[2] (window)", window, wanted_shape, x.device, *dtypes)
        elif self._windows:
            self._warn_of_windows(h, c)
            windows = [x.new_zeros(layer.kernel_size - 1, *batch, layer.input_size) for layer in self.layers]
        state = h, c.to(exact), tuple(window.to(x.dtype) for window in windows) or None
        return state if batched else _map(lambda part: part.unsqueeze(1), state)

    def _warn_of_windows(self, h: Tensor, c: Tensor) -> None:
        if self._warned or torch.compiler.is_compiling() or torch.jit.is_tracing() or not bool(h.any() | c.any()):
            return
        self._warned = True
        widths = [layer.kernel_size for layer in self.layers]
        warnings.warn(
            f"hx: (h, c) given to a QRNN whose layers also look back at inputs (kernel sizes {widths}, dense="
            f"{self.dense}): the inputs before the first step count as zeros. To go on with a sequence pass all three "
            "parts of the state, (h, c, window).",
            stacklevel=4,
        )


def check_flag(name: str, flag: bool) -> bool:
    """Return a flag as a bool, also NumPy's; no flag is a probability of dropout, one place too early."""
    kind = type(flag).__name__  # NumPy's is bool_ before its version 2
    expect(kind in ("bool", "bool_", "int") and flag in (0, 1), name, flag, "True or False", TypeError)
    return bool(flag)


def _map(function: Callable[[Tensor], Tensor], state: Any) -> Any:
    """Apply to every tensor of a state, however its tuples are nested."""
    if isinstance(state, Tensor):
        return function(state)
    return None if state is None else tuple(_map(function, part) for part in state)


def _last(h: Tensor, lengths: Tensor | None, before: Tensor | None) -> Tensor:
    """Return the last real output of each sequence, (B, H), of h, (B, T, H); `before` where there is no step."""
    if h.shape[1] == 0:
        return h.new_zeros(h.shape[0], h.shape[2]) if before is None else before.to(h.dtype)
    if lengths is None:
        return h[:, -1]
    return h.take_along_dim((lengths - 1).view(-1, 1, 1), dim=1).squeeze(1)  # packed sequences have a step at least


def _reversed(x: Tensor, lengths: Tensor | None) -> Tensor:
    """Return (B, T, F) with the real steps of each sequence in reverse order; after them, anything."""
    if lengths is None:
        return x.flip(1)
    index = lengths.unsqueeze(1) - 1 - torch.arange(x.shape[1], device=x.device)  # (B, T)
    return x.take_along_dim(index.clamp(min=0).unsqueeze(2), dim=1)
