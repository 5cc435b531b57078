"""What only a GPU can show: skipped where there is none."""

import os

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pack_sequence

from qrnn import QRNN
from qrnn_layer import METHODS, MODES, QRNNLayer, pool

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # PyTorch reads it once, for its deterministic products

DEVICE = "cuda"
pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    # PyTorch's advice on the GPU it finds, and its note that it does not see every wait
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning"),
    pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning"),
]
every_method = pytest.mark.parametrize("method", ("auto", *METHODS))


@pytest.fixture(autouse=True)
def without_tf32():
    """Compare with the CPU in full float32, whatever PyTorch allows by itself."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before  # monkeypatch cannot: it would delete the attribute


def gates(time: int, bias: float, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """log_f, log_x and h0 on the CPU, as numbers that float32 has."""
    torch.manual_seed(0)
    a = torch.randn(2, time, 40) + bias
    log_x = F.logsigmoid(-a) + F.softplus(torch.randn(2, time, 40)).log()
    return [array.to(dtype) for array in (F.logsigmoid(a), log_x, torch.rand(2, 40))]


def pooled(arrays: list[torch.Tensor], method: str, device: str) -> tuple[torch.Tensor, ...]:
    """h and the gradients of all arguments, in float64 on the CPU."""
    leaves = [array.to(device).requires_grad_() for array in arrays]
    h = pool(*leaves, method=method)
    weights = torch.linspace(-1, 1, h.numel()).view(h.shape).to(h)
    return tuple(array.detach().cpu().double() for array in (h, *torch.autograd.grad(h, leaves, weights)))


# --- pooling ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", (-6.0, 0.0, 6.0))
@pytest.mark.parametrize("time", (1, 7, 129, 4096))
@every_method
def test_pooling_is_the_definition_on_the_cpu(method, time, bias):
    h, *gradients = pooled(gates(time, bias, torch.float32), method, DEVICE)
    want, *want_gradients = pooled(gates(time, bias), "loop", "cpu")
    c = float(gates(time, bias)[0].cumsum(1).abs().max())
    eps = torch.finfo(torch.float32).eps
    bound = eps * (4 + time**0.5) * (1 + c + 20) if method == "log" else 1e-5  # 20: more than any |log_x|
    assert ((h - want).abs() / want).max() <= bound
    if method != "log":
        for name, got, right in zip(("log_f", "log_x", "h0"), gradients, want_gradients, strict=True):
            assert (got - right).norm() <= 2e-5 * right.norm(), name


def test_the_scan_pairs_logs():
    """Of constant gates and x = 1 - f, h_t is 1 - f^t. A product of gates would have lost the digits of 1 - f."""
    log_f = torch.full((1, 2**20, 1), -1e-7)
    log_x = log_f.double().expm1().neg().log().float()
    want = -(log_f.double() * torch.arange(1, 2**20 + 1).view(1, -1, 1)).expm1()
    got = pool(log_f.to(DEVICE), log_x.to(DEVICE), method="scan").cpu().double()
    assert ((got - want).abs() / want).max() <= 1e-5


@every_method
def test_resets_and_missing_inputs_stay_finite(method):
    log_f, log_x, h0 = gates(129, 0.0, torch.float32)
    log_f[:, ::5], log_x[:, ::7] = -torch.inf, -torch.inf
    h, *gradients = pooled([log_f, log_x, h0], method, DEVICE)
    want, *_ = pooled([log_f.double(), log_x.double(), h0.double()], "loop", "cpu")
    torch.testing.assert_close(h, want, rtol=1e-2 if method == "log" else 1e-5, atol=1e-6)
    assert all(gradient.isfinite().all() for gradient in gradients)


@every_method
def test_half_precision_is_pooled_in_float32(method):
    arrays = [array.to(DEVICE, torch.bfloat16) for array in gates(129, 0.0)]
    want = pool(*(array.float() for array in arrays), method=method).bfloat16()
    assert torch.equal(pool(*arrays, method=method), want)


@every_method
def test_tf32_changes_no_pooling(method):
    arrays = [array.to(DEVICE, torch.float32) for array in gates(129, 0.0)]
    results = []
    for allowed in (False, True):
        torch.backends.cuda.matmul.allow_tf32 = allowed
        results.append(pool(*arrays, method=method))
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=0)


# --- layer and stack -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_the_layer_is_that_of_the_cpu_and_autocast_near_it(mode):
    torch.manual_seed(0)
    layer, x, lengths = QRNNLayer(16, 24, mode=mode), torch.randn(4, 50, 16), torch.tensor([50, 3, 0, 17])
    want, state = layer(x, lengths=lengths)
    layer.to(DEVICE)
    for given in (lengths, lengths.to(DEVICE)):
        got, got_state = layer(x.to(DEVICE), lengths=given)
        torch.testing.assert_close(got.cpu(), want, rtol=1e-4, atol=1e-5)
        for mine, right in zip(got_state, state, strict=True):
            torch.testing.assert_close(mine.cpu(), right, rtol=1e-4, atol=1e-5)
    with torch.autocast(DEVICE, torch.bfloat16):
        got, _ = layer(x.to(DEVICE), lengths=lengths)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.cpu().float(), want, rtol=5e-2, atol=5e-2)


def test_tf32_moves_a_layer_by_its_rounding_alone():
    torch.manual_seed(0)
    layer, x = QRNNLayer(64, 64).to(DEVICE), torch.randn(4, 50, 64, device=DEVICE)
    want, _ = layer(x)
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.testing.assert_close(layer(x)[0], want, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("mode", MODES)
def test_a_stack_of_fast_layers_is_that_of_the_cpu(mode):
    """On a CPU the layers compute in their own way; here the plain layer takes over."""
    torch.manual_seed(0)
    rnn, x = QRNN(16, 24, 2, batch_first=True, mode=mode), torch.randn(4, 50, 16)
    results = []
    for device in ("cpu", DEVICE):
        rnn.to(device)
        first, state = rnn(x[:, :20].to(device))
        second, state = rnn(x[:, 20:].to(device), state)
        output = torch.cat([first, second], dim=1)
        gradients = torch.autograd.grad(output.square().sum(), list(rnn.parameters()))
        results.append([array.cpu() for array in (output, *([state] if mode == "f" else state), *gradients)])
    for want, got in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)


def test_a_sequence_step_by_step_is_the_whole():
    torch.manual_seed(0)
    rnn, x = QRNN(16, 24, 2, batch_first=True).to(DEVICE).eval(), torch.randn(4, 9, 16, device=DEVICE)
    state, steps = None, []
    with torch.no_grad():
        want, (want_h, want_c) = rnn(x)
        for t in range(x.shape[1]):
            step, state = rnn(x[:, t : t + 1], state)
            steps.append(step)
    torch.testing.assert_close(torch.cat(steps, dim=1), want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state, (want_h, want_c), rtol=1e-4, atol=1e-5)


def test_packed_sequences():
    torch.manual_seed(0)
    rnn = QRNN(16, 24, 2, bidirectional=True)
    packed = pack_sequence([torch.randn(n, 16) for n in (5, 50, 1)], enforce_sorted=False)
    want, state = rnn(packed)
    got, got_state = rnn.to(DEVICE)(packed.to(DEVICE))
    torch.testing.assert_close(got.data.cpu(), want.data, rtol=1e-4, atol=1e-5)
    for mine, right in zip(got_state, state, strict=True):
        torch.testing.assert_close(mine.cpu(), right, rtol=1e-4, atol=1e-5)


def test_zoned_out_states_stay_to_the_bit():
    torch.manual_seed(0)
    layer = QRNNLayer(16, 24, mode="f", zoneout=0.5).to(DEVICE)
    h, _ = layer(torch.randn(4, 50, 16, device=DEVICE))
    stayed = (h[:, 1:] == h[:, :-1]).float().mean().item()
    assert 0.45 < stayed < 0.55


# --- what only CUDA has ----------------------------------------------------------------------------------------------


def test_a_training_step_never_waits_for_the_gpu():
    rnn = QRNN(16, 24, 2, batch_first=True, zoneout=0.1, dropout=0.1).to(DEVICE)
    x = torch.randn(4, 50, 16, device=DEVICE)
    rnn(x)[0].sum().backward()  # what is set up on first use may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        rnn(x)[0].sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_another_stream():
    layer, x = QRNNLayer(16, 24).to(DEVICE), torch.randn(4, 50, 16, device=DEVICE)
    want, _ = layer(x)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        got, _ = layer(x)
    torch.cuda.current_stream().wait_stream(stream)
    torch.testing.assert_close(got, want)


def test_deterministic_algorithms_work_and_repeat_to_the_bit():
    torch.manual_seed(0)
    rnn, x = QRNN(16, 24, 2, batch_first=True).to(DEVICE), torch.randn(4, 500, 16, device=DEVICE)
    torch.use_deterministic_algorithms(True)
    try:
        runs = [torch.autograd.grad(rnn(x)[0].square().sum(), list(rnn.parameters())) for _ in range(2)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("shape", ((8193, 4, 65_536), (1, 2**21 + 1, 1024)), ids=("wide", "long"))
@pytest.mark.parametrize("method", ("scan", "loop", "blocked"))
def test_more_than_two_to_the_31_numbers(method, shape):
    if method == "loop" and shape[1] > 4:
        pytest.skip("a loop over two million steps")
    arrays = {"scan": 6, "loop": 7, "blocked": 18}[method]  # of that size, at the peak
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < arrays * 4 * torch.Size(shape).numel():
        pytest.skip(f"needs the memory of {arrays} such arrays")
    log_f, log_x = (torch.rand(shape, device=DEVICE).neg_() for _ in range(2))
    with torch.no_grad():
        h = pool(log_f, log_x, method=method)
        tail = pool(log_f[-1:, -2:], log_x[-1:, -2:], h[-1:, -3])  # the last sequence's last steps, from the one before
    torch.testing.assert_close(h[-1:, -2:], tail, rtol=1e-5, atol=0)


def test_compiled_for_any_batch_and_length():
    torch.manual_seed(0)
    layer = QRNNLayer(16, 24, method="scan").to(DEVICE)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    for batch_size, time in ((4, 50), (3, 51)):
        x = torch.randn(batch_size, time, 16, device=DEVICE)
        torch.testing.assert_close(compiled(x)[0], layer(x)[0], rtol=1e-4, atol=1e-5)


def test_compiled_scans_pair_logs():
    """As `test_the_scan_pairs_logs`, over so many steps that the compiler's scan goes in pieces."""
    log_f = torch.full((1, 2**16, 3), -1e-6)
    log_x = log_f.double().expm1().neg().log().float()
    want = -(log_f.double() * torch.arange(1, 2**16 + 1).view(1, -1, 1)).expm1()
    compiled = torch.compile(lambda log_f, log_x: pool(log_f, log_x, method="scan"), fullgraph=True)
    got = compiled(log_f.to(DEVICE), log_x.to(DEVICE)).cpu().double()
    assert ((got - want).abs() / want).max() <= 1e-5


