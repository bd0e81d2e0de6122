"""The fork helper itself."""

from __future__ import annotations

import os
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

import tests.distributed
from tests.distributed import RankError, run_ranks


def summed(offset: int) -> torch.Tensor:
    value = torch.tensor([dist.get_rank() + offset])
    dist.all_reduce(value)
    return value


def test_results_come_back_by_rank() -> None:
    assert run_ranks(3, summed, 10) == [torch.tensor([33])] * 3


def fails_on_rank_1() -> None:
    if dist.get_rank() == 1:
        raise ValueError("boom")
    dist.all_reduce(torch.ones(1))


@pytest.mark.parametrize("late", [0, 0.5])
def test_a_rank_that_raises_is_reported_with_its_traceback(monkeypatch: pytest.MonkeyPatch, late: float) -> None:
    """Also where the rank whose collective it broke has raised too by the time that this process looks."""
    wait = tests.distributed.wait

    def wait_late(*args: Any, **kwargs: Any) -> Any:
        time.sleep(late)
        return wait(*args, **kwargs)

    monkeypatch.setattr(tests.distributed, "wait", wait_late)
    with pytest.raises(RankError, match=r"(?s)rank 1 of 2 raised.*Traceback.*ValueError: boom"):
        run_ranks(2, fails_on_rank_1)


def test_a_rank_that_dies_or_hangs_is_reported() -> None:
    with pytest.raises(RankError, match="died without a result"):
        run_ranks(1, os._exit, 3)
    with pytest.raises(RankError, match=r"ranks \[0\] of 1 did not finish"):
        run_ranks(1, time.sleep, 60, timeout=1)
