"""The convolution of the fast layer, two ways: a product for the taps side by side, or short filters.

Two neighbouring outputs of a kernel of width 2 take four products of a weight and an input. The short filter algorithm
F(2,2) (Winograd 1980) takes three. Let both outputs see the input b, the even one also a, the input before it, and the
odd one d, the input after it:

    y_even = W0 a + W1 b = W0 (a - b) + (W0 + W1) b
    y_odd  = W0 b + W1 d = W1 (d - b) + (W0 + W1) b

With a kernel of width 3 both outputs see b and c, and F(2,3) takes four products instead of six:

    y_even = W0 a + W1 b + W2 c = W0 (a - c) + P (b + c) + M (c - b)        P = (W0 + W1 + W2) / 2
    y_odd  = W0 b + W1 c + W2 d = W2 (d - b) + P (b + c) - M (c - b)        M = (W0 - W1 + W2) / 2

An output meets no input that it should not see, so the future cannot leak into it, not even as rounding. (It would with
F(3,2).) The gradients have the same form. The sums of neighbours have a limit: an input of inf, or near the largest
float, makes its sequence NaN where the one product may give inf, and saturated gates.

Arrays have time first: x is (T, B, F) and `window`, the K - 1 inputs before it, (K - 1, B, F). A piece is a slice of
the steps, and its projection is (n, B, rows of the weight). All pieces but the last have an even number of steps. The
backward pass takes them from the last to the first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from qrnn.onednn import add_product, linear, product

SHORT_FILTER_ROWS = 1024

Halves = tuple[Tensor, Tensor]  # the even and the odd steps of an array, counted from 0; (n / 2, B, H) each


def even_and_odd(array: Tensor) -> Halves:
    return array[0::2], array[1::2]


class Taps:
    """Convolve by one product, of the K inputs that an output sees, side by side."""

    split = split_states = staticmethod(even_and_odd)

    def __init__(self, window: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        self.seen = torch.cat([window, x]) if len(window) else x
        self.weight, self.bias = weight.to(dtype), None if bias is None else bias.to(dtype)

    def project(self, piece: slice, y: Tensor) -> None:
        """Fill y, (n, B, rows of `weight`)."""
        taps, rows = self._taps(piece), y.flatten(0, 1)
        if rows.dtype != taps.dtype:
            rows.copy_(F.linear(taps, self.weight, self.bias))
        else:
            product(taps, self.weight.t(), rows, self.bias)

    def start_backward(self, dtype: torch.dtype, differentiates_inputs: bool) -> None:
        self.weight_grad = torch.zeros_like(self.weight, dtype=dtype)
        self.bias_grad = self.weight_grad.new_zeros(len(self.weight))
        self.seen_grad = self.seen.new_empty(self.seen.shape) if differentiates_inputs else None

    def backward(self, piece: slice, y_grad: Tensor) -> None:
        """Add to the gradients."""
        self.bias_grad += y_grad.sum((0, 1))
        rows, taps = y_grad.flatten(0, 1).to(self.weight.dtype), self._taps(piece)
        if self.weight_grad.dtype == rows.dtype:
            add_product(rows.t(), taps, self.weight_grad)
        else:
            self.weight_grad += torch.mm(rows.t(), taps)
        if self.seen_grad is None:
            return
        steps, batch, features = len(y_grad), *self.seen.shape[1:]
        parts = self.seen_grad[piece.start : piece.stop + len(self.seen) - self._steps]
        if len(parts) == steps and parts.dtype == rows.dtype:
            product(rows, self.weight, parts.flatten(0, 1))
            return
        to_taps = linear(rows, self.weight.t()).view(steps, batch, -1).split(features, dim=2)
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
    """Convolve by F(2,2) or F(2,3). A buffer has the odd steps first, then the even ones.

    The inputs of a pair of outputs are numbered 0 to K. The first products are shared, then come that of the even
    output alone and that of the odd one alone. M has another sign in the odd output.
    """

    def __init__(self, window: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, longest: int) -> None:
        self.x, self.bias, self.before = x, bias, len(window)
        self.first_pair = [*window, *x[:2]]  # its inputs
        taps = [tap.contiguous() for tap in weight.chunk(self.before + 1, dim=1)]
        self.combinations: list[tuple[Callable[..., Tensor], tuple[int, ...]]]
        if self.before == 1:
            shared = [taps[0] + taps[1]]
            self.combinations = [(_copy, (1,)), (torch.sub, (0, 1)), (torch.sub, (2, 1))]
        else:
            half = (taps[0] + taps[2]).div_(2)
            shared = [torch.add(half, taps[1], alpha=0.5), torch.sub(half, taps[1], alpha=0.5)]
            self.combinations = [(torch.add, (1, 2)), (torch.sub, (2, 1)), (torch.sub, (0, 2)), (torch.sub, (3, 1))]
        self.weights = [*shared, taps[0], taps[-1]]
        self.longest = (longest + 1) // 2  # pairs of steps in a piece
        self.buffers = [x.new_empty(self.longest, *x.shape[1:])] * len(self.weights)  # one after another

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
        inputs, weights = self._inputs(piece), [weight.t() for weight in self.weights]
        product(next(inputs), weights[0], even, self.bias)
        if self.before == 1:
            odd.copy_(even[: len(odd)])
        else:
            difference = linear(next(inputs), self.weights[1])
            torch.sub(even[: len(odd)], difference[: len(odd)], out=odd)
            even += difference
        add_product(next(inputs), weights[-2], even)
        add_product(next(inputs), weights[-1], odd)

    def start_backward(self, dtype: torch.dtype, differentiates_inputs: bool) -> None:
        x = self.x
        self.seen_grad = x.new_empty(len(x) + self.before, *x.shape[1:]) if differentiates_inputs else None
        self.weight_grads = [torch.zeros_like(weight) for weight in self.weights]
        self.bias_grad = x.new_zeros(len(self.weights[0]))
        self.sums = x.new_empty(self.before, self.longest * x.shape[1], len(self.bias_grad))  # and differences
        self.buffers = [torch.empty_like(self.buffers[0]) for _ in self.buffers]  # side by side

    def backward(self, piece: slice, y_grad: Tensor) -> None:
        """Add to the gradients."""
        even, odd = (half.flatten(0, 1) for half in self.split(y_grad))
        shared = [sums[: len(even)] for sums in self.sums]
        for rows, combine in zip(shared, (torch.add, torch.sub), strict=False):
            combine(even[: len(odd)], odd, out=rows[: len(odd)])
            rows[len(odd) :] = even[len(odd) :]
        self.bias_grad += shared[0].sum(0)
        inputs, grads = list(self._inputs(piece)), [*shared, even, odd]
        for weight_grad, rows, columns in zip(self.weight_grads, grads, inputs, strict=True):
            add_product(rows.t(), columns, weight_grad)
        if self.seen_grad is not None:  # in the buffers of the inputs, which are through
            part = self.seen_grad[piece.start : piece.stop + self.before]
            if piece.stop == len(self.x):
                part[-self.before :] = 0
            for out, rows, weight in zip(inputs, grads, self.weights, strict=True):
                product(rows, weight, out)
            self._add_input_gradients(part, *(out.view(-1, *self.x.shape[1:]) for out in inputs))

    def _add_input_gradients(self, seen_grad: Tensor, *products: Tensor) -> None:
        """Fill the first n steps of the piece's part of `seen_grad` and add to the others."""
        (both, *difference), (to_even, to_odd) = products[:-2], products[-2:]
        even, odd = even_and_odd(seen_grad)  # where inputs 0 and 1 of the pairs are
        pairs = len(to_even)
        even[:pairs] = to_even
        torch.sub(both, difference[0] if difference else to_even, out=odd[:pairs])
        odd[: len(to_odd)] -= to_odd
        if difference:
            even[1 : pairs + 1] += both.add_(difference[0]).sub_(to_even)
        (odd if difference else even)[1 : len(to_odd) + 1] += to_odd

    def gradients(self) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor]:
        """Return the gradients of window, x, weight and bias, once all pieces are through."""
        *shared, first, last = self.weight_grads
        if self.before == 1:
            taps = [first.add_(shared[0]), last.add_(shared[0])]
        else:
            half = (shared[0] + shared[1]).div_(2)
            taps = [first.add_(half), shared[0].sub_(shared[1]).div_(2), last.add_(half)]
        before = self.before
        inputs = (None, None) if self.seen_grad is None else (self.seen_grad[:before], self.seen_grad[before:])
        return *inputs, torch.cat(taps, dim=1), self.bias_grad

    def _inputs(self, piece: slice) -> Iterator[Tensor]:
        """Yield what the weights are multiplied by, each as a matrix in a buffer. If n is odd, input K is missing."""
        steps = piece.stop - piece.start
        skipped = 0 if piece.start else 1  # the first pair of all, some of whose inputs are in the window
        start = piece.start + 2 * skipped - self.before
        for buffer, (combine, which) in zip(self.buffers, self.combinations, strict=True):
            pairs = (steps + 1) // 2 - (self.before + 1 in which and steps % 2)
            out, stop = buffer[:pairs], start + 2 * (pairs - skipped) - 1
            if skipped and pairs:
                combine(*(self.first_pair[i] for i in which), out=out[0])
            if pairs > skipped:
                combine(*(self.x[start + i : stop + i : 2] for i in which), out=out[skipped:])
            yield out.flatten(0, 1)


def _copy(array: Tensor, out: Tensor) -> Tensor:
    return out.copy_(array)


def convolution(
    window: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, longest: int
) -> Taps | ShortFilter:
    """Return the convolution for pieces of at most `longest` steps."""
    same = x.dtype == window.dtype == weight.dtype == dtype != torch.bfloat16
    if same and len(window) in (1, 2) and x.shape[0] * x.shape[1] >= SHORT_FILTER_ROWS:
        return ShortFilter(window, x, weight, bias, longest)
    return Taps(window, x, weight, bias, dtype)
