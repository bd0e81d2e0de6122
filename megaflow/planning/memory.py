"""Bytes that every pipeline rank holds at its fullest moment, by item."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import lru_cache

from megaflow.config import ModelConfig
from megaflow.model.memory import activation_bytes
from megaflow.parallel.vocabulary import vocabulary_rows
from megaflow.planning.layout import Held, Job, Layout, Recompute
from megaflow.planning.pipeline import live_activations

RESERVED = 4 * 2**30
"""Bytes of a GPU that no tensor gets: the CUDA context, the buffers of NCCL and cuBLAS, gaps between tensors."""
CASTS = 2
"""bf16 copies of gradient buckets under way at once, where gradients are reduced in bf16."""


@dataclass(frozen=True)
class RankMemory:
    """Bytes on the ranks of one pipeline stage."""

    weights: int
    """In the model's dtype."""
    master: int
    """fp32 weights of the optimizer, where the model's are bf16."""
    gradients: int
    """fp32 sums."""
    moments: int
    """Both of AdamW, fp32."""
    activations: int
    """Kept between the passes of the micro-batches under way."""
    working: int
    """Of a layer in its backward pass: what is computed again, gradients of activations, the gradient of a weight."""
    logits: int
    """Logits, and their fp32 copies in the loss."""
    buckets: int
    """bf16 copies of gradients on their way."""

    @property
    def total(self) -> int:
        kept = self.weights + self.master + self.gradients + self.moments + self.activations
        return kept + self.working + self.logits + self.buckets


def parameters(model: ModelConfig, held: Held, tp: int) -> int:
    """Parameters of a part of the model on one tensor-parallel rank, padding of the vocabulary included."""
    hidden, kv = model.hidden_size, model.num_kv_heads * model.head_dim
    layer = (2 * hidden * (hidden + kv) + 3 * hidden * model.intermediate_size) // tp + 2 * hidden
    rows = vocabulary_rows(model.vocab_size, tp) * hidden
    return held.layers * layer + (held.embed + held.head) * rows + held.head * hidden


def rank_parameters(job: Job, layout: Layout) -> list[int]:
    """Parameters on a rank of every pipeline stage."""
    counts = [0] * layout.pp
    for owner, held in zip(layout.owners, layout.held(job), strict=True):
        counts[owner] += parameters(job.model, held, layout.tp)
    if job.model.tie_embeddings and layout.owners[0] == layout.owners[-1]:
        counts[0] -= vocabulary_rows(job.model.vocab_size, layout.tp) * job.model.hidden_size
    return counts


@dataclass(frozen=True)
class _Activations:
    """Bytes for one micro-batch."""

    layer: int
    recomputed: int
    working: int
    head: int
    logits: int
    inputs: int

    def of(self, held: Held) -> int:
        """Kept for a part of the model."""
        kept = held.recomputed * self.recomputed + (held.layers - held.recomputed) * self.layer + self.inputs
        return kept + self.head if held.head else kept


@lru_cache(maxsize=4096)
def _activations(
    job: Job, tp: int, sequence_parallel: bool, cp: int, micro_batch: int, recompute: Recompute
) -> _Activations:
    model, element = job.model, job.element
    tokens = micro_batch * job.seq_length // cp
    rows = tokens // tp if sequence_parallel else tokens
    plain, again = (
        activation_bytes(
            model,
            tokens,
            tp=tp,
            sequence_parallel=sequence_parallel,
            cp=cp,
            recompute=kind,
            precision=job.precision,
            attention=job.attention,
        )
        for kind in ("none", recompute)
    )
    gathered = tokens * model.hidden_size * element if sequence_parallel else 0
    weight = 2 * model.hidden_size * model.intermediate_size // tp * element
    return _Activations(
        layer=plain.kept,
        recomputed=again.kept,
        working=max(plain.working, again.working) + gathered + weight,
        head=rows * (4 * model.hidden_size + 2 * element * model.hidden_size + 4),
        logits=tokens * vocabulary_rows(model.vocab_size, tp),
        inputs=tokens * (8 * 3 + 4 * model.head_dim),
    )


def memory(job: Job, layout: Layout, exact: bool = True) -> list[RankMemory]:
    """The fullest moment of every pipeline rank; the ranks of a stage are alike.

    `exact`: what is under way is counted along the schedule, chunk by chunk; else all chunks of a rank are taken for
    the largest.
    """
    shards = layout.data if layout.zero else 1
    mixed = job.precision == "bf16"
    one = _activations(job, layout.tp, layout.sequence_parallel, layout.cp, layout.micro_batch, layout.recompute)
    kept = [one.of(held) for held in layout.held(job)]
    peaks = _peaks(job, layout, kept) if exact else _bounds(job, layout, kept)
    last = layout.owners[-1]
    ranks = []
    for rank, held in enumerate(rank_parameters(job, layout)):
        bucket = min(job.bucket_mib * 2**20 // 4, held)
        # bf16 logits and an fp32 copy less its maximum; fp32 ones and that
        logits = one.logits * (job.element + (8 if mixed else 4)) if rank == last else 0
        if layout.schedule == "gpipe" and rank == last:
            logits += one.logits * job.element * (layout.micro_batches(job) - 1)
        ranks.append(
            RankMemory(
                weights=job.element * held,
                master=4 * held // shards if mixed else 0,
                gradients=4 * held,
                moments=8 * held // shards,
                activations=peaks[rank],
                working=one.working,
                logits=logits,
                buckets=CASTS * 2 * bucket if job.grad_reduce == "bf16" and layout.data > 1 else 0,
            )
        )
    return ranks


def _peaks(job: Job, layout: Layout, kept: list[int]) -> list[int]:
    """The most bytes under way on each rank, along its actions."""
    few = min(layout.micro_batches(job), 4 * layout.pp + layout.micro_batches(job) % layout.pp)
    if layout.schedule == "gpipe":
        few = layout.micro_batches(job)
    peaks = []
    for actions in layout.made(few).ranks:
        live: Counter[int] = Counter()
        now = most = 0
        for action in actions:
            if action.kind == "forward":
                now += kept[action.chunk]
                live[action.chunk] += 1
            elif action.kind in ("backward", "backward_weight"):
                now -= kept[action.chunk]
            most = max(most, now)
        peaks.append(most)
    return peaks


def _bounds(job: Job, layout: Layout, kept: list[int]) -> list[int]:
    largest = [0] * layout.pp
    for owner, size in zip(layout.owners, kept, strict=True):
        largest[owner] = max(largest[owner], size)
    return [
        count * size for count, size in zip(live_activations(layout, layout.micro_batches(job)), largest, strict=True)
    ]
