"""Held-out loss and bits per byte of every source."""

from __future__ import annotations

import math
from collections.abc import Sequence

from megaflow.config import Config
from megaflow.data.loader import Batch, heldout_batches
from megaflow.data.sources import Source
from megaflow.parallel.mesh import ParallelContext
from megaflow.parallel.runner import Pipeline
from megaflow.train.metrics import LOSS, LOSS_TOKENS, SEQUENCES, SourceTotals


def evaluate(
    pipeline: Pipeline, heldouts: Sequence[Source | None], config: Config, ctx: ParallelContext
) -> dict[str, dict[str, float]]:
    """Loss (nats per token) and bits per byte on the first `eval_sequences` windows of each source's held-out text.

    Bits per byte are bits per token with loss times tokens with loss per byte of text with loss, the latter over the
    whole held-out corpus. Sources without held-out documents (None) are left out. Equal on every rank.
    """
    batches: list[Batch] = []
    for index, held in enumerate(heldouts):
        if held is None:
            continue
        batches += heldout_batches(
            held,
            config.train.micro_batch_size,
            ctx.dp,
            ctx.dp_rank,
            config.train.eval_sequences,
            config.data.document_boundaries,
            index,
            ctx.cp,
            ctx.cp_rank,
        )
    batches = [batch.to(ctx.device) for batch in batches]
    totals = SourceTotals(len(heldouts), ctx)
    for number, losses in pipeline.losses(batches).items():
        totals.add(losses, batches[number])
    totals.reduce()
    results = {}
    for held, row in zip(heldouts, totals.values.tolist(), strict=True):
        if held is None or not row[LOSS_TOKENS]:
            continue
        manifest = held.corpus.manifest
        loss = row[LOSS] / row[LOSS_TOKENS]
        results[held.name] = {
            "loss": loss,
            "bits_per_byte": loss / math.log(2) * manifest.loss_tokens / manifest.loss_bytes,
            "sequences": round(row[SEQUENCES]),
        }
    return results
