"""The order of a corpus's documents, put on disk: memory stays the same however many documents there are.

Every document has a place that can be computed from its number. Documents are first written to buckets, each of which
holds the places of one range, then each bucket is put in order in memory and appended to the corpus.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt

from megaflow.data.corpus.writer import CorpusWriter
from megaflow.data.packing import pack
from megaflow.data.prepare.spool import Spool, cuts
from megaflow.data.sampler.order import hash_ints, perm_inverse_many

GATHER_TOKENS = 1 << 22
"""Tokens put in order at a time."""
ENTRY = np.dtype([("place", "<i8"), ("length", "<i4"), ("heldout", "?")])
"""What a bucket says of a document."""

Int64Array = npt.NDArray[np.int64]
Places = Callable[[int, int], Int64Array]
"""The places of the documents from one number to another: each of 0..documents - 1 is the place of one document."""


@dataclass(frozen=True)
class Limits:
    """How much a preparation holds at a time.

    Attributes:
        piece_bytes: tokenised data between two entries of the journal: what a kill costs at most, about.
        partition_documents: documents whose hashes are compared at a time.
        batch_tokens: tokens read at a time when documents are sorted into buckets.
        bucket_tokens, bucket_documents: of a bucket, on average.
    """

    piece_bytes: int = 1 << 25
    partition_documents: int = 1 << 21
    batch_tokens: int = 1 << 24
    bucket_tokens: int = 1 << 26
    bucket_documents: int = 1 << 22


class Buckets:
    """A file of entries of one type, sorted into buckets of known sizes; in each in the order they were appended."""

    def __init__(self, path: Path, dtype: np.dtype, sizes: Int64Array) -> None:
        self.path = path
        self.dtype = dtype
        self.starts = np.cumsum(sizes) - sizes
        self.filled = np.zeros(len(sizes), np.int64)
        self._file = path.open("w+b")

    def __enter__(self) -> Buckets:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        self.path.unlink()

    def append(self, entries: np.ndarray, counts: Int64Array) -> None:
        """Append entries that are given bucket by bucket, `counts[b]` of them to bucket b."""
        ends = np.cumsum(counts)
        for bucket in np.flatnonzero(counts).tolist():
            self._file.seek(int(self.starts[bucket] + self.filled[bucket]) * self.dtype.itemsize)
            self._file.write(entries[ends[bucket] - counts[bucket] : ends[bucket]].tobytes())
        self.filled += counts

    def read(self, bucket: int, limit: int) -> Iterator[np.ndarray]:
        """The entries of a bucket, at most `limit` at a time."""
        self._file.flush()
        for done in range(0, int(self.filled[bucket]), limit):
            self._file.seek(int(self.starts[bucket] + done) * self.dtype.itemsize)
            yield np.fromfile(self._file, self.dtype, min(limit, int(self.filled[bucket]) - done))


def shuffled(seed: int, documents: int) -> Places:
    """The places of running text: the inverse of the keyed permutation, computed number by number."""
    key = hash_ints(seed, documents)
    return lambda start, stop: perm_inverse_many(key, documents, np.arange(start, stop, dtype=np.int64))


def packed(
    spool: Spool, places: Places, seq_length: int, writers: Sequence[tuple[bool, CorpusWriter]]
) -> tuple[Places, list[int]]:
    """Pack examples into sequences, best fit over their shuffled order, and write the pack indices.

    Takes about 50 bytes of memory per example.

    Args:
        writers: of the corpus, and of the documents held out (True) where there are any.

    Returns:
        The places of the examples pack by pack, and the number of packs of each writer.
    """
    documents = count(spool)
    lengths = np.empty(documents, np.int32)  # in shuffled order; negative for those held out
    for start, rows in numbered(spool):
        lengths[places(start, start + len(rows))] = np.where(rows["heldout"], -rows["length"], rows["length"])
    final = np.empty(documents, np.int64)
    done, packs = 0, []
    for held, writer in writers:
        side = np.flatnonzero(lengths < 0 if held else lengths > 0)
        inside, before = pack(np.abs(lengths[side]), seq_length)
        final[side[inside]] = np.arange(done, done + len(side))
        done += len(side)
        writer.write_packs(seq_length, before)
        packs.append(len(before) - 1)
    return lambda start, stop: final[places(start, stop)], packs


def count(spool: Spool) -> int:
    """Documents that are not left out."""
    return spool.mark.documents - (0 if spool.left_out is None else int(np.count_nonzero(spool.left_out)))


def numbered(spool: Spool) -> Iterator[tuple[int, np.ndarray]]:
    """The spool's rows, and the number of the first of each array among the documents that are not left out."""
    start = 0
    for rows in spool.rows():
        yield start, rows
        start += len(rows)


