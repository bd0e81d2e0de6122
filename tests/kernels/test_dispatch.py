"""Which backend each operation gets, and how a wrong wish is refused."""

from __future__ import annotations

import pytest
import torch

from megaflow.kernels import attention
from megaflow.kernels.dispatch import OPERATIONS, describe, select_ops


def test_preferred_backend_that_runs_here_is_chosen() -> None:
    assert select_ops("cpu", torch.float32).attention is attention.sdpa


def test_a_named_backend_wins() -> None:
    assert select_ops("cpu", torch.float32, {"attention": "reference"}).attention is attention.reference


def test_every_operation_is_described_with_its_reason() -> None:
    rows = {op: (backend, reason) for op, backend, reason in describe("cpu", torch.float32, {"rotary": "reference"})}
    assert set(rows) == set(OPERATIONS)
    assert rows["attention"] == ("sdpa", "varlen needs CUDA")
    assert rows["rotary"] == ("reference", "named in the configuration")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"atention": "sdpa"}, "no operation is called 'atention'; there are rms_norm, rotary, swiglu, attention"),
        ({"attention": "flash"}, "attention has no backend 'flash'; there are varlen, sdpa, reference"),
        ({"attention": "varlen"}, "attention cannot use 'varlen': it needs CUDA; here there are sdpa, reference"),
    ],
)
def test_wrong_wishes_name_the_choices(overrides: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        select_ops("cpu", torch.float32, overrides)


def test_every_operation_has_a_reference_that_runs_anywhere() -> None:
    for backends in OPERATIONS.values():
        reference = {backend.name: backend for backend in backends}["reference"]
        assert reference.missing(torch.device("cpu"), torch.float64) is None
