"""Products and tanh by oneDNN: the numbers of PyTorch's own, whatever the strides."""

import math

import pytest
import torch
from torch import Tensor

from qrnn import onednn

SIZES = [(129, 65, 257), (8, 640, 1920), (600, 500, 4), (1, 1024, 1024)]  # M, K, N; of the last two one is too short


@pytest.fixture(params=[False, True], autouse=True)
def by_onednn(request, monkeypatch) -> bool:
    if request.param and not torch.backends.mkldnn.is_available():
        pytest.skip("PyTorch without oneDNN")
    monkeypatch.setattr(onednn, "is_faster", lambda: request.param)
    return request.param


def strided(rows: int, columns: int, how: str) -> Tensor:
    if how == "transposed":
        return torch.randn(columns, rows).t()
    return torch.randn(rows, columns + 7)[:, 3 : columns + 3] if how == "part" else torch.randn(rows, columns)


def assert_close(found: Tensor, exact: Tensor, terms: int) -> None:
    assert (found.double() - exact).norm() / exact.norm() < torch.finfo(torch.float32).eps * math.sqrt(terms)


@pytest.mark.parametrize("a_strides", ["plain", "transposed", "part"])
@pytest.mark.parametrize("b_strides", ["plain", "transposed", "part"])
@pytest.mark.parametrize(("rows", "terms", "columns"), SIZES)
def test_products(rows, terms, columns, a_strides, b_strides):
    torch.manual_seed(0)
    a, b, bias = strided(rows, terms, a_strides), strided(terms, columns, b_strides), torch.randn(columns)
    exact = a.double() @ b.double()
    out, start = torch.full((2 * rows, columns), math.nan)[::2], torch.randn(rows, columns)
    onednn.product(a, b, out)
    assert_close(out, exact, terms)
    onednn.product(a, b, out, bias)
    assert_close(out, exact + bias, terms)
    assert_close(onednn.linear(a, b.t(), bias), exact + bias, terms)
    onednn.add_product(a, b, out.copy_(start))
    assert_close(out, exact + start, terms)


def test_other_dtypes_are_left_to_pytorch():
    a, b = torch.randn(256, 256, dtype=torch.float64), torch.randn(256, 256, dtype=torch.float64)
    assert torch.equal(onednn.linear(a, b), torch.nn.functional.linear(a, b))
    x = torch.randn(256, 256, dtype=torch.float64)
    assert torch.equal(onednn.tanh_(x.clone()), x.tanh())


@pytest.mark.parametrize("size", [10, 300])  # below the rule and above it
@pytest.mark.parametrize("scale", [1e-40, 1e-6, 1e-2, 1, 30])
def test_tanh_keeps_the_digits_of_all_numbers(scale, size):
    torch.manual_seed(0)
    whole = torch.randn(size, 2 * size) * scale
    part = whole[:, size // 2 : size // 2 + size]
    exact, rest = part.double().tanh(), whole[:, : size // 2].clone()
    assert onednn.tanh_(part) is part
    torch.testing.assert_close(part.double(), exact, rtol=3e-7, atol=1e-44)
    assert torch.equal(whole[:, : size // 2], rest)


def test_tanh_of_what_has_no_digits():
    special = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan]).repeat(2**14)
    found = onednn.tanh_(special)[:5]
    torch.testing.assert_close(found, torch.tensor([0.0, 0.0, 1.0, -1.0, math.nan]), rtol=0, atol=0, equal_nan=True)
    assert found.signbit().tolist()[:2] == [False, True]


@pytest.mark.parametrize(
    ("cpu", "capability", "faster"),
    [
        ("vendor_id : AuthenticAMD", "AVX512", True),
        ("vendor_id : AuthenticAMD", "AVX2", False),
        ("vendor_id : GenuineIntel", "AVX512", False),
        (None, "AVX512", True),
    ],
)
def test_the_cpu_decides(cpu, capability, faster, monkeypatch, tmp_path):
    monkeypatch.undo()
    (tmp_path / "cpuinfo").write_text(cpu or "")

    def open_cpuinfo(path):
        if cpu is None:
            raise FileNotFoundError(path)  # as on Windows
        return (tmp_path / "cpuinfo").open()

    monkeypatch.setattr(onednn, "open", open_cpuinfo, raising=False)
    monkeypatch.setattr(onednn.platform, "processor", lambda: "AMD64 Family 25 Model 97 Stepping 2, AuthenticAMD")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    assert onednn.is_faster.__wrapped__() == faster
