"""LLaMA-2 (Touvron et al., 2023): layers and shapes. What is cut over ranks is the parallel layers' affair.

Activations are `[S, B, H]`. Between layers the residual stream and what is to be added to it travel apart, because the
next norm adds and normalises in one pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from megaflow.config import ModelConfig
from megaflow.kernels.attention import Segments, unpack
from megaflow.kernels.cross_entropy import Objective, Vocabulary
from megaflow.kernels.dispatch import Ops
from megaflow.kernels.linear_cross_entropy import TotalLoss
from megaflow.kernels.rotary import rotary_tables
from megaflow.model.chunks import Chunks, whole_model
from megaflow.model.recompute import Recompute, recomputed, remade
from megaflow.parallel.context_parallel import gather_keys_values
from megaflow.parallel.layers import (
    ColumnParallelLinear,
    DeferredGradients,
    RowParallelLinear,
    VocabParallelEmbedding,
    column_parallel_linear,
    empty_weight,
    vocabulary_rows,
)
from megaflow.parallel.mesh import ParallelContext
from megaflow.parallel.regions import TensorRegion, gather_last_dimension

if TYPE_CHECKING:
    from megaflow.data.loader import Batch
    from megaflow.data.zigzag import Keys


class Layout(NamedTuple):
    """What attention needs to know of the tokens of a micro-batch, the same for every layer."""

    cos: Tensor
    """Of the rotary angles, fp32 `[S, B, head_dim / 2]`."""
    sin: Tensor
    segments: Segments
    """The documents, or this rank's segments of them, and what each attends to."""
    key_index: Tensor | None
    """Under context parallelism, where the keys are among all ranks' tokens, int32 `[K]`."""

    @classmethod
    def of(
        cls, config: ModelConfig, positions: Tensor, cu_seqlens: Tensor, max_seqlen: int, keys: Keys | None = None
    ) -> Layout:
        """The layout of tokens at `positions` `[B, S]` that attend to `keys`, or each document to itself."""
        cos, sin = rotary_tables(positions.T, config.head_dim, config.rope_theta)
        if keys is None:
            return cls(cos, sin, Segments.documents(cu_seqlens, max_seqlen, positions.numel()), None)
        sizes = max_seqlen, keys.max_seqlen, positions.numel(), len(keys.index)
        return cls(cos, sin, Segments(cu_seqlens, keys.cu_seqlens, *sizes), keys.index)


