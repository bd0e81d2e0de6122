"""Held-out loss and bits per byte of every source."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from megaflow.config import Config
from megaflow.data.corpus import Corpus
from megaflow.data.loader import heldout_batches
from megaflow.data.sources import Source, heldout_prefix
from megaflow.model.llama import Llama
from megaflow.parallel.mesh import ParallelContext
from megaflow.train.metrics import LOSS, LOSS_TOKENS, SEQUENCES, SourceTotals


@torch.no_grad()
def evaluate(
    model: Llama, sources: Sequence[Source], config: Config, ctx: ParallelContext
) -> dict[str, dict[str, float]]:
    """Loss (nats per token) and bits per byte over the first `eval_sequences` held-out windows of each source.

    Bits per byte are bits per token with loss times tokens with loss per byte of text with loss, the latter over the
    whole held-out corpus. Sources without held-out documents are left out. Equal on every rank.
    """
    totals = SourceTotals(len(sources), ctx.device)
    for index, source in enumerate(sources):
        batches = heldout_batches(
            source.corpus.prefix,
            config.data.seq_length,
            config.train.micro_batch_size,
            ctx.dp,
            ctx.dp_rank,
            config.train.eval_sequences,
            config.data.document_boundaries,
            index,
        )
        for batch in batches:
            batch = batch.to(ctx.device)
            totals.add(model.loss(batch), batch)
    totals.reduce(ctx)
    results = {}
    for source, row in zip(sources, totals.values.tolist(), strict=True):
        if not row[LOSS_TOKENS]:
            continue
        manifest = Corpus.open(heldout_prefix(source.corpus.prefix)).manifest
        loss = row[LOSS] / row[LOSS_TOKENS]
        results[source.name] = {
            "loss": loss,
            "bits_per_byte": loss / math.log(2) * manifest.loss_tokens / manifest.loss_bytes,
            "sequences": round(row[SEQUENCES]),
        }
    return results
