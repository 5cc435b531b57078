"""The QRNN layer (Bradbury et al. 2016, arXiv 1611.01576) with recurrent pooling that has no loop over time.

The recurrence and its closed form, for x > 0 and c_t = log f_1 + ... + log f_t:

    h_t = f_t * h_{t-1} + x_t        <=>        log h_t = c_t + logcumsumexp_t(log x_t - c_t)

Glossary (letters of the paper):
    B T H    batch, time steps, channels of the hidden state; arrays are (B, T, H) unless said otherwise
    K F      kernel width of the convolution; features of its input
    z        candidate, any activation of the first block of the projection (the paper's Z)
    f i o    forget, input and output gate, in [0, 1]; `log_f` is log f; Salesforce's code calls 1 - f what is f here
    x        what enters the recurrence: (1 - f) * z in the modes "f" and "fo", i * z in "ifo"
    c h      cell state, the result of the pooling, and the layer's output: h = c in "f", h = o * c in "fo" and "ifo"
             (the formula above and `pool` say h for the result of the pooling, and c_t for the sum of the log gates)

The file imports torch only, so that it can be copied into another project as it is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

METHODS = ("loop", "log", "blocked", "scan")
MODES = {"f": 2, "fo": 3, "ifo": 4}  # mode -> number of blocks in the projection, in the order z, f, [i], [o]
ACTIVATIONS = {
    "softplus": F.softplus,
    "exp": torch.exp,
    "sigmoid": torch.sigmoid,
    "relu": torch.relu,
    "tanh": torch.tanh,
    "identity": lambda z: z,
}
DERIVATIVES = {  # of the activations, from the pre-activation a and the value z
    "softplus": lambda a, z: torch.sigmoid(a),
    "exp": lambda a, z: z,
    "sigmoid": lambda a, z: z * (1 - z),
    "relu": lambda a, z: z > 0,
    "tanh": lambda a, z: 1 - z * z,
    "identity": lambda a, z: 1,
}
SIGNED_ACTIVATIONS = ("tanh", "identity")  # all others give z >= 0, which the closed form takes without splitting


# --- the trick -------------------------------------------------------------------------------------------------------


def closed_form(log_f: Tensor, log_x: Tensor) -> tuple[Tensor, Tensor]:
    """The recurrence h_t = f_t h_{t-1} + x_t with h_0 = 0, for every t at once, over the dimension before the last.

    Returns log h and c, the cumulative log forget gates, both shaped like the arguments (..., T, H).
    """
    c = log_f.cumsum(dim=-2)  # log of f_1 * ... * f_t
    log_h = c + (log_x - c).logcumsumexp(dim=-2)  # f_1...f_t * sum of x_s / (f_1...f_s), in logs
    return log_h, c


# --- the four ways to pool: each takes f in logs, x of any sign and h0, and gives h; none is called with T = 0 --------


def _loop(log_f: Tensor, x: Tensor, h0: Tensor) -> Tensor:
    """The definition, and the only loop over time in this project."""
    f, h, steps = log_f.exp(), h0, []
    for t in range(x.shape[1]):
        h = f[:, t] * h + x[:, t]  # (B, H)
        steps.append(h)
    return torch.stack(steps, dim=1)


def _log(log_f: Tensor, x: Tensor, h0: Tensor, positive: bool) -> Tensor:
    """The closed form over the whole sequence; h0 enters as exp(c_t) h0, which needs no sign."""
    h, c = _closed_form_of_any_sign(log_f, x, positive)
    return h + c.exp() * h0.unsqueeze(-2)


def _blocked(log_f: Tensor, x: Tensor, h0: Tensor, positive: bool, block_size: int) -> Tensor:
    """The closed form inside blocks of time steps, in float64, and the odd-even scan from block to block.

    float64, because a float32 log of size |c| is off by eps |c|: a hard reset (log f = -87 or less) costs 1e-5 already.
    """
    length = x.shape[1]
    block_size = min(block_size, length)
    shape = (x.shape[0], -(-length // block_size), block_size, x.shape[2])
    fill = (0, 0, 0, shape[1] * block_size - length)
    f_blocks, x_blocks = (F.pad(array, fill).double().view(shape) for array in (log_f, x))
    h, c = _closed_form_of_any_sign(f_blocks, x_blocks, positive)  # as if every block started from 0
    decay = c.exp()
    ends = _scan(decay[:, :, -1], h[:, :, -1], h0.double())  # (B, blocks, H), the true state after each block
    starts = torch.cat([h0.double().unsqueeze(1), ends[:, :-1]], dim=1)
    h = h + decay * starts.unsqueeze(2)
    return h.reshape(shape[0], shape[1] * block_size, shape[3])[:, :length].to(x.dtype)


def _closed_form_of_any_sign(log_f: Tensor, x: Tensor, positive: bool) -> tuple[Tensor, Tensor]:
    """Split x into x+ - x-, pool both halves at once, subtract. A gate of 0 counts as the smallest number of its dtype,
    1e-38 in float32 and 1e-308 in float64: in logs -inf - (-inf) would be NaN."""
    log_f = log_f.clamp(min=math.log(torch.finfo(log_f.dtype).tiny))
    if positive:
        log_h, c = closed_form(log_f, x.log())
        return log_h.exp(), c
    log_h, c = closed_form(log_f, torch.stack([x, -x]).clamp(min=0).log())  # (2, ..., T, H)
    return log_h[0].exp() - log_h[1].exp(), c


def _scan(f: Tensor, x: Tensor, h0: Tensor) -> Tensor:
    """Odd-even scan in linear space: log2(T) levels, 2T work, no division, so exact to rounding for any sign."""
    h = x.clone(memory_format=torch.contiguous_format)
    h[:, 0].addcmul_(f[:, 0], h0)
    _scan_in_place(h, f[:, 1:])
    return h


def _scan_in_place(h: Tensor, link: Tensor, backwards: bool = False) -> None:
    """Turn x, (B, T, H), into the states; `link`, (B, T-1, H), has a factor between each step and the next.

    h_t = x_t + link_{t-1} h_{t-1}, or with `backwards` h_t = x_t + link_t h_{t+1}. Steps are counted from 0, from the
    end if `backwards`: step 0 is right as it is.
    """
    length = h.shape[1]
    if length == 1:
        return
    end = length % 2 if backwards else 0  # so that the slices below, which all go upwards, meet the right partners
    if backwards:
        odd, before_odd = slice(end, length - 1, 2), slice(end + 1, length, 2)
        even, before_even = slice(1 - end, length - 2, 2), slice(2 - end, length - 1, 2)
        to_odd, to_even = link[:, odd], link[:, even]
    else:
        odd, before_odd = slice(1, length, 2), slice(0, length - 1, 2)
        even, before_even = slice(2, length, 2), slice(1, length - 1, 2)
        to_odd, to_even = link[:, before_odd], link[:, before_even]
    # The odd steps are a recurrence of their own, half as long: h_t = (x_t + f_t x_{t-1}) + f_t f_{t-1} h_{t-2}.
    h[:, odd].addcmul_(to_odd, h[:, before_odd])
    pairs = to_odd.shape[1] - 1
    if pairs:
        longer = to_odd[:, :-1] * to_even[:, -pairs:] if backwards else to_odd[:, 1:] * to_even[:, :pairs]
        _scan_in_place(h[:, odd], longer, backwards)
    # The even steps follow, each from the odd one before it.
    if length > 2:
        h[:, even].addcmul_(to_even, h[:, before_even])


# --- the derivative, one for all methods -----------------------------------------------------------------------------


class _Pool(torch.autograd.Function):
    """h_t = f_t h_{t-1} + x_t with its derived backward pass, which is the same recurrence run backwards in time.

    delta_t = g_t + f_{t+1} delta_{t+1}    dx_t = delta_t    dlog f_t = delta_t f_t h_{t-1}    dh_0 = f_1 delta_1

    Autograd through the logs loses far more digits than the forward pass and stores every array on the way; this stores
    log f and h. It calls the pooling itself, so that second derivatives work.
    """

    @staticmethod
    def forward(
        log_f: Tensor, x: Tensor, h0: Tensor, method: str, block_size: int, positive: bool
    ) -> Tensor:  # (B, T, H), (B, T, H), (B, H) -> (B, T, H)
        if method == "loop":
            return _loop(log_f, x, h0)
        if method == "log":
            return _log(log_f, x, h0, positive)
        if method == "blocked":
            return _blocked(log_f, x, h0, positive, block_size)
        return _scan(log_f.exp(), x, h0)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        log_f, _, h0, ctx.method, ctx.block_size, _ = inputs
        ctx.save_for_backward(log_f, h0, output)
        ctx.save_for_forward(log_f, h0, output)  # for `jvp`

    @staticmethod
    def backward(ctx, grad):
        log_f, h0, h = ctx.saved_tensors
        if ctx.method == "scan" and not torch.is_grad_enabled():  # the same, without copies
            f = log_f.exp()
            delta = grad.clone(memory_format=torch.contiguous_format)
            _scan_in_place(delta, f[:, 1:], backwards=True)
            f_delta = f.mul_(delta)
            grad_h0 = f_delta[:, 0].clone()
            f_delta[:, 1:].mul_(h[:, :-1])
            f_delta[:, 0].mul_(h0)
            return f_delta, delta, grad_h0, None, None, None
        log_f_next = torch.cat([log_f[:, :1], log_f[:, 1:].flip(1)], dim=1)  # log f_{t+1}, t running down from T
        delta = _recurrence(log_f_next, grad.flip(1), torch.zeros_like(h0), ctx.method, ctx.block_size).flip(1)
        f_delta = log_f.exp() * delta
        h_before = torch.cat([h0.unsqueeze(1), h[:, :-1]], dim=1)
        return f_delta * h_before, delta, f_delta[:, 0], None, None, None

    @staticmethod
    def vmap(info, in_dims, log_f, x, h0, method, block_size, positive):
        def fold(array: Tensor, dim: int | None) -> Tensor:  # the mapped dimension joins the batch
            array = array.expand(info.batch_size, *array.shape) if dim is None else array.movedim(dim, 0)
            return array.flatten(0, 1)

        folded = (fold(array, dim) for array, dim in zip((log_f, x, h0), in_dims, strict=False))
        h = _recurrence(*folded, method, block_size, positive)
        return h.unflatten(0, (info.batch_size, h.shape[0] // max(info.batch_size, 1))), 0


class _PoolForwardMode(_Pool):
    """Adds the forward-mode derivative, again a pooling. A class of its own: torch.compile takes no `jvp`."""

    @staticmethod
    def jvp(ctx, log_f_tangent, x_tangent, h0_tangent, *_):
        log_f, h0, h = ctx.saved_tensors
        h_before = torch.cat([h0.unsqueeze(1), h[:, :-1]], dim=1)
        x_tangent = x_tangent + log_f.exp() * h_before * log_f_tangent
        return _recurrence(log_f, x_tangent, h0_tangent, ctx.method, ctx.block_size)


def _recurrence(
    log_f: Tensor, x: Tensor, h0: Tensor, method: str, block_size: int = 64, positive: bool = False
) -> Tensor:
    """h_t = f_t h_{t-1} + x_t, (B, T, H), in the dtype of the arguments; `positive` promises x >= 0."""
    if x.shape[1] == 0:
        return x * log_f + h0.unsqueeze(1)  # empty, and still a function of all three
    function = _Pool if torch.compiler.is_compiling() else _PoolForwardMode
    return function.apply(log_f, x, h0, _resolve(method, x.device), block_size, positive)


def _resolve(method: str, device: torch.device) -> str:
    """The rule behind "auto": see `pool`."""
    if method != "auto":
        return method
    return "blocked" if device.type == "cuda" and not torch.are_deterministic_algorithms_enabled() else "scan"


# --- pooling, the public functions -----------------------------------------------------------------------------------


def pool(
    log_f: Tensor,
    log_x: Tensor,
    h0: Tensor | None = None,
    *,
    method: str = "auto",
    block_size: int = 64,
    check: bool = False,
) -> Tensor:
    """Pool positive x: h_t = exp(log_f_t) h_{t-1} + exp(log_x_t) (eq. 3 of the paper, x = (1 - f) z).

    Args:
        log_f: (B, T, H), any floating dtype; logs of the forget gates, <= 0. -inf is a gate of exactly 0: a hard reset.
        log_x: (B, T, H), same dtype and device; logs of what enters, from -87 to 88 in float32, where exp(log_x) is a
            normal number. -inf: nothing enters.
        h0: (B, H), same dtype and device, any sign; the state before the first step. Default: zeros.
        method: how to compute it. All give the same h and the same gradients up to rounding, and stay finite.
            "loop": the definition, step by step.
            "log": `closed_form` over the whole sequence. Its relative error is about eps |c_t|, at most
            4 eps (1 + log T + max |c_t| + max |log_x_t|), c_t the sum of log_f up to t: it grows with T, most where
            gates forget. A gate of 0 lets 1e-38 of the state before it through, in float32.
            "blocked": `closed_form` inside blocks, in float64: 1e-5 for any T, hard resets included.
            "scan": odd-even scan in linear space: 5e-6 for any T.
            "auto": "blocked" on CUDA, "scan" elsewhere and under `torch.use_deterministic_algorithms(True)`, because
            CUDA's `cumsum` is not deterministic. On a CPU `logcumsumexp` is a scalar loop, and "scan" the fastest:
            `python -m benchmarks` measures it.
        block_size: time steps a block, "blocked" only.
        check: also check values (a gate above 1, NaN, an infinite x), which makes a GPU wait. Unchecked, log_f > 0 is
            computed as it stands, as a recurrence that grows, and NaN and inf spread to later steps of their channel,
            in the log forms possibly to steps of the whole block.

    Returns:
        h, (B, T, H), in the dtype of log_f. bfloat16 and float16 are pooled in float32 and cast back.

    Raises:
        ValueError: a wrong rank, shape, dtype, device, method or block size, and with `check` a wrong value.
    """
    arrays = {"log_f": log_f, "log_x": log_x, "h0": h0}
    _check_pool(arrays, method, block_size, check, limits={"log_f": 0.0})
    f, x, state = _working_precision(log_f, log_x, h0)
    return _recurrence(f, x.exp(), state, method, block_size, positive=True).to(log_f.dtype)


def signed_pool(
    log_f: Tensor,
    log_i: Tensor,
    z: Tensor,
    h0: Tensor | None = None,
    *,
    method: str = "auto",
    block_size: int = 64,
    check: bool = False,
) -> Tensor:
    """Pool candidates of any sign: h_t = exp(log_f_t) h_{t-1} + exp(log_i_t) z_t (eq. 5 of the paper).

    The log forms split z = z+ - z-, pool the halves and subtract; errors are relative to the same pooling of |z|.

    Args:
        log_f: (B, T, H), as in `pool`.
        log_i: (B, T, H), logs of the input gates, <= 0; -inf allowed.
        z: (B, T, H), any finite numbers.
        h0, method, block_size, check: as in `pool`.

    Returns:
        h, (B, T, H), in the dtype of log_f.

    Raises:
        ValueError: as `pool`.
    """
    arrays = {"log_f": log_f, "log_i": log_i, "z": z, "h0": h0}
    _check_pool(arrays, method, block_size, check, limits={"log_f": 0.0, "log_i": 0.0})
    f, i, candidates, state = _working_precision(log_f, log_i, z, h0)
    return _recurrence(f, i.exp() * candidates, state, method, block_size).to(log_f.dtype)


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """Sums over time in half precision say nothing, so states and pooling are float32 or float64."""
    return torch.promote_types(dtype, torch.float32)


def _fuses(projection: Tensor, c0: Tensor, method: str) -> bool:
    """Whether `_FusedCells` can take the place of `_cells`: it has no forward-mode derivative and no vmap."""
    return (
        _resolve(method, projection.device) == "scan"
        and projection.numel() > 0
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and all(forward_ad.unpack_dual(array).tangent is None for array in (projection, c0))
    )


def _convolves_faster(seen: Tensor) -> bool:
    """Whether PyTorch's convolution beats its matrix product: forward alone, in float32 on a CPU, and not small."""
    return (
        seen.device.type == "cpu"
        and seen.dtype == torch.float32
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not _autocasts(seen)
        and seen.shape[0] * seen.shape[1] >= 512
    )


