"""Corpora written and read whole, for tests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megaflow.data.corpus.corpus import Corpus
from megaflow.data.corpus.manifest import Manifest, TokenizerInfo
from megaflow.data.corpus.writer import CorpusWriter
from megaflow.data.packing import pack
from megaflow.data.sources import Source

EOS = 2
TOKENIZER = TokenizerInfo(
    library="sentencepiece", version="0", sha256="ab", probe="cd", vocab_size=999, bos_id=1, eos_id=EOS, path="t.model"
)


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


def write_corpus(
    prefix: Path,
    lengths: Sequence[int],
    seq_length: int | None = None,
    masked: bool = False,
    tokenizer: TokenizerInfo = TOKENIZER,
    command: str = "",
    dtype: np.dtype | None = None,
) -> list[tuple[int, int, bool]]:
    """A corpus of the given document lengths, packed if a sequence length is given; returns (id, document, mask)s."""
    packs = None
    tokens: list[tuple[int, int, bool]] = []
    order: Sequence[int] = range(len(lengths))
    with CorpusWriter(prefix, dtype or np.dtype("<u2")) as writer:
        if seq_length is not None:
            inside, before = pack(np.array(lengths, dtype=np.int32), seq_length)
            order, packs = inside.tolist(), len(before) - 1
            writer.write_packs(seq_length, before)
        for place, document in enumerate(order):
            ids = [3 + (len(tokens) + i) % 900 for i in range(lengths[document])]
            mask = [not masked or i % 3 != 1 for i in range(lengths[document])]
            add_document(writer, ids, mask)
            tokens += [(token, place, bit) for token, bit in zip(ids, mask, strict=True)]
        manifest = Manifest(
            kind="text" if seq_length is None else "parallel",
            language="en",
            documents=0,
            tokens=0,
            loss_tokens=0,
            bytes=1,
            loss_bytes=1,
            tokenizer=tokenizer,
            shuffle_seed=0,
            seq_length=seq_length,
            packs=packs,
            command=command,
        )
        finish(writer, manifest)
    return tokens


def document_starts(corpus: Corpus) -> list[int]:
    """First token of each document, and the number of tokens last."""
    return [corpus.document_start(document) for document in range(corpus.num_documents + 1)]


@dataclass(frozen=True)
class Window:
    """`tokens`, `labels` and `positions` [S], `lengths` [D] of the documents."""

    tokens: npt.NDArray[np.int32]
    labels: npt.NDArray[np.int32]
    positions: npt.NDArray[np.int32]
    lengths: npt.NDArray[np.int64]


def read_window(source: Source, epoch: int, index: int) -> Window:
    """A window in arrays of its own."""
    window = np.full((3, source.seq_length), -7, dtype=np.int32)
    lengths = source.read(epoch, index, window)
    return Window(*window, lengths)
