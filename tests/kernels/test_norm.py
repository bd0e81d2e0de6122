"""RMSNorm with and without an addition to the residual stream."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.kernels.conftest import Place
from tests.kernels.numerics import LIMITS, assert_close, inputs, wide

SHAPES = [(1, 8), (3, 1, 200), (3, 4096), (2, 5120)]
FULL = [(1, 4096), (3, 8192), (199, 4096), (1023, 5120), (16384, 4096)]


def expected(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = x if delta is None else x + delta
    return total, total / (total.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def check(place: Place, shape: tuple[int, ...], dtype: torch.dtype, added: bool, eps: float = 1e-5) -> None:
    x, weight = inputs(shape, dtype, place.device, 3.0), inputs(shape[-1:], dtype, place.device)
    delta = inputs(shape, dtype, place.device) if added else None
    total, out = place.op("rms_norm")(x, delta, weight, eps)
    grads = torch.randn(shape).to(out), torch.randn(shape).to(out)
    wanted = [x, weight] if delta is None else [x, delta, weight]
    # without delta the first result is x itself
    given = torch.autograd.grad((total, out), wanted, grads)

    # what is normalised is the sum as it was rounded
    rounded, weight64 = wide(total.detach().requires_grad_()), wide(weight)
    total64, out64 = expected(rounded, None, weight64, eps)
    found = torch.autograd.grad((total64, out64), (rounded, weight64), [wide(grad) for grad in grads])
    assert_close(out, out64)
    if delta is None:
        assert total is x
    else:
        assert_close(total, wide(x) + wide(delta))
        assert torch.equal(given[0], given[1])
    assert_close(given[0], found[0])
    assert_close(given[-1], found[1])


@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm(place: Place, shape: tuple[int, ...], dtype: torch.dtype, added: bool) -> None:
    check(place, shape, dtype, added)


@pytest.mark.gpu
@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("shape", FULL)
def test_rms_norm_in_full(shape: tuple[int, ...], dtype: torch.dtype, added: bool) -> None:
    check(Place("triton", "cuda"), shape, dtype, added)


def test_the_residual_stream_alone_has_its_gradient(place: Place) -> None:
    x, delta, weight = (inputs(shape, torch.float32, place.device) for shape in ((3, 8), (3, 8), (8,)))
    total, _ = place.op("rms_norm")(x, delta, weight, 1e-5)
    grad = torch.randn(3, 8, device=place.device)
    assert all(torch.equal(found, grad) for found in torch.autograd.grad(total, (x, delta), grad))


def test_a_row_of_zeros_and_one_of_large_numbers(place: Place) -> None:
    x = torch.zeros(2, 64, device=place.device)
    x[1] = 1e15
    _, out = place.op("rms_norm")(x, None, torch.ones(64, device=place.device), 1e-5)
    assert torch.equal(out[0], torch.zeros_like(out[0]))
    assert_close(out[1], torch.ones(64, dtype=torch.float64))


def test_gradients_have_equal_bits_every_time(place: Place) -> None:
    x, weight = inputs((40, 64), torch.bfloat16, place.device), inputs((64,), torch.bfloat16, place.device)
    grad = torch.randn(40, 64).to(x)
    runs = [torch.autograd.grad(place.op("rms_norm")(x, None, weight, 1e-5)[1], (x, weight), grad) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
