"""Ranks, groups and the errors of groups that are not there."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from megaflow.config_parallel import ParallelConfig
from megaflow.parallel.mesh import PIPELINE_CHANNELS, ParallelContext
from tests.distributed import RankError, run_ranks


def grid(parallel: ParallelConfig, names: list[str]) -> tuple:
    ctx = ParallelContext.create(parallel, "cpu")
    groups = {name: dist.get_process_group_ranks(ctx.groups[name]) for name in names if name in ctx.groups}
    return (ctx.pp_rank, ctx.dp_rank, ctx.cp_rank, ctx.tp_rank), groups


def test_tensor_parallel_neighbours_are_adjacent() -> None:
    assert run_ranks(4, grid, ParallelConfig(tp=2), ["tp", "data", "cp"]) == [
        ((0, 0, 0, 0), {"tp": [0, 1], "data": [0, 2]}),
        ((0, 0, 0, 1), {"tp": [0, 1], "data": [1, 3]}),
        ((0, 1, 0, 0), {"tp": [2, 3], "data": [0, 2]}),
        ((0, 1, 0, 1), {"tp": [2, 3], "data": [1, 3]}),
    ]


def test_grid_of_all_four() -> None:
    names = ["cp", "tp", "data", "embedding", *PIPELINE_CHANNELS]
    found = run_ranks(8, grid, ParallelConfig(pp=2, cp=2, tp=1), names)
    assert [place for place, _ in found] == [(p, d, c, 0) for p in (0, 1) for d in (0, 1) for c in (0, 1)]
    _, groups = found[6]
    pipeline = {key: [2, 6] for key in ["embedding", *PIPELINE_CHANNELS]}
    assert groups == pipeline | {"cp": [6, 7], "data": [4, 5, 6, 7]}


def test_the_embedding_group_is_the_ends_of_the_pipeline() -> None:
    found = run_ranks(4, grid, ParallelConfig(pp=4), ["embedding", "data"])
    assert [groups for _, groups in found] == [{"embedding": [0, 3]}, {}, {}, {"embedding": [0, 3]}]


def shared_groups() -> bool:
    ctx = ParallelContext.create(ParallelConfig(cp=2), "cpu")
    return ctx.group("data") is ctx.group("cp")


def test_keys_and_values_have_a_group_to_themselves() -> None:
    assert run_ranks(2, shared_groups) == [False, False]


def wait_in_vain() -> dict[str, str]:
    """What the first rank hears in each of its groups when nobody else comes."""
    ctx, said = ParallelContext.create(ParallelConfig(pp=2, cp=2, timeout=1), "cpu"), {}
    if ctx.rank == 0:
        works = {name: dist.all_reduce(torch.ones(1), group=group, async_op=True) for name, group in ctx.groups.items()}
        for name, work in works.items():
            with pytest.raises(RuntimeError) as caught:
                work.wait()
            said[name] = str(caught.value)
    return said


def test_every_group_has_the_timeout_of_the_config() -> None:
    said = run_ranks(4, wait_in_vain, timeout=20)[0]
    assert said.keys() == {"cp", "data", "embedding", *PIPELINE_CHANNELS}
    assert [name for name, line in said.items() if "Timed out waiting 1000ms" not in line] == []


def test_a_group_of_one_is_an_error() -> None:
    ctx = ParallelContext.single()
    with pytest.raises(RuntimeError, match="no tp group"):
        _ = ctx.tp_group
    with pytest.raises(RuntimeError, match="no data group"):
        ctx.group("data")


def test_uneven_layouts_are_refused() -> None:
    with pytest.raises(RankError, match="= 3 does not divide the 2 ranks"):
        run_ranks(2, grid, ParallelConfig(tp=3), [])
    with pytest.raises(ValueError, match="10 cannot be cut evenly over 4"):
        ParallelContext(ParallelContext.single().device, tp=4).tp_share(10)
