"""The convolution of the fast layer, two ways: a product for each tap, or three products for two steps.

Two neighbouring outputs of a kernel of width 2 take four products of a weight and an input. The short filter algorithm
F(2,2) (Winograd 1980) takes three. Let both outputs see the input b, the even one also a, the input before it, and the
odd one d, the input after it:

    y_even = W0 a + W1 b = W0 (a - b) + (W0 + W1) b
    y_odd  = W0 b + W1 d = W1 (d - b) + (W0 + W1) b

An output meets no input that it should not see, so the future cannot leak into it, not even as rounding. (It would with
F(3,2).) The gradients have the same form.

Arrays have time first: x is (T, B, F) and `window`, the K - 1 inputs before it, (K - 1, B, F). A piece is a slice of
the steps, and its projection is (n, B, rows of the weight). All pieces but the last have an even number of steps. The
backward pass takes them from the last to the first.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

SHORT_FILTER_ROWS = 1024

Halves = tuple[Tensor, Tensor]  # the even and the odd steps of an array, counted from 0; (n / 2, B, H) each


def even_and_odd(array: Tensor) -> Halves:
    return array[0::2], array[1::2]


class Taps:
    """One product, of the K inputs that an output sees side by side."""

    split = split_states = staticmethod(even_and_odd)

    def __init__(self, window: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        self.seen = torch.cat([window, x]) if len(window) else x
        self.weight, self.bias = weight.to(dtype), None if bias is None else bias.to(dtype)

    def project(self, piece: slice, y: Tensor) -> None:
        """Fill y, (n, B, rows of `weight`)."""
        taps, rows = self._taps(piece), y.flatten(0, 1)
        if rows.dtype != taps.dtype:
            rows.copy_(F.linear(taps, self.weight, self.bias))
        elif self.bias is None:
            torch.mm(taps, self.weight.t(), out=rows)
        else:
            torch.addmm(self.bias, taps, self.weight.t(), out=rows)

    def start_backward(self, dtype: torch.dtype, differentiates_inputs: bool) -> None:
        self.weight_grad = torch.zeros_like(self.weight, dtype=dtype)
        self.bias_grad = self.weight_grad.new_zeros(len(self.weight))
        self.seen_grad = self.seen.new_empty(self.seen.shape) if differentiates_inputs else None

    def backward(self, piece: slice, y_grad: Tensor) -> None:
        """Add to the gradients."""
        self.bias_grad += y_grad.sum((0, 1))
        rows, taps = y_grad.flatten(0, 1).to(self.weight.dtype), self._taps(piece)
        if self.weight_grad.dtype == rows.dtype:
            self.weight_grad.addmm_(rows.t(), taps)
        else:
            self.weight_grad += torch.mm(rows.t(), taps)
        if self.seen_grad is None:
            return
        steps, batch, features = len(y_grad), *self.seen.shape[1:]
        parts = self.seen_grad[piece.start : piece.stop + len(self.seen) - self._steps]
        if len(parts) == steps and parts.dtype == rows.dtype:
            torch.mm(rows, self.weight, out=parts.flatten(0, 1))
            return
        to_taps = torch.mm(rows, self.weight).view(steps, batch, -1).split(features, dim=2)
        parts[:steps] = to_taps[0]
        if piece.stop == self._steps:
            parts[steps:] = 0
        for k, grad in enumerate(to_taps[1:], 1):
            parts[k : k + steps] += grad

    def gradients(self) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor]:
        """Return the gradients of window, x, weight and bias, once all pieces are through."""
        before = len(self.seen) - self._steps
        inputs = (None, None) if self.seen_grad is None else (self.seen_grad[:before], self.seen_grad[before:])
        return *inputs, self.weight_grad, self.bias_grad

    @property
    def _steps(self) -> int:
        return len(self.seen) - self.weight.shape[1] // self.seen.shape[2] + 1

    def _taps(self, piece: slice) -> Tensor:
        """Return the inputs of a piece, (n B, K F)."""
        steps, before = piece.stop - piece.start, len(self.seen) - self._steps
        seen = self.seen[piece.start : piece.stop + before].to(self.weight.dtype)
        if before:
            seen = torch.cat([seen[k : k + steps] for k in range(before + 1)], dim=2)
        return seen.flatten(0, 1)


class ShortFilter:
    """F(2,2): three products for two steps. A buffer has the odd steps first, then the even ones."""

    def __init__(self, window: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, longest: int) -> None:
        self.window, self.x, self.bias = window, x, bias
        self.first, self.second = weight.chunk(2, dim=1)
        self.both = self.first + self.second
        self.longest = (longest + 1) // 2  # pairs of steps in a piece
        self.buffers = [x.new_empty(self.longest, *x.shape[1:])] * 3  # one after another

    @staticmethod
    def split(buffer: Tensor) -> Halves:
        odd = len(buffer) // 2
        return buffer[odd:], buffer[:odd]

    @staticmethod
    def split_states(buffer: Tensor) -> Halves:
        """Split n steps and the one before them, which is the first of all. So the others are as `split` wants them."""
        even = (len(buffer) + 1) // 2
        return buffer[:even], buffer[even:]

    def project(self, piece: slice, y: Tensor) -> None:
        """Fill y, (n, B, rows of `weight`)."""
        even, odd = (half.flatten(0, 1) for half in self.split(y))
        inputs = self._inputs(piece)
        if self.bias is None:
            torch.mm(next(inputs), self.both.t(), out=even)
        else:
            torch.addmm(self.bias, next(inputs), self.both.t(), out=even)
        odd.copy_(even[: len(odd)])
        even.addmm_(next(inputs), self.first.t())
        odd.addmm_(next(inputs), self.second.t())

    def start_backward(self, dtype: torch.dtype, differentiates_inputs: bool) -> None:
        self.x_grad = self.x.new_empty(self.x.shape) if differentiates_inputs else None
        self.window_grad: Tensor | None = None
        self.weight_grads = self.both.new_zeros(3, *self.both.shape)
        self.bias_grad = self.both.new_zeros(len(self.both))
        self.sums = self.both.new_empty(self.longest * self.x.shape[1], len(self.both))
        self.buffers = [torch.empty_like(self.buffers[0]) for _ in range(3)]  # side by side

    def backward(self, piece: slice, y_grad: Tensor) -> None:
        """Add to the gradients."""
        even, odd = (half.flatten(0, 1) for half in self.split(y_grad))
        both = torch.add(even[: len(odd)], odd, out=self.sums[: len(odd)])
        if len(odd) < len(even):
            both = self.sums[: len(even)]
            both[len(odd) :] = even[len(odd) :]
        self.bias_grad += both.sum(0)
        inputs, grads = list(self._inputs(piece)), (both, even, odd)
        for weight_grad, rows, columns in zip(self.weight_grads, grads, inputs, strict=True):
            weight_grad.addmm_(rows.t(), columns)
        if self.x_grad is not None:  # in the buffers of the inputs, which are through
            for out, rows, weight in zip(inputs, grads, (self.both, self.first, self.second), strict=True):
                torch.mm(rows, weight, out=out)
            self._add_input_gradients(piece, *(out.view(-1, *self.x.shape[1:]) for out in inputs))

    def _add_input_gradients(self, piece: slice, to_b: Tensor, to_a: Tensor, to_d: Tensor) -> None:
        b_grad, d_grad = even_and_odd(self.x_grad[piece])
        torch.sub(to_b, to_a, out=b_grad)
        b_grad[: len(to_d)] -= to_d
        inner = len(to_a) - 1  # inputs d that are the a of the next pair
        torch.add(to_a[1:], to_d[:inner], out=d_grad[:inner])
        if inner < len(to_d):
            last = self.x_grad[piece.stop - 1]
            last.copy_(to_d[-1]) if piece.stop == len(self.x) else last.add_(to_d[-1])
        if piece.start:
            self.x_grad[piece.start - 1] = to_a[0]
        else:
            self.window_grad = to_a[:1].clone()

    def gradients(self) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor]:
        """Return the gradients of window, x, weight and bias, once all pieces are through."""
        both, first, second = self.weight_grads
        weight_grad = torch.cat([first.add_(both), second.add_(both)], dim=1)
        return self.window_grad, self.x_grad, weight_grad, self.bias_grad

    def _inputs(self, piece: slice) -> Iterator[Tensor]:
        """Yield b, a - b and d - b, each as a matrix in a buffer. If n is odd, the last pair has no d."""
        b, d = even_and_odd(self.x[piece])
        b_copy, a_b, d_b = (
            buffer[: len(array)] for buffer, array in zip(self.buffers, (b, b, d), strict=True)
        )
        yield b_copy.copy_(b).flatten(0, 1)
        if piece.start:
            torch.sub(self.x[piece.start - 1 : piece.stop - 1 : 2], b, out=a_b)
        else:
            torch.sub(self.window[0], b[0], out=a_b[0])
            torch.sub(d[: len(b) - 1], b[1:], out=a_b[1:])
        yield a_b.flatten(0, 1)
        yield torch.sub(d, b[: len(d)], out=d_b).flatten(0, 1)


def convolution(
    window: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, longest: int
) -> Taps | ShortFilter:
    """Return the convolution for pieces of at most `longest` steps."""
    same = x.dtype == window.dtype == weight.dtype == dtype != torch.bfloat16
    if same and len(window) == 1 and x.shape[0] * x.shape[1] >= SHORT_FILTER_ROWS:
        return ShortFilter(window, x, weight, bias, longest)
    return Taps(window, x, weight, bias, dtype)