class Cache(Protocol):
    """Keys and values of the tokens before these, for generation."""

    def attend(self, layer: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Remember k and v of the new tokens and attend to all, old and new; `[n, heads, head_dim]` as q."""


class RMSNorm(nn.Module):
    """Adds to the residual stream and normalises it, with a learned weight `[H]`."""

    def __init__(self, config: ModelConfig, ctx: ParallelContext, ops: Ops, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.hidden_size, dtype=dtype, device=ctx.device))
        self.eps = config.norm_eps
        self.rms_norm = ops.rms_norm

    def forward(self, x: Tensor, delta: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """`x + delta`, and its normalisation."""
        return self.rms_norm(x, delta, self.weight, self.eps)


class Attention(nn.Module):
    """Causal self-attention within documents, with rotary positions and grouped key-value heads."""

    def __init__(
        self, config: ModelConfig, ctx: ParallelContext, ops: Ops, dtype: torch.dtype, deferred: DeferredGradients
    ) -> None:
        super().__init__()
        self.ctx, self.ops = ctx, ops
        self.head_dim = config.head_dim
        self.heads = ctx.tp_share(config.num_heads)
        self.kv_heads = ctx.tp_share(config.num_kv_heads)
        width = (config.num_heads + 2 * config.num_kv_heads) * self.head_dim
        self.qkv = ColumnParallelLinear(config.hidden_size, width, ctx, dtype, deferred)
        self.out = RowParallelLinear(config.hidden_size, config.hidden_size, ctx, dtype, deferred)

    def forward(self, qkv: Tensor, layout: Layout, cache: Cache | None, again: bool) -> Tensor:
        """From what `self.qkv` gives, `[S, B, (heads + 2 kv_heads) head_dim / tp]`, to `self.out`'s result.

        qkv is overwritten by its rotated self. again: compute the attention once more in the backward pass instead of
        keeping it.
        """
        rotated = self.ops.rotary(qkv, self.heads + self.kv_heads, layout.cos, layout.sin)
        packed = rotated.unflatten(-1, (-1, self.head_dim))
        if cache is not None:
            mixed = cache.attend(self, *(x[:, 0] for x in unpack(self.heads, packed)))
            return self.out(mixed.flatten(1)[:, None])

        def mix(*tensors: Tensor) -> Tensor:
            return self.ops.attention(self.heads, layout.segments, *tensors).flatten(2)

        tensors = (packed,) if layout.key_index is None else self._gathered(packed, layout.key_index)
        return recomputed(mix, self.out, *tensors) if again else self.out(mix(*tensors))

    def _gathered(self, packed: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """This rank's queries, and the keys and values that they see, as one sequence."""
        q, kv = packed.split((self.heads, 2 * self.kv_heads), dim=2)
        whole = gather_keys_values(kv.transpose(0, 1).flatten(0, 1), index, self.ctx)[:, None]
        return q.contiguous(), whole  # a view would keep the rank's own keys and values too


class MLP(nn.Module):
    """The parts of the SwiGLU feed-forward block `down(swiglu(gate_up(x)))`."""

    def __init__(
        self, config: ModelConfig, ctx: ParallelContext, ops: Ops, dtype: torch.dtype, deferred: DeferredGradients
    ) -> None:
        super().__init__()
        self.swiglu = ops.swiglu
        self.gate_up = ColumnParallelLinear(config.hidden_size, 2 * config.intermediate_size, ctx, dtype, deferred)
        self.down = RowParallelLinear(config.intermediate_size, config.hidden_size, ctx, dtype, deferred)


class Layer(nn.Module):
    """One pre-norm transformer layer."""

    def __init__(
        self, config: ModelConfig, ctx: ParallelContext, ops: Ops, dtype: torch.dtype, deferred: DeferredGradients
    ) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config, ctx, ops, dtype)
        self.attention = Attention(config, ctx, ops, dtype, deferred)
        self.mlp_norm = RMSNorm(config, ctx, ops, dtype)
        self.mlp = MLP(config, ctx, ops, dtype, deferred)
        self.recompute: Recompute = "none"
        """What the backward pass computes again; see `recompute_layers`."""

    def forward(
        self, x: Tensor, delta: Tensor | None, layout: Layout, cache: Cache | None = None
    ) -> tuple[Tensor, Tensor]:
        """The residual stream without the last block's result, and that: the next norm adds them. x and delta too."""
        x, normed = self.attention_norm(x, delta)
        before = x.detach()
        if self.recompute == "full":  # the last product's result is nobody's input here: it is not computed again
            return recomputed(
                lambda x, normed: self._activated(x, normed, layout, cache)[:2],
                lambda x, activated: (x, self.mlp.down(activated)),
                x,
                normed,
                make=lambda: self.attention_norm(before),
            )
        x, activated, kept = self._activated(x, normed, layout, cache)
        return x, self._then(self.mlp.down, activated, lambda: self.mlp.swiglu(kept))

    def _activated(
        self, x: Tensor, normed: Tensor, layout: Layout, cache: Cache | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The residual stream after attention, what the last product takes, and what SwiGLU took."""
        attention, mlp, before = self.attention, self.mlp, x.detach()
        qkv = self._then(attention.qkv, normed, lambda: self.attention_norm(before)[1])
        x, normed = self.mlp_norm(x, attention(qkv, layout, cache, again=self.recompute == "selective"))
        after = x.detach()
        gate_up = self._then(mlp.gate_up, normed, lambda: self.mlp_norm(after)[1])
        return x, mlp.swiglu(gate_up), gate_up.detach()

    def _then(self, linear: Callable[[Tensor], Tensor], result: Tensor, make: Callable[[], Tensor]) -> Tensor:
        """`linear(result)`, whose input is kept or made again."""
        return remade(make, result, linear) if self.recompute == "selective" else linear(result)


class Head(nn.Module):
    """Final norm and projection to this rank's part of the vocabulary; the projection may be the embedding's weight."""

    def __init__(
        self,
        config: ModelConfig,
        ctx: ParallelContext,
        ops: Ops,
        dtype: torch.dtype,
        deferred: DeferredGradients,
        tied: nn.Parameter | None,
    ) -> None:
        super().__init__()
        self.ctx, self.deferred = ctx, deferred
        self.linear_cross_entropy = ops.linear_cross_entropy
        self.norm = RMSNorm(config, ctx, ops, dtype)
        rows = vocabulary_rows(config.vocab_size, ctx.tp)
        self.vocab_start, self.vocab_size = rows * ctx.tp_rank, config.vocab_size
        self.weight = empty_weight(rows, config.hidden_size, ctx, dtype) if tied is None else tied

    def forward(self, x: Tensor, labels: Tensor | None = None, objective: Objective = Objective()) -> Any:
        """Logits `[S, B, V_local]` of the normalised `[S, B, H]` or, for labels `[S, B]`, a `TotalLoss`."""
        if labels is None:
            return column_parallel_linear(x, self.weight, self.ctx, self.deferred)
        group, region = (self.ctx.tp_group, TensorRegion(self.ctx)) if self.ctx.tp > 1 else (None, None)
        vocabulary = Vocabulary(self.vocab_start, self.vocab_size, group)
        take = partial(self.deferred.computed_gradient, self.weight)
        return self.linear_cross_entropy(x, self.weight, labels, vocabulary, objective, take, region)


class Llama(nn.Module):
    """A LLaMA-2 model, or this rank's part of one. Weights are zero until `init.initialise` or a checkpoint.

    `chunks`: the parts of the model's depth that it has, all of it by default. Where embeddings are tied and only the
    head is here, it has a copy of the embedding. `objective`: what training minimises.
    """

    def __init__(
        self,
        config: ModelConfig,
        ctx: ParallelContext,
        ops: Ops,
        dtype: torch.dtype = torch.float32,
        chunks: Chunks | None = None,
        objective: Objective = Objective(),
    ) -> None:
        super().__init__()
        self.config = config
        self.objective = objective
        self.ctx = ctx
        self.ops = ops
        self.dtype = dtype
        self.chunks = whole_model(config) if chunks is None else chunks
        self.deferred = DeferredGradients()
        """Lets a backward pass leave weight gradients for later."""
        tied = None
        if any(chunk.embed for chunk in self.chunks.values()):
            self.embed = VocabParallelEmbedding(config.vocab_size, config.hidden_size, ctx, dtype, ops.embedding)
            tied = self.embed.weight if config.tie_embeddings else None
        # By global layer number, so that a part of the model keeps the names of the whole.
        numbers = [number for chunk in self.chunks.values() for number in chunk.layers]
        self.layers = nn.ModuleDict({str(i): Layer(config, ctx, ops, dtype, self.deferred) for i in numbers})
        if any(chunk.head for chunk in self.chunks.values()):
            self.head = Head(config, ctx, ops, dtype, self.deferred, tied)

    def forward(self, tokens: Tensor, layout: Layout, cache: Cache | None = None) -> Tensor:
        """Logits `[S, B, V_local]` of tokens `[B, S]` over this rank's part of the padded vocabulary; whole models."""
        x = tokens.T
        for number in self.chunks:
            x = self.run_chunk(number, x, layout, cache)
        return self.head(x)

    def run_chunk(self, number: int, x: Tensor, layout: Layout, cache: Cache | None = None) -> Tensor:
        """A chunk's output `[S, B, H]` (this rank's part of S under sequence parallelism); of the last one normalised.

        x: the output of the chunk before; for the first one, tokens `[S, B]`.
        """
        chunk = self.chunks[number]
        if chunk.embed:
            x = self.embed(x)
        delta = None
        for i in chunk.layers:
            x, delta = self.layers[str(i)](x, delta, layout, cache)
        if chunk.head:
            return self.head.norm(x, delta)[1]
        return x if delta is None else x + delta

    def layout(self, batch: Batch) -> Layout:
        """What the layers need to know of a micro-batch."""
        return Layout.of(self.config, batch.positions, batch.cu_seqlens, batch.max_seqlen, batch.keys)

    def losses(self, x: Tensor, labels: Tensor) -> TotalLoss:
        """What is minimised, and the cross-entropy of every token, fp32 `[B, S]`, 0 where the label `[B, S]` is -100.

        x: the last chunk's output.
        """
        total = self.head(x, labels.T, self.objective)
        return TotalLoss(total.objective, total.losses.T)

    def loss(self, batch: Batch) -> TotalLoss:
        """Those of a micro-batch; for whole models."""
        x, layout = batch.tokens.T, self.layout(batch)
        for number in self.chunks:
            x = self.run_chunk(number, x, layout)
        return self.losses(x, batch.labels)

    def logits(
        self, tokens: Tensor, positions: Tensor, cu_seqlens: Tensor, max_seqlen: int, cache: Cache | None = None
    ) -> Tensor:
        """Logits `[B, S, V]` over the true vocabulary, whole on every rank; with tp > 1 they carry no gradient.

        tokens, positions: `[B, S]`; cu_seqlens: int32 `[D + 1]`, edges of the documents in the flat `[B * S]` tokens.
        """
        local = self(tokens, Layout.of(self.config, positions, cu_seqlens, max_seqlen), cache)
        return gather_last_dimension(local, self.ctx)[..., : self.config.vocab_size].transpose(0, 1)

    def without_sequence_parallel(self) -> Llama:
        """A model of the same weights whose sequences need not be a multiple of tp long, for generation."""
        if not self.ctx.sequence_parallel:
            return self
        meta = replace(self.ctx, sequence_parallel=False, symmetric_memory=False, device=torch.device("meta"))
        twin = Llama(self.config, meta, self.ops, self.dtype, self.chunks)
        twin.load_state_dict(self.state_dict(), assign=True)
        return twin
