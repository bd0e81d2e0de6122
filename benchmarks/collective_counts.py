"""The collectives of a training step: those that a rank makes, and the fewest that its layout needs."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch.distributed as dist
from torch import Tensor

from megaflow.config import ModelConfig
from megaflow.config_parallel import ParallelConfig
from megaflow.model.chunks import Chunks
from megaflow.model.recompute import Recompute
from megaflow.parallel import collectives
from megaflow.parallel.layers import vocabulary_rows
from megaflow.parallel.mesh import ParallelContext
from megaflow.parallel.parameters import ALIGNMENT
from megaflow.parallel.schedule import chunk_owners

FP32, FP64 = 4, 8
"""Bytes."""
OTHERS = (
    "all_gather_into_tensor",
    "all_gather_object",
    "all_to_all",
    "all_to_all_single",
    "barrier",
    "broadcast",
    "broadcast_object_list",
    "gather",
    "gather_object",
    "recv",
    "reduce",
    "reduce_scatter_tensor",
    "scatter",
    "send",
)
"""Collectives that no step needs; they count as calls without bytes."""

Key = tuple[str, str]
"""Kind of collective, and the group: its name in `ParallelContext`, or "world"."""


@dataclass
class Calls:
    """Collectives of one kind and group."""

    calls: int = 0
    bytes: int = 0
    """Of the whole tensors: an all-gather's result, a reduce-scatter's input."""

    def add(self, calls: int, bytes_of_each: int) -> None:
        self.calls += calls
        self.bytes += calls * bytes_of_each


Counts = dict[Key, Calls]


def group_name(ctx: ParallelContext, group: dist.ProcessGroup | None) -> str:
    """The first name of a group; where only cp cuts the data, "cp" and "data" are one."""
    return next((name for name, found in ctx.groups.items() if found is group), "world")


@contextmanager
def counting(ctx: ParallelContext) -> Iterator[Counts]:
    """Counts what this process calls."""
    counts: Counts = defaultdict(Calls)

    def counted(kind: str, original: Callable[..., Any], size: Callable[..., int]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            counts[kind, group_name(ctx, kwargs.get("group"))].add(1, size(*args))
            return original(*args, **kwargs)

        return call

    def first(tensor: Tensor, *_: Any) -> int:
        return tensor.nbytes

    sizes: dict[str, tuple[Any, str, Callable[..., int]]] = {
        "all-reduce": (dist, "all_reduce", first),
        "all-gather": (collectives, "all_gather", first),
        "reduce-scatter": (collectives, "reduce_scatter", lambda out, x: x.nbytes),
        "all-gather of statistics": (dist, "all_gather", lambda outs, x: len(outs) * x.nbytes),
        "send": (dist, "isend", first),
        "receive": (dist, "irecv", first),
    }
    with ExitStack() as stack:
        for kind, (module, name, size) in sizes.items():
            stack.enter_context(mock.patch.object(module, name, counted(kind, getattr(module, name), size)))
        for name in OTHERS:
            stack.enter_context(mock.patch.object(dist, name, counted(name, getattr(dist, name), lambda *_: 0)))
        yield counts


@dataclass(frozen=True)
class Step:
    """What a rank does in a step."""

    model: ModelConfig
    parallel: ParallelConfig
    recompute: Recompute
    chunks: Chunks
    """The rank's."""
    micro_batches: int
    tokens: int
    """Of a micro-batch, before context parallelism cuts it."""
    sources: int

    def fewest(self, ctx: ParallelContext) -> Counts:
        """The fewest collectives of a rank, all parameters of a kind in one bucket; fp32.

        Per layer and micro-batch tp needs two all-reduces forward and two backward (Shoeybi et al., arXiv 1909.08053),
        under sequence parallelism an all-gather and a reduce-scatter for each, and the inputs of two products once more
        (Korthikanti et al., arXiv 2205.05198). cp needs keys and values forward and their gradients backward.
        """
        counts: Counts = defaultdict(Calls)
        self._activations(counts, ctx)
        self._messages(counts, ctx)
        self._gradients(counts, ctx)
        if ctx.world_size > 1:  # totals of every source, squared norm, request to stop
            counts["all-reduce", "world"].add(1, (3 * self.sources + 2) * FP64)
        return dict(counts)

    @property
    def embed(self) -> bool:
        return any(chunk.embed for chunk in self.chunks.values())

    @property
    def head(self) -> bool:
        return any(chunk.head for chunk in self.chunks.values())

    @property
    def layers(self) -> int:
        return sum(len(chunk.layers) for chunk in self.chunks.values())

    def _activations(self, counts: Counts, ctx: ParallelContext) -> None:
        passes, full = self.layers * self.micro_batches, self.recompute == "full"
        tokens = self.tokens // ctx.cp
        whole = tokens * self.model.hidden_size * FP32
        embed, head = self.embed * self.micro_batches, self.head * self.micro_batches
        if ctx.tp > 1:
            if ctx.sequence_parallel:
                counts["all-gather", "tp"].add((6 + 2 * full) * passes + embed + head, whole)
                counts["reduce-scatter", "tp"].add((4 + full) * passes + embed + head, whole)
            else:
                counts["all-reduce", "tp"].add((4 + full) * passes + embed + head, whole)
            if head:
                counts["all-gather of statistics", "tp"].add(head, ctx.tp * 3 * tokens * FP32)
        if ctx.cp > 1 and passes:
            keys_values = self.tokens * 2 * ctx.tp_share(self.model.num_kv_heads) * self.model.head_dim * FP32
            counts["all-gather", "cp"].add((1 + full) * passes, keys_values)
            counts["reduce-scatter", "cp"].add(passes, keys_values)

    def _messages(self, counts: Counts, ctx: ParallelContext) -> None:
        parallel = self.parallel
        owners = chunk_owners(parallel.schedule, parallel.pp, parallel.chunks_per_rank)
        size = self.tokens // ctx.cp * self.model.hidden_size * FP32 // (ctx.tp if ctx.sequence_parallel else 1)
        for before, after in itertools.pairwise(owners):
            if before == after:
                continue
            up, down = ("up", "down") if before < after else ("down", "up")
            for rank, forward, backward in ((before, "send", "receive"), (after, "receive", "send")):
                if rank == ctx.pp_rank:
                    counts[forward, f"forward_{up}"].add(self.micro_batches, size)
                    counts[backward, f"backward_{down}"].add(self.micro_batches, size)

    def _gradients(self, counts: Counts, ctx: ParallelContext) -> None:
        zero = self.parallel.zero
        shards = ctx.data if zero else 1
        apart = self.model.tie_embeddings and ctx.pp > 1 and self.embed != self.head
        for kind, numel in self._parameters(ctx).items():
            multiple = ctx.data * ALIGNMENT
            size = -(-numel // multiple) * multiple * FP32
            if not numel:
                continue
            if ctx.data > 1:
                data = group_name(ctx, ctx.group("data"))
                counts["reduce-scatter" if zero else "all-reduce", data].add(1, size)
                if zero:
                    counts["all-gather", data].add(1, size)
            if kind == "norms" and ctx.sequence_parallel:
                counts["all-reduce", "tp"].add(1, size // shards)
            if kind == "tied" and apart:
                counts["all-reduce", "embedding"].add(1, size // shards)

    def _parameters(self, ctx: ParallelContext) -> dict[str, int]:
        """Of this rank, by kind."""
        model = self.model
        hidden, tied = model.hidden_size, model.tie_embeddings
        vocabulary = vocabulary_rows(model.vocab_size, ctx.tp) * hidden
        attention = 2 * hidden * (model.num_heads + model.num_kv_heads) * model.head_dim
        layer = (attention + 3 * hidden * model.intermediate_size) // ctx.tp
        return {
            "matrices": self.layers * layer + (0 if tied else (self.embed + self.head) * vocabulary),
            "tied": vocabulary if tied and (self.embed or self.head) else 0,
            "norms": (2 * self.layers + self.head) * hidden,
        }
