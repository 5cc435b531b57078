"""The QRNN layer again, faster on a CPU: the numbers of `QRNNLayer`, by one function from the inputs to h.

Four ideas, each with its rule:

1. Three products for two steps, see `qrnn.convolution`. Rule: kernel_size = 2, float32 or float64, SHORT_FILTER_ROWS
   rows (steps times batch) or more: fewer do not pay for W0 + W1, and bfloat16 would round the differences. Otherwise
   each tap is a product, so kernel_size = 1 has two thirds of the work of 2, and 3 has twice as much.
2. Pieces that stay in the cache. The layer goes through time in pieces of about PIECE numbers in the projection.
   Product, gates, pooling and output of a piece come before the next piece; the state runs on. Rule: always.
3. Few passes over memory. Gates are computed in place, in the buffer of the projection. The backward pass needs these
   values alone, so they are what is kept; without gradients, no more than a piece is. Rule: always.
4. 1 - f instead of f. A gate near 1 has lost the digits of 1 - f in float32, and the errors of T steps add up. The gate
   g = 1 - f = sigmoid(-a) has them all, and two steps are joined by 1 - f f' = g + (1 - g) g'. Where f is near 0, it is
   exact to 6e-8 of the state that it lets through. Rule: always. The scan halves the number of steps until no more than
   LOOP_STEPS are left, which go one by one: fewer calls, fewer passes. Where a state is to stay as it is, all steps go
   one by one, for then it stays to the bit.

Where the plain layer takes over: see `FastQRNNLayer`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from qrnn.convolution import Halves, convolution, even_and_odd
from qrnn_layer import MODES, QRNNLayer

PIECE = 2**19  # 2 MiB in float32
LOOP_STEPS = 16  # of a scan, two calls a step
LERP_STEPS = 128  # of an average, one call a step

aten = torch.ops.aten


class _Activation(NamedTuple):
    """An activation in place, and its backward pass from its value."""

    forward_: Callable[[Tensor], object]  # (pre-activation) -> None
    backward: Callable[[Tensor, Tensor, Tensor], object]  # (gradient of the value, value, out) -> None


def _softplus_backward(grad: Tensor, z: Tensor, out: Tensor) -> None:
    torch.mul(grad, torch.neg(z).expm1_(), out=out).neg_()  # sigmoid(a) = 1 - exp(-softplus(a))


def _shifted_softplus(a: Tensor) -> None:
    aten.softplus.out(a.mul_(2), 1, 20, out=a).sub_(math.log(2))


def _shifted_softplus_backward(grad: Tensor, z: Tensor, out: Tensor) -> None:
    torch.mul(grad, torch.neg(z).exp_().neg_().add_(2), out=out)  # 2 sigmoid(2a) = 2 - exp(-z)


ACTIVATIONS = {
    "softplus": _Activation(lambda a: aten.softplus.out(a, 1, 20, out=a), _softplus_backward),
    "shifted_softplus": _Activation(_shifted_softplus, _shifted_softplus_backward),
    "elu": _Activation(F.elu_, lambda grad, z, out: aten.elu_backward(grad, 1, 1, 1, True, z, grad_input=out)),
    "exp": _Activation(torch.exp_, lambda grad, z, out: torch.mul(grad, z, out=out)),
    "sigmoid": _Activation(torch.sigmoid_, lambda grad, z, out: aten.sigmoid_backward(grad, z, grad_input=out)),
    "relu": _Activation(torch.relu_, lambda grad, z, out: aten.threshold_backward(grad, z, 0, grad_input=out)),
    "tanh": _Activation(torch.tanh_, lambda grad, z, out: aten.tanh_backward(grad, z, grad_input=out)),
    "identity": _Activation(lambda a: None, lambda grad, z, out: out.copy_(grad)),
}


# --- the recurrence, in terms of g = 1 - f ----------------------------------------------------------------------------


def _average(c: Halves, z: Halves, g: Halves, c0: Tensor, one_by_one: bool) -> None:
    """Fill c with c_t = (1 - g_t) c_{t-1} + g_t z_t: `_scan`, but for a first level that has half as many passes."""
    (even, odd), (z_even, z_odd), (g_even, g_odd) = c, z, g
    length = len(odd)
    if one_by_one or len(even) + length <= LERP_STEPS:
        for c_t, z_t, g_t in zip(*map(_in_time, (c, z, g)), strict=True):
            c0 = torch.lerp(c0, z_t, g_t, out=c_t)
        return
    torch.mul(z_even, g_even, out=even)
    torch.lerp(c0, z_even[0], g_even[0], out=even[0])
    torch.lerp(even[:length], z_odd, g_odd, out=odd)
    _scan(even_and_odd(odd), _joined(g))
    torch.lerp(odd[: len(even) - 1], z_even[1:], g_even[1:], out=even[1:])


def _scan(x: Halves, g: Halves, backwards: bool = False, one_by_one: bool = False) -> None:
    """Turn x into the states, in place.

    h_t = x_t + (1 - g_t) h_{t-1}, or with `backwards` h_t = x_t + (1 - g_{t+1}) h_{t+1}. The step where it starts is
    right as it is. Each odd step takes in the even one before (backwards: after) it. Then the odd steps are a
    recurrence of their own, half as long, and the even steps follow from their odd neighbours.
    """
    (even, odd), (g_even, g_odd) = x, g
    length, later = len(odd), len(even) - 1
    if one_by_one or length + later < LOOP_STEPS:
        states, gates = _in_time(x), _in_time(g)
        for t in range(length + later):
            if backwards:
                t = length + later - 1 - t
                _carry(states[t], states[t + 1], gates[t + 1])
            else:
                _carry(states[t + 1], states[t], gates[t + 1])
        return
    if backwards:
        _carry(odd[:later], even[1:], g_even[1:])
    else:
        _carry(odd, even[:length], g_odd)
    _scan(even_and_odd(odd), _joined(g), backwards)
    if backwards:
        _carry(even[:length], odd, g_odd)
    else:
        _carry(even[1:], odd[:later], g_even[1:])


def _carry(state: Tensor, other: Tensor, g: Tensor) -> None:
    """Add (1 - g) other to state. The product comes first: where g = 1, nothing of other is left, not even rounding."""
    state += torch.addcmul(other, g, other, value=-1)


def _joined(g: Halves) -> Halves:
    """Return the gates 1 - f f' of pairs of steps: how much an odd step forgets of the odd one before it."""
    even, odd = g
    return even_and_odd(torch.lerp(even[: len(odd)], odd.new_ones(()), odd))


