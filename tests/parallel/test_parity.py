"""Every layout follows the run of one process: its losses, gradient norms, gradients and weights."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from megaflow.errors import UserError
from megaflow.parallel.mesh import ParallelContext
from megaflow.parallel.schedule import make_schedule
from tests.distributed import RankError, run_ranks
from tests.parallel.layouts import CUTS, GRIDS, KINDS, Case, Grid, Task, legal, legal_cuts, pairwise, product
from tests.parallel.parity import ROUNDED, TOLERANCE, Curve, Trainer, deviations, missing, one_process

Found = dict[str, float]
"""Deviations by what deviates."""
PAIRWISE = pairwise()
BF16 = [
    Case(),
    Case(Grid(1, 1, 1, 2), sequence_parallel=True, recompute="full"),
    Case(Grid(1, 2, 2, 1), recompute="selective"),
    Case(Grid(2, 1, 1, 2), schedule="zb_v", embeddings="tied"),
    Case(Grid(2, 2, 1, 1), schedule="zb_h1", grad_reduce="bf16", zero=False),
]


@cache
def expected(task: Task) -> Curve:
    return one_process(task)


def context(case: Case) -> ParallelContext:
    return ParallelContext.create(case.parallel, "cpu") if case.grid.world > 1 else ParallelContext.single()


def follow(cases: list[Case], log: Path, dtype: torch.dtype) -> None:
    """Runs cases of one grid on this rank, noting what each came to as soon as it did."""
    ctx = context(cases[0])
    with (log / str(ctx.rank)).open("w") as file:
        for case in cases:
            trainer = Trainer(case, ctx, dtype=dtype)
            found = deviations(trainer, expected(case.task))
            found |= dict.fromkeys(missing(trainer), float("inf"))
            file.write(json.dumps([str(case), found]) + "\n")
            file.flush()


def outcomes(cases: list[Case], folder: Path, dtype: torch.dtype = torch.float32) -> dict[Case, Found | str]:
    """The largest deviations of each case of one grid on any rank, or what went wrong; after that others go on."""
    found: dict[Case, Found | str] = {}
    for case in cases:
        expected(case.task)  # before the fork
    while left := cases[len(found) :]:
        world, log, fault = left[0].grid.world, folder / f"from-{len(found)}", None
        log.mkdir()
        try:
            run_ranks(world, follow, left, log, dtype, timeout=60 + 3 * len(left))
        except RankError as error:
            fault = str(error)
        logs = [log / str(rank) for rank in range(world)]
        lines = [map(json.loads, path.read_text().splitlines()) if path.exists() else [] for path in logs]
        for case, of_ranks in zip(left, zip(*lines, strict=False), strict=False):
            assert {name for name, _ in of_ranks} == {str(case)}
            keys = {key for _, of_rank in of_ranks for key in of_rank}
            found[case] = {key: max(of_rank.get(key, 0.0) for _, of_rank in of_ranks) for key in keys}
        if fault is not None:
            found[cases[len(found)]] = fault
    return found


def too_far(found: Found | str, tolerance: float) -> Found | str:
    """What deviates by more, the most first, or what went wrong."""
    if isinstance(found, str):
        return found
    ordered = sorted(found.items(), key=lambda item: -item[1])
    return {key: value for key, value in ordered if not value < tolerance}


@pytest.fixture(scope="module")
def of_grid(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Gives the outcomes of a grid's cases, of those that pytest has selected; the ranks are forked once for all."""
    items = [item for item in request.session.items if isinstance(item, pytest.Function)]
    chosen = [item.callspec.params["case"] for item in items if item.originalname == test_case_follows.__name__]
    return cache(lambda grid: outcomes([c for c in chosen if c.grid == grid], tmp_path_factory.mktemp("logs")))


@pytest.mark.parametrize("case", PAIRWISE, ids=str)
def test_case_follows(case: Case, of_grid: Callable[..., Any]) -> None:
    """One process, in fp32."""
    assert not too_far(of_grid(case.grid)[case], tolerance(case))


@pytest.mark.parametrize("case", BF16, ids=str)
def test_case_follows_in_bf16(case: Case, tmp_path: Path) -> None:
    """The fp32 run; gradients taken together, for those of queries and keys alone are differences of large numbers."""
    (found,) = outcomes([case], tmp_path, torch.bfloat16).values()
    assert isinstance(found, dict), found
    norms = {f"gradient/{name}": float(tensor.norm()) for name, tensor in expected(case.task).gradients.items()}
    squares = [(found.pop(name) * norm) ** 2 for name, norm in norms.items()]
    found["gradients"] = math.sqrt(sum(squares) / sum(norm**2 for norm in norms.values()))
    assert min(found["losses"], found["gradients"]) > TOLERANCE  # it is another precision
    assert not too_far(found, ROUNDED)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_whole_product_follows(grid: Grid, tmp_path: Path) -> None:
    found = outcomes([case for case in product() if case.grid == grid], tmp_path)
    assert not {str(case): too for case, of_case in found.items() if (too := too_far(of_case, tolerance(case)))}


def tolerance(case: Case) -> float:
    return ROUNDED if case.grad_reduce == "bf16" else TOLERANCE


def test_every_legal_pair_of_features_is_in_a_case() -> None:
    wanted = {pair for cuts in legal_cuts() for pair in itertools.combinations(cuts.items(), 2)}
    kinds = [(name, kind) for name in KINDS for kind in KINDS[name]]
    wanted |= {(cut, kind) for cuts in legal_cuts() for cut in cuts.items() for kind in kinds}
    wanted |= {(one, other) for one, other in itertools.combinations(kinds, 2) if one[0] != other[0]}
    exact = [vars(case).items() for case in PAIRWISE if case.grad_reduce == "fp32"]
    rounded = [vars(case).items() for case in PAIRWISE if case.grad_reduce == "bf16"]
    for pair in wanted:
        cases = rounded if ("grad_reduce", "bf16") in pair else exact
        assert any(set(pair) <= case for case in cases), pair
    assert len({str(case) for case in PAIRWISE}) == len(PAIRWISE)


def test_table_has_every_grid_and_every_layout_that_means_something() -> None:
    assert {case.grid for case in PAIRWISE} == set(GRIDS)
    assert len(GRIDS) == 19
    for values in itertools.product(*CUTS.values()):
        cuts = dict(zip(CUTS, values, strict=True))
        grid, schedule = cuts["grid"], Case(**cuts).parallel
        try:
            make_schedule(schedule.schedule, grid.pp, cuts["micro_batches"], schedule.chunks_per_rank)
        except UserError:
            assert not legal(cuts)
            continue
        without_effect = [
            grid.tp == 1 and cuts["sequence_parallel"],
            grid.dp * grid.cp == 1 and (not cuts["zero"] or cuts["grad_reduce"] == "bf16"),
            grid.pp == 1 and cuts["schedule"] in ("gpipe", "interleaved", "interleaved 3"),
            grid.pp == 1 and cuts["layers"] == "uneven",
        ]
        assert legal(cuts) == (not any(without_effect)), cuts
