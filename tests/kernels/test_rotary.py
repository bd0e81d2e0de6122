"""Rotary embedding in place, and its gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megaflow.kernels.rotary import rotary_tables
from tests.kernels.conftest import Place
from tests.kernels.numerics import LIMITS, assert_close, distance, inputs, wide


def turned(x: Tensor, heads: int, cos: Tensor, sin: Tensor) -> Tensor:
    """As products of complex numbers."""
    half = cos.shape[-1]
    both = x[..., : 2 * half * heads].unflatten(-1, (heads, 2, half))
    numbers = torch.complex(both[..., 0, :], both[..., 1, :]) * torch.complex(cos, sin)[..., None, :]
    result = torch.stack((numbers.real, numbers.imag), dim=-2).flatten(-3)
    return torch.cat((result, x[..., 2 * half * heads :]), dim=-1)


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize(
    ("rows", "heads", "others", "head_dim"), [((3,), 3, 1, 16), ((5, 2), 6, 2, 24), ((2, 1), 40, 8, 128)]
)
def test_rotary(
    place: Place, rows: tuple[int, ...], heads: int, others: int, head_dim: int, dtype: torch.dtype
) -> None:
    x = inputs((*rows, (heads + others) * head_dim), dtype, place.device)
    positions = torch.randint(4096, rows)
    cos, sin = rotary_tables(positions.to(place.device), head_dim, 10000.0)
    given = x * 1  # a tensor that may be written over
    out = place.op("rotary")(given, heads, cos, sin)
    assert out.data_ptr() == given.data_ptr()
    grad = torch.randn(x.shape).to(out)
    expected_grad = wide(grad)
    (found,) = torch.autograd.grad(out, x, grad)

    x64, tables = wide(x), (cos.double(), sin.double())
    out64 = turned(x64, heads, *tables)
    (found64,) = torch.autograd.grad(out64, x64, expected_grad)
    assert_close(out, out64)
    assert_close(found, found64)
    assert torch.equal(out[..., heads * head_dim :], x[..., heads * head_dim :])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", LIMITS)
def test_rotary_in_full(dtype: torch.dtype) -> None:
    test_rotary(Place("triton", "cuda"), (4096, 4), 64, 32, 128, dtype)


def test_tables_hold_the_angles() -> None:
    positions = torch.tensor([[0, 1, 2, 0, 4095]])
    cos, sin = rotary_tables(positions, 16, 10000.0)
    angles = positions[..., None].double() * 10000.0 ** (-torch.arange(8).double() / 8)
    assert cos.shape == sin.shape == (1, 5, 8)
    assert distance(cos, angles.cos()) < 5e-5  # fp32 angles of up to 4095 radians
    assert distance(sin, angles.sin()) < 5e-5


def test_scores_depend_on_distance_only(place: Place) -> None:
    q, k = torch.randn(1, 16), torch.randn(1, 16)

    def score(at: int, to: int) -> float:
        rows = [rotary_tables(torch.tensor([position], device=place.device), 16, 10000.0) for position in (at, to)]
        turned = [place.op("rotary")(x.clone().to(place.device), 1, *row) for x, row in zip((q, k), rows, strict=True)]
        return float((turned[0] * turned[1]).sum())

    assert score(9, 4) == pytest.approx(score(25, 20), rel=1e-4)
    assert score(9, 4) != pytest.approx(score(9, 5), rel=1e-2)