def write_in_order(
    spool: Spool,
    places: Places,
    writers: Sequence[tuple[bool, CorpusWriter]],
    progress: Callable[[int, int], None] | None,
    limits: Limits,
) -> None:
    """Append the spool's documents to the writers, by place; those held out to the one that is marked so.

    Memory: a bucket and a few arrays of `GATHER_TOKENS`. Disk: the spool's size once more, until the end. `progress` is
    called with the tokens moved so far and all that are to be, each twice.
    """
    documents = count(spool)
    number = max(1, -(-spool.mark.tokens // limits.bucket_tokens), -(-documents // limits.bucket_documents))
    per_bucket = -(-documents // number)
    sizes, tokens = np.zeros((2, number), np.int64)
    for start, rows in numbered(spool):
        buckets = places(start, start + len(rows)) // per_bucket
        sizes += np.bincount(buckets, minlength=number)
        tokens += np.bincount(buckets, rows["length"], minlength=number).astype(np.int64)
    folder = spool.folder
    with (
        Buckets(folder / "bucket-entries", ENTRY, sizes) as entries,
        Buckets(folder / "bucket-tokens", spool.dtype, tokens) as ids,
        Buckets(folder / "bucket-mask", np.dtype(np.uint8), tokens) as mask,
    ):
        moved, total = 0, 2 * int(tokens.sum())
        sorting = _sort_into(spool, places, per_bucket, limits.batch_tokens, entries, ids, mask)
        appending = (_append(bucket, entries, ids, mask, writers) for bucket in np.flatnonzero(sizes).tolist())
        for count_moved in chain(sorting, appending):
            moved += count_moved
            if progress is not None:
                progress(moved, total)


def _sort_into(
    spool: Spool, places: Places, per_bucket: int, batch_tokens: int, entries: Buckets, ids: Buckets, mask: Buckets
) -> Iterator[int]:
    """Sort all documents into buckets; gives the number of tokens of each batch."""
    start, number = 0, len(entries.filled)
    for batch in spool.batches(batch_tokens):
        lengths = batch.rows["length"]
        place = places(start, start + len(lengths))
        start += len(lengths)
        bucket = place // per_bucket
        order = np.argsort(bucket, kind="stable")
        rows = np.empty(len(lengths), ENTRY)
        rows["place"], rows["length"], rows["heldout"] = place, lengths, batch.rows["heldout"]
        entries.append(rows[order], np.bincount(bucket, minlength=number))
        counts = np.bincount(bucket, lengths, minlength=number).astype(np.int64)
        for data, to in ((batch.tokens, ids), (batch.mask, mask)):
            if data is not None:
                to.append(np.concatenate([data[index] for _, index in _gather(lengths, order)]), counts)
        yield int(lengths.sum(dtype=np.int64))


def _append(
    bucket: int, entries: Buckets, ids: Buckets, mask: Buckets, writers: Sequence[tuple[bool, CorpusWriter]]
) -> int:
    """Append a bucket's documents in order; the number of their tokens."""
    (rows,) = entries.read(bucket, int(entries.filled[bucket]))
    (tokens,) = ids.read(bucket, int(ids.filled[bucket]))
    bits = next(mask.read(bucket, int(ids.filled[bucket])), None) if mask.filled[bucket] else None
    order = np.argsort(rows["place"])
    for held, writer in writers:
        for part, index in _gather(rows["length"], order[rows["heldout"][order] == held]):
            writer.add_documents(tokens[index], rows["length"][part], None if bits is None else bits[index])
    return len(tokens)


def _gather(lengths: npt.NDArray[np.int32], order: Int64Array) -> Iterator[tuple[Int64Array, Int64Array]]:
    """For documents back to back: `order` in parts, and where the tokens of each part's documents are."""
    starts = np.cumsum(lengths, dtype=np.int64) - lengths
    for first, last in cuts(lengths[order], GATHER_TOKENS):
        part = order[first:last]
        sizes = lengths[part].astype(np.int64)
        yield part, np.repeat(starts[part] - (np.cumsum(sizes) - sizes), sizes) + np.arange(sizes.sum())