@pytest.mark.parametrize("shape", ((0, 5, 3), (2, 1, 3), (2, 5, 0)))
def test_compiled_at_the_edges(shape):
    log_f, log_x = (torch.rand(shape, device=DEVICE).neg_() for _ in range(2))
    compiled = torch.compile(lambda log_f, log_x: pool(log_f, log_x, method="scan"), fullgraph=True, dynamic=False)
    torch.testing.assert_close(compiled(log_f, log_x), pool(log_f, log_x, method="loop"), rtol=1e-5, atol=0)


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_compiled_with_functorch():
    """PyTorch's scan has no rules for vmap and grad, so it is not used there."""
    log_f, log_x = (torch.rand(4, 2, 5, 3, device=DEVICE).neg_() for _ in range(2))
    vmapped = torch.vmap(lambda log_f, log_x: pool(log_f, log_x, method="scan"))
    torch.testing.assert_close(torch.compile(vmapped, dynamic=False)(log_f, log_x), vmapped(log_f, log_x))
    slope = torch.func.grad(lambda log_f: pool(log_f, log_x[0], method="scan").sum())
    torch.testing.assert_close(torch.compile(slope, dynamic=False)(log_f[0]), slope(log_f[0]))


@every_method
def test_compiled(method):
    torch.manual_seed(0)
    layer, x = QRNNLayer(16, 24, method=method).to(DEVICE), torch.randn(4, 50, 16, device=DEVICE)
    want = torch.autograd.grad(layer(x)[0].square().sum(), list(layer.parameters()))
    compiled = torch.compile(layer, fullgraph=True)
    torch.testing.assert_close(compiled(x)[0], layer(x)[0], rtol=1e-4, atol=1e-5)
    for a, b in zip(torch.autograd.grad(compiled(x)[0].square().sum(), list(layer.parameters())), want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


class Output(nn.Module):
    """The output alone: `make_graphed_callables` wants tensors."""

    def __init__(self, rnn: nn.Module) -> None:
        super().__init__()
        self.rnn = rnn

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.rnn(x)[0]


@every_method
def test_cuda_graphs(method):
    torch.manual_seed(0)
    model = Output(QRNN(16, 24, 2, batch_first=True, method=method)).to(DEVICE)
    x = torch.randn(4, 50, 16, device=DEVICE)
    want = model(x)
    want_gradients = torch.autograd.grad(want.square().sum(), list(model.parameters()))
    want = want.detach()  # its graph would keep the parameters' gradients on the stream that is not captured
    graphed = torch.cuda.make_graphed_callables(model, (torch.randn_like(x),))
    got = graphed(x)
    torch.testing.assert_close(got, want)
    for a, b in zip(torch.autograd.grad(got.square().sum(), list(model.parameters())), want_gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
