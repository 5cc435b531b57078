"""The QRNN layer again, faster on a CPU: the numbers of `QRNNLayer`, by one function from the inputs to h.

Four ideas, each with its rule:

1. Fewer products, see `qrnn.convolution`: three for two steps of two taps, four for two steps of three. Rule:
   kernel_size 2 or 3, float32 or float64, SHORT_FILTER_ROWS rows (steps times batch) or more; fewer do not pay for the
   sums of weights. So kernel_size = 1 has two thirds of the work of 2, and 3 has four thirds. In bfloat16 the rounded
   sums would make the error larger, and products are cheap; there it is one product, of all taps at once.
2. Pieces that stay in the cache. The layer goes through time in pieces of about PIECE numbers in the projection.
   Product, gates, pooling and output of a piece come before the next piece; the state runs on. Each product packs the
   weights anew, so there are PIECE_ROWS rows at least, and in bfloat16, where packing weighs more, HALF_PIECE numbers.
   The window before the inputs is read where it is: nothing is copied to stand before them. Rule: always.
3. Few passes over memory. Gates are computed in place, in the buffer of the projection. The backward pass needs these
   values alone, so they are what is kept; without gradients, no more than a piece is. One sigmoid serves all gates: the
   sign that makes g of f (idea 4) is multiplied into the weight or into the projection, whichever has fewer numbers.
   Rule: always. No sigmoid serves the candidate: tanh as 2 sigmoid(2a) - 1 has lost the digits of a small one.
4. 1 - f instead of f. A gate near 1 has lost the digits of 1 - f in float32, and the errors of T steps add up. The gate
   g = 1 - f = sigmoid(-a) has them all, and two steps are joined by 1 - f f' = g + (1 - g) g'. Where f is near 0, it is
   exact to 6e-8 of the state that it lets through. Rule: always. The scan halves the number of steps until no more than
   LOOP_STEPS are left, which go one by one: fewer calls, fewer passes. Steps of LOOP_SIZE numbers or more go one by one
   at once. So do all where a state is to stay as it is, for then it stays to the bit.

Products and tanh are those of the faster library, see `qrnn.onednn`. Where the plain layer takes over: see
`FastQRNNLayer`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from qrnn.convolution import Halves, convolution, even_and_odd
from qrnn.onednn import linear, tanh_
from qrnn_layer import MODES, QRNNLayer

PIECE = 2**19  # 2 MiB in float32
HALF_PIECE = 2**21  # of products in bfloat16
PIECE_ROWS = 768  # at least, steps times batch
LOOP_STEPS = 16
LOOP_SIZE = 4096  # numbers in a step, batch times width

aten = torch.ops.aten
sigmoid_backward = aten.sigmoid_backward.grad_input  # an overload by name is found three times as fast


class _Activation(NamedTuple):
    """Hold an activation in place, and its backward pass from its value."""

    forward_: Callable[[Tensor], object]  # (pre-activation) -> None
    backward: Callable[[Tensor, Tensor, Tensor], object]  # (gradient of the value, value, out) -> None


def _softplus_backward(grad: Tensor, z: Tensor, out: Tensor) -> None:
    torch.mul(grad, torch.neg(z).expm1_(), out=out).neg_()  # sigmoid(a) = 1 - exp(-softplus(a))


def _shifted_softplus(a: Tensor) -> None:
    shift = tanh_(a.abs()).log1p_()  # see `qrnn_layer`
    a.relu_().mul_(2).sub_(shift)


def _shifted_softplus_backward(grad: Tensor, z: Tensor, out: Tensor) -> None:
    torch.mul(grad, torch.neg(z).exp_().neg_().add_(2), out=out)  # 2 sigmoid(2a) = 2 - exp(-z)


ACTIVATIONS = {
    "softplus": _Activation(lambda a: aten.softplus.out(a, 1, 20, out=a), _softplus_backward),
    "shifted_softplus": _Activation(_shifted_softplus, _shifted_softplus_backward),
    "elu": _Activation(F.elu_, lambda grad, z, out: aten.elu_backward(grad, 1, 1, 1, True, z, grad_input=out)),
    "exp": _Activation(torch.exp_, lambda grad, z, out: torch.mul(grad, z, out=out)),
    "sigmoid": _Activation(torch.sigmoid_, lambda grad, z, out: sigmoid_backward(grad, z, grad_input=out)),
    "relu": _Activation(torch.relu_, lambda grad, z, out: aten.threshold_backward(grad, z, 0, grad_input=out)),
    "tanh": _Activation(tanh_, lambda grad, z, out: aten.tanh_backward.grad_input(grad, z, grad_input=out)),
    "identity": _Activation(lambda a: None, lambda grad, z, out: out.copy_(grad)),
}


# --- the recurrence, in terms of g = 1 - f ----------------------------------------------------------------------------


def _average(c: Halves, z: Halves, g: Halves, one_by_one: bool) -> None:
    """Fill c with c_t = (1 - g_t) c_{t-1} + g_t z_t: `_scan`, but for a first level that has half as many passes.

    c begins with the state before the first step, so its halves are that state with the odd steps, and the even steps.
    """
    (before_odd, even), (z_even, z_odd), (g_even, g_odd) = c, z, g
    odd = before_odd[1:]
    if one_by_one or _few(c):
        states, *inputs = map(_in_time, (c, z, g))
        for before, c_t, z_t, g_t in zip(states[:-1], states[1:], *inputs, strict=True):
            torch.lerp(before, z_t, g_t, out=c_t)
        return
    torch.mul(z_even, g_even, out=even)
    torch.lerp(even[: len(odd)], z_odd, g_odd, out=odd)
    _scan(even_and_odd(before_odd), even_and_odd(_joined(g_even[: len(odd)], g_odd)))
    torch.lerp(before_odd[: len(even)], z_even, g_even, out=even)


def _scan(x: Halves, g: Halves, backwards: bool = False, one_by_one: bool = False) -> None:
    """Turn x into the states, in place: h_t = x_t + (1 - g_{t-1}) h_{t-1}, or x_t + (1 - g_t) h_{t+1} with `backwards`.

    There is a gate less than there are steps, and the step where it starts is right as it is. Each odd step takes in
    the even one before (backwards: after) it. Then the odd steps are a recurrence of their own, half as long, and the
    even steps follow from their odd neighbours.
    """
    (even, odd), (to_odd, to_even) = x, g
    length, later = len(odd), len(even) - 1
    if one_by_one or _few(x):
        states = _in_time(x)
        steps = list(zip(states[:-1], states[1:], _in_time(g), strict=True))
        for before, after, gate in reversed(steps) if backwards else steps:
            _carry(before, after, gate) if backwards else _carry(after, before, gate)
        return
    if backwards:
        _carry(odd[:later], even[1:], to_even)
    else:
        _carry(odd, even[:length], to_odd)
    _scan(even_and_odd(odd), even_and_odd(_joined(to_even[: length - 1], to_odd[1:])), backwards)
    if backwards:
        _carry(even[:length], odd, to_odd)
    else:
        _carry(even[1:], odd[:later], to_even)


def _few(steps: Halves) -> bool:
    """Return whether a loop over the steps is faster than to halve their number."""
    even, odd = steps
    return len(even) + len(odd) <= LOOP_STEPS or even[0].numel() >= LOOP_SIZE


def _carry(state: Tensor, other: Tensor, g: Tensor) -> None:
    """Add (1 - g) other to state. The product comes first: where g = 1, nothing of other is left, not even rounding."""
    state += torch.addcmul(other, g, other, value=-1)


def _joined(g: Tensor, next_g: Tensor) -> Tensor:
    """Return the gates 1 - f f' of pairs of steps: how much is forgotten in both."""
    return torch.lerp(g, next_g.new_ones(()), next_g)


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

    @property
    def activation(self) -> _Activation:
        return ACTIVATIONS[self.layer.activation]

    @property
    def kept_of_gates(self) -> float:
        """Return how much of 1 - f and i is left where zoneout is replaced by its mean."""
        return 1 - self.layer.zoneout if self.layer.mean_zoneout and not self.layer.training else 1.0

    def signs(self, dtype: torch.dtype) -> Tensor:
        """Return what the numbers of a step of the projection are multiplied by, (rows,), see `_activate`."""
        return _signs(self.mode, self.layer.hidden_size, dtype)


