"""SwiGLU, whose backward pass computes the activation again."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.conftest import Place
from tests.kernels.numerics import LIMITS, assert_close, distance, inputs, wide


def check(place: Place, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    gate_up = inputs((*shape[:-1], 2 * shape[-1]), dtype, place.device, 2.0)
    out = place.op("swiglu")(gate_up)
    grad = torch.randn(shape).to(out)
    (found,) = torch.autograd.grad(out, gate_up, grad)
    wide_gate_up = wide(gate_up)
    gate, up = wide_gate_up.chunk(2, -1)
    expected = gate * torch.sigmoid(gate) * up
    (expected_grad,) = torch.autograd.grad(expected, wide_gate_up, wide(grad))
    if place.backend == "triton":  # rounds once
        assert_close(out, expected)
        assert_close(found, expected_grad)
    else:
        assert distance(out, expected) < 2 * LIMITS[dtype]
        assert distance(found, expected_grad) < 2 * LIMITS[dtype]


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("shape", [(1, 8), (3, 2, 56), (3, 2752), (1, 11008)])
def test_swiglu(place: Place, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check(place, shape, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("shape", [(1023, 11008), (16384, 11008), (199, 13824)])
def test_swiglu_in_full(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check(Place("triton", "cuda"), shape, dtype)


def test_extreme_gates(place: Place) -> None:
    """Of which silu is 0 or the gate itself."""
    gate_up = torch.tensor([[-1e4, 1e4, 0.0, 2.0, 3.0, 4.0]], device=place.device, requires_grad=True)
    out = place.op("swiglu")(gate_up)
    (grad,) = torch.autograd.grad(out.sum(), gate_up)
    assert out.tolist() == [[0.0, 3e4, 0.0]]
    assert grad.tolist() == [[0.0, 3.0, 2.0, 0.0, 1e4, 0.0]]
