"""The convolution of the fast layer, two ways: a product for each tap, or three products for two steps.

Two neighbouring outputs of a kernel of width 2 take four products of a weight and an input. The short filter algorithm
F(2,2) (Winograd 1980) takes three. Let both outputs see the input b, the even one also a, the input before it, and the
odd one d, the input after it:

    y_even = W0 a + W1 b = W0 (a - b) + (W0 + W1) b
    y_odd  = W0 b + W1 d = W1 (d - b) + (W0 + W1) b

An output meets no input that it should not see, so the future cannot leak into it, not even as rounding. (It would with
F(3,2).) The gradients have the same form.

Arrays have time first: a piece of n steps sees n + K - 1 inputs, (steps, B, F), and gives (n, B, rows of the weight).
"""

from __future__ import annotations

import torch
from torch import Tensor

SHORT_FILTER_ROWS = 1024

Halves = tuple[Tensor, Tensor]  # the even and the odd steps of an array, counted from 0; (n / 2, B, H) each


def even_and_odd(array: Tensor) -> Halves:
    return array[0::2], array[1::2]


class Taps:
    """One product for each of the K inputs that an output sees."""

    split = staticmethod(lambda buffer: even_and_odd(buffer))

    def __init__(self, weight: Tensor, features: int, dtype: torch.dtype) -> None:
        self.weights = weight.to(dtype).split(features, dim=1)

    def project(self, seen: Tensor, bias: Tensor | None, y: Tensor) -> None:
        """Fill y, (n, B, rows of `weight`)."""
        if bias is not None:
            y.copy_(bias)
        for k, weight in enumerate(self.weights):
            _add_product(y, self._tap(seen, k, len(y)), weight.t(), beta=k > 0 or bias is not None)

    def start_backward(self, dtype: torch.dtype) -> None:
        features = self.weights[0].shape[1]
        self.weight_grad = self.weights[0].new_zeros(len(self.weights[0]), len(self.weights) * features, dtype=dtype)
        self.bias_grad = self.weight_grad.new_zeros(len(self.weight_grad))

    def backward(self, seen: Tensor, y_grad: Tensor, seen_grad: Tensor | None) -> None:
        """Add to the gradients of weight and bias; fill the first n steps of `seen_grad` and add to the others."""
        self.bias_grad += y_grad.sum((0, 1))
        rows = y_grad.flatten(0, 1).to(self.weights[0].dtype)
        weight_grads = self.weight_grad.split(seen.shape[2], dim=1)
        for k, (weight, weight_grad) in enumerate(zip(self.weights, weight_grads, strict=True)):
            _add_product(weight_grad, rows.t(), self._tap(seen, k, len(y_grad)))
            if seen_grad is not None:
                _add_product(seen_grad[k : k + len(y_grad)], rows, weight, beta=k > 0)

    def finish_backward(self) -> None:
        """Nothing is left to do."""

    def _tap(self, seen: Tensor, k: int, steps: int) -> Tensor:
        return seen[k : k + steps].flatten(0, 1).to(self.weights[0].dtype)


class ShortFilter:
    """F(2,2): three products for two steps. A buffer has the even steps first, then the odd ones."""

    def __init__(self, weight: Tensor) -> None:
        self.first, self.second = (tap.contiguous() for tap in weight.chunk(2, dim=1))
        self.both = self.first + self.second

    @staticmethod
    def split(buffer: Tensor) -> Halves:
        half = (len(buffer) + 1) // 2
        return buffer[:half], buffer[half:]

    def project(self, seen: Tensor, bias: Tensor | None, y: Tensor) -> None:
        """Fill y, (n, B, rows of `weight`)."""
        a_b, b, d_b = self._inputs(seen)
        even, odd = self.split(y)
        if bias is not None:
            even.copy_(bias)
        _add_product(even, b, self.both.t(), beta=bias is not None)
        odd.copy_(even[: len(odd)])
        _add_product(even, a_b, self.first.t())
        _add_product(odd, d_b, self.second.t())

    def start_backward(self, dtype: torch.dtype) -> None:
        self.weight_grad, self.both_grad = torch.zeros_like(self.both).repeat(1, 2), torch.zeros_like(self.both)
        self.bias_grad = self.both.new_zeros(len(self.both))

    def backward(self, seen: Tensor, y_grad: Tensor, seen_grad: Tensor | None) -> None:
        """Add to the gradients of weight and bias; fill the first n steps of `seen_grad` and add to the others."""
        even, odd = (half.flatten(0, 1) for half in self.split(y_grad))
        both = even.clone()
        both[: len(odd)] += odd
        self.bias_grad += both.sum(0)
        first, second = self.weight_grad.chunk(2, dim=1)
        grads = (first, self.both_grad, second)
        for weight_grad, rows, inputs in zip(grads, (even, both, odd), self._inputs(seen), strict=True):
            _add_product(weight_grad, rows.t(), inputs)
        if seen_grad is None:
            return
        to_a, to_b, to_d = (
            torch.mm(rows, weight).view(-1, *seen.shape[1:])
            for rows, weight in ((even, self.first), (both, self.both), (odd, self.second))
        )
        seen_grad[0:-1:2] = to_a
        torch.sub(to_b, to_a, out=seen_grad[1::2])
        seen_grad[1::2][: len(to_d)] -= to_d
        seen_grad[2::2] += to_d

    def finish_backward(self) -> None:
        """Add the gradient of W0 + W1 to those of W0 and W1."""
        for weight_grad in self.weight_grad.chunk(2, dim=1):
            weight_grad += self.both_grad

    def _inputs(self, seen: Tensor) -> list[Tensor]:
        """Return a - b, b and d - b, each as a matrix. If n is odd, the last pair has no d."""
        a, b, d = seen[0:-1:2], seen[1::2], seen[2::2]
        inputs = [seen.new_empty(array.shape) for array in (a, b, d)]
        torch.sub(a, b, out=inputs[0])
        inputs[1].copy_(b)
        torch.sub(d, b[: len(d)], out=inputs[2])
        return [array.flatten(0, 1) for array in inputs]


def convolution(seen: Tensor, weight: Tensor, dtype: torch.dtype) -> Taps | ShortFilter:
    rows, features = (len(seen) - 1) * seen.shape[1], seen.shape[2]
    same = seen.dtype == weight.dtype == dtype != torch.bfloat16
    if same and weight.shape[1] == 2 * features and rows >= SHORT_FILTER_ROWS:
        return ShortFilter(weight)
    return Taps(weight, features, dtype)


def _add_product(out: Tensor, a: Tensor, b: Tensor, beta: bool = True) -> None:
    """Set out, (..., columns), to the matrix product a b, plus itself if `beta`."""
    if out.dtype == a.dtype and (out.dim() == 2 or out.is_contiguous()):
        out.flatten(0, -2).addmm_(a, b, beta=float(beta))
        return
    product = torch.mm(a, b).view(out.shape)
    out.add_(product) if beta else out.copy_(product)
