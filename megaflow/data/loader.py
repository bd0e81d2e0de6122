"""From the sampler's plan to the tensors of a step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from megaflow.data.mix import Sampler
from megaflow.data.packing import Int64Array, cumulative_lengths, fill_positions
from megaflow.data.plan import StepPlan, count_micro_batches
from megaflow.data.sources import Source

Card = tuple[int, int, int]
"""Card of the step's deck, epoch and window of its source."""


@dataclass(frozen=True)
class Batch:
    """One micro-batch of B sequences of S tokens.

    Attributes:
        tokens: [B, S] int64.
        labels: [B, S] int64, the next token, -100 where there is no loss.
        positions: [B, S] int64, restarting at each document.
        cu_seqlens: [D + 1] int32, document boundaries over the flattened B * S tokens.
        max_seqlen: longest of those documents, in tokens.
        sources: [B] int64, flat source index of each sequence.
        cards: where each sequence comes from, for logs.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor
    cu_seqlens: torch.Tensor
    max_seqlen: int
    sources: torch.Tensor
    cards: list[Card]

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on `device`."""
        names = ("tokens", "labels", "positions", "cu_seqlens", "sources")
        return replace(self, **{name: getattr(self, name).to(device, non_blocking=True) for name in names})


def make_batch(
    sources: Sequence[Source],
    flat: Sequence[int],
    cards: list[Card],
    document_boundaries: bool,
    memory: Int64Array | None = None,
) -> Batch:
    """Fetch the windows of `cards`, card i from `sources[flat[i]]`, into `memory` [3, B, S] if given.

    Without `document_boundaries`, each window counts as one document for attention and positions; labels still never
    cross from one document into the next.
    """
    shape = (len(cards), sources[flat[0]].seq_length)
    tokens, labels, positions = np.empty((3, *shape), dtype=np.int64) if memory is None else memory
    documents = [
        sources[source].read(epoch, index, tokens[row], labels[row])
        for row, (source, (_, epoch, index)) in enumerate(zip(flat, cards, strict=True))
    ]
    lengths = np.concatenate(documents) if document_boundaries else np.full(shape[0], shape[1], dtype=np.int64)
    cu_seqlens = cumulative_lengths(lengths)
    fill_positions(cu_seqlens, positions.reshape(-1))
    return Batch(
        tokens=torch.from_numpy(tokens),
        labels=torch.from_numpy(labels),
        positions=torch.from_numpy(positions),
        cu_seqlens=torch.from_numpy(cu_seqlens),
        max_seqlen=int(lengths.max()),
        sources=torch.tensor(flat, dtype=torch.int64),
        cards=cards,
    )


class Loader:
    """One data-parallel rank's micro-batches, step by step, as the sampler plans them.

    Args:
        sampler: the plan; advanced by each `next_step`.
        sources: every source of the run, in the sampler's flat order.
        dp, dp_rank: data-parallel size and rank.
        micro_batch_size: sequences per micro-batch; `dp * micro_batch_size` divides the sampler's batch size.
        document_boundaries: whether attention and positions restart at documents.
    """

    def __init__(
        self,
        sampler: Sampler,
        sources: Sequence[Source],
        dp: int,
        dp_rank: int,
        micro_batch_size: int,
        document_boundaries: bool = True,
    ) -> None:
        self.sampler = sampler
        self.sources = sources
        self.dp = dp
        self.dp_rank = dp_rank
        self.micro_batches = count_micro_batches(sampler.batch_size, dp, micro_batch_size)
        self.document_boundaries = document_boundaries

    def next_step(self) -> tuple[StepPlan, list[Batch]]:
        """Plan the next step and fetch this rank's micro-batches of it."""
        plan = self.sampler.plan()
        hands = plan.hand(self.dp, self.micro_batches, self.dp_rank)
        # one allocation for the whole step: the allocator keeps it for the next one, where of many small ones it gives
        # some back to the system, and page faults then take longer than the reading
        shape = (len(hands), 3, len(hands[0]), self.sources[0].seq_length)
        return plan, [
            self._batch(plan, hand, memory) for hand, memory in zip(hands, np.empty(shape, dtype=np.int64), strict=True)
        ]

    def _batch(self, plan: StepPlan, hand: np.ndarray, memory: Int64Array) -> Batch:
        deck = plan.deck
        flat = deck.source[hand].tolist()
        cards = list(zip(hand.tolist(), deck.epoch[hand].tolist(), deck.window[hand].tolist(), strict=True))
        return make_batch(self.sources, flat, cards, self.document_boundaries, memory)


def heldout_batches(
    held: Source,
    micro_batch_size: int,
    dp: int = 1,
    dp_rank: int = 0,
    max_windows: int | None = None,
    document_boundaries: bool = True,
    source: int = 0,
) -> Iterator[Batch]:
    """This rank's share of the windows of `held` (see `open_heldout`), in order.

    Windows go round the ranks, the last batch may be smaller. Over all ranks each label of the held-out documents comes
    exactly once (the first `max_windows` windows of them, if given). `source` fills `Batch.sources`.
    """
    windows = held.num_windows if max_windows is None else min(max_windows, held.num_windows)
    mine = range(dp_rank, windows, dp)
    for i in range(0, len(mine), micro_batch_size):
        indices = mine[i : i + micro_batch_size]
        batch = make_batch([held], [0] * len(indices), [(index, 0, index) for index in indices], document_boundaries)
        yield replace(batch, sources=torch.full((len(indices),), source, dtype=torch.int64))
