"""Tokenised corpora opened for reading; `files.py` says what their files hold."""

from __future__ import annotations

import ctypes
import functools
import weakref
from bisect import bisect_right
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megaflow.data import native
from megaflow.data.corpus.blocks import BlockFile, Verify
from megaflow.data.corpus.files import (
    HEADER,
    Int32Array,
    Int64Array,
    check_index,
    check_size,
    corpus_path,
    file_sizes,
    pack_suffix,
)
from megaflow.data.corpus.manifest import Manifest, read_manifest
from megaflow.data.packing import fill_window
from megaflow.errors import UserError


class Corpus:
    """A corpus opened for reading: only headers are read until tokens are asked for, then only what is asked for.

    Every method that reads raises UserError where the files are damaged.

    Attributes: `prefix`, `prefixes` (here only that), `manifest`, `num_tokens`, `num_documents`, `num_packs`.
    """

    def __init__(
        self, prefix: str | Path, manifest: Manifest, verify: Verify, sound: dict[str, bytearray] | None = None
    ) -> None:
        """As `open`, with the manifest read; `sound` is what an earlier opening found sound, by suffix, kept up."""
        self.prefix, self.prefixes = prefix, [str(prefix)]
        self.manifest = manifest
        self.num_documents = documents = manifest.documents
        self.num_tokens = manifest.tokens
        self.num_packs = manifest.packs or 0
        self._verify: Verify = verify
        self._sound = {} if sound is None else sound
        self._offsets_at = HEADER.size + 4 * documents
        dtype = self._check_files()
        self._itemsize = dtype.itemsize
        self._index = self._file("idx")
        # 8-byte numbers at odd addresses: a memoryview reads single ones as fast as a list
        self._offsets = self._index.bytes.data[self._offsets_at : self._offsets_at + 8 * documents].cast("q")
        self._bin = self._file("bin")
        self._tokens = self._bin.bytes.view(dtype)
        self._ids = self._tokens.view(f"<u{dtype.itemsize}")  # of which a negative id is a large one
        self._mask = self._file("mask") if "mask" in manifest.blocks else None
        self._packs = None if manifest.seq_length is None else self._file(pack_suffix(manifest.seq_length))
        self._stream = native.Stream(
            self._bin.bytes.ctypes.data,
            self._index.bytes.ctypes.data + self._offsets_at,
            None if self._mask is None else self._mask.bytes.ctypes.data,
            self._itemsize,
            self.num_tokens,
            documents,
            manifest.tokenizer.vocab_size,
            manifest.tokenizer.eos_id,
        )

    @classmethod
    def open(cls, prefix: str | Path, verify: Verify = "lazy") -> Corpus:
        """Open `<prefix>.bin`, `.idx` and `.json`, checking the header's arithmetic and the files' sizes.

        `verify` says when blocks are held against the manifest's checksums. Raises UserError where a file is missing,
        or is not what its header and the manifest say.
        """
        return cls(prefix, read_manifest(corpus_path(prefix, "json")), verify)

    def _check_files(self) -> np.dtype:
        """Check the index's header and the files' sizes; the type of the tokens."""
        dtype = check_index(self._path("idx"), self.manifest)
        for suffix, size in file_sizes(self.manifest, dtype.itemsize).items():
            check_size(self._path(suffix), size)
        return dtype

    def _path(self, suffix: str) -> Path:
        return corpus_path(self.prefix, suffix)

    def _file(self, suffix: str) -> BlockFile:
        return BlockFile(self._path(suffix), *self._checksums(suffix))

    def _checksums(self, suffix: str) -> tuple[list[str], int, Verify, Callable[[int, int], str], bytearray]:
        """What a file is held against: the arguments of `BlockFile` after the path."""
        locate = functools.partial(Corpus._located, weakref.proxy(self), suffix)  # no cycle: unmapped when let go of
        blocks, sound = self.manifest.blocks.get(suffix, []), self._sound.setdefault(suffix, bytearray())
        return blocks, self.manifest.block_bytes, self._verify, locate, sound

    def _located(self, suffix: str, start: int, stop: int) -> str:
        """What lies in a range of a file's bytes, in words."""
        if suffix.startswith("packs-"):
            return f"packs {max(0, start // 8 - 1)} to {min(self.num_packs, (stop + 7) // 8) - 1}"
        if suffix == "idx":
            documents = (start - self._offsets_at) // 8, (stop - 1 - self._offsets_at) // 8
            if documents[0] >= self.num_documents or documents[1] < 0:
                return "no data that training uses"
        else:
            scale = 8 * self._itemsize if suffix == "mask" else 1
            documents = self._document_at(start * scale), self._document_at(stop * scale - 1)
        first, last = (min(max(0, document), self.num_documents - 1) for document in documents)
        return f"documents {first} to {last}"

    def _document_at(self, offset: int) -> int:
        """The document that holds byte `offset` of `.bin`, as the index says, checked or not."""
        return bisect_right(self._offsets, offset) - 1

    @property
    def has_mask(self) -> bool:
        """Whether any token carries no loss."""
        return self._mask is not None

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """[stop - start] the ids of tokens `start .. stop - 1`, a view of the file; `start < stop`."""
        self._bin.check(start * self._itemsize, stop * self._itemsize)
        ids, vocab_size = self._ids[start:stop], self.manifest.tokenizer.vocab_size
        if np.maximum.reduce(ids) >= vocab_size:
            at = start + int(np.argmax(ids >= vocab_size))
            raise UserError(
                f"{self._bin.path}: token {at} (document {self._document_at(at * self._itemsize)}) is id "
                f"{self._tokens[at]}, outside the vocabulary of {vocab_size}; prepare the corpus again"
            )
        return self._tokens[start:stop]

    def loss_mask(self, start: int, stop: int) -> npt.NDArray[np.bool_]:
        """[stop - start] whether each token of the range carries loss as a label; `start < stop`."""
        if self._mask is None:
            return np.ones(stop - start, dtype=np.bool_)
        first, last = start // 8, (stop + 7) // 8
        self._mask.check(first, last)
        bits = np.unpackbits(self._mask.bytes[first:last], bitorder="little")
        return bits[start - 8 * first : stop - 8 * first].view(np.bool_)

    def document_start(self, document: int) -> int:
        """First token of `document`; the number of tokens for the number of documents."""
        if document == self.num_documents:
            return self.num_tokens
        self._check_offsets(document, document + 1)
        start = self._offsets[document] // self._itemsize
        if not 0 <= start < self.num_tokens:
            raise UserError(
                f"{self._index.path}: document {document} is said to start at token {start} of {self.num_tokens}; "
                "prepare it again"
            )
        return start

    def starts_within(self, start: int, stop: int, use_native: bool = True) -> Int64Array:
        """[D] where documents start in tokens `start + 1 .. stop` (inclusive), relative to `start`, ascending.

        The end of the stream counts as a start, as it is on a ring. Found by binary search: whichever offsets it
        passes, what it ends at is right if the blocks around it are.
        """
        library = native.library() if use_native else None
        if library is not None:
            found, at = np.empty(stop - start + 1, dtype=np.int64), ctypes.c_int64()
            stream = ctypes.byref(self._stream)
            count = library.megaflow_starts(stream, start, stop, native.address(found), ctypes.byref(at))
            if count >= 0:
                self._check_around(at.value, at.value + count)
                return found[:count]
        size = self._itemsize
        first = bisect_right(self._offsets, start * size)
        last = bisect_right(self._offsets, stop * size, first, min(first + stop - start, self.num_documents))
        self._check_around(first, last)
        starts = (np.frombuffer(self._offsets[first:last], dtype="<i8") >> (size >> 1)) - start  # size is 2 or 4
        if stop == self.num_tokens:
            starts = np.append(starts, stop - start)
        if first == 0 or (len(starts) and (starts[0] < 1 or (starts[1:] <= starts[:-1]).any())):
            raise UserError(f"{self._index.path}: the offsets near document {first} do not increase; prepare it again")
        return starts

    def fill(self, start: int, stop: int, window: Int32Array, use_native: bool = True) -> Int64Array:
        """Fill `window` [3, S] from tokens `start .. stop - 1`, at most S: its rows are tokens, labels and positions.

        What they leave is padding: end-of-sequence tokens, one more document. Labels are the next tokens, -100 where
        there is no loss, at the end of each document and on padding; positions restart with each document. The rows of
        `window` are contiguous. Documents end where a corpus does, so a window over the end of one and on from the
        start of another is two calls, on two parts of it.

        Returns:
            [D] lengths of the documents, padding last.
        """
        end = min(stop + 1, self.num_tokens)
        library = native.library() if use_native else None
        if library is not None:
            self._bin.check(start * self._itemsize, end * self._itemsize)
            if self._mask is not None:
                self._mask.check(start // 8, (end + 7) // 8)
            size, stride = window.shape[1], window.strides[0] // window.itemsize
            lengths, at = np.empty(size + 2, dtype=np.int64), ctypes.c_int64()
            stream, arrays = ctypes.byref(self._stream), (native.address(window[0]), native.address(lengths))
            count = library.megaflow_fill(stream, start, stop, size, stride, *arrays, ctypes.byref(at))
            if count >= 0:
                self._check_around(at.value, at.value + count)
                return lengths[:count]
        ids = self.tokens(start, end)
        mask = self.loss_mask(start, end) if self.has_mask else None
        starts = self.starts_within(start, stop, use_native)
        return fill_window(ids, mask, starts, stop - start, self.manifest.tokenizer.eos_id, window)

    def count_labels(self, start: int, stop: int, use_native: bool = True) -> int:
        """How many of tokens `start + 1 .. stop`, as far as there are any, are labels with loss; reads no tokens."""
        last = min(stop, self.num_tokens - 1)
        library = native.library() if use_native else None
        if library is not None:
            if self._mask is not None:
                self._mask.check(start // 8, last // 8 + 1)
            starts, at, found = np.empty(stop - start + 1, dtype=np.int64), ctypes.c_int64(), ctypes.c_int64()
            results = native.address(starts), ctypes.byref(at), ctypes.byref(found)
            count: int = library.megaflow_count_labels(ctypes.byref(self._stream), start, stop, *results)
            if count >= 0:
                self._check_around(at.value, at.value + found.value)
                return count
        starts = self.starts_within(start, stop, use_native)
        starts = starts[start + starts <= last]  # the end of the stream counts as a start
        if not self.has_mask:
            return last - start - len(starts)
        mask = self.loss_mask(start, last + 1)
        return int(np.count_nonzero(mask[1:])) - int(np.count_nonzero(mask[starts]))

    def _check_around(self, first: int, last: int) -> None:
        """Check the offsets of documents `first .. last - 1` and of one on either side."""
        self._check_offsets(max(0, first - 1), min(last + 1, self.num_documents))

    def _check_offsets(self, first: int, last: int) -> None:
        self._index.check(self._offsets_at + 8 * first, self._offsets_at + 8 * last)

    def pack(self, index: int) -> tuple[int, int]:
        """First and last (exclusive) document of a pack."""
        assert self._packs is not None, "a text corpus has no packs"
        self._packs.check(8 * index, 8 * index + 16)
        first, last = self._packs.bytes[8 * index : 8 * index + 16].view("<u8").tolist()
        if not first < last <= self.num_documents:
            raise UserError(
                f"{self._packs.path}: pack {index} is said to be documents {first} to {last - 1} of "
                f"{self.num_documents}; prepare it again"
            )
        return first, last
