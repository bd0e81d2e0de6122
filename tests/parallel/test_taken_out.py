"""No collective can be taken out unnoticed: without any one of them a run leaves that of one process."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megaflow.parallel import collectives
from megaflow.parallel.mesh import PIPELINE_CHANNELS, ParallelContext
from tests.distributed import run_ranks
from tests.parallel.layouts import Case, Grid
from tests.parallel.parity import TOLERANCE, Curve, Trainer, deviations, one_process

BETWEEN = ("all_reduce", "all_gather_sequence", "reduce_scatter_sequence", "gathered_product", "summed_product")
"""Functions that call a collective for another one, which it is named after."""

TP, CP, DP, PP = Grid(1, 1, 1, 2), Grid(1, 1, 2, 1), Grid(1, 2, 1, 1), Grid(2, 1, 1, 1)
SEQUENCE_PARALLEL = [
    "_ReduceScatterToSequenceRegion.forward: reduce_scatter",
    "_ReduceScatterToSequenceRegion.backward: all_gather",
    "_ColumnParallel.forward: all_gather",
    "_ColumnParallel.backward: reduce_scatter",
    "_RowParallel.forward: reduce_scatter",
    "_RowParallel.backward: all_gather",
    "TensorRegion.enter: all_gather",
    "TensorRegion.leave: reduce_scatter",
    "_merge: all_gather_list",
    "GradientBuffer.finish: all_reduce",
    "train_step: all_reduce",
]
ZERO = ["GradientBuffer._reduce: reduce_scatter", "FlatParameters.gather: all_gather", "train_step: all_reduce"]
TABLE: dict[Case, list[str]] = {
    Case(TP): [
        "_ReduceFromTensorRegion.forward: all_reduce",
        "_RowParallel.forward: all_reduce",
        "_ColumnParallel.backward: all_reduce",
        "TensorRegion.leave: all_reduce",
        "_merge: all_gather_list",
        "train_step: all_reduce",
    ],
    Case(TP, sequence_parallel=True): [*SEQUENCE_PARALLEL, "_ColumnParallel.backward: all_gather"],
    Case(TP, sequence_parallel=True, schedule="zb_h1"): [
        *SEQUENCE_PARALLEL,
        "_ColumnParallel.backward.<locals>.compute: all_gather",
    ],
    Case(DP): ZERO,
    Case(DP, zero=False): ["GradientBuffer._reduce: all_reduce", "train_step: all_reduce"],
    Case(CP): [*ZERO, "_GatherKeysValues.forward: all_gather", "_GatherKeysValues.backward: reduce_scatter"],
    Case(PP): ["forward_up", "backward_down", "train_step: all_reduce"],
    Case(PP, embeddings="tied"): [
        "forward_up",
        "backward_down",
        "GradientBuffer.finish: all_reduce",
        "train_step: all_reduce",
    ],
    Case(PP, schedule="zb_v"): [*PIPELINE_CHANNELS, "train_step: all_reduce"],
}
"""Layout, and all collectives of its steps: the function that calls each, or the channel of the pipeline."""


class Done:
    """A collective that was none."""

    def wait(self) -> None:
        pass


def all_reduce(x: Tensor, **_: Any) -> Done:
    return Done()


def all_gather(out: Tensor, x: Tensor, **_: Any) -> Done:
    """Own values in the others' places, or what was there, where they are gathered in place."""
    if out.untyped_storage().data_ptr() != x.untyped_storage().data_ptr():
        out.view(-1, *x.shape).copy_(x.expand(out.shape[0] // x.shape[0], *x.shape))
    return Done()


def reduce_scatter(out: Tensor, x: Tensor, group: dist.ProcessGroup, **_: Any) -> Done:
    out.copy_(x.view(-1, *out.shape)[dist.get_rank(group)])
    return Done()


def all_gather_list(outs: list[Tensor], x: Tensor, group: dist.ProcessGroup) -> None:
    """Of the losses' statistics: the others have nothing."""
    for rank, out in enumerate(outs):
        out.copy_(x if rank == dist.get_rank(group) else torch.tensor([-torch.inf, 0.0, 0.0])[:, None])


def isend(tensor: Tensor, **_: Any) -> Done:
    return Done()


def irecv(tensor: Tensor, **_: Any) -> Done:
    tensor.zero_()
    return Done()


class TakenOut:
    """Patches all collectives of this process so that one of them keeps this rank's own values, and lists them all."""

    def __init__(self, ctx: ParallelContext, without: str | None) -> None:
        self.channels = {id(ctx.groups[name]): name for name in PIPELINE_CHANNELS if name in ctx.groups}
        self.without = without
        self.seen: set[str] = set()
        self.patches = ExitStack()

    def __enter__(self) -> TakenOut:
        places = {
            "all_reduce": (dist, all_reduce),
            "isend": (dist, isend),
            "irecv": (dist, irecv),
            "all_gather": (collectives, all_gather),
            "reduce_scatter": (collectives, reduce_scatter),
        }
        for name, (module, local) in places.items():
            self._patch(module, name, name, local)
        self._patch(dist, "all_gather", "all_gather_list", all_gather_list)
        return self

    def __exit__(self, *_: object) -> None:
        self.patches.close()

    def _patch(self, module: Any, attribute: str, name: str, local: Callable[..., Any]) -> None:
        original = getattr(module, attribute)

        def patched(*args: Any, **kwargs: Any) -> Any:
            frame = sys._getframe(1)
            while frame.f_code.co_qualname in BETWEEN and frame.f_back is not None:
                frame = frame.f_back
            site = self.channels.get(id(kwargs.get("group"))) or f"{frame.f_code.co_qualname}: {name}"
            self.seen.add(site)
            return (local if site == self.without else original)(*args, **kwargs)

        self.patches.enter_context(mock.patch.object(module, attribute, patched))


def without_each(case: Case, expected: Curve, sites: list[str]) -> tuple[set[str], dict[str | None, float]]:
    """All collectives of a run, and the largest deviation without each of the given ones, and with all (None)."""
    ctx = ParallelContext.create(case.parallel, "cpu")
    seen, found = set(), {}
    for site in [None, *sites]:
        trainer = Trainer(case, ctx)
        with TakenOut(ctx, site) as taken:
            found[site] = max(deviations(trainer, expected).values())
        seen |= taken.seen
    return seen, found


@pytest.mark.parametrize("case", TABLE, ids=str)
def test_no_collective_can_be_taken_out(case: Case) -> None:
    seen, found = zip(*run_ranks(case.grid.world, without_each, case, one_process(case.task), TABLE[case]), strict=True)
    assert set.union(*seen) == set(TABLE[case])
    worst = {site: max(of_rank[site] for of_rank in found) for site in found[0]}
    exact = worst.pop(None)
    assert not {site: deviation for site, deviation in worst.items() if deviation < 10 * max(exact, TOLERANCE)}
