"""What only a GPU can show: skipped where there is none."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pack_sequence

from qrnn import QRNN
from qrnn_layer import METHODS, MODES, QRNNLayer, pool

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
every_method = pytest.mark.parametrize("method", ("auto", *METHODS))


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


@pytest.mark.parametrize("bias", (-6.0, 0.0, 6.0))
@pytest.mark.parametrize("time", (1, 7, 129, 4096))
@every_method
def test_pooling_is_the_definition_on_the_cpu(method, time, bias):
    h, *gradients = pooled(gates(time, bias, torch.float32), method, "cuda")
    want, *want_gradients = pooled(gates(time, bias), "loop", "cpu")
    c = float(gates(time, bias)[0].cumsum(1).abs().max())
    eps = torch.finfo(torch.float32).eps
    bound = 4 * eps * (1 + torch.tensor(time).log().item() + c + 20) if method == "log" else 1e-5
    assert ((h - want).abs() / want).max() <= bound
    if method != "log":
        for name, got, right in zip(("log_f", "log_x", "h0"), gradients, want_gradients, strict=True):
            assert (got - right).norm() <= 2e-5 * right.norm(), name


@every_method
def test_half_precision_is_pooled_in_float32(method):
    arrays = [array.to("cuda", torch.bfloat16) for array in gates(129, 0.0)]
    want = pool(*(array.float() for array in arrays), method=method).bfloat16()
    assert torch.equal(pool(*arrays, method=method), want)


@every_method
def test_tf32_changes_no_pooling(method, monkeypatch):
    arrays = [array.to("cuda", torch.float32) for array in gates(129, 0.0)]
    results = []
    for allowed in (False, True):
        monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", allowed)
        results.append(pool(*arrays, method=method))
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=0)


@pytest.mark.parametrize("mode", MODES)
def test_the_layer_is_that_of_the_cpu_and_autocast_near_it(mode):
    torch.manual_seed(0)
    layer, x, lengths = QRNNLayer(16, 24, mode=mode), torch.randn(4, 50, 16), torch.tensor([50, 3, 0, 17])
    want, state = layer(x, lengths=lengths)
    layer.cuda()
    for given in (lengths, lengths.cuda()):
        got, got_state = layer(x.cuda(), lengths=given)
        torch.testing.assert_close(got.cpu(), want, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(got_state[1].cpu(), state[1], rtol=1e-4, atol=1e-5)
    with torch.autocast("cuda", torch.bfloat16):
        got, _ = layer(x.cuda(), lengths=lengths)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.cpu().float(), want, rtol=5e-2, atol=5e-2)


def test_a_training_step_never_waits_for_the_gpu():
    rnn = QRNN(16, 24, 2, batch_first=True, zoneout=0.1).cuda()
    x = torch.randn(4, 50, 16, device="cuda")
    rnn(x)[0].sum().backward()  # what is set up on first use may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        rnn(x)[0].sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_another_stream():
    layer, x = QRNNLayer(16, 24).cuda(), torch.randn(4, 50, 16, device="cuda")
    want, _ = layer(x)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        got, _ = layer(x)
    torch.cuda.current_stream().wait_stream(stream)
    torch.testing.assert_close(got, want)


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
    model = Output(QRNN(16, 24, 2, batch_first=True, method=method)).cuda()
    x = torch.randn(4, 50, 16, device="cuda")
    want = model(x)
    want_gradients = torch.autograd.grad(want.square().sum(), list(model.parameters()))
    graphed = torch.cuda.make_graphed_callables(model, (torch.randn_like(x),))
    got = graphed(x)
    torch.testing.assert_close(got, want)
    for a, b in zip(torch.autograd.grad(got.square().sum(), list(model.parameters())), want_gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@every_method
def test_compiled(method):
    torch.manual_seed(0)
    layer, x = QRNNLayer(16, 24, method=method).cuda(), torch.randn(4, 50, 16, device="cuda")
    want = torch.autograd.grad(layer(x)[0].square().sum(), list(layer.parameters()))
    compiled = torch.compile(layer, fullgraph=True)
    torch.testing.assert_close(compiled(x)[0], layer(x)[0], rtol=1e-4, atol=1e-5)
    for a, b in zip(torch.autograd.grad(compiled(x)[0].square().sum(), list(layer.parameters())), want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_deterministic_algorithms_work_and_repeat_to_the_bit(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.manual_seed(0)
    rnn, x = QRNN(16, 24, 2, batch_first=True).cuda(), torch.randn(4, 500, 16, device="cuda")
    torch.use_deterministic_algorithms(True)
    try:
        runs = [torch.autograd.grad(rnn(x)[0].square().sum(), list(rnn.parameters())) for _ in range(2)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_packed_sequences():
    torch.manual_seed(0)
    rnn = QRNN(16, 24, 2, bidirectional=True)
    packed = pack_sequence([torch.randn(n, 16) for n in (5, 50, 1)], enforce_sorted=False)
    want, state = rnn(packed)
    got, got_state = rnn.cuda()(packed.to("cuda"))
    torch.testing.assert_close(got.data.cpu(), want.data, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got_state[1].cpu(), state[1], rtol=1e-4, atol=1e-5)
