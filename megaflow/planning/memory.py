"""Bytes that every pipeline rank holds at its fullest moment, by item."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from megaflow.config import ModelConfig
from megaflow.kernels.blocks import block_size
from megaflow.model.memory import activation_bytes
from megaflow.parallel.vocabulary import vocabulary_rows
from megaflow.planning.layout import Held, Job, Layout, Recompute
from megaflow.planning.pipeline import live_activations

RESERVED = 4 * 2**30
"""Bytes of a GPU that no tensor gets: the CUDA context, the buffers of NCCL and cuBLAS, gaps between tensors."""
MESSAGES = 3
"""Of a pipeline rank with each neighbour: two that leave, one that comes."""
CASTS = 2
"""Copies of gradient buckets under way at once, where gradients are reduced in another dtype than summed."""


@dataclass(frozen=True)
class RankMemory:
    """Bytes on the ranks of one pipeline stage."""

    weights: int
    """In the model's dtype."""
    master: int
    """What the optimizer keeps of fp32 weights beside bf16 ones."""
    gradients: int
    """Sums."""
    moments: int
    """Both of AdamW."""
    activations: int
    """Kept between the passes of the micro-batches under way."""
    loss: int
    """Kept too, on the rank with the output head: gradients of its input and weight, computed in the forward pass."""
    messages: int
    """To and from other pipeline ranks, under way or waiting."""
    working: int
    """Beside all these at the widest moment: in the loss or in a layer's backward pass, with what is computed again,
    gradients of activations and the gradient of a weight."""
    buckets: int
    """Copies of gradients on their way in another dtype than that of the sums."""

    @property
    def state(self) -> int:
        """What is there between steps too."""
        return self.weights + self.master + self.gradients + self.moments

    @property
    def total(self) -> int:
        return self.state + self.activations + self.loss + self.messages + self.working + self.buckets


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
    inputs: int
    """Of every chunk: the rotary tables."""
    head: int
    loss: int
    message: int
    layer_working: int
    loss_working: int

    def of(self, held: Held) -> int:
        """Kept for a part of the model."""
        kept = held.recomputed * self.recomputed + (held.layers - held.recomputed) * self.layer + self.inputs
        return kept + self.head if held.head else kept

    def working(self, head: bool) -> int:
        """Of the widest moment; with the head's chunk under way, whose norm and loss are gone when layers follow."""
        if not head:
            return self.layer_working
        return max(self.loss_working, self.layer_working - self.head - self.loss)


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
    whole, residual = tokens * model.hidden_size * element, rows * model.hidden_size * element
    wide = tokens * model.intermediate_size // tp * element
    head_rows = vocabulary_rows(model.vocab_size, tp)
    # SwiGLU's gradients, or later that of its weight: its activations are gone then, the input's gradient is there
    gathered = whole if sequence_parallel else 0
    weight = 2 * model.hidden_size * model.intermediate_size // tp * element
    working = max(again.working, plain.working)
    block = min(block_size(head_rows, element, "cuda" if job.attention == "triton" else "cpu"), tokens)
    return _Activations(
        layer=plain.kept,
        recomputed=again.kept,
        inputs=tokens * (4 * model.head_dim + 8),
        head=residual + 4 * rows,
        loss=whole + 4 * head_rows * model.hidden_size,
        message=residual,
        layer_working=max(working, working - 2 * wide + whole + gathered + weight),
        loss_working=residual + gathered + block * head_rows * element,
    )


def memory(job: Job, layout: Layout, exact: bool = True) -> list[RankMemory]:
    """The fullest moment of every pipeline rank; the ranks of a stage are alike.

    `exact`: what is under way is counted along the schedule, chunk by chunk; else all chunks of a rank are taken for
    the largest.
    """
    shards = layout.data if layout.zero else 1
    master = 0 if job.precision == "fp32" else 2 if job.master == "remainder" else 4
    gradient, moments, sent = (2 if x == "bf16" else 4 for x in (job.gradients, job.moments, job.grad_reduce))
    one = _activations(job, layout.tp, layout.sequence_parallel, layout.cp, layout.micro_batch, layout.recompute)
    kept = [one.of(held) for held in layout.held(job)]
    widest = _widest(job, layout, kept, one) if exact else _bounds(job, layout, kept, one)
    ranks = []
    for rank, held in enumerate(rank_parameters(job, layout)):
        bucket = min(job.bucket_mib * 2**20 // 4, held)
        neighbours = 0 if layout.pp == 1 else 1 if layout.chunks == 1 and rank in (0, layout.pp - 1) else 2
        activations, loss, working = widest[rank]
        ranks.append(
            RankMemory(
                weights=job.element * held,
                master=master * held // shards,
                gradients=gradient * held,
                moments=2 * moments * held // shards,
                activations=activations,
                loss=loss,
                messages=MESSAGES * neighbours * one.message,
                working=working,
                buckets=CASTS * sent * bucket if sent != gradient and layout.data > 1 else 0,
            )
        )
    return ranks


def _widest(job: Job, layout: Layout, kept: list[int], one: _Activations) -> list[tuple[int, int, int]]:
    """Activations, loss and working memory of each rank at its fullest moment, along its actions."""
    micro_batches, last = layout.micro_batches(job), len(layout.owners) - 1
    few = min(micro_batches, 4 * layout.pp + micro_batches % layout.pp)
    found = []
    for actions in layout.made(micro_batches if layout.schedule == "gpipe" else few).ranks:
        now = loss = 0
        most = (0, 0, 0)
        for action in actions:
            done = -(action.kind in ("backward", "backward_weight"))
            change = 1 if action.kind == "forward" else done
            now += change * kept[action.chunk]
            if action.chunk == last:  # a split backward's goes before its weights
                loss += (change if action.kind != "backward_weight" else 0) * one.loss
                loss -= one.loss if action.kind == "backward_input" else 0
            most = max(most, (now, loss, one.working(loss > 0)), key=sum)
        found.append(most)
    return found


def _bounds(job: Job, layout: Layout, kept: list[int], one: _Activations) -> list[tuple[int, int, int]]:
    """No less than those, without a look at the schedule: every chunk of a rank is taken for its largest."""
    largest = [0] * layout.pp
    for owner, size in zip(layout.owners, kept, strict=True):
        largest[owner] = max(largest[owner], size)
    counts = live_activations(layout, layout.micro_batches(job))
    found = [(count * size, 0, one.working(False)) for count, size in zip(counts, largest, strict=True)]
    last = layout.owners[-1]
    loss = one.loss * (layout.micro_batches(job) if layout.schedule == "gpipe" else 1)
    found[last] = (found[last][0], loss, one.working(True))
    return found
