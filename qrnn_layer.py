"""A QRNN layer (Bradbury et al. 2016, arXiv 1611.01576) whose recurrent pooling has no loop over time.

The recurrence, and its closed form with c_t = log f_1 + ... + log f_t. Inputs of any sign are first made positive.

    h_t = f_t * h_{t-1} + x_t        <=>        log h_t = c_t + logcumsumexp_t(log x_t - c_t)

Glossary (letters of the paper):
    B T H    batch, time steps, channels of the hidden state; arrays are (B, T, H) unless said otherwise
    K F      kernel width of the convolution; features of its input
    z        candidate, an activation of the first block of the projection (the paper's Z)
    f i o    forget, input and output gate, in [0, 1]; `log_f` is log f. Salesforce's code calls 1 - f what is f here
    x        what enters the recurrence: (1 - f) * z in the modes "f" and "fo", i * z in "ifo"
    c h      cell state and output: h = c in the mode "f", else h = o * c. Above and in `pool`, h is the state
"""

import math
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

COMPILES_SCANS = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 11)  # on a GPU, where all sizes are fixed
METHODS = ("loop", "log", "blocked", "scan")
MODES = {"f": 2, "fo": 3, "ifo": 4}  # mode -> blocks of the projection, in the order z, f, [i], [o]
GAINS = {"f": 2, "fo": 4, "ifo": 4}  # of the initial weights of z, see `reset_parameters`
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]]
ACTIVATIONS = {f.__name__: f for f in (torch.exp, torch.sigmoid, torch.relu, torch.tanh, F.softplus, F.elu)}
# 2 max(a, 0) - log(1 + tanh |a|) keeps the digits near 0. There |a| is -a, for relu has slope 0 and the sum needs 1.
ACTIVATIONS |= {"identity": lambda a: a, "shifted_softplus": lambda a: 2 * a.relu() - a.where(a > 0, -a).tanh().log1p()}
FLOORS = {"tanh": -1, "elu": -1, "shifted_softplus": -math.log(2), "identity": -math.inf}  # z >= floor; 0 of all others


# --- the trick -------------------------------------------------------------------------------------------------------
def closed_form(log_f: Tensor, log_x: Tensor) -> tuple[Tensor, Tensor]:
    """Solve h_t = f_t h_{t-1} + x_t with h_0 = 0 for all t at once: log h and c, the sums of log_f, (..., T, H)."""
    c = log_f.cumsum(dim=-2)  # log of f_1 * ... * f_t
    log_h = c + (log_x - c).logcumsumexp(dim=-2)  # f_1...f_t * sum of x_s / (f_1...f_s), in logs
    return log_h, c


class QRNNState(NamedTuple):
    """Hold everything a QRNN layer remembers between two calls."""

    c: Tensor  # (B, H), the cell state after the last step; float32 even if the layer computes in half precision
    window: Tensor  # (B, K - 1, F), the last K - 1 inputs, oldest first