def _in_time(halves: Halves) -> list[Tensor]:
    """Return the steps one by one."""
    even, odd = halves
    steps = [even] * (len(even) + len(odd))
    steps[0::2], steps[1::2] = even.unbind(), odd.unbind()
    return steps


# --- the layer --------------------------------------------------------------------------------------------------------


class _Setting(NamedTuple):
    dtype: torch.dtype  # of the matrix products and of h
    layer: QRNNLayer  # for its mode and activation; the parameters are arguments

    @property
    def mode(self) -> str:
        return self.layer.mode


def _pieces(steps: int, step_size: int) -> list[slice]:
    """Cut the steps, of `step_size` numbers each, into pieces; all but the last have an even number of steps."""
    length = max(2, PIECE // step_size // 2 * 2)
    return [slice(start, min(start + length, steps)) for start in range(0, steps, length)]


def _blocks(y: Tensor, mode: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return z, g, i and o. In "f" and "fo" i is g; in "f" there is no o, and g stands in its place."""
    blocks = y.chunk(MODES[mode], dim=-1)
    return blocks[0], blocks[1], blocks[2] if mode == "ifo" else blocks[1], blocks[-1]


def _activate(y: Tensor, setting: _Setting) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Turn the projection into candidates and gates, in place, and return `_blocks` of it."""
    z, g, i, o = _blocks(y, setting.mode)
    ACTIVATIONS[setting.layer.activation].forward_(z)
    g.neg_()  # 1 - f = sigmoid(-a)
    y[..., z.shape[-1] :].sigmoid_()
    return z, g, i, o


def _forward(
    seen: Tensor,  # (K - 1 + T, B, F)
    c0: Tensor,  # (B, H)
    keep: Tensor | None,  # (T, B, 1) or (T, B, H)
    weight: Tensor,
    bias: Tensor | None,
    setting: _Setting,
    saves: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return h, (T, B, H), the last c, (B, H), and, if it `saves`, the gates, (T, B, MODES*H), and c, (T, B, H)."""
    (batch, width), window = c0.shape, weight.shape[1] // seen.shape[2] - 1
    steps = len(seen) - window
    convolves, pieces = convolution(seen, weight, setting.dtype), _pieces(steps, batch * len(weight))
    stored = steps if saves else pieces[0].stop
    gates, states = c0.new_empty(stored, batch, len(weight)), c0.new_empty(stored, batch, width)
    h = seen.new_empty(steps, batch, width, dtype=setting.dtype)
    for piece in pieces:
        place = piece if saves else slice(piece.stop - piece.start)
        y = gates[place]
        convolves.project(seen[piece.start : piece.stop + window], bias, y)
        z, g, i, o, c = map(convolves.split, (*_activate(y, setting), states[place]))
        if keep is not None:
            for halves in (g, i) if setting.mode == "ifo" else (g,):
                for half, where in zip(halves, even_and_odd(keep[piece]), strict=True):
                    half.masked_fill_(where, 0)
        if setting.mode == "ifo":
            for half, candidate, gate in zip(c, z, i, strict=True):
                torch.mul(candidate, gate, out=half)
            _carry(c[0][0], c0, g[0][0])
            _scan(c, g, one_by_one=keep is not None)
        else:
            _average(c, z, g, c0, one_by_one=keep is not None)
        for target, half, gate in zip(even_and_odd(h[piece]), c, o, strict=True):
            target.copy_(half) if setting.mode == "f" else torch.mul(half, gate, out=target)
        c0 = _last(c).clone()
    return h, c0, gates, states


def _last(halves: Halves) -> Tensor:
    even, odd = halves
    return (even if len(even) > len(odd) else odd)[-1]


class _Layer(torch.autograd.Function):
    """`_forward` and its derivative: h and the last c."""

    @staticmethod
    def forward(ctx, seen, c0, keep, weight, bias, setting):
        h, c_last, gates, states = _forward(seen, c0, keep, weight, bias, setting, saves=True)
        ctx.save_for_backward(seen, c0, keep, weight, bias, gates, states)
        ctx.setting = setting
        ctx.set_materialize_grads(False)
        return h, c_last

    @staticmethod
    def backward(ctx, h_grad: Tensor | None, c_grad: Tensor | None):
        seen, c0, _, weight, bias, gates, states = ctx.saved_tensors
        given = [grad for grad in (h_grad, c_grad) if grad is not None]
        batched = any(torch._C._functorch.is_legacy_batchedtensor(grad) for grad in given)  # by is_grads_batched=True
        if torch.is_grad_enabled() or batched:  # second and many derivatives are those of the definition
            return *_gradients_of_definition(ctx, h_grad, c_grad), None
        mode, (steps, batch, rows) = ctx.setting.mode, gates.shape
        seen_grad = None
        if ctx.needs_input_grad[0]:
            seen_grad = torch.empty_like(seen)
            seen_grad[steps:] = 0
        convolves, pieces = convolution(seen, weight, ctx.setting.dtype), _pieces(steps, batch * rows)
        convolves.start_backward(gates.dtype)
        buffers = gates.new_empty(pieces[0].stop, batch, rows), states.new_empty(pieces[0].stop, *c0.shape)
        carried = torch.zeros_like(c0) if c_grad is None else c_grad
        for piece, previous in zip(reversed(pieces), [*reversed(pieces[:-1]), None], strict=True):
            y_grad, delta = (buffer[: piece.stop - piece.start] for buffer in buffers)
            before = c0 if previous is None else _last(convolves.split(states[previous]))
            blocks = gates[piece], y_grad
            (z, g, i, o), (z_grad, f_grad, i_grad, o_grad) = (_blocks(array, mode) for array in blocks)
            c_halves, g_halves, delta_halves = map(convolves.split, (states[piece], g, delta))

            # h = o c, or c in the mode "f"
            if h_grad is None:
                delta.zero_()
                o_grad.zero_()
            else:
                arrays = map(convolves.split, (o, o_grad))
                for given, c, d, gate, grad in zip(
                    even_and_odd(h_grad[piece]), c_halves, delta_halves, *arrays, strict=True
                ):
                    if mode == "f":
                        d.copy_(given)
                    else:
                        torch.mul(given, gate, out=d)
                        aten.sigmoid_backward(given * c, gate, grad_input=grad)
            # c_t = (1 - g_t) c_{t-1} + i_t z_t
            _last(delta_halves).add_(carried)
            _scan(delta_halves, g_halves, backwards=True)
            carried = torch.addcmul(delta[0], g[0], delta[0], value=-1)
            ACTIVATIONS[ctx.setting.layer.activation].backward(delta * i, z, z_grad)
            if mode == "ifo":
                aten.sigmoid_backward(delta * z, i, grad_input=i_grad)
            # The gate f times the state before; in "f" and "fo" 1 - f times z as well.
            (c_even, c_odd), (f_even, f_odd) = c_halves, convolves.split(f_grad)
            z_even, z_odd = convolves.split(torch.zeros_like(z) if mode == "ifo" else z)
            torch.sub(before, z_even[0], out=f_even[0])
            torch.sub(c_odd[: len(c_even) - 1], z_even[1:], out=f_even[1:])
            torch.sub(c_even[: len(c_odd)], z_odd, out=f_odd)
            aten.sigmoid_backward(f_grad.mul_(delta), g, grad_input=f_grad)  # f' = f (1 - f) = g (1 - g)

            inputs = slice(piece.start, piece.stop + len(seen) - steps)
            convolves.backward(seen[inputs], y_grad, None if seen_grad is None else seen_grad[inputs])
        convolves.finish_backward()
        bias_grad = None if bias is None else convolves.bias_grad.to(bias.dtype)
        return seen_grad, carried, None, convolves.weight_grad.to(weight.dtype), bias_grad, None


def _definition(seen, c0, keep, weight, bias, setting) -> tuple[Tensor, Tensor]:
    """Return what `_Layer` does, by the operations of the plain layer."""
    width = weight.shape[1] // seen.shape[2]
    taps = torch.cat([seen[k : len(seen) - width + 1 + k] for k in range(width)], dim=2)
    y = F.linear(taps.to(setting.dtype), weight.to(setting.dtype), None if bias is None else bias.to(setting.dtype))
    c, o = setting.layer._cells(y.transpose(0, 1), c0, None if keep is None else keep.transpose(0, 1))
    return (c if o is None else o * c).to(setting.dtype).transpose(0, 1), c[:, -1]


def _gradients_of_definition(ctx, *grads: Tensor | None) -> list[Tensor | None]:
    """Return the gradients of seen, c0, keep, weight and bias as functions that have derivatives themselves."""
    needs, create_graph = ctx.needs_input_grad[:5], torch.is_grad_enabled()
    with torch.enable_grad():
        # Aliases, because one may be a function of another: the input of a second layer with the same weight.
        inputs = [a.view_as(a) if needed else a for a, needed in zip(ctx.saved_tensors[:5], needs, strict=True)]
        outputs = _definition(*inputs, ctx.setting)  # type: ignore[call-arg]
    wanted = [a for a, needed in zip(inputs, needs, strict=True) if needed]
    given = [(h, grad) for h, grad in zip(outputs, grads, strict=True) if grad is not None]
    outputs, grads = zip(*given, strict=True)
    found = iter(torch.autograd.grad(outputs, wanted, grads, create_graph=create_graph))
    return [next(found) if needed else None for needed in needs]


class FastQRNNLayer(QRNNLayer):
    """`QRNNLayer`, faster on a CPU; arguments, parameters and numbers are the same.

    The plain layer computes what this one cannot or need not: other devices, float16, methods other than "scan" (or
    "auto"), no steps or no sequences, forward-mode derivatives, `torch.func`, `torch.compile`, `torch.export`, tracing.
    Second derivatives are those of the plain layer.
    """

    def _run(self, seen: Tensor, c0: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor]:
        autocasts = seen.device.type == "cpu" and torch.is_autocast_enabled("cpu") and seen.dtype != torch.float64
        setting = _Setting(torch.get_autocast_dtype("cpu") if autocasts else seen.dtype, self)
        if not self._is_fast(seen, setting.dtype):
            return super()._run(seen, c0, keep)
        trained = (seen, c0, self.weight) if self.bias is None else (seen, c0, self.weight, self.bias)
        differentiates = torch.is_grad_enabled() and any(array.requires_grad for array in trained)
        if seen.shape[1] == self.kernel_size and not differentiates:
            return self._step(seen, c0, keep, setting)
        seen, keep = seen.transpose(0, 1), None if keep is None else keep.transpose(0, 1)
        if differentiates:
            h, c = _Layer.apply(seen, c0, keep, self.weight, self.bias, setting)
        else:
            h, c, *_ = _forward(seen, c0, keep, self.weight, self.bias, setting, saves=False)
        return h.transpose(0, 1), c

    def _step(self, seen: Tensor, c0: Tensor, keep: Tensor | None, setting: _Setting) -> tuple[Tensor, Tensor]:
        """Run one step, as in generation, with few calls."""
        weight: Tensor = self.weight
        bias: Tensor | None = self.bias
        if setting.dtype != weight.dtype:
            weight, bias = weight.to(setting.dtype), None if bias is None else bias.to(setting.dtype)
        y = F.linear(seen.flatten(1).to(setting.dtype), weight, bias).to(c0.dtype)
        z, g, i, o = _activate(y, setting)
        c = torch.lerp(c0, z, g) if self.mode != "ifo" else torch.addcmul(c0, g, c0, value=-1).addcmul_(i, z)
        if keep is not None:
            c = torch.where(keep[:, 0], c0, c)
        h = c if self.mode == "f" else o * c
        return h.to(setting.dtype).unsqueeze(1), c

    def _is_fast(self, seen: Tensor, dtype: torch.dtype) -> bool:
        return (
            seen.device.type == "cpu"
            and dtype in (torch.float32, torch.float64, torch.bfloat16)
            and self.method in ("auto", "scan")
            and self.activation in ACTIVATIONS
            and seen.shape[0] > 0
            and seen.shape[1] >= self.kernel_size
            and not torch.compiler.is_compiling()
            and not torch.jit.is_tracing()
            and not torch._C._are_functorch_transforms_active()
            and forward_ad._current_level < 0
        )
