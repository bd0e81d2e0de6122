"""LLaMA-2 (Touvron et al., 2023): layers and shapes. What is cut over ranks is the parallel layers' affair.

Activations are `[S, B, H]`; inside attention the tokens lie flat, `T = B * S`, sequence after sequence.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from megaflow.config import ModelConfig
from megaflow.kernels.dispatch import Ops
from megaflow.kernels.rotary import rotary_tables
from megaflow.model.chunks import Chunks, whole_model
from megaflow.model.recompute import Call, Recompute, plain, recomputed
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
from megaflow.parallel.regions import gather_last_dimension

if TYPE_CHECKING:
    from megaflow.data.loader import Batch
    from megaflow.data.zigzag import Keys


class Layout(NamedTuple):
    """What attention needs to know of the tokens of a micro-batch, the same for every layer."""

    cos: Tensor
    """Of the rotary angles, fp32 `[T, head_dim / 2]`."""
    sin: Tensor
    cu_seqlens_q: Tensor
    """Edges of the documents, or of this rank's segments of them, int32 `[N + 1]`."""
    cu_seqlens_k: Tensor
    """Edges of what each of those attends to."""
    max_seqlen_q: int
    """Length of the longest document or segment."""
    max_seqlen_k: int
    key_index: Tensor | None
    """Under context parallelism, where the keys are among all ranks' tokens, int32 `[K]`."""

    @classmethod
    def of(
        cls, config: ModelConfig, positions: Tensor, cu_seqlens: Tensor, max_seqlen: int, keys: Keys | None = None
    ) -> Layout:
        """The layout of tokens at `positions` `[B, S]` that attend to `keys`, or each document to itself."""
        cos, sin = rotary_tables(positions.flatten(), config.head_dim, config.rope_theta)
        if keys is None:
            return cls(cos, sin, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, None)
        return cls(cos, sin, cu_seqlens, keys.cu_seqlens, max_seqlen, keys.max_seqlen, keys.index)


class Cache(Protocol):
    """Keys and values of the tokens before these, for generation."""

    def attend(self, layer: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Remember k and v of the new tokens and attend to all, old and new; `[n, heads, head_dim]` as q."""


class RMSNorm(nn.Module):
    """Root-mean-square normalisation with a learned weight `[H]`."""

    def __init__(self, config: ModelConfig, ctx: ParallelContext, ops: Ops, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.hidden_size, dtype=dtype, device=ctx.device))
        self.eps = config.norm_eps
        self.rms_norm = ops.rms_norm

    def forward(self, x: Tensor) -> Tensor:
        return self.rms_norm(x, self.weight, self.eps)


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

    def forward(self, qkv: Tensor, layout: Layout, cache: Cache | None, call: Call) -> Tensor:
        """From what `self.qkv` gives, `[S, B, (heads + 2 kv_heads) head_dim / tp]`, to `self.out`'s result."""
        seq_length, batch, _ = qkv.shape

        def split(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            flat = qkv.transpose(0, 1).reshape(batch * seq_length, -1, self.head_dim)
            q, k, v = flat.split([self.heads, self.kv_heads, self.kv_heads], dim=1)
            return *self.ops.rotary(q, k, layout.cos, layout.sin), v

        def mix(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if cache is None:
                edges = layout.cu_seqlens_q, layout.cu_seqlens_k
                mixed = self.ops.attention(q, k, v, *edges, layout.max_seqlen_q, layout.max_seqlen_k)
            else:
                mixed = cache.attend(self, q, k, v)
            return mixed.reshape(batch, seq_length, -1).transpose(0, 1)

        if layout.key_index is None:
            return call(lambda qkv: mix(*split(qkv)), self.out, qkv)
        q, k, v = split(qkv)
        # outside the call: what it makes again is without a collective
        return call(mix, self.out, q, *gather_keys_values(k, v, layout.key_index, self.ctx))


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

    def forward(self, x: Tensor, layout: Layout, cache: Cache | None) -> Tensor:
        attention, mlp = self.attention, self.mlp
        call = recomputed if self.recompute == "selective" else plain

        def up(x: Tensor) -> tuple[Tensor, Tensor]:
            x = x + attention(call(self.attention_norm, attention.qkv, x), layout, cache, call)
            return x, call(self.mlp_norm, mlp.gate_up, x)

        def hidden(x: Tensor) -> tuple[Tensor, Tensor]:
            x, gate_up = up(x)
            return x, mlp.swiglu(gate_up)

        if self.recompute == "full":  # the last product's result is nobody's input here: it is not computed again
            return recomputed(hidden, lambda x, activated: x + mlp.down(activated), x)
        x, gate_up = up(x)
        return x + call(mlp.swiglu, mlp.down, gate_up)


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
        self.norm = RMSNorm(config, ctx, ops, dtype)
        rows = vocabulary_rows(config.vocab_size, ctx.tp)
        self.vocab_start = rows * ctx.tp_rank
        self.weight = empty_weight(rows, config.hidden_size, ctx, dtype) if tied is None else tied

    def forward(self, x: Tensor) -> Tensor:
        return column_parallel_linear(self.norm(x), self.weight, self.ctx, self.deferred)


class Llama(nn.Module):
    """A LLaMA-2 model, or this rank's part of one. Weights are zero until `init.initialise` or a checkpoint.

    `chunks`: the parts of the model's depth that it has, all of it by default. Where embeddings are tied and only the
    head is here, it has a copy of the embedding.
    """

    def __init__(
        self,
        config: ModelConfig,
        ctx: ParallelContext,
        ops: Ops,
        dtype: torch.dtype = torch.float32,
        chunks: Chunks | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.ctx = ctx
        self.ops = ops
        self.dtype = dtype
        self.chunks = whole_model(config) if chunks is None else chunks
        self.deferred = DeferredGradients()
        """Lets a backward pass leave weight gradients for later."""
        tied = None
        if any(chunk.embed for chunk in self.chunks.values()):
            self.embed = VocabParallelEmbedding(config.vocab_size, config.hidden_size, ctx, dtype)
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
        return x

    def run_chunk(self, number: int, x: Tensor, layout: Layout, cache: Cache | None = None) -> Tensor:
        """A chunk's output `[S, B, H]` (this rank's part of S under sequence parallelism), or the last one's logits.

        x: the output of the chunk before; for the first one, tokens `[S, B]`.
        """
        chunk = self.chunks[number]
        if chunk.embed:
            x = self.embed(x)
        for i in chunk.layers:
            x = self.layers[str(i)](x, layout, cache)
        return self.head(x) if chunk.head else x

    def layout(self, batch: Batch) -> Layout:
        """What the layers need to know of a micro-batch."""
        return Layout.of(self.config, batch.positions, batch.cu_seqlens, batch.max_seqlen, batch.keys)

    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of every token, fp32 `[B, S]`, 0 where the label `[B, S]` is -100.

        The backward pass overwrites the logits `[S, B, V_local]`.
        """
        seq_length, sequences, width = logits.shape
        losses = self.ops.cross_entropy(
            logits.view(-1, width),
            labels.T.flatten(),
            self.head.vocab_start,
            self.config.vocab_size,
            self.ctx.tp_group if self.ctx.tp > 1 else None,
        )
        return losses.view(seq_length, sequences).T

    def loss(self, batch: Batch) -> Tensor:
        """The losses `[B, S]` of a micro-batch; for whole models."""
        return self.losses(self(batch.tokens, self.layout(batch)), batch.labels)

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
