"""From the sampler's plan to the tensors of a step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from megaflow.data.packing import cumulative_lengths
from megaflow.data.prefetch import Prefetcher
from megaflow.data.sampler.mix import Sampler
from megaflow.data.sampler.plan import Ints, StepPlan, count_micro_batches
from megaflow.data.sources import Source
from megaflow.data.zigzag import Keys, cut_documents, local_columns

Card = tuple[int, int, int]
"""Card of the step's deck, epoch and window of its source."""


@dataclass(frozen=True)
class Batch:
    """One micro-batch of B sequences of S tokens, or a context-parallel rank's part of each: S is then its length.

    Attributes:
        tokens: [B, S] int32.
        labels: [B, S] int32, the next token, -100 where there is no loss.
        positions: [B, S] int32, restarting at each document.
        cu_seqlens: [D + 1] int32, boundaries of the documents, or of this rank's segments of them, over the flattened
            B * S tokens.
        max_seqlen: longest of those, in tokens.
        sources: [B] int64, flat source index of each sequence.
        cards: where each sequence comes from, for logs.
        keys: under context parallelism, what the segments attend to; None: each document to itself.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor
    cu_seqlens: torch.Tensor
    max_seqlen: int
    sources: torch.Tensor
    cards: list[Card]
    keys: Keys | None = None

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on `device`; from pinned memory the copies need not be waited for."""
        return self._with(lambda tensor: tensor.to(device, non_blocking=True))

    def pin(self) -> Batch:
        """The same batch with its tensors in pinned memory; those that are stay."""
        return self._with(torch.Tensor.pin_memory)

    def _with(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        names = ("tokens", "labels", "positions", "cu_seqlens", "sources")
        changed: dict[str, Any] = {name: change(getattr(self, name)) for name in names}
        if self.keys is not None:
            keys = self.keys
            changed["keys"] = replace(keys, cu_seqlens=change(keys.cu_seqlens), index=change(keys.index))
        return replace(self, **changed)


def make_batch(
    sources: Sequence[Source],
    flat: Sequence[int],
    cards: list[Card],
    document_boundaries: bool,
    memory: torch.Tensor | None = None,
) -> Batch:
    """Fetch the windows of `cards`, card i from `sources[flat[i]]`, into `memory` [3, B, S] if given.

    Without `document_boundaries`, each window counts as one document for attention and positions; labels still never
    cross from one document into the next.
    """
    size = sources[flat[0]].seq_length
    tensors = torch.empty((3, len(cards), size), dtype=torch.int32) if memory is None else memory
    windows = tensors.numpy()
    documents = [
        sources[source].read(epoch, index, windows[:, row])
        for row, (source, (_, epoch, index)) in enumerate(zip(flat, cards, strict=True))
    ]
    if document_boundaries:
        lengths = np.concatenate(documents)
    else:
        lengths = np.full(len(cards), size, dtype=np.int64)
        windows[2] = np.arange(size)
    cu_seqlens = cumulative_lengths(lengths)
    return Batch(
        tokens=tensors[0],
        labels=tensors[1],
        positions=tensors[2],
        cu_seqlens=torch.from_numpy(cu_seqlens),
        max_seqlen=int(lengths.max()),
        sources=torch.tensor(flat, dtype=torch.int64),
        cards=cards,
    )


def cut_batch(batch: Batch, cp: int, cp_rank: int, memory: torch.Tensor | None = None) -> Batch:
    """A context-parallel rank's part of a whole batch, in `memory` [3, B, S / cp] if given; with cp 1 the batch itself.

    Raises:
        ValueError: 2 cp does not divide S.
    """
    if cp == 1:
        return batch
    early, late = local_columns(batch.tokens.shape[1], cp, cp_rank)
    whole = (batch.tokens, batch.labels, batch.positions)
    parts = [
        torch.cat((tensor[:, early], tensor[:, late]), dim=1, out=None if memory is None else memory[i])
        for i, tensor in enumerate(whole)
    ]
    cu_seqlens, max_seqlen, keys = cut_documents(batch.cu_seqlens.numpy(), len(batch.tokens), cp, cp_rank)
    return replace(
        batch,
        tokens=parts[0],
        labels=parts[1],
        positions=parts[2],
        cu_seqlens=torch.from_numpy(cu_seqlens),
        max_seqlen=max_seqlen,
        keys=keys,
    )


class Loader:
    """One data-parallel rank's micro-batches, step by step, as the sampler plans them.

    Steps are prepared ahead by threads, from a fork of the sampler: the sampler itself is always at the step handed out
    last. Where it is changed or moved meanwhile, what was prepared is dropped and planned again from where it stands.
    Use as a context manager, or `close`, where there are workers.

    Args:
        sampler: the plan; advanced by each `next_step`.
        sources: every source of the run, in the sampler's flat order.
        dp, dp_rank: data-parallel size and rank.
        micro_batch_size: sequences per micro-batch; `dp * micro_batch_size` divides each step's batch size.
        document_boundaries: whether attention and positions restart at documents.
        workers: threads that read; 0 plans and reads in `next_step`, without threads.
        prefetch: steps prepared ahead where there are workers.
        last_step: nothing is prepared beyond it.
        pinned: whether tensors are in pinned memory, from which a GPU copies while others work; needs CUDA.
        cp, cp_rank: context-parallel size and rank, which keeps its part of every sequence.
    """

    def __init__(
        self,
        sampler: Sampler,
        sources: Sequence[Source],
        dp: int,
        dp_rank: int,
        micro_batch_size: int,
        document_boundaries: bool = True,
        workers: int = 0,
        prefetch: int = 2,
        last_step: int | None = None,
        pinned: bool = False,
        cp: int = 1,
        cp_rank: int = 0,
    ) -> None:
        self.sampler = sampler
        self.sources = sources
        self.dp = dp
        self.dp_rank = dp_rank
        self.micro_batch_size = micro_batch_size
        self.document_boundaries = document_boundaries
        self.workers = workers
        self.prefetch = prefetch
        self.last_step = last_step
        self.pinned = pinned
        self.cp = cp
        self.cp_rank = cp_rank
        self._prefetcher: Prefetcher[StepPlan, Batch] | None = None
        self._place: tuple[int, int, int] | None = None

    def next_step(self) -> tuple[StepPlan, list[Batch]]:
        """The next step's plan and this rank's micro-batches of it.

        Raises:
            UserError: the ranks cannot share this step's batch, or data of this step are damaged. The sampler then
                stays at the step before, and the loader is closed.
        """
        step = self.sampler.step + 1
        if self._prefetcher is None or self.sampler.place != self._place:
            self.close()
            self._prefetcher = Prefetcher(self.sampler.fork().plan, self._parts, self.workers)
        try:
            ahead = self.prefetch if self.last_step is None else min(self.prefetch, self.last_step - step)
            plan, batches = self._prefetcher.next(ahead)
        except BaseException:
            self.close()
            raise
        self.sampler.follow(plan)
        self._place = self.sampler.place
        return plan, batches

    def _parts(self, plan: StepPlan) -> list[Callable[[], Batch]]:
        """What there is to do for a planned step: a call for each micro-batch."""
        batch_size = len(plan.deck.window)
        hands = plan.hand(self.dp, count_micro_batches(batch_size, self.dp, self.micro_batch_size), self.dp_rank)
        # one allocation for the whole step: the allocator keeps it for the next one, where of many small ones it gives
        # some back to the system, and page faults then take longer than the reading
        shape = (len(hands), 3, self.micro_batch_size, self.sources[0].seq_length // self.cp)
        step_memory = torch.empty(shape, dtype=torch.int32, pin_memory=self.pinned)
        return [partial(self._batch, plan, hand, memory) for hand, memory in zip(hands, step_memory, strict=True)]

    def _batch(self, plan: StepPlan, hand: Ints, memory: torch.Tensor) -> Batch:
        deck = plan.deck
        flat = deck.source[hand].tolist()
        cards = list(zip(hand.tolist(), deck.epoch[hand].tolist(), deck.window[hand].tolist(), strict=True))
        whole = make_batch(self.sources, flat, cards, self.document_boundaries, memory if self.cp == 1 else None)
        batch = cut_batch(whole, self.cp, self.cp_rank, memory)
        return batch.pin() if self.pinned else batch

    def close(self) -> None:
        """Ends the threads; a further `next_step` starts others."""
        if self._prefetcher is not None:
            self._prefetcher.close()
            self._prefetcher = None

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def heldout_batches(
    held: Source,
    micro_batch_size: int,
    dp: int = 1,
    dp_rank: int = 0,
    max_windows: int | None = None,
    document_boundaries: bool = True,
    source: int = 0,
    cp: int = 1,
    cp_rank: int = 0,
) -> Iterator[Batch]:
    """This rank's share of the windows of `held` (see `open_heldout`), in order, and its context-parallel part of them.

    Windows go round the ranks, the last batch may be smaller. Over all ranks each label of the held-out documents comes
    exactly once (the first `max_windows` windows of them, if given). `source` fills `Batch.sources`.
    """
    windows = held.num_windows if max_windows is None else min(max_windows, held.num_windows)
    mine = range(dp_rank, windows, dp)
    for i in range(0, len(mine), micro_batch_size):
        indices = mine[i : i + micro_batch_size]
        batch = make_batch([held], [0] * len(indices), [(index, 0, index) for index in indices], document_boundaries)
        batch = replace(batch, sources=torch.full((len(indices),), source, dtype=torch.int64))
        yield cut_batch(batch, cp, cp_rank)