def _autocasts(x: Tensor) -> bool:
    """Whether autocast decides about the dtype of what is computed from x."""
    device = x.device.type
    # autocast knows no "meta", and leaves float64 alone
    return device != "meta" and x.dtype != torch.float64 and torch.is_autocast_enabled(device)


def _autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype of a matrix product with x."""
    return torch.get_autocast_dtype(x.device.type) if _autocasts(x) else x.dtype


def _working_precision(*arrays: Tensor | None) -> list[Tensor]:
    """All arrays in at least float32; h0, the last, as zeros (B, H) if it is None."""
    *arrays, h0 = arrays
    dtype = _at_least_float32(arrays[0].dtype)
    h0 = arrays[0].new_zeros(arrays[0].shape[0], arrays[0].shape[2]) if h0 is None else h0
    return [array.to(dtype) for array in (*arrays, h0)]


# --- from the projection to the states -------------------------------------------------------------------------------


def _cells(
    projection: Tensor, c0: Tensor, keep: Tensor | None, mode: str, activation: str, method: str
) -> tuple[Tensor, Tensor | None]:
    """(B, T, MODES*H), (B, H) and, where the state is to stay exactly as it is, True -> c and o, (B, T, H)."""
    blocks = projection.chunk(MODES[mode], dim=2)
    z, log_f = ACTIVATIONS[activation](blocks[0]), F.logsigmoid(blocks[1])
    i = torch.sigmoid(blocks[2] if mode == "ifo" else -blocks[1])  # 1 - f = sigmoid(-pre-activation)
    if keep is not None:
        log_f, i = log_f.masked_fill(keep, 0), i.masked_fill(keep, 0)  # f = 1 and nothing enters
    c = _recurrence(log_f, i * z, c0, method, positive=activation not in SIGNED_ACTIVATIONS)
    return c, None if mode == "f" else torch.sigmoid(blocks[-1])


class _FusedCells(torch.autograd.Function):
    """c and h = o * c of `_cells` with the method "scan", for speed: in place on its own buffers, a few sequences at a
    time, which fit the cache; it stores the projection and c, and computes the gates anew in the backward pass."""

    @staticmethod
    def forward(
        ctx, projection: Tensor, c0: Tensor, keep: Tensor | None, mode: str, activation: str
    ) -> tuple[Tensor, Tensor | None]:
        shape = (*projection.shape[:2], c0.shape[1])
        c = projection.new_empty(shape)
        h = None if mode == "f" else projection.new_empty(shape)
        for rows in _cache_sized(c):
            blocks = projection[rows].chunk(MODES[mode], dim=2)
            f, i = torch.sigmoid(blocks[1]), _input_gate(blocks, mode)
            x = torch.mul(ACTIVATIONS[activation](blocks[0]), i, out=c[rows])
            if keep is not None:
                f.masked_fill_(keep[rows], 1)
                x.masked_fill_(keep[rows], 0)
            x[:, 0].addcmul_(f[:, 0], c0[rows])
            _scan_in_place(x, f[:, 1:])
            if h is not None:
                torch.mul(torch.sigmoid(blocks[-1]), x, out=h[rows])
        ctx.save_for_backward(projection, c0, keep, c)
        ctx.mode, ctx.activation = mode, activation
        ctx.set_materialize_grads(False)
        return c, h

    @staticmethod
    def backward(ctx, grad_c: Tensor | None, grad_h: Tensor | None = None):
        projection, c0, keep, c = ctx.saved_tensors
        if torch.is_grad_enabled():  # second derivatives are those of the definition
            return *_FusedCells._by_definition(ctx, grad_c, grad_h), None, None, None
        grad, grad_c0 = torch.empty_like(projection), torch.empty_like(c0)
        for rows in _cache_sized(c):
            given = (None if array is None else array[rows] for array in (keep, grad_c, grad_h))
            grad_c0[rows] = _FusedCells._backward(ctx, projection[rows], c0[rows], c[rows], grad[rows], *given)
        return grad, grad_c0, None, None, None

    @staticmethod
    def _backward(
        ctx,
        projection: Tensor,
        c0: Tensor,
        c: Tensor,
        grad: Tensor,
        keep: Tensor | None,
        grad_c: Tensor | None,
        grad_h: Tensor | None,
    ) -> Tensor:
        """Fill `grad`, the gradient of the projection, and return that of c0."""
        blocks, grads = (array.chunk(MODES[ctx.mode], dim=2) for array in (projection, grad))
        delta = torch.zeros_like(c) if grad_c is None else grad_c.clone(memory_format=torch.contiguous_format)
        if ctx.mode != "f":
            grads[-1].zero_()
        if grad_h is not None:  # h = o c
            o = torch.sigmoid(blocks[-1])
            through = grad_h * o
            delta += through
            torch.mul(through.mul_(c), o.neg_().add_(1), out=grads[-1])
        f, i, z = torch.sigmoid(blocks[1]), _input_gate(blocks, ctx.mode), ACTIVATIONS[ctx.activation](blocks[0])
        if keep is not None:
            f.masked_fill_(keep, 1)
        _scan_in_place(delta, f[:, 1:], backwards=True)
        grad_c0 = f[:, 0] * delta[:, 0]
        if keep is not None:
            delta.masked_fill_(keep, 0)

        entering = i * delta  # the gradient of z
        torch.mul(entering, DERIVATIVES[ctx.activation](blocks[0], z), out=grads[0])
        torch.mul(f, torch.sigmoid(-blocks[1]), out=grads[1])
        grads[1][:, 1:].mul_(c[:, :-1])
        grads[1][:, 0].mul_(c0)
        grads[1].mul_(delta)  # of f alone
        entering.mul_(z).mul_(i.neg_().add_(1))  # of what i is the sigmoid of: in "f" and "fo" what f is of, negated
        if ctx.mode == "ifo":
            grads[2].copy_(entering)
        else:
            grads[1].sub_(entering)
        return grad_c0

    @staticmethod
    def _by_definition(ctx, grad_c: Tensor | None, grad_h: Tensor | None) -> list[Tensor | None]:
        projection, c0, keep, _ = ctx.saved_tensors
        c, o = _cells(projection, c0, keep, ctx.mode, ctx.activation, "scan")
        given = [(c, grad_c), (None if o is None else o * c, grad_h)]
        outputs, grads = zip(*((output, grad) for output, grad in given if grad is not None), strict=True)
        inputs = [array for array in (projection, c0) if array.requires_grad]
        found = iter(torch.autograd.grad(outputs, inputs, grads, create_graph=True))
        return [next(found) if array.requires_grad else None for array in (projection, c0)]


def _input_gate(blocks: Sequence[Tensor], mode: str) -> Tensor:
    return torch.sigmoid(blocks[2]) if mode == "ifo" else torch.neg(blocks[1]).sigmoid_()


def _cache_sized(array: Tensor) -> list[slice]:
    """Pieces of the batch; on a CPU of about 2 MiB in float32, of which a few fit its cache at once."""
    batch, size = len(array), max(1, array[:1].numel())
    rows = max(1, 2**19 // size) if array.device.type == "cpu" else batch
    return [slice(start, start + rows) for start in range(0, batch, rows)]


# --- the layer -------------------------------------------------------------------------------------------------------


class QRNNState(NamedTuple):
    """Everything a QRNN layer remembers between two calls.

    Attributes:
        c: (B, H), the cell state after the last step; float32 even if the layer computes in half precision.
        window: (B, K - 1, F), the last K - 1 inputs, oldest first.
    """

    c: Tensor
    window: Tensor

    def index_select(self, index: Tensor) -> QRNNState:
        """The state of the sequences `index`, (N,) int64, of the batch: a beam search goes on with those it keeps."""
        return QRNNState(self.c.index_select(0, index), self.window.index_select(0, index))


class Cells(NamedTuple):
    """What `QRNNLayer.cells` gives.

    Attributes:
        c: (B, T, H), the cell state after each step, 0 where padded; at least float32.
        o: (B, T, H), the output gate, at least float32; None in the mode "f".
        state: after the last real step of each sequence.
    """

    c: Tensor
    o: Tensor | None
    state: QRNNState


class QRNNLayer(nn.Module):
    """One QRNN layer: a causal convolution over time gives the candidate and the gates, `pool` does the rest.

    >>> layer = QRNNLayer(input_size=32, hidden_size=64)
    >>> h, state = layer(torch.randn(8, 100, 32))             # h: (8, 100, 64)
    >>> h, state = layer(torch.randn(8, 50, 32), state)       # the next 50 steps of the same 8 sequences

    Args:
        input_size: features F of the input.
        hidden_size: channels H of the output.
        kernel_size: width K of the convolution; step t sees the inputs t - K + 1 ... t, never a later one.
        mode: "f", "fo" or "ifo", section 2 of the paper: which gates there are besides the forget gate.
        zoneout: probability that a channel keeps its state for a step, in training only (eq. 6, without rescaling).
        activation: of the candidate: "softplus", "exp", "sigmoid", "relu", "tanh" (the paper's) or "identity".
            For language models "tanh" is the better choice by far, see the README.
        bias: whether the projection has a bias.
        method: how to pool, see `pool`.
        causal: False centres the convolution: step t sees the inputs t - K // 2 ... t + (K - 1) // 2. For an encoder,
            which is given whole sequences: such a layer takes no state.
        device, dtype: of the parameters.

    Raises:
        TypeError: a size that is no whole number.
        ValueError: an argument out of range.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        kernel_size: int = 2,
        mode: str = "fo",
        zoneout: float = 0.0,
        *,
        activation: str = "softplus",
        bias: bool = True,
        method: str = "auto",
        causal: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, size in (("input_size", input_size), ("hidden_size", hidden_size), ("kernel_size", kernel_size)):
            check_size(name, size)
        check_probability("zoneout", zoneout)
        _check_choice("mode", mode, tuple(MODES))
        _check_choice("activation", activation, tuple(ACTIVATIONS))
        _check_choice("method", method, ("auto", *METHODS))
        self.input_size, self.hidden_size, self.kernel_size = input_size, hidden_size, kernel_size
        self.mode, self.zoneout, self.activation, self.method, self.causal = mode, zoneout, activation, method, causal
        rows = MODES[mode] * hidden_size
        self.weight = nn.Parameter(torch.empty(rows, kernel_size * input_size, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(rows, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self, forget_bias: float = 0.0) -> None:
        """Draw the parameters uniformly from +-1/sqrt(K F), as nn.Conv1d does, and add `forget_bias` to the bias of the
        forget gate: a positive one makes the layer remember longer at the start of training."""
        if self.bias is None and forget_bias:
            raise ValueError(f"forget_bias: {forget_bias!r} given, but the layer has no bias; build it with bias=True")
        bound = 1 / math.sqrt(self.kernel_size * self.input_size)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)
        if self.bias is not None:
            with torch.no_grad():
                self.bias[self.hidden_size : 2 * self.hidden_size] += forget_bias

    def extra_repr(self) -> str:
        return (
            f"{self.input_size}, {self.hidden_size}, kernel_size={self.kernel_size}, mode={self.mode!r}, "
            f"zoneout={self.zoneout}, activation={self.activation!r}, bias={self.bias is not None}, "
            f"method={self.method!r}, causal={self.causal}"
        )

    def initial_state(self, batch_size: int, like: Tensor) -> QRNNState:
        """Zeros, for `batch_size` sequences of the device and dtype of `like`."""
        return QRNNState(
            c=like.new_zeros(batch_size, self.hidden_size, dtype=_at_least_float32(like.dtype)),
            window=like.new_zeros(batch_size, self.kernel_size - 1, self.input_size),
        )

    def forward(
        self,
        x: Tensor,
        state: QRNNState | None = None,
        lengths: Tensor | Sequence[int] | None = None,
        condition: Tensor | None = None,
    ) -> tuple[Tensor, QRNNState]:
        """Run the layer over T steps.

        Args:
            x: (B, T, F), in the dtype of the parameters; under autocast also bfloat16, float16 or float32.
            state: what an earlier call returned: the steps of x then follow those of that call. Default: zeros.
            lengths: (B,) whole numbers from 0 to T, on any device: only the first `lengths[b]` steps of x[b] are real.
                Padding moves no state, its content (NaN even) is never seen, and its output is 0. The range is checked
                for lengths on the CPU in eager mode; elsewhere the check would make a GPU wait.
            condition: (B, rows of `weight`), added to the projection at every step: what the layer is told of another
                sequence (V h of the paper's eq. 7; blocks in the order z, f, [i], [o]). Default: nothing.

        Returns:
            h, (B, T, H), and the state after the last real step of each sequence.

        Raises:
            ValueError: a wrong rank, size, dtype, device or length, or a state for a layer that is not causal.
        """
        projection, keep, padding, seen, state = self._project(x, state, lengths, condition)
        if _fuses(projection, state.c, self.method):
            c, h = _FusedCells.apply(projection, state.c, keep, self.mode, self.activation)
        else:
            c, o = _cells(projection, state.c, keep, self.mode, self.activation, self.method)
            h = None if o is None else o * c
        h = c if h is None else h
        if padding is not None:
            h = h.masked_fill(padding, 0)
        return h.to(_autocast_dtype(x)), self._last_state(state.c, c, seen, lengths)

    def cells(
        self,
        x: Tensor,
        state: QRNNState | None = None,
        lengths: Tensor | Sequence[int] | None = None,
        condition: Tensor | None = None,
    ) -> Cells:
        """`forward` before the output gate is applied, for those who mix something in first, attention for example."""
        projection, keep, padding, seen, state = self._project(x, state, lengths, condition)
        c, o = _cells(projection, state.c, keep, self.mode, self.activation, self.method)
        return Cells(
            c if padding is None else c.masked_fill(padding, 0), o, self._last_state(state.c, c, seen, lengths)
        )

    def _project(
        self, x: Tensor, state: QRNNState | None, lengths: Tensor | Sequence[int] | None, condition: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor, QRNNState]:
        """The projection, (B, T, MODES*H) in at least float32; where the state stays as it is; where x is padded; the
        inputs that the convolution saw, (B, K-1+T, F); the state before the first step."""
        self._check_input(x, state, condition)
        batch_size, time = x.shape[:2]
        if state is None:
            state = self.initial_state(batch_size, x)
        padding = None
        if lengths is not None:
            lengths = _check_lengths(lengths, batch_size, time).to(x.device)
            padding = (torch.arange(time, device=x.device) >= lengths.unsqueeze(1)).unsqueeze(2)  # (B, T, 1)
            x = x.masked_fill(padding, 0)

        seen = torch.cat([state.window.to(x.dtype), x], dim=1)  # (B, K-1+T, F)
        if not self.causal:
            seen = F.pad(seen[:, (self.kernel_size - 1) // 2 :], (0, 0, 0, (self.kernel_size - 1) // 2))
        projection = self._convolve(seen)
        projection = projection.to(_at_least_float32(projection.dtype))
        if condition is not None:
            projection = projection + condition.unsqueeze(1)

        keep = padding
        if self.training and self.zoneout > 0:
            zoned_out = torch.rand_like(projection[:, :, : self.hidden_size]) < self.zoneout
            keep = zoned_out if padding is None else zoned_out | padding
        return projection, keep, padding, seen, state

    def _convolve(self, seen: Tensor) -> Tensor:
        """(B, K-1+T, F) -> (B, T, MODES*H), all gates at once."""
        time = seen.shape[1] - self.kernel_size + 1
        if _convolves_faster(seen):  # in the layout "channels last", which seen, weight and result have as they are
            weight = self.weight.view(-1, self.kernel_size, self.input_size).transpose(1, 2).unsqueeze(2)
            image = seen.permute(2, 0, 1).unsqueeze(0)  # (1, F, B, K-1+T)
            return F.conv2d(image, weight, self.bias).squeeze(0).permute(1, 2, 0)
        taps = torch.cat([seen[:, k : k + time] for k in range(self.kernel_size)], dim=2)  # (B, T, K*F)
        return F.linear(taps, self.weight, self.bias)

    def _last_state(self, c0: Tensor, c: Tensor, seen: Tensor, lengths: Tensor | Sequence[int] | None) -> QRNNState:
        time = c.shape[1]
        if lengths is None:  # cloned: a view would keep the whole sequence in memory, and in every pickle
            return QRNNState((c[:, -1] if time else c0).clone(), seen[:, time:].clone())
        lengths = torch.as_tensor(lengths, device=c.device).long()
        rows = torch.arange(lengths.shape[0], device=c.device)
        steps = lengths.unsqueeze(1) + torch.arange(self.kernel_size - 1, device=c.device)  # (B, K-1)
        states = torch.cat([c0.unsqueeze(1), c], dim=1)  # (B, 1+T, H): index t is the state after t steps
        return QRNNState(states[rows, lengths], seen[rows.unsqueeze(1), steps])

    def _check_input(self, x: Tensor, state: QRNNState | None, condition: Tensor | None) -> None:
        if x.dim() != 3 or x.shape[2] != self.input_size:
            raise ShapeError(f"x: shape {tuple(x.shape)} given, (B, T, {self.input_size}) expected")
        dtype = None if _autocasts(x) else self.weight.dtype
        _check_like("x", x, "the layer's parameters", self.weight.device, dtype)
        if condition is not None:
            if tuple(condition.shape) != (x.shape[0], len(self.weight)):
                raise ShapeError(
                    f"condition: shape {tuple(condition.shape)} given, {(x.shape[0], len(self.weight))} expected"
                )
            _check_like("condition", condition, "x", x.device, dtype)
        if state is None:
            return
        if not self.causal:
            raise ValueError("state: given to a layer with causal=False, which looks ahead: give it whole sequences")
        if not isinstance(state, tuple) or len(state) != 2:
            raise ValueError(
                f"state: {type(state).__name__} of length {len(state)} given, QRNNState(c, window) expected"
            )
        wanted = {"c": (x.shape[0], self.hidden_size), "window": (x.shape[0], self.kernel_size - 1, self.input_size)}
        dtypes = {
            "c": _at_least_float32(x.dtype),
            "window": None,
        }  # a window may come from inside autocast, or go there
        for name, array in zip(wanted, state, strict=True):
            if tuple(array.shape) != wanted[name]:
                raise ShapeError(f"state.{name}: shape {tuple(array.shape)} given, {wanted[name]} expected")
            _check_like(f"state.{name}", array, "x", x.device, dtypes[name])


# --- errors ----------------------------------------------------------------------------------------------------------


class ShapeError(ValueError, RuntimeError):
    """Tensors that do not fit, in shape, dtype or device. A RuntimeError too, which PyTorch's own layers raise then."""


def check_size(name: str, given: int) -> None:
    """Raises TypeError: no whole number; ValueError: below 1."""
    if not isinstance(given, int):
        raise TypeError(f"{name}: {given!r} given, a whole number expected")
    if given < 1:
        raise ValueError(f"{name}: {given!r} given, a whole number of at least 1 expected")


def check_probability(name: str, given: float) -> None:
    """Raises ValueError: unless from 0 to 1."""
    if not isinstance(given, (int, float)) or isinstance(given, bool) or not 0 <= given <= 1:
        raise ValueError(f"{name}: {given!r} given, a probability from 0 to 1 expected")


def _check_choice(name: str, given: str, choices: tuple[str, ...]) -> None:
    if given not in choices:
        raise ValueError(f"{name}: {given!r} given, one of {', '.join(map(repr, choices))} expected")


def _check_like(name: str, array: Tensor, like: str, device: torch.device, dtype: torch.dtype | None) -> None:
    if not array.is_floating_point():
        raise ShapeError(f"{name}: dtype {array.dtype} given, a floating dtype expected")
    if dtype is not None and array.dtype != dtype:
        raise ShapeError(
            f"{name}: dtype {array.dtype} given, {dtype} expected, to go with {like}; convert one of them by .to(dtype)"
        )
    if array.device != device:
        raise ShapeError(
            f"{name}: device {array.device} given, {device} expected, where {like} is; move it by .to(device)"
        )


def _check_pool(
    arrays: dict[str, Tensor | None], method: str, block_size: int, check: bool, limits: dict[str, float]
) -> None:
    log_f = arrays["log_f"]
    if log_f.dim() != 3:
        raise ShapeError(f"log_f: shape {tuple(log_f.shape)} given, three dimensions (B, T, H) expected")
    for name, array in arrays.items():
        if array is None:
            continue
        shape = tuple(log_f.shape) if name != "h0" else (log_f.shape[0], log_f.shape[2])
        if tuple(array.shape) != shape:
            layout = "(B, T, H)" if name != "h0" else "(B, H)"
            raise ShapeError(f"{name}: shape {tuple(array.shape)} given, {layout} = {shape} expected, to go with log_f")
        _check_like(name, array, "log_f", log_f.device, log_f.dtype)
    _check_choice("method", method, ("auto", *METHODS))
    if not isinstance(block_size, int) or block_size < 1:
        raise ValueError(f"block_size: {block_size!r} given, a whole number of at least 1 expected")
    if check:
        for name, array in arrays.items():
            if array is not None:
                _check_values(name, array, limits.get(name))


def _check_values(name: str, array: Tensor, limit: float | None) -> None:
    is_log = name.startswith("log_")
    wrong = array.isnan() | array.isposinf() | (array > limit if limit is not None else False)
    wrong = wrong if is_log else wrong | array.isneginf()
    if wrong.any():
        where = tuple(wrong.nonzero()[0].tolist())
        legal = f"numbers <= {limit:g} or -inf" if limit is not None else "numbers or -inf" if is_log else "numbers"
        raise ValueError(f"{name}: {array[where].item()} given at {where}, {legal} expected ({int(wrong.sum())} wrong)")


def _check_lengths(lengths: Tensor | Sequence[int], batch_size: int, time: int) -> Tensor:
    lengths = torch.as_tensor(lengths)
    whole = not (lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool)
    if not whole or tuple(lengths.shape) != (batch_size,):
        raise ValueError(
            f"lengths: shape {tuple(lengths.shape)} of {lengths.dtype} given, ({batch_size},) of whole numbers expected"
        )
    looked_at = lengths.device.type == "cpu" and not torch.compiler.is_compiling()
    if looked_at and not bool(((lengths >= 0) & (lengths <= time)).all()):
        raise ValueError(f"lengths: {lengths.tolist()} given, numbers from 0 to T = {time} expected")
    return lengths.long()
