"""How exactly different rules mix a step: each re-expressed from its project's documentation, all on the same batches.

A rule deals groups: an int8 array `[steps, dp, M, m]`, the group of each sequence of each of the `M` micro-batches of
`m` sequences of each data-parallel rank. `error_figures` measures every rule alike.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from megaflow.data.sampler.mix import GroupSpec, Sampler, SourceSpec
from megaflow.data.sampler.schedule import ONE, CompiledSchedule

Dealt = npt.NDArray[np.int8]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Layout:
    """Steps of `dp * M * m` sequences."""

    steps: int
    dp: int
    micro_batches: int
    micro_batch_size: int

    @property
    def batch(self) -> int:
        return self.dp * self.micro_batches * self.micro_batch_size

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.steps, self.dp, self.micro_batches, self.micro_batch_size


def ours(schedule: CompiledSchedule, layout: Layout) -> Dealt:
    """megaflow: carried integer quotas, dealt like cards (`Sampler.plan`, `StepPlan.hand`)."""
    names = range(len(schedule.knots[0][1]))
    groups = [GroupSpec(f"g{k}", (SourceSpec(f"s{k}", 10**6, 10**6),), (ONE,)) for k in names]
    sampler = Sampler(1, layout.batch, 4096, groups, schedule)
    dealt = np.empty(layout.shape, np.int8)
    for step in range(layout.steps):
        plan = sampler.plan()
        for rank in range(layout.dp):
            for micro_batch, cards in enumerate(plan.hand(layout.dp, layout.micro_batches, rank)):
                dealt[step, rank, micro_batch] = plan.deck.group[cards]
    return dealt


def megatron_stream(shares: list[float], samples: int) -> Dealt:
    """[samples] Megatron-LM's blend: each sample to the dataset that lags its share of the samples before it the most.

    Megatron-LM `build_blending_indices` (megatron/core/datasets/helpers.cpp), used by `BlendedDataset`.
    """
    counts = [0] * len(shares)
    stream = np.empty(samples, np.int8)
    for i in range(samples):
        lags = [share * max(i, 1) - count for share, count in zip(shares, counts, strict=True)]
        chosen = lags.index(max(lags))
        counts[chosen] += 1
        stream[i] = chosen
    return stream


def megatron(schedule: CompiledSchedule, layout: Layout) -> Dealt:
    """Megatron-LM's blend; `MegatronPretrainingSampler` deals it: micro-batch after micro-batch, ranks in turn."""
    steps, dp, micro_batches, size = layout.shape
    stream = megatron_stream(constant_shares(schedule), steps * layout.batch)
    return stream.reshape(steps, micro_batches, dp, size).transpose(0, 2, 1, 3)


def mosaic(schedule: CompiledSchedule, layout: Layout) -> Dealt:
    """MosaicML streaming's stratified batches: floors of the shares, what is left over always to the same streams.

    streaming `generate_work_stratified_batching` (streaming/base/batching/stratified.py): a batch is stream after
    stream, and ranks take contiguous pieces of it.
    """
    exact = np.array(constant_shares(schedule)) * layout.batch
    counts = np.floor(exact).astype(int)
    counts[np.argsort(counts - exact, kind="stable")[: layout.batch - counts.sum()]] += 1
    batch = np.repeat(np.arange(len(counts), dtype=np.int8), counts)
    return np.broadcast_to(batch.reshape(layout.shape[1:]), layout.shape)


