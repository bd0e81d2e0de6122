"""A trillion tokens planned for many data-parallel ranks, with every promise checked on the way."""

from __future__ import annotations

import json
import math
import statistics
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from megaflow.data.sampler.groups import GroupSpec, SourceSpec
from megaflow.data.sampler.mix import Sampler
from megaflow.data.sampler.plan import StepPlan
from megaflow.data.sampler.schedule import ONE, chatflow, weights_from_decimals

INITIAL, FINAL = (".45", ".45", ".10", "0"), (".10", ".05", ".60", ".25")
"""Weights of the groups at the start of the ramp and at its end."""


@dataclass(frozen=True)
class Scale:
    """A run of `tokens` tokens whose corpora have `windows` windows in all."""

    tokens: int
    dp: int
    windows: int
    micro_batches: int = 1
    seq_length: int = 4096
    sampled_ranks: int = 64

    @property
    def batch(self) -> int:
        return self.dp * self.micro_batches

    @property
    def steps(self) -> int:
        return math.ceil(self.tokens / (self.batch * self.seq_length))


def make_groups(windows: int) -> list[GroupSpec]:
    """Four groups of two sources, which share their group 7 to 3; `windows` in all."""
    names = ("en", "parallel", "zh", "instruction")
    weights = tuple(weights_from_decimals(["7", "3"]))
    sizes = [[int(windows * share), int(windows * share / 5)] for share in (0.35, 0.08, 0.35, 0.05)]
    return [
        GroupSpec(name, tuple(SourceSpec(f"{name}-{i}", n, 3 * n) for i, n in enumerate(pair)), weights)
        for name, pair in zip(names, sizes, strict=True)
    ]


class Promises:
    """Checks plans one after another, independently of the sampler's own arithmetic; keeps the worst figures."""

    def __init__(self, scale: Scale, groups: list[GroupSpec]) -> None:
        generator = np.random.default_rng(1)
        self.scale = scale
        self.ranks = sorted({0, scale.dp - 1, *generator.integers(scale.dp, size=scale.sampled_ranks - 2).tolist()})
        self.visits = [np.zeros(source.windows, np.uint8) for group in groups for source in group.sources]
        self.due = [0] * len(groups)  # cumulative shares, in units of 1 / ONE
        self.taken = [0] * len(groups)
        self.drift, self.corrections = 0.0, 0
        self.rank_groups = np.zeros((len(self.ranks), len(groups)), np.int64)

    def check(self, plan: StepPlan) -> None:
        """Raises AssertionError where a promise does not hold."""
        batch = self.scale.batch
        assert sum(plan.group_counts) == batch == len(plan.deck.window), f"step {plan.step}: the batch is not exact"
        outside = 0
        for g, (count, weight) in enumerate(zip(plan.group_counts, plan.weights, strict=True)):
            low, high = batch * weight // ONE, -(-batch * weight // ONE)
            outside += not low <= count <= high
            self.due[g] += batch * weight
            self.taken[g] += count
            self.drift = max(self.drift, abs(self.taken[g] * ONE - self.due[g]) / ONE)
        assert outside <= 2 * plan.corrections, f"step {plan.step}: a group's count is not its share's floor or ceiling"
        self.corrections += plan.corrections
        self._check_windows(plan)
        self._check_ranks(plan)

    def _check_windows(self, plan: StepPlan) -> None:
        """A window of epoch e was visited e times before: by induction, once in each epoch."""
        ends = np.cumsum([0, *(count for group in plan.counts for count in group)])
        for visits, (start, end) in zip(self.visits, pairwise(ends), strict=True):
            windows, epochs = plan.deck.window[start:end], plan.deck.epoch[start:end]
            for epoch in np.unique(epochs):
                now = windows[epochs == epoch]
                once = (visits[now] == epoch).all() & (len(np.unique(now)) == len(now))
                assert once, f"step {plan.step}: a window skipped or repeated in an epoch"
                visits[now] += 1

    def _check_ranks(self, plan: StepPlan) -> None:
        """A rank's, and a micro-batch's, count of a source and of a group is the floor or ceiling of its part."""
        dp, micro_batches = self.scale.dp, self.scale.micro_batches
        sources, groups = (len(self.visits), len(plan.group_counts))
        totals = np.array([*(count for group in plan.counts for count in group), *plan.group_counts])
        for i, rank in enumerate(self.ranks):
            hands = plan.hand(dp, micro_batches, rank)
            counts = np.stack(
                [
                    np.concatenate(
                        [
                            np.bincount(plan.deck.source[hand], minlength=sources),
                            np.bincount(plan.deck.group[hand], minlength=groups),
                        ]
                    )
                    for hand in hands
                ]
            )
            for parts, ours in ((dp * micro_batches, counts), (dp, counts.sum(axis=0, keepdims=True))):
                fits = (totals // parts <= ours) & (ours <= -(-totals // parts))
                assert fits.all(), f"step {plan.step}: rank {rank} has not the step's ratios"
            self.rank_groups[i] += counts[:, sources:].sum(axis=0)


def simulate(scale: Scale, tick: Callable[[], None]) -> dict[str, Any]:
    """Plan the whole run, check each step and time what one rank does: plan, and take its hand.

    Raises:
        AssertionError: a promise does not hold.
    """
    groups = make_groups(scale.windows)
    schedule = chatflow("tokens", INITIAL, FINAL, scale.tokens * 3 // 5)
    sampler = Sampler(1, scale.batch, scale.seq_length, groups, schedule)
    fresh = Sampler(1, scale.batch, scale.seq_length, groups, schedule)
    peak = _plan_bytes(Sampler(1, scale.batch, scale.seq_length, groups, schedule), scale)
    promises = Promises(scale, groups)
    seconds = []
    for _ in range(scale.steps):
        start = time.perf_counter()
        plan = sampler.plan()
        plan.hand(scale.dp, scale.micro_batches, scale.dp // 2)
        seconds.append(time.perf_counter() - start)
        promises.check(plan)
        tick()
    start = time.perf_counter()
    replayed = fresh.replay(scale.steps)
    replay_seconds = time.perf_counter() - start
    state = sampler.state_dict()
    assert replayed == {key: value for key, value in state.items() if key != "digest"}, "a replay gives another state"
    expected = np.array(promises.due) / ONE / scale.dp
    return {
        "tokens": scale.steps * scale.batch * scale.seq_length,
        "steps": scale.steps,
        "dp": scale.dp,
        "batch": scale.batch,
        "windows": sum(source.windows for group in groups for source in group.sources),
        "epochs": [round(n / s.windows, 2) for n, s in zip(sampler.consumed, sampler.sources, strict=True)],
        "sampled_ranks": len(promises.ranks),
        "seconds_per_step": statistics.median(seconds),
        "seconds_of_run": sum(seconds),
        "plan_bytes": peak,
        "state_bytes": len(json.dumps(state)),
        "replay_seconds": replay_seconds,
        "drift": promises.drift,
        "corrections": promises.corrections,
        "rank_share_error": float(100 * (np.abs(promises.rank_groups - expected) / expected.sum()).max()),
        "digest": state["digest"],
    }


def _plan_bytes(sampler: Sampler, scale: Scale) -> int:
    """Most memory that planning a step and taking a hand hold at once, beyond the sampler."""
    sampler.plan()
    tracemalloc.start()
    sampler.plan().hand(scale.dp, scale.micro_batches, 0)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak
