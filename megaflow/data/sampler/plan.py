"""One step's plan: its sequences, and the dealing of them to data-parallel ranks and micro-batches."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megaflow.data.sampler import order
from megaflow.data.sampler.counts import Progress
from megaflow.errors import UserError

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Deck:
    """A step's sequences, sorted by group, source and count: columns of shape `[B]`, one row per card."""

    group: Ints
    source: Ints  # counted over all groups
    source_in_group: Ints
    epoch: Ints
    window: Ints


@dataclass(frozen=True)
class StepPlan:
    """What one optimizer step trains on.

    Attributes:
        step: from 1.
        clock: the schedule's clock before the step.
        weights: the schedule's group weights at that clock, in units of 1 / `ONE`: the planned ratios.
        group_counts: sequences of each group.
        counts: sequences of each source, by group.
        deck: the sequences themselves.
        digest: of every plan up to this one; `f"{digest:016x}"` is its usual form.
        total: what the weights share out: the step's sequences, or its tokens with loss.
        corrections: sequences that the safety valve moved between groups or sources.
        seed: of the run; it rotates the dealing.
        after: how far the run has come with this step.
    """

    step: int
    clock: int
    weights: list[int]
    group_counts: list[int]
    counts: list[list[int]]
    deck: Deck
    digest: int
    total: int
    corrections: int
    seed: int
    after: Progress

    def hand(self, dp: int, micro_batches: int, dp_rank: int) -> list[Ints]:
        """The cards of one data-parallel rank, by micro-batch: ascending card indices.

        Cards go to the `dp * micro_batches` hands in turn, from one that rotates from step to step: consecutive cards
        of a source land on consecutive hands, so each has the step's ratios to within one sequence. The deck does not
        depend on `dp` or `micro_batches`; this dealing is the only place where they appear.
        """
        hands = dp * micro_batches
        first = order.rotation(self.seed, self.step, hands)
        batch = len(self.deck.window)
        return [np.arange((m * dp + dp_rank - first) % hands, batch, hands) for m in range(micro_batches)]


def count_micro_batches(batch_size: int, dp: int, micro_batch_size: int) -> int:
    """Micro-batches per data-parallel rank and step.

    Raises:
        UserError: `dp * micro_batch_size` does not divide `batch_size`; names the nearest batch sizes that fit.
    """
    unit = dp * micro_batch_size
    if batch_size < 1 or batch_size % unit:
        below = batch_size // unit * unit
        fits = f"{below} or {below + unit}" if below > 0 else f"{unit}"
        raise UserError(
            f"batch size {batch_size} is not a multiple of {unit} ({dp} data-parallel ranks x micro-batches of "
            f"{micro_batch_size}): nearest that fit: {fits}"
        )
    return batch_size // unit
