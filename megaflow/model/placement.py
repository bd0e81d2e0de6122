"""The one table of what this rank holds: local parameter -> parts of the canonical tensors.

Canonical names and shapes are those of Hugging Face LLaMA checkpoints, with the vocabulary unpadded. The table serves
initial weights, import and export, checkpoints and tests.
"""

from __future__ import annotations

from dataclasses import dataclass

from megaflow.config import ModelConfig
from megaflow.model.chunks import Chunks, whole_model
from megaflow.parallel.layers import vocabulary_rows
from megaflow.parallel.mesh import ParallelContext


@dataclass(frozen=True)
class Piece:
    """A rectangle of a canonical tensor inside a local parameter."""

    name: str
    """Canonical name, for example `model.layers.0.self_attn.q_proj.weight`."""
    global_shape: tuple[int, ...]
    """Shape of the canonical tensor."""
    global_offset: tuple[int, ...]
    """Where the rectangle begins in the canonical tensor."""
    local_offset: tuple[int, ...]
    """Where it begins in the local parameter."""
    shape: tuple[int, ...]
    """Shape of the rectangle; a dimension may be 0."""

    def global_slices(self) -> tuple[slice, ...]:
        """The rectangle in the canonical tensor."""
        return _slices(self.global_offset, self.shape)

    def local_slices(self) -> tuple[slice, ...]:
        """The rectangle in the local parameter."""
        return _slices(self.local_offset, self.shape)


def _slices(offset: tuple[int, ...], shape: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))


Placement = dict[str, list[Piece]]
"""Local parameter name -> its pieces."""


def placement(config: ModelConfig, ctx: ParallelContext, chunks: Chunks | None = None) -> Placement:
    """The pieces of every local parameter of a rank that holds these chunks, or the whole depth."""
    parts = (whole_model(config) if chunks is None else chunks).values()
    embed, head = any(chunk.embed for chunk in parts), any(chunk.head for chunk in parts)
    table = {"embed.weight": _vocabulary("model.embed_tokens.weight", config, ctx)} if embed else {}
    for chunk in parts:
        for i in chunk.layers:
            table |= _layer(i, config, ctx)
    if head:
        table["head.norm.weight"] = _replicated("model.norm.weight", config.hidden_size)
    if head and not config.tie_embeddings:
        table["head.weight"] = _vocabulary("lm_head.weight", config, ctx)
    elif head and not embed:
        table["head.weight"] = _vocabulary("model.embed_tokens.weight", config, ctx)
    return table


def _layer(i: int, config: ModelConfig, ctx: ParallelContext) -> Placement:
    hidden, feed_forward = config.hidden_size, config.intermediate_size
    kv = config.num_kv_heads * config.head_dim
    ours, theirs = f"layers.{i}", f"model.layers.{i}"
    qkv = [(f"{theirs}.self_attn.{p}_proj.weight", rows) for p, rows in (("q", hidden), ("k", kv), ("v", kv))]
    gate_up = [(f"{theirs}.mlp.{p}_proj.weight", feed_forward) for p in ("gate", "up")]
    return {
        f"{ours}.attention_norm.weight": _replicated(f"{theirs}.input_layernorm.weight", hidden),
        f"{ours}.attention.qkv.weight": _rows(qkv, hidden, ctx),
        f"{ours}.attention.out.weight": _columns(f"{theirs}.self_attn.o_proj.weight", hidden, hidden, ctx),
        f"{ours}.mlp_norm.weight": _replicated(f"{theirs}.post_attention_layernorm.weight", hidden),
        f"{ours}.mlp.gate_up.weight": _rows(gate_up, hidden, ctx),
        f"{ours}.mlp.down.weight": _columns(f"{theirs}.mlp.down_proj.weight", hidden, feed_forward, ctx),
    }


def _replicated(name: str, size: int) -> list[Piece]:
    return [Piece(name, (size,), (0,), (0,), (size,))]


def _rows(parts: list[tuple[str, int]], columns: int, ctx: ParallelContext) -> list[Piece]:
    """Several tensors cut by rows, this rank's rows of each one under the other."""
    pieces, local = [], 0
    for name, rows in parts:
        share = ctx.tp_share(rows)
        pieces.append(Piece(name, (rows, columns), (ctx.tp_rank * share, 0), (local, 0), (share, columns)))
        local += share
    return pieces


def _columns(name: str, rows: int, columns: int, ctx: ParallelContext) -> list[Piece]:
    share = ctx.tp_share(columns)
    return [Piece(name, (rows, columns), (0, ctx.tp_rank * share), (0, 0), (rows, share))]


def _vocabulary(name: str, config: ModelConfig, ctx: ParallelContext) -> list[Piece]:
    """This rank's rows of the vocabulary without padding; the last ranks may hold padding only."""
    vocab, hidden = config.vocab_size, config.hidden_size
    rows = vocabulary_rows(vocab, ctx.tp)
    start = min(ctx.tp_rank * rows, vocab)
    return [Piece(name, (vocab, hidden), (start, 0), (0, 0), (min(rows, vocab - start), hidden))]