class QRNNLayer(nn.Module):
    """Convolve over time for the candidate and all gates at once, then pool.

    >>> layer = QRNNLayer(input_size=32, hidden_size=64)
    >>> h, state = layer(torch.randn(8, 100, 32))             # h: (8, 100, 64)
    >>> h, state = layer(torch.randn(8, 50, 32), state)       # the next 50 steps of the same 8 sequences

    Args:
        input_size, hidden_size: features F of the input, channels H of the output. device, dtype: of the parameters.
        kernel_size: width K of the convolution. Step t sees the inputs t - K + 1 ... t, never a later one.
        mode: "f", "fo" or "ifo" (section 2 of the paper): which gates there are.
        zoneout: probability that a channel keeps its state for a step, in training (eq. 6, without rescaling).
        mean_zoneout: in evaluation 1 - f and what enters are 1 - zoneout times theirs, their means. Default: they stay.
        activation: of the candidate: "tanh" (the paper's), "elu", "identity" or "shifted_softplus", softplus(2a) - log
            2, which has value 0 and slope 1 at 0, as tanh. Never negative: "softplus", "exp", "sigmoid" and "relu".
        bias, method: whether the projection has a bias; how to pool, see `pool`. In "f" and "fo" the methods "log" and
            "blocked" pool a z >= -s (tanh: s = 1) as z + s, so their errors are relative to the pooling of |z| + s.
    Raises TypeError or ValueError if an argument is of a wrong type or out of range.
    """

    __call__: Callable[..., tuple[Tensor, QRNNState]]  # for type checkers, to which a call of a module is Any

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        kernel_size: int = 2,
        mode: str = "fo",
        zoneout: float = 0.0,
        *,
        activation: str = "tanh",
        bias: bool = True,
        mean_zoneout: bool = False,
        method: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        expect(str(mode) in MODES, "mode", mode, f"one of {', '.join(MODES)}")
        expect(str(activation) in ACTIVATIONS, "activation", activation, f"one of {', '.join(ACTIVATIONS)}")
        expect(str(method) in ("auto", *METHODS), "method", method, f"auto or one of {', '.join(METHODS)}")
        for n, flag in (("bias", bias), ("mean_zoneout", mean_zoneout)):
            expect(type(flag).__name__ in ("bool", "bool_", "int") and flag in (0, 1), n, flag, "a bool", TypeError)
        expect(getattr(dtype, "is_floating_point", dtype is None), "dtype", dtype, "a floating dtype")
        self.input_size, self.hidden_size = check_size("input_size", input_size), check_size("hidden_size", hidden_size)
        self.kernel_size, self.zoneout = check_size("kernel_size", kernel_size), check_probability("zoneout", zoneout)
        self.mode, self.activation, self.method = str(mode), str(activation), str(method)
        self.mean_zoneout, rows = bool(mean_zoneout), MODES[self.mode] * self.hidden_size
        self.weight = nn.Parameter(torch.empty(rows, self.kernel_size * self.input_size, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(rows, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self, forget_bias: float = 0.0) -> None:
        """Draw from +-1/sqrt(K F), weights of z from `GAINS` times that. A `forget_bias` > 0 remembers longer first."""
        expect(isinstance(forget_bias, Real) and math.isfinite(forget_bias), "forget_bias", forget_bias, "a number")
        expect(self.bias is not None or not forget_bias, "forget_bias", forget_bias, "0 for a layer without bias")
        expect({*self.state_dict()} <= {"weight", "bias"}, "parameters", [*self.state_dict()], "weight and bias alone")
        bound = 1 / math.sqrt(self.kernel_size * self.input_size)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)
        with torch.no_grad():
            self.weight[: self.hidden_size] *= GAINS[self.mode]  # or signals die out: gates near 1/2 halve z and c
            if self.bias is not None:
                self.bias[self.hidden_size : 2 * self.hidden_size] += forget_bias

    def extra_repr(self) -> str:
        names = ("kernel_size", "mode", "zoneout", "mean_zoneout", "activation", "method")
        options = ", ".join(f"{name}={getattr(self, name)!r}" for name in names)
        return f"{self.input_size}, {self.hidden_size}, {options}, bias={self.bias is not None}"

    def initial_state(self, batch_size: int, like: Tensor) -> QRNNState:
        """Return zeros for `batch_size` sequences, on the device of `like` and in its dtype."""
        c = like.new_zeros(batch_size, self.hidden_size, dtype=torch.promote_types(like.dtype, torch.float32))
        return QRNNState(c, like.new_zeros(batch_size, self.kernel_size - 1, self.input_size))

    def forward(
        self, x: Tensor, state: QRNNState | None = None, lengths: Tensor | Sequence[int] | None = None
    ) -> tuple[Tensor, QRNNState]:
        """Run the layer over T steps.

        Args:
            x: (B, T, F), in the dtype of the parameters; under autocast also bfloat16, float16 or float32.
            state: what an earlier call returned: the steps of x follow those of that call. Default: zeros.
            lengths: (B,) whole numbers from 0 to T: only the first `lengths[b]` steps of x[b] are real. Padding moves
                no state, its content (NaN even) is never seen, and its output is 0. On a GPU the range is not checked.
        Returns h, (B, T, H), and the state after the last real step of each sequence.
        Raises TypeError if an argument is no tensor, ShapeError if one does not fit, ValueError for a wrong length.
        """
        state, padding = self._check_input(x, state), None
        batch_size, time = x.shape[:2]
        if lengths is not None:
            lengths = check_lengths(lengths, batch_size, time).to(x.device)
            padding = (torch.arange(time, device=x.device) >= lengths.unsqueeze(1)).unsqueeze(2)  # (B, T, 1)
            x = x.masked_fill(padding, 0)
        h, c = self._run(state.window, x, state.c, self._keep(x, padding))
        if lengths is None or padding is None:
            return h, QRNNState(c, torch.cat([state.window[:, time:], x[:, max(time - self.kernel_size + 1, 0) :]], 1))
        last = lengths.unsqueeze(1) + torch.arange(self.kernel_size - 1, device=x.device)  # (B, K-1)
        seen = torch.cat([state.window, x], dim=1)
        return h.masked_fill(padding, 0), QRNNState(c, seen.take_along_dim(last.unsqueeze(2), dim=1))

    def _keep(self, x: Tensor, padding: Tensor | None = None) -> Tensor | None:
        """Return where the state stays exactly as it is, (B, T, H) or (B, T, 1): where it is zoned out or padded."""
        if not self.training or self.zoneout == 0:
            return padding
        zoned_out = torch.rand(*x.shape[:2], self.hidden_size, device=x.device) < self.zoneout
        return zoned_out if padding is None else zoned_out | padding

    def _run(self, window: Tensor, x: Tensor, c0: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return h, (B, T, H), and the last cell state, (B, H). `qrnn.fast` does the same, faster on a CPU."""
        projection = self._project(torch.cat([window, x], dim=1))
        c, o = self._cells(projection, c0, keep)
        return (c if o is None else o * c).to(projection.dtype), (c[:, -1] if c.shape[1] else c0).clone()

    def _project(self, seen: Tensor) -> Tensor:
        """Convolve: (B, K-1+T, F) -> (B, T, MODES*H), the pre-activations of all gates (eq. 1)."""
        time = seen.shape[1] - self.kernel_size + 1
        taps = torch.cat([seen[:, k : k + time] for k in range(self.kernel_size)], dim=2)  # (B, T, K*F)
        return F.linear(taps, self.weight, self.bias)

    def _cells(self, y: Tensor, c0: Tensor, keep: Tensor | None, mean: bool = True) -> tuple[Tensor, Tensor | None]:
        """Return the cell states and the output gate, (B, T, H) each, at least float32; no gate in the mode "f"."""
        dtype = torch.promote_types(y.dtype, torch.float32)  # sums over time in half precision say nothing
        a_z, a_f, *others = y.to(dtype).chunk(MODES[self.mode], dim=2)
        z = ACTIVATIONS[self.activation](a_z)
        log_f = F.logsigmoid(a_f)  # never log(sigmoid(a)), which is -inf from a = -104 on
        i = torch.sigmoid(others[0] if self.mode == "ifo" else -a_f)  # 1 - f = sigmoid(-a_f), to the last digit
        o = None if self.mode == "f" else torch.sigmoid(others[-1])
        if mean and self.mean_zoneout and self.zoneout and not self.training:  # 1 - f and i as on average in training
            g = torch.sigmoid(-a_f).clamp(max=1 - torch.finfo(dtype).eps / 2)  # below 1, for log 0 has no gradient
            log_f, i = torch.log1p((self.zoneout - 1) * g), (1 - self.zoneout) * i
        if keep is not None:
            log_f, i = log_f.masked_fill(keep, 0), i.masked_fill(keep, 0)  # f = 1, and nothing enters
        return self._pool(log_f, i * z, c0, keep), o

    def _pool(self, log_f: Tensor, x: Tensor, c0: Tensor, keep: Tensor | None) -> Tensor:
        floor = FLOORS.get(self.activation, 0)  # in "ifo" i may exceed 1 - f, so one below 0 does not hold
        return _recurrence(log_f, x, c0, self.method, 64, -math.inf if floor and self.mode == "ifo" else floor, keep)

    def _check_x(self, x: Tensor, name: str = "x") -> list[torch.dtype]:  # its legal dtype; none: autocast takes any
        weight = self.weight
        autocasts = not weight.is_meta and torch.is_autocast_enabled(weight.device.type)  # float64 it leaves alone
        dtypes = [] if autocasts and torch.float64 not in (weight.dtype, getattr(x, "dtype", None)) else [weight.dtype]
        check_tensor(name, x, ("B", "T", self.input_size), weight.device, *dtypes)
        return dtypes

    def _check_input(self, x: Tensor, state: QRNNState | None) -> QRNNState:
        dtypes, n = self._check_x(x), x.shape[0]
        if state is None:
            return self.initial_state(n, x)
        expect(isinstance(state, tuple) and len(state) == 2, "state", type(state), "QRNNState(c, window)", TypeError)
        check_tensor("state.c", state[0], (n, self.hidden_size), x.device, torch.promote_types(x.dtype, torch.float32))
        check_tensor("state.window", state[1], (n, self.kernel_size - 1, self.input_size), x.device, *dtypes)
        return QRNNState(state[0], state[1].to(x.dtype))


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
        log_f: (B, T, H), any floating dtype: logs of the forget gates, <= 0. -inf is a gate of exactly 0, a reset.
        log_x: (B, T, H), same dtype and device: logs of what enters, -87 to 88 in float32. -inf: nothing enters.
        h0: (B, H), same dtype and device, any sign: the state before the first step. Default: zeros.
        method, block_size: how to compute it. All give the same h and gradients up to rounding, and stay finite.
            "loop": the definition, step by step. Gates that are equal repeat one rounding error: up to eps T.
            "log": `closed_form` of the whole sequence, a gate of 0 as 1e-38. Its relative error grows with T: at most
            4 eps (1 + log T + max |c_t| + max |log_x_t|) on a CPU, c_t the running sum of log_f; on a GPU more.
            "blocked": `closed_form` inside blocks of `block_size` steps, in float64: 1e-5 for any T.
            "scan": a scan of log gates and plain states: 5e-6 for any T. Products of gates below 1e-38 are 0.
            "auto": "scan", faster than "blocked" on a CPU; on a GPU too if compiled for fixed sizes and B H > 2,500.
        check: also check values, which makes a GPU wait. Unchecked, log_f > 0, NaN and inf are computed as they stand.
    Returns h, (B, T, H), in the dtype of log_f. bfloat16 and float16 are pooled in float32 and cast back.
    Raises TypeError if an argument is no tensor, ShapeError if one does not fit, ValueError for a wrong value.
    """
    f, x, state = _checked(method, block_size, check, {"log_f": log_f, "log_x": log_x}, h0)
    return _recurrence(f, x.exp(), state, method, block_size, floor=0).to(log_f.dtype)


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

    Args:
        log_f, h0, method, block_size, check: as in `pool`, which says too what is returned and raised.
        log_i, z: (B, T, H): logs of the input gates, <= 0, -inf allowed; candidates, any finite numbers. The log forms
            pool max(z, 0) and max(-z, 0) and subtract. Errors are relative to the same pooling of |z|.
    """
    f, i, candidates, state = _checked(method, block_size, check, {"log_f": log_f, "log_i": log_i, "z": z}, h0)
    return _recurrence(f, i.exp() * candidates, state, method, block_size).to(log_f.dtype)


# --- the four ways to pool: (B, T, H), (B, T, H), (B, H) -> (B, T, H), T > 0 -----------------------------------------
def _loop(log_f: Tensor, x: Tensor, h0: Tensor) -> Tensor:
    """Pool by the definition, with the only loop over time in this file."""
    f, h, steps = log_f.exp(), h0, []
    for t in range(x.shape[1]):
        h = f[:, t] * h + x[:, t]  # (B, H)
        steps.append(h)
    return torch.stack(steps, dim=1)


def _blocked(log_f: Tensor, x: Tensor, h0: Tensor, floor: float, block_size: int) -> Tensor:
    """Solve inside blocks, scan from block to block: in float64, for a log c is off by eps |c|."""
    (batch_size, length, channels), size = x.shape, min(block_size, x.shape[1])
    shape = batch_size, -(-length // size), size, channels
    f_blocks, x_blocks = (F.pad(a, (0, 0, 0, -length % size)).double().reshape(shape) for a in (log_f, x))
    h, c = _closed_form_of_any_sign(f_blocks, x_blocks, floor)  # as if every block started from 0
    ends = _scan(c[:, :, -1], h[:, :, -1], h0.double())  # (B, blocks, H), the true state after each block
    h = h + c.exp() * torch.cat([h0.double().unsqueeze(1), ends[:, :-1]], dim=1).unsqueeze(2)
    return h.reshape(batch_size, shape[1] * size, channels).narrow(1, 0, length).to(x.dtype)


def _closed_form_of_any_sign(log_f: Tensor, x: Tensor, floor: float) -> tuple[Tensor, Tensor]:
    """Return h, from h_0 = 0, and c, for x >= (1 - f) floor; only what is not negative has a log."""
    log_f = log_f.clamp(min=math.log(torch.finfo(log_f.dtype).tiny))  # for -inf - (-inf) would be NaN
    if floor == -math.inf:  # none: pool max(x, 0) and max(-x, 0) at once, and subtract
        log_h, c = closed_form(log_f, torch.stack([x, -x]).clamp(min=0).log())  # (2, ..., T, H)
        return log_h[0].exp() - log_h[1].exp(), c
    if floor:  # an average moves with its inputs: x - (1 - f) floor, which is >= 0, pools to h - (1 - exp(c)) floor
        x = (x + floor * log_f.expm1()).clamp(min=0)
    log_h, c = closed_form(log_f, x.log())
    return log_h.exp() - floor * c.expm1() if floor else log_h.exp(), c


def _scan(log_f: Tensor, x: Tensor, h0: Tensor) -> Tensor:
    """Scan log gates and plain states, odd and even steps in turn: log2(T) levels, 2T joins, no division, any sign."""
    # A plain gate near 1 has lost the digits of 1 - f, and a product of T of them collects the loss; a sum of logs not.
    h = torch.cat([(x[:, 0] + log_f[:, 0].exp() * h0).unsqueeze(1), x[:, 1:]], dim=1)
    if COMPILES_SCANS and x.is_cuda and torch.compiler.is_dynamo_compiling() and x.numel():
        scan = torch._higher_order_ops.associative_scan  # a prototype: not public, and without rules for functorch
        fixed = all(map(torch.fx.experimental.symbolic_shapes.has_static_value, x.shape))
        if fixed and not torch._C._are_functorch_transforms_active():
            return scan(lambda a, b: (a[0] + b[0], b[0].exp() * a[1] + b[1]), (log_f, h), dim=1)[1]
    scan_in_place(h, log_f[:, 1:])
    return h


def scan_in_place(h: Tensor, link: Tensor) -> None:
    """Turn x, (B, T, H), into the states h_t = x_t + exp(link_{t-1}) h_{t-1}; `link` is (B, T-1, H)."""
    # The odd steps, counted from 0, are a recurrence of their own: h_t = (x_t + f_t x_{t-1}) + f_t f_{t-1} h_{t-2}.
    length = h.shape[1]
    if length > 1:
        odd, to_odd, to_even = h[:, 1::2], link[:, 0::2], link[:, 1::2]
        odd.addcmul_(to_odd.exp(), h[:, : length - 1 : 2])
        scan_in_place(odd, to_odd[:, 1:] + to_even[:, : to_odd.shape[1] - 1])
    if length > 2:  # the even steps follow, each from the odd one before it
        h[:, 2::2].addcmul_(to_even.exp(), h[:, 1 : length - 1 : 2])


class _Pool(torch.autograd.Function):
    """Pool with the derived backward pass, the same recurrence run backwards in time.

    delta_t = g_t + f_{t+1} delta_{t+1}    dx_t = delta_t    dlog f_t = delta_t f_t h_{t-1}    dh_0 = f_1 delta_1
    """

    @staticmethod
    def forward(log_f: Tensor, x: Tensor, h0: Tensor, keep: Tensor | None, method: str, size: int, floor: float):
        if method == "log":  # h0 enters as exp(c_t) h0, which needs no sign
            h, c = _closed_form_of_any_sign(log_f, x, floor)
            h = h + c.exp() * h0.unsqueeze(1)
        elif method == "blocked":
            h = _blocked(log_f, x, h0, floor, size)
        else:
            h = (_loop if method == "loop" else _scan)(log_f, x, h0)
        return h if keep is None else _hold(h, h0, keep)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        log_f, _, h0, _, ctx.method, ctx.block_size, _ = inputs
        ctx.save_for_backward(log_f, h0, output)  # autograd through the logs would keep far more, and lose digits
        ctx.save_for_forward(log_f, h0, output)  # for `jvp`

    @staticmethod
    def backward(ctx, grad):
        log_f, h0, h = ctx.saved_tensors
        log_f_next = torch.cat([log_f[:, :1], log_f[:, 1:].flip(1)], dim=1)  # log f_{t+1}, t running down from T
        delta = _recurrence(log_f_next, grad.flip(1), torch.zeros_like(h0), ctx.method, ctx.block_size).flip(1)
        f_delta = log_f.exp() * delta
        return f_delta * torch.cat([h0.unsqueeze(1), h[:, :-1]], dim=1), delta, f_delta[:, 0], None, None, None, None

    @staticmethod
    def vmap(info, in_dims, *inputs):
        def fold(array: Tensor, dim: int | None) -> Tensor:  # the mapped dimension joins the batch
            return (array.expand(info.batch_size, *array.shape) if dim is None else array.movedim(dim, 0)).flatten(0, 1)

        log_f, x, h0, keep = (a if a is None else fold(a, dim) for a, dim in zip(inputs[:4], in_dims[:4], strict=True))
        return _recurrence(log_f, x, h0, *inputs[4:], keep).unflatten(0, (info.batch_size, -1)), 0  # type: ignore


class _PoolForwardMode(_Pool):
    """Add the forward-mode derivative, again a pooling. A class of its own: torch.compile takes no `jvp`."""

    @staticmethod
    def jvp(ctx, log_f_tangent, x_tangent, h0_tangent, *_):
        log_f, h0, h = ctx.saved_tensors
        x_tangent = x_tangent + log_f.exp() * torch.cat([h0.unsqueeze(1), h[:, :-1]], dim=1) * log_f_tangent
        return _recurrence(log_f, x_tangent, h0_tangent, ctx.method, ctx.block_size)


def _recurrence(
    log_f: Tensor, x: Tensor, h0: Tensor, method: str, size: int, floor: float = -math.inf, keep: Tensor | None = None
) -> Tensor:
    """Return h of h_t = f_t h_{t-1} + x_t, (B, T, H), for x >= (1 - f) floor. Where `keep`, f must be 1 and x 0."""
    if x.shape[1] == 0:
        return x * log_f + h0.unsqueeze(1)  # empty, and still a function of all three
    compiles = torch.compiler.is_compiling()
    levels = () if compiles else torch._C._functorch.get_interpreter_stack() or ()
    # The older exporters lose writes in place and a derivative of one's own. A jvp inside a jvp loses what `jvp` saved.
    if torch.jit.is_tracing() or sum(level.key() == torch._C._functorch.TransformType.Jvp for level in levels) > 1:
        return _loop(log_f, x, h0) if keep is None else _hold(_loop(log_f, x, h0), h0, keep)
    return (_Pool if compiles else _PoolForwardMode).apply(log_f, x, h0, keep, method, size, floor)


def _hold(h: Tensor, h0: Tensor, keep: Tensor) -> Tensor:
    """Repeat the state of the last step not to `keep`, to the bit: a scan comes to each step on a path of its own."""
    moved = torch.arange(1, h.shape[1] + 1, device=h.device).unsqueeze(1).where(~keep, 0).cummax(dim=1).values
    return torch.cat([h0.unsqueeze(1), h], dim=1).take_along_dim(moved, dim=1)


class ShapeError(ValueError, RuntimeError):
    """Say that a tensor does not fit, in shape, dtype or device: a RuntimeError too, as PyTorch's own layers raise."""


def expect(holds: bool, name: str, given: object, expected: str, error: type[Exception] = ValueError) -> None:
    """Raise an error that says what was given and what is expected, unless it holds."""
    if not holds:
        raise error(f"{name}: {given!r} given, {expected} expected")


def check_size(name: str, given: int, least: int = 1) -> int:
    expect(isinstance(given, Integral) and not isinstance(given, bool), name, given, "a whole number", TypeError)
    expect(given >= least, name, given, f"a whole number of at least {least}")
    return int(given)


def check_probability(name: str, given: float) -> float:
    expect(isinstance(given, Real) and given is not True and 0 <= given <= 1, name, given, "a probability from 0 to 1")
    return float(given)


def check_tensor(
    name: str, given: Tensor, shape: Sequence[int | str], device: torch.device | None = None, *dtypes: torch.dtype
) -> None:
    """Check a dense tensor: its shape, in which letters stand for any size, its device, its dtype (any floating)."""
    dense = isinstance(given, Tensor) and given.layout == torch.strided and not given.is_nested
    sizes = tuple(given.shape) if dense else ()
    if len(sizes) != len(shape) or any(n != m for n, m in zip(shape, sizes, strict=True) if not isinstance(n, str)):
        what, error = (f"shape {sizes}", ShapeError) if dense else (type(given).__name__, TypeError)
        raise error(f"{name}: {what} given, a dense tensor ({', '.join(map(str, shape))}) expected")
    if not (given.dtype in dtypes if dtypes else given.is_floating_point()):
        wanted = " or ".join(map(str, dict.fromkeys(dtypes))) or "a floating dtype"
        raise ShapeError(f"{name}: dtype {given.dtype} given, {wanted} expected; convert it by .to(dtype)")
    if device not in (None, given.device):
        raise ShapeError(f"{name}: device {given.device} given, {device} expected; move it by .to(device)")


def check_lengths(given: Tensor | Sequence[int], size: int, time: int, name: str = "lengths", least: int = 0) -> Tensor:
    """Return lengths as int64. On a GPU the range is not checked, for that would make it wait."""
    try:
        lengths = torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError):
        lengths = torch.empty(0)
    whole = not (lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool)
    expect(whole and lengths.shape == (size,), name, given, f"whole numbers of shape ({size},)")
    lengths = lengths.long()  # small integer types do not hold T
    if lengths.device.type == "cpu" and not torch.compiler.is_compiling():
        expect(bool(((lengths >= least) & (lengths <= time)).all()), name, given, f"numbers from {least} to {time}")
    return lengths


def _checked(method: str, block_size: int, check: bool, arrays: dict[str, Tensor], h0: Tensor | None) -> list[Tensor]:
    """Return all arrays in at least float32, h0 last, as zeros if it is None."""
    expect(str(method) in ("auto", *METHODS), "method", method, f"auto or one of {', '.join(METHODS)}")
    check_size("block_size", block_size)
    check_tensor("log_f", log_f := arrays["log_f"], ("B", "T", "H"))
    arrays = {**arrays, "h0": log_f.new_zeros(log_f.shape[::2]) if h0 is None else h0}  # (B, H)
    for name, array in arrays.items():
        check_tensor(name, array, log_f.shape[::2] if name == "h0" else log_f.shape, log_f.device, log_f.dtype)
    for name, array in arrays.items() if check else ():
        wanted = "finite numbers" if name in ("z", "h0") else "a finite exp" if name == "log_x" else "numbers <= 0"
        legal = array <= 0 if wanted == "numbers <= 0" else (array.exp() if name == "log_x" else array).isfinite()
        for where in map(tuple, (~legal).nonzero()[:1].tolist()):  # the first one
            raise ValueError(f"{name}: {array[where].item()} given at {where}, {wanted} expected")
    return [array.to(torch.promote_types(array.dtype, torch.float32)) for array in arrays.values()]
