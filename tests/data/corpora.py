"""Corpora written and read whole, for tests."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megaflow.data.corpus import Corpus
from megaflow.data.manifest import Manifest
from megaflow.data.sources import Source
from megaflow.data.writer import CorpusWriter


def add_document(writer: CorpusWriter, ids: npt.ArrayLike, mask: npt.ArrayLike | None = None) -> None:
    """One document, by its ids and 1 or 0 for each token that carries loss or not."""
    tokens = np.asarray(ids)
    bits = None if mask is None else np.asarray(mask, dtype=np.uint8)
    writer.add_documents(tokens, np.array([len(tokens)], dtype=np.int32), bits)


def finish(writer: CorpusWriter, manifest: Manifest) -> Manifest:
    """Complete and commit; the manifest as written."""
    manifest = writer.complete(manifest)
    writer.commit()
    return manifest


def document_starts(corpus: Corpus) -> list[int]:
    """First token of each document, and the number of tokens last."""
    return [corpus.document_start(document) for document in range(corpus.num_documents + 1)]


@dataclass(frozen=True)
class Window:
    """`tokens` and `labels` [S], `lengths` [D] of the documents."""

    tokens: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]


def read_window(source: Source, epoch: int, index: int) -> Window:
    """A window in arrays of its own."""
    tokens, labels = np.empty((2, source.seq_length), dtype=np.int64)
    return Window(tokens, labels, source.read(epoch, index, tokens, labels))
