"""The squared norm against plain fp64."""

from __future__ import annotations

import pytest
import torch

from megaflow.kernels import grad_norm
from megaflow.kernels.backend import Situation

FUNCTIONS = {backend.name: backend.function for backend in grad_norm.BACKENDS}

devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
backends = pytest.mark.parametrize("backend", FUNCTIONS)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def require(name: str, device: str, dtype: torch.dtype = torch.float32) -> None:
    missing = {backend.name: backend.missing for backend in grad_norm.BACKENDS}[name](
        Situation(torch.device(device), dtype, grads=dtype)
    )
    if missing:
        pytest.skip(f"{name} {missing}")


def tensors(lengths: list[int], dtype: torch.dtype, device: str = "cpu", offset: int = 0) -> list[torch.Tensor]:
    """Of a few magnitudes, beginning `offset` elements behind an allocation's start."""
    torch.manual_seed(0)
    scales = [10.0 ** (i % 3) for i in range(len(lengths))]
    return [(torch.randn(n + offset) * s).to(device, dtype)[offset:] for n, s in zip(lengths, scales, strict=True)]


@devices
@dtypes
@backends
@pytest.mark.parametrize("offset", [0, 1, 8])
@pytest.mark.parametrize(
    "lengths",
    [[1], [7], [0, 8], [1023, 64], [8192, 16384, 16385], [100003, 65536, 65537, 2**18], [3] * 500],
    ids=lambda lengths: f"{len(lengths)}x{lengths[0]}",
)
def test_norm(lengths: list[int], offset: int, backend: str, dtype: torch.dtype, device: str) -> None:
    require(backend, device, dtype)
    values = tensors(lengths, dtype, device, offset)
    result = FUNCTIONS[backend](values)
    expected = sum(float(x.cpu().double().square().sum()) for x in values)
    assert (result.dtype, result.shape, result.device.type) == (torch.float64, (), device)
    assert float(result) == pytest.approx(expected, rel=1e-7)
    assert float(result) == float(FUNCTIONS[backend](values))


@devices
@dtypes
@backends
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 70_001, 99_999])
def test_what_is_not_finite_is_seen(place: int, bad: float, backend: str, dtype: torch.dtype, device: str) -> None:
    require(backend, device, dtype)
    values = tensors([5, 100_000, 7], dtype, device)
    assert bool(FUNCTIONS[backend](values).isfinite())
    values[1][place] = bad
    assert not bool(FUNCTIONS[backend](values).isfinite())


@devices
def test_the_order_of_the_sum_is_fixed(device: str) -> None:
    """Sums of very different numbers would show another order."""
    require("csrc", device)
    torch.manual_seed(0)
    values = [(torch.randn(n).exp() ** 8).to(device) for n in (65536 * 3 + 17, 100_003, 5)]
    results = {float(grad_norm.csrc(values)) for _ in range(20)}
    assert len(results) == 1
    assert float(grad_norm.csrc([x.clone() for x in values])) in results


@devices
def test_gradients_of_zero_have_no_norm(device: str) -> None:
    require("csrc", device)
    assert float(grad_norm.csrc([torch.zeros(1000, device=device), torch.empty(0, device=device)])) == 0.0
    assert float(grad_norm.csrc([torch.empty(0, device=device)])) == 0.0


def test_range() -> None:
    """Squares are fp32: what is too large is taken for infinite rather than for a wrong number."""
    require("csrc", "cpu")
    assert float(grad_norm.csrc([torch.full((10,), 1e19)])) == pytest.approx(1e39, rel=1e-6)
    assert float(grad_norm.csrc([torch.full((10,), 2e19)])) == float("inf")


@backends
def test_no_tensors_have_no_device(backend: str) -> None:
    with pytest.raises(ValueError, match="there are no tensors"):
        FUNCTIONS[backend]([])


def test_what_backends_lack() -> None:
    require("csrc", "cpu")
    csrc = grad_norm.BACKENDS[0]
    assert csrc.missing(Situation(torch.device("cpu"), torch.bfloat16, grads=torch.bfloat16)) is None
    assert csrc.missing(Situation(torch.device("cpu"), torch.float16, grads=torch.float16)) == "needs fp32 or bf16"
    assert csrc.missing(Situation(torch.device("xpu"), torch.float32)) == "has no kernels for xpu"