@lru_cache(64)
def _signs(mode: str, width: int, dtype: torch.dtype) -> Tensor:
    blocks = [1, -1, 1, 1][: MODES[mode]]  # 1 - f = sigmoid(-a)
    return torch.tensor(blocks, dtype=dtype, device="cpu").repeat_interleave(width)


def _pieces(steps: int, batch: int, rows: int, dtype: torch.dtype) -> list[slice]:
    """Cut the steps into pieces; all but the last have an even number of them."""
    size = (HALF_PIECE if dtype == torch.bfloat16 else PIECE) // rows
    length = max(2, max(size, PIECE_ROWS) // batch // 2 * 2)
    return [slice(start, min(start + length, steps)) for start in range(0, steps, length)]


def _blocks(y: Tensor, mode: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return z, g, i and o. In "f" and "fo" i is g; in "f" there is no o, and g stands in its place."""
    blocks = y.chunk(MODES[mode], dim=-1)
    return blocks[0], blocks[1], blocks[2] if mode == "ifo" else blocks[1], blocks[-1]


def _activate(y: Tensor, setting: _Setting) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Turn the projection, times `signs`, into candidates and gates, in place, and return `_blocks` of it."""
    blocks = _blocks(y, setting.mode)
    width = blocks[0].shape[-1]
    y[..., width:].sigmoid_()
    if setting.kept_of_gates < 1:
        y[..., width : (3 if setting.mode == "ifo" else 2) * width] *= setting.kept_of_gates
    setting.activation.forward_(blocks[0])
    return blocks


def _forward(
    window: Tensor,  # (K - 1, B, F)
    x: Tensor,  # (T, B, F)
    c0: Tensor,  # (B, H)
    keep: Tensor | None,  # (T, B, 1) or (T, B, H)
    weight: Tensor,
    bias: Tensor | None,
    setting: _Setting,
    *,
    saves: bool,
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    """Return h, (T, B, H), and the last c, (B, H); and for the pieces, or if it does not save them for the last one,
    the gates, (n, B, MODES*H), and the states with the one before, (n + 1, B, H).
    """
    (batch, width), (steps, rows) = c0.shape, (len(x), len(weight))
    pieces, signs = _pieces(steps, batch, rows, setting.dtype), setting.signs(weight.dtype)
    signed_before = weight.numel() < steps * batch * rows
    if signed_before:
        weight, bias = weight * signs.unsqueeze(1), None if bias is None else bias * signs
    convolves = convolution(window, x, weight, bias, setting.dtype, pieces[0].stop)
    gates: list[Tensor] = []
    states: list[Tensor] = []
    h = x.new_empty(steps, batch, width, dtype=setting.dtype)
    for piece in pieces:
        length = piece.stop - piece.start
        if saves or not gates:
            gates.append(c0.new_empty(length, batch, rows))
            states.append(c0.new_empty(length + 1, batch, width))
        y, c = gates[-1][:length], states[-1][: length + 1]
        convolves.project(piece, y)
        if not signed_before:
            y *= signs
        z, g, i, o = map(convolves.split, _activate(y, setting))
        if keep is not None:
            for halves in (g, i) if setting.mode == "ifo" else (g,):
                for half, where in zip(halves, even_and_odd(keep[piece]), strict=True):
                    half.masked_fill_(where, 0)
        c[0] = c0
        before_odd, even = halves_of_c = convolves.split_states(c)
        odd = before_odd[1:]
        if setting.mode == "ifo":
            for half, candidate, gate in zip((even, odd), z, i, strict=True):
                torch.mul(candidate, gate, out=half)
            _scan(halves_of_c, g, one_by_one=keep is not None)
        else:
            _average(halves_of_c, z, g, one_by_one=keep is not None)
        for target, half, gate in zip(even_and_odd(h[piece]), (even, odd), o, strict=True):
            if setting.mode != "f" and h.dtype == c.dtype:
                torch.mul(half, gate, out=target)
            else:  # a result is fastest in its own dtype
                target.copy_(half if setting.mode == "f" else half * gate)
        c0 = _last(halves_of_c)
    return h, c0.clone(), gates, states


def _last(states: Halves) -> Tensor:
    before_odd, even = states
    return (before_odd if len(before_odd) > len(even) else even)[-1]


class _Layer(torch.autograd.Function):
    """Return h and the last c of `_forward`, with their derivatives."""

    @staticmethod
    def forward(ctx, *given) -> tuple[Tensor, Tensor]:  # as `_forward`
        h, c_last, gates, states = _forward(*given, saves=True)
        *arrays, ctx.setting = given
        ctx.save_for_backward(*arrays, *gates, *states)
        ctx.set_materialize_grads(False)
        return h, c_last

    @staticmethod
    def backward(ctx, h_grad: Tensor | None, c_grad: Tensor | None):
        window, x, c0, keep, weight, bias, *saved = ctx.saved_tensors  # once: a checkpoint gives them no second time
        given = [grad for grad in (h_grad, c_grad) if grad is not None]
        batched = any(torch._C._functorch.is_legacy_batchedtensor(grad) for grad in given)  # by is_grads_batched=True
        if torch.is_grad_enabled() or batched:  # second and many derivatives are those of the definition
            return *_gradients_of_definition(ctx, (window, x, c0, keep, weight, bias), h_grad, c_grad), None
        setting, (batch, width), rows = ctx.setting, c0.shape, len(weight)
        pieces = _pieces(len(x), batch, rows, setting.dtype)
        convolves = convolution(window, x, weight, bias, setting.dtype, pieces[0].stop)
        convolves.start_backward(c0.dtype, any(ctx.needs_input_grad[:2]))
        buffers = c0.new_empty(pieces[0].stop, batch, rows), c0.new_empty(pieces[0].stop + 1, batch, width)
        carried = torch.zeros_like(c0) if c_grad is None else c_grad
        gates, states = saved[: len(pieces)], saved[len(pieces) :]
        for piece, y, c in zip(reversed(pieces), reversed(gates), reversed(states), strict=True):
            y_grad, delta = buffers[0][: len(y)], buffers[1][: len(c)]
            (z, g, i, o), (z_grad, f_grad, i_grad, o_grad) = _blocks(y, setting.mode), _blocks(y_grad, setting.mode)
            (c_odd, c_even), (d_odd, d_even) = (convolves.split_states(array) for array in (c, delta))  # 1 before them

            # h = o c, or c in the mode "f"
            if h_grad is None:
                delta.zero_()
                o_grad.zero_()
            else:
                arrays = (c_even, c_odd[1:]), (d_even, d_odd[1:]), convolves.split(o), convolves.split(o_grad)
                in_time = even_and_odd(h_grad[piece].to(c.dtype))
                for grads, half, d, gate, grad in zip(in_time, *arrays, strict=True):
                    if setting.mode == "f":
                        d.copy_(grads)
                    else:
                        torch.mul(grads, gate, out=d)
                        torch.mul(grads, half, out=grad)
            # c_t = (1 - g_t) c_{t-1} + i_t z_t
            delta[0] = 0
            _last((d_odd, d_even)).add_(carried)
            _scan((d_odd, d_even), convolves.split(g), backwards=True)
            carried, delta = delta[0].clone(), delta[1:]
            setting.activation.backward(torch.mul(delta, i, out=z_grad), z, z_grad)
            f_even, f_odd = convolves.split(f_grad)
            before = c_odd[: len(f_even)], c_even[: len(f_odd)]
            if setting.mode == "ifo":
                torch.mul(delta, z, out=i_grad)
                for grad, previous, d in zip((f_even, f_odd), before, (d_even, d_odd[1:]), strict=True):
                    torch.mul(previous, d, out=grad)
            else:  # the gate f times the state before, 1 - f times z
                for grad, previous, candidate in zip((f_even, f_odd), before, convolves.split(z), strict=True):
                    torch.sub(previous, candidate, out=grad)
                f_grad.mul_(delta)
            sigmoid_backward(y_grad[..., width:], y[..., width:], grad_input=y_grad[..., width:])  # f' = f (1 - f)
            convolves.backward(piece, y_grad)
        window_grad, x_grad, weight_grad, bias_grad = convolves.gradients()
        to_bias = None if bias is None else bias_grad.to(bias.dtype)
        return window_grad, x_grad, carried, None, weight_grad.to(weight.dtype), to_bias, None


def _definition(
    window: Tensor,
    x: Tensor,
    c0: Tensor,
    keep: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    setting: _Setting,
) -> tuple[Tensor, Tensor]:
    """Return what `_Layer` does, by the operations of the plain layer."""
    seen = torch.cat([window, x])
    taps = torch.cat([seen[k : k + len(x)] for k in range(len(window) + 1)], dim=2)
    y = F.linear(taps.to(setting.dtype), weight.to(setting.dtype), None if bias is None else bias.to(setting.dtype))
    keep = None if keep is None else keep.transpose(0, 1)
    c, o = setting.layer._cells(y.transpose(0, 1), c0, keep, mean=False)  # `_Layer` computes no means
    return (c if o is None else o * c).to(setting.dtype).transpose(0, 1), c[:, -1]


def _gradients_of_definition(ctx, given: tuple, *grads: Tensor | None) -> list[Tensor | None]:
    """Return the gradients of window, x, c0, keep, weight and bias as functions that have derivatives themselves."""
    needs, create_graph = ctx.needs_input_grad[: len(given)], torch.is_grad_enabled()
    with torch.enable_grad():
        # Aliases, because one may be a function of another: the input of a second layer with the same weight.
        inputs = [a.view_as(a) if needed else a for a, needed in zip(given, needs, strict=True)]
        outputs = _definition(*inputs, ctx.setting)  # type: ignore[call-arg]
    wanted = [a for a, needed in zip(inputs, needs, strict=True) if needed]
    pairs = [(h, grad) for h, grad in zip(outputs, grads, strict=True) if grad is not None]
    outputs, grads = zip(*pairs, strict=True)
    found = iter(torch.autograd.grad(outputs, wanted, grads, create_graph=create_graph))
    return [next(found) if needed else None for needed in needs]


class FastQRNNLayer(QRNNLayer):
    """Do what `QRNNLayer` does, faster on a CPU; arguments, parameters and numbers are the same.

    The plain layer computes what this one cannot or need not: other devices, float16, methods other than "scan" (or
    "auto"), no steps or no sequences, derivatives of an evaluation with `mean_zoneout`, forward-mode derivatives,
    `torch.func`, `torch.compile`, `torch.export`, tracing. Second derivatives are those of the plain layer. Where
    `qrnn.convolution` takes its short filter, an input of inf or near the largest float makes its sequence NaN; the
    plain layer saturates.
    """

    def _run(self, window: Tensor, x: Tensor, c0: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor]:
        autocasts = x.device.type == "cpu" and torch.is_autocast_enabled("cpu") and x.dtype != torch.float64
        setting = _Setting(torch.get_autocast_dtype("cpu") if autocasts else x.dtype, self)
        if not self._is_fast(x, setting.dtype):
            return super()._run(window, x, c0, keep)
        trained = (window, x, c0, self.weight) if self.bias is None else (window, x, c0, self.weight, self.bias)
        differentiates = torch.is_grad_enabled() and any(array.requires_grad for array in trained)
        if differentiates and setting.kept_of_gates < 1:  # the backward pass takes gates for sigmoids
            return super()._run(window, x, c0, keep)
        if x.shape[1] == 1 and not differentiates:
            return self._step(window, x, c0, keep, setting)
        window, x, keep = window.transpose(0, 1), x.transpose(0, 1), None if keep is None else keep.transpose(0, 1)
        if differentiates:
            h, c = _Layer.apply(window, x, c0, keep, self.weight, self.bias, setting)
        else:
            h, c, *_ = _forward(window, x, c0, keep, self.weight, self.bias, setting, saves=False)
        return h.transpose(0, 1), c

    def _step(
        self, window: Tensor, x: Tensor, c0: Tensor, keep: Tensor | None, setting: _Setting
    ) -> tuple[Tensor, Tensor]:
        """Run one step, as in generation, with few calls."""
        weight: Tensor = self.weight
        bias: Tensor | None = self.bias
        if setting.dtype != weight.dtype:
            weight, bias = weight.to(setting.dtype), None if bias is None else bias.to(setting.dtype)
        seen = torch.cat([window, x], dim=1) if window.shape[1] else x
        y = linear(seen.flatten(1).to(setting.dtype), weight, bias).to(c0.dtype)
        z, g, i, o = _activate(y.mul_(setting.signs(y.dtype)), setting)
        c = torch.lerp(c0, z, g) if self.mode != "ifo" else torch.addcmul(c0, g, c0, value=-1).addcmul_(i, z)
        if keep is not None:
            c = torch.where(keep[:, 0], c0, c)
        h = c if self.mode == "f" else o * c
        return h.to(setting.dtype).unsqueeze(1), c

    def _is_fast(self, x: Tensor, dtype: torch.dtype) -> bool:
        return (
            type(x) in (Tensor, nn.Parameter)  # no subclass, such as those that trace
            and x.device.type == "cpu"
            and dtype in (torch.float32, torch.float64, torch.bfloat16)
            and self.method in ("auto", "scan")
            and x.shape[0] > 0
            and x.shape[1] > 0
            and not torch.compiler.is_compiling()
            and not torch.jit.is_tracing()
            and not torch._C._are_functorch_transforms_active()
            and forward_ad._current_level < 0
        )
