"""The simplest language model there is, as a mark that a trained one must pass."""

from __future__ import annotations

import numpy as np

from megaflow.data.corpus.prefixes import Paths
from megaflow.data.corpus.shards import open_corpus
from megaflow.data.loader import heldout_batches
from megaflow.data.sources import open_heldout

CHUNK = 2**24  # tokens counted at a time


def unigram_loss(
    paths: Paths, seq_length: int, max_windows: int | None = None, cache_dir: str | None = None
) -> float | None:
    """Nats per token of a unigram model of the corpus at `paths` on its held-out documents; None if there are none.

    Token frequencies of the whole training text with one added to each, scored on the labels that evaluation scores
    (the first `max_windows` windows).
    """
    held = open_heldout(str(paths), paths, seq_length, cache_dir=cache_dir)
    if held is None:
        return None
    corpus = open_corpus(paths, cache_dir=cache_dir)
    counts = np.ones(corpus.manifest.tokenizer.vocab_size, dtype=np.int64)
    for start in range(0, corpus.num_tokens, CHUNK):
        counts += np.bincount(corpus.tokens(start, min(start + CHUNK, corpus.num_tokens)), minlength=len(counts))
    losses = np.log(counts.sum()) - np.log(counts)
    total, tokens = 0.0, 0
    for batch in heldout_batches(held, 16, max_windows=max_windows):
        labels = batch.labels[batch.labels >= 0].numpy()
        total += float(losses[labels].sum())
        tokens += len(labels)
    return total / tokens if tokens else None