def grain_stream(shares: list[float], samples: int) -> Dealt:
    """[samples] Grain's mix: of the first k, ceilings of k's shares, one dataset after another of what is left.

    grain `MapDataset.mix` (grain/_src/python/dataset/transformations/mix.py, `_counts_per_dataset`).
    """
    parts = [int(share * 100 / min(shares)) for share in shares]
    left = np.arange(samples + 1)
    counts = []
    for k, part in enumerate(parts):
        taken = -(-left * part // sum(parts[k:]))
        counts.append(taken)
        left = left - taken
    return np.diff(np.stack(counts), axis=1).argmax(axis=0).astype(np.int8)


def grain_sliced(schedule: CompiledSchedule, layout: Layout) -> Dealt:
    """Grain's mix of whole datasets, of which each rank takes the slice `[rank::dp]`."""
    steps, dp, micro_batches, size = layout.shape
    stream = grain_stream(constant_shares(schedule), steps * layout.batch)
    return stream.reshape(steps, micro_batches, size, dp).transpose(0, 3, 1, 2)


def grain_per_rank(schedule: CompiledSchedule, layout: Layout) -> Dealt:
    """Datasets sliced by rank first, then mixed by Grain on each rank: all ranks mix in step with each other."""
    steps, _, micro_batches, size = layout.shape
    stream = grain_stream(constant_shares(schedule), steps * micro_batches * size)
    return np.broadcast_to(stream.reshape(steps, 1, micro_batches, size), layout.shape)


def draws(schedule: CompiledSchedule, layout: Layout) -> Dealt:
    """Every sample drawn by itself: Megatron Energon `BlendDataset`, lingua, Hugging Face `interleave_datasets`.

    They have no schedules; here they are given the step's weights.
    """
    edges = np.cumsum(step_shares(schedule, layout.steps), axis=1)[:, None, None, None, :]
    drawn = np.random.default_rng(1).random(layout.shape)
    return (drawn[..., None] >= edges[..., :-1]).sum(axis=-1).astype(np.int8)


Rule = Callable[[CompiledSchedule, Layout], Dealt]
RULES: dict[str, Rule] = {
    "megaflow": ours,
    "Megatron-LM": megatron,
    "MosaicML stratified": mosaic,
    "Grain, mix sliced": grain_sliced,
    "Grain, mixed per rank": grain_per_rank,
    "independent draws": draws,
}
SCHEDULED = ("megaflow", "independent draws")
"""Rules that can follow weights that move."""


def step_shares(schedule: CompiledSchedule, steps: int) -> Floats:
    """[steps, K] the groups' shares of each step, of a schedule on the clock of steps."""
    return np.array([schedule.weights(step) for step in range(steps)]) / ONE


def constant_shares(schedule: CompiledSchedule) -> list[float]:
    """The shares of a schedule that does not move."""
    ((_, weights),) = schedule.knots
    return [weight / ONE for weight in weights]


def error_figures(dealt: Dealt, shares: Floats, points: int = 50) -> dict[str, Any]:
    """How far what was dealt is from `shares` [steps, K], in sequences unless it says otherwise.

    Returns:
        `step`: largest error of a group's count in a step; `cumulative`: of its count since the start; `rank` and
        `micro_batch`: of its count on one rank in a step and in one micro-batch; `rank_run`: of a rank's share over the
        whole run, in percentage points; `missing`: per cent of ranks' steps without any sequence of a group of which
        they should have one or more; `drift`: `cumulative` over the steps so far, at `points` steps.
    """
    steps, dp, micro_batches, size = dealt.shape
    hands = np.stack([(dealt == k).sum(axis=3) for k in range(shares.shape[1])], axis=-1)
    ranks = hands.sum(axis=2)
    expected = shares * micro_batches * size
    off = ranks.sum(axis=1) - expected * dp
    drift = np.maximum.accumulate(np.abs(off.cumsum(axis=0)).max(axis=1))
    missing = ((ranks == 0) & (expected[:, None] >= 1)).any(axis=2)
    at = np.unique(np.linspace(0, steps - 1, points).astype(int))
    return {
        "step": float(np.abs(off).max()),
        "cumulative": float(drift[-1]),
        "rank": float(np.abs(ranks - expected[:, None]).max()),
        "rank_run": float(100 * np.abs((ranks - expected[:, None]).sum(axis=0)).max() / (steps * micro_batches * size)),
        "micro_batch": float(np.abs(hands - shares[:, None, None] * size).max()),
        "missing": float(100 * missing.mean()),
        "drift": [[int(t) + 1, float(drift[t])] for t in at],
    }
