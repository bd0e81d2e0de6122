"""The embedding and the sum of its gradients."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.conftest import Place
from tests.kernels.numerics import LIMITS, assert_close, inputs, wide


def check(place: Place, tokens: torch.Tensor, rows: int, columns: int, start: int | None, dtype: torch.dtype) -> None:
    weight = inputs((rows, columns), dtype, place.device)
    tokens = tokens.to(place.device)
    out = place.op("embedding")(tokens, weight, start)
    grad = torch.randn(out.shape).to(out)
    (found,) = torch.autograd.grad(out, weight, grad)
    row = tokens - (start or 0)
    here = (row >= 0) & (row < rows)
    expected = torch.zeros_like(weight, dtype=torch.float64)
    expected.index_add_(0, row[here].long(), wide(grad)[here])
    wanted = torch.zeros_like(out, dtype=torch.float64)
    wanted[here] = wide(weight).detach()[row[here].long()]
    assert torch.equal(out.detach().double(), wanted)
    if place.backend == "triton" or dtype == torch.float32:  # torch adds rounded numbers on a CPU
        assert_close(found, expected)
    assert not found[expected.norm(dim=1) == 0].any()
    (again,) = torch.autograd.grad(place.op("embedding")(tokens, weight, start), weight, grad)
    assert torch.equal(found, again)


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("start", [None, 0, 5])
def test_embedding(place: Place, start: int | None, dtype: torch.dtype) -> None:
    """One id comes often, some never, and with a start some are others'."""
    tokens = torch.randint(12, (3, 20), dtype=torch.int32) if start is None else torch.randint(20, (3, 20))
    tokens[:, ::3] = 7
    check(place, tokens, 12, 40, start, dtype)


@pytest.mark.parametrize("start", [0, 100])
def test_no_id_is_of_this_shard(place: Place, start: int) -> None:
    check(place, torch.full((2, 3), 50), 10, 16, start, torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", LIMITS)
def test_embedding_in_full(dtype: torch.dtype) -> None:
    tokens = (torch.rand(4, 4096) ** 6 * 32000).int()  # a few ids are a good part of it
    check(Place("triton", "cuda"), tokens, 32000, 4096, None, dtype)
