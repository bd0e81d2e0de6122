"""A run saved on any layout goes on as any other, on the curve of a process that never stopped."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megaflow.checkpoint.shards import Shards
from megaflow.checkpoint.store import CheckpointStore, open_checkpoint
from megaflow.parallel.mesh import ParallelContext
from megaflow.train.state import TrainState
from tests.distributed import run_ranks
from tests.parallel.layouts import Case, Grid
from tests.parallel.parity import TOLERANCE, Curve, Trainer, one_process, region, relative

SAVED, STEPS = 2, 3
LAYOUTS = [
    Case(),
    Case(Grid(1, 4, 1, 1)),
    Case(Grid(2, 1, 1, 2), schedule="zb_v"),
    Case(Grid(1, 2, 2, 1)),
    Case(Grid(4, 1, 1, 1)),
    Case(Grid(1, 1, 1, 4), sequence_parallel=True),
    Case(Grid(1, 2, 1, 2), zero=False),
]
TASK = Case(Grid(4, 1, 1, 1), embeddings="tied").task
"""What all of them train."""


@cache
def undisturbed() -> Curve:
    return one_process(TASK, STEPS)


def tensors(trainer: Trainer, saving: bool) -> dict[str, Shards]:
    """Master weights and moments that this rank saves or loads."""
    state = TrainState(None, trainer.placement, trainer.parameters, trainer.optimizer, None)  # type: ignore[arg-type]
    tensors = state.tensors_to_save() if saving else state.tensors_to_load(state.optimizer.master)
    return {name: shard for name, shard in tensors.items() if isinstance(shard, Shards)}


@cache
def read(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint, whole."""
    checkpoint = open_checkpoint(folder)
    return {name: checkpoint.read(name) for name in checkpoint.names()}


def check_bits(held: dict[str, Shards], saved: dict[str, Tensor]) -> None:
    """What this rank holds is what a checkpoint has."""
    for name, shard in held.items():
        for offset, block in shard.blocks:
            assert torch.equal(block, saved[name][region(offset, block)]), name


def save_each(cases: list[Case], folder: Path) -> None:
    for case in cases:
        ctx = ParallelContext.create(case.parallel, "cpu")
        trainer = Trainer(case, ctx, TASK)
        for step in range(SAVED):
            trainer.step(step)
        steps = {"optimizer_steps": float(trainer.optimizer.steps)}
        path = CheckpointStore(folder / str(case), ctx).save(SAVED, tensors(trainer, saving=True), steps)
        check_bits(tensors(trainer, saving=True), read(path))


def load_each(cases: list[Case], places: list[int], folder: Path) -> dict[tuple[str, str], float]:
    """The largest deviation of this rank's of a run that goes on as one layout from the checkpoint of another.

    places: of the others, counted from the layout's own place in the table.
    """
    found, expected = {}, undisturbed()
    for case in cases:
        ctx = ParallelContext.create(case.parallel, "cpu")
        for other in [LAYOUTS[(LAYOUTS.index(case) + place) % len(LAYOUTS)] for place in places]:
            trainer = Trainer(case, ctx, TASK)
            manifest = CheckpointStore(folder / str(other), ctx).load(tensors(trainer, saving=False))
            assert manifest is not None
            check_bits(tensors(trainer, saving=False), read(folder / str(other)))
            trainer.optimizer.steps.fill_(manifest.scalars["optimizer_steps"])
            trainer.optimizer.copy_master_to_params()
            outcomes = [trainer.step(step) for step in range(SAVED, STEPS)]
            losses = torch.stack([outcome.totals[:, 0] for outcome in outcomes])
            norms = torch.stack([outcome.grad_norm.double() for outcome in outcomes])
            deviations = [
                (losses / expected.losses[SAVED:] - 1).abs().max(),
                (norms / expected.grad_norms[SAVED:] - 1).abs().max(),
            ]
            weights = trainer.whole_weights().items()
            deviations += [relative(shard, expected.weights[name.partition("/")[2]]) for name, shard in weights]
            found[str(other), str(case)] = float(max(deviations))
    return found


@pytest.mark.timeout(600)
@pytest.mark.parametrize("places", [[1, 3], pytest.param([0, 2, 4, 5, 6], marks=pytest.mark.slow)], ids=str)
def test_a_layout_goes_on_from_another(places: list[int], tmp_path: Path) -> None:
    """Every one from two others, and from all others if that may take long."""
    undisturbed()  # before the fork
    of_world = {world: [case for case in LAYOUTS if case.grid.world == world] for world in (1, 4)}
    for world, cases in of_world.items():
        run_ranks(world, save_each, cases, tmp_path)
    found: dict[tuple[str, str], float] = {}
    for world, cases in of_world.items():
        for of_rank in run_ranks(world, load_each, cases, places, tmp_path, timeout=300):
            found |= {pair: max(value, found.get(pair, 0.0)) for pair, value in of_rank.items()}
    assert len(found) == len(LAYOUTS) * len(places)
    assert not {pair: value for pair, value in found.items() if not value < TOLERANCE}
