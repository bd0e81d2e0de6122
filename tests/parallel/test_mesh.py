"""Ranks, groups and the errors of groups that are not there."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from megaflow.parallel.mesh import ParallelContext
from tests.distributed import RankError, run_ranks


def grid(tp: int) -> tuple[int, int, list[int], list[int]]:
    ctx = ParallelContext.create(tp, sequence_parallel=False, device="cpu")
    groups = [dist.get_process_group_ranks(group) for group in (ctx.dp_group, ctx.tp_group)]
    return ctx.dp_rank, ctx.tp_rank, *groups


def test_tensor_parallel_neighbours_are_adjacent() -> None:
    assert run_ranks(4, grid, 2) == [
        (0, 0, [0, 2], [0, 1]),
        (0, 1, [1, 3], [0, 1]),
        (1, 0, [0, 2], [2, 3]),
        (1, 1, [1, 3], [2, 3]),
    ]


def test_a_group_of_one_is_an_error() -> None:
    ctx = ParallelContext.single()
    with pytest.raises(RuntimeError, match="no tp group"):
        _ = ctx.tp_group
    with pytest.raises(RuntimeError, match="no dp group"):
        _ = ctx.dp_group


def test_uneven_layouts_are_refused() -> None:
    with pytest.raises(RankError, match="tp 3 does not divide the 2 ranks"):
        run_ranks(2, grid, 3)
    with pytest.raises(ValueError, match="10 cannot be cut evenly over 4"):
        ParallelContext(ParallelContext.single().device, tp=4).tp_share(10)
