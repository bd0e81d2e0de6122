"""Training runs on forked ranks, and what they logged."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import megaflow.train.loop as loop
from megaflow.checkpoint.store import open_checkpoint, step_name
from megaflow.config import Config
from megaflow.data.sampler.ledger import build_sampler, read_ledger
from megaflow.parallel.mesh import ParallelContext
from megaflow.train.run import Run, plan_run
from megaflow.train.samples import SampleId
from tests.distributed import RankError, run_ranks

MakeConfig = Callable[..., Config]
During = Callable[[int, Run], None]


def run(
    config: Config, world: int = 1, kill: tuple[int, int, signal.Signals] | None = None, during: During | None = None
) -> None:
    """Trains on forked ranks. `kill` sends a signal to a rank while it takes a step; `during` is called in every step
    with the rank and the run, its sampler at that step."""

    def rank_main() -> None:
        planned = plan_run(config, torch.device("cpu"))
        ctx = ParallelContext.single() if world == 1 else ParallelContext.create(config.parallel, "cpu")
        step_function = loop.train_step

        def step_with_kill(*args: Any) -> Any:
            if kill is not None and (ctx.rank, planned.sampler.step) == kill[:2]:
                _await_save(config, kill[1] - 1)
                os.kill(os.getpid(), kill[2])
            if during is not None:
                during(ctx.rank, planned)
            return step_function(*args)

        loop.train_step = step_with_kill
        loop.train(planned, ctx)

    run_ranks(world, rank_main, timeout=90)


def _await_save(config: Config, step: int) -> None:
    """Waits until the last checkpoint that is due by a step is committed."""
    due = step // config.checkpoint.interval * config.checkpoint.interval if config.checkpoint.interval else 0
    while due and not (Path(config.run_dir) / "checkpoints" / step_name(due)).exists():
        time.sleep(0.001)


def killed(config: Config, world: int, rank: int, step: int) -> None:
    with pytest.raises(RankError) as caught:
        run(config, world, (rank, step, signal.SIGKILL))
    # the killed rank says nothing; another one may be the first to notice, in a collective
    assert "died without a result" in str(caught.value) or "Connection" in str(caught.value), caught.value


def weights(config: Config) -> dict[str, torch.Tensor]:
    checkpoint = open_checkpoint(Path(config.run_dir) / "checkpoints")
    return {name: checkpoint.read(name) for name in checkpoint.names()}


def losses(config: Config) -> list[tuple[int, float]]:
    records = map(json.loads, (Path(config.run_dir) / "metrics.jsonl").read_text().splitlines())
    return [(record["step"], record["loss"]) for record in records if record["kind"] == "train"]


def planned_samples(config: Config) -> dict[int, list[SampleId]]:
    """What the ledger says every step consists of."""
    sampler = build_sampler(read_ledger(Path(config.run_dir) / "ledger.json"))
    plans = [sampler.plan() for _ in range(config.train.steps)]
    return {
        plan.step: list(
            zip(plan.deck.source.tolist(), plan.deck.epoch.tolist(), plan.deck.window.tolist(), strict=True)
        )
        for plan in plans
    }


def assert_bitwise_equal(a: Config, b: Config) -> None:
    ours, theirs = weights(a), weights(b)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
