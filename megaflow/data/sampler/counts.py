"""How many sequences each group and source gives to a step: integer quotas with carried residuals, on two levels.

Where weights are shares of tokens with loss, `deficit` chooses instead of quotas.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from megaflow.data import native
from megaflow.data.sampler.deficit import Shares
from megaflow.data.sampler.schedule import CLOCKS, ONE, CompiledSchedule

Ints = NDArray[np.int64]


def quota(batch: int, weights: Sequence[int], residuals: list[int]) -> tuple[list[int], int]:
    """Share `batch` sequences by integer weights that sum to `ONE`, carrying in `residuals` what rounding left over.

    Each count is the floor or the ceiling of `batch * W_k / ONE`; the entries that are owed most are rounded up. Where
    an abrupt switch still leaves an entry owed a whole sequence, the safety valve moves one to it from an entry that is
    owed nothing.

    Args:
        batch: at most 2**20.
        weights: `W_k >= 0`.
        residuals: sequences owed, in units of 1 / `ONE`; updated in place, their sum stays 0.

    Returns:
        The counts and how many sequences the safety valve moved.
    """
    entries = range(len(weights))
    exact = [batch * weight for weight in weights]
    counts = [value // ONE for value in exact]
    fractions = [value % ONE for value in exact]
    for k in entries:
        residuals[k] += fractions[k]
    owed_most = sorted((k for k in entries if fractions[k] > 0), key=lambda k: (-residuals[k], k))
    for k in owed_most[: batch - sum(counts)]:
        counts[k] += 1
        residuals[k] -= ONE
    corrections = 0
    while True:
        receivers = [k for k in entries if weights[k] > 0 and residuals[k] >= ONE]
        givers = [k for k in entries if counts[k] > 0 and residuals[k] <= 0]
        if not receivers or not givers:
            return counts, corrections
        receiver = max(receivers, key=lambda k: (residuals[k], -k))
        giver = min(givers, key=lambda k: (residuals[k], k))
        if residuals[receiver] - residuals[giver] == ONE:  # they would only change places, for ever
            return counts, corrections
        counts[receiver] += 1
        residuals[receiver] -= ONE
        counts[giver] -= 1
        residuals[giver] += ONE
        corrections += 1


@dataclass
class Progress:
    """How far a run has come: the step last planned, residuals in units of 1 / `ONE`, sequences consumed.

    Residuals are sequences owed, or tokens with loss where weights are shares of those: below 2**63 for fewer than
    2**31 / S groups, and sources in a group.
    `worst` is not part of the state: the largest absolute residual of each group after any step since the start.
    """

    step: int
    group_residuals: Ints
    source_residuals: Ints
    consumed: Ints
    worst: Ints

    @classmethod
    def start(cls, groups: int, sources: int) -> Progress:
        """Before the first step."""
        return cls(0, *(np.zeros(size, np.int64) for size in (groups, sources, sources, groups)))

    def copy(self) -> Progress:
        """An independent copy."""
        arrays = (self.group_residuals, self.source_residuals, self.consumed, self.worst)
        return Progress(self.step, *(array.copy() for array in arrays))


@dataclass(frozen=True)
class StepCounts:
    """The counts of one step: `weights` and `groups` by group, `sources` by source over all groups.

    `total` is what the weights share out: its sequences, or its tokens with loss.
    """

    weights: list[int]
    groups: list[int]
    sources: list[int]
    total: int
    corrections: int


@dataclass(frozen=True)
class CountRule:
    """What decides the counts besides `Progress`. Arrays are int64; sources are listed over all groups in order.

    Attributes:
        group_sizes: sources in each group.
        source_weights: each source's share of its group, in units of 1 / `ONE`.
        windows, documents: of each source, per epoch.
        length: tokens with loss of a source's n-th sequence, where weights are shares of those.
    """

    schedule: CompiledSchedule
    seq_length: int
    group_sizes: Ints
    source_weights: Ints
    windows: Ints
    documents: Ints
    length: Callable[[int, int], int] | None = None

    def clock(self, progress: Progress) -> int:
        """The schedule's clock before the next step."""
        if self.schedule.clock == "steps":
            return progress.step
        consumed: list[int] = progress.consumed.tolist()
        if self.schedule.clock == "documents":
            sources = zip(consumed, self.documents.tolist(), self.windows.tolist(), strict=True)
            return sum(count * documents // windows for count, documents, windows in sources)
        return sum(consumed) * (self.seq_length if self.schedule.clock == "tokens" else 1)

    def advance(self, progress: Progress, steps: int, batch: int, use_native: bool = True) -> StepCounts:
        """Move `progress` on by `steps >= 1` steps of `batch` sequences.

        Returns:
            The counts of the last of these steps, with the corrections of all of them.
        """
        library = native.library() if use_native and self.length is None else None
        if library is not None:
            weights, groups = np.empty_like(self.group_sizes), np.empty_like(self.group_sizes)
            sources, step = np.empty_like(self.windows), np.array([progress.step], np.int64)
            state = (step, progress.group_residuals, progress.source_residuals, progress.consumed, progress.worst)
            pointers = map(native.address, (*state, weights, groups, sources))
            corrections = library.megaflow_advance(steps, batch, *self._native_arguments, *pointers)
            progress.step += steps
            return StepCounts(weights.tolist(), groups.tolist(), sources.tolist(), batch, corrections)
        corrections = 0
        for _ in range(steps):
            last = (
                self._advance_python(progress, batch) if self.length is None else self._advance_tokens(progress, batch)
            )
            corrections += last.corrections
        return replace(last, corrections=corrections)

    def _advance_python(self, progress: Progress, batch: int) -> StepCounts:
        """Twin of one step of `megaflow_advance`."""
        weights = self.schedule.weights(self.clock(progress))
        group_residuals = progress.group_residuals.tolist()
        groups, corrections = quota(batch, weights, group_residuals)
        sources: list[int] = []
        source_residuals: list[int] = []
        for count, size in zip(groups, self.group_sizes.tolist(), strict=True):
            members = slice(len(sources), len(sources) + size)
            residuals = progress.source_residuals[members].tolist()
            counts, moved = quota(count, self.source_weights[members].tolist(), residuals)
            sources += counts
            source_residuals += residuals
            corrections += moved
        progress.group_residuals[:] = group_residuals
        np.maximum(progress.worst, np.abs(progress.group_residuals), out=progress.worst)
        progress.source_residuals[:] = source_residuals
        progress.consumed += np.array(sources, np.int64)
        progress.step += 1
        return StepCounts(weights, groups, sources, batch, corrections)

    def _advance_tokens(self, progress: Progress, batch: int) -> StepCounts:
        """One step where weights are shares of tokens with loss."""
        assert self.length is not None
        ends = np.cumsum(self.group_sizes)[:-1]
        weights, credits = self.schedule.weights(self.clock(progress)), progress.group_residuals.tolist()
        source_weights, source_credits = (
            [part.tolist() for part in np.split(column, ends)]
            for column in (self.source_weights, progress.source_residuals)
        )
        consumed: list[int] = progress.consumed.tolist()
        total = Shares(weights, credits, source_weights, source_credits).fill(batch, consumed, self.length)
        counts = np.array(consumed, np.int64) - progress.consumed
        groups = [int(part.sum()) for part in np.split(counts, ends)]
        progress.group_residuals[:] = credits
        np.maximum(progress.worst, np.abs(progress.group_residuals), out=progress.worst)
        progress.source_residuals[:] = np.concatenate(source_credits)
        progress.consumed += counts
        progress.step += 1
        return StepCounts(weights, groups, counts.tolist(), total, 0)

    @cached_property
    def _native_arguments(self) -> tuple[int, ...]:
        """The constant arguments of `megaflow_advance`, after the batch size."""
        at, weights = self._knots
        clock = CLOCKS.index(self.schedule.clock)
        arrays = (self.group_sizes, self.source_weights, self.windows, self.documents)
        pointers = [array.ctypes.data for array in arrays]
        groups = len(self.group_sizes)
        return (self.seq_length, clock, len(at), at.ctypes.data, weights.ctypes.data, groups, *pointers)

    @cached_property
    def _knots(self) -> tuple[Ints, Ints]:
        """Clock values `[knots]` and weights `[knots, groups]`, kept alive for the pointers above."""
        at = np.array([x for x, _ in self.schedule.knots], np.int64)
        return at, np.array([weights for _, weights in self.schedule.knots], np.int64)
