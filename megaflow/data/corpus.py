"""Tokenised corpora on disk: Megatron's `.bin/.idx` (MMIDIDX version 1) with a manifest and sidecars beside them.

    <prefix>.bin        raw tokens, documents back to back
    <prefix>.idx        b"MMIDIDX\\0\\0", u64 version, u8 dtype code, u64 S sequences, u64 S + 1, then
                        S i32 lengths, S i64 byte offsets, S + 1 i64 document indices; one sequence per document
    <prefix>.json       the manifest, written last: a prefix without one is not a corpus
    <prefix>.mask       one bit per token, lowest bit first, 0 = no loss on it; absent when every bit would be 1
    <prefix>.packs-<S>  one u64 more than there are packs: how many documents lie before each pack

All numbers are little-endian.
"""

from __future__ import annotations

import contextlib
import os
import struct
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Literal

import numpy as np
import numpy.typing as npt

from megaflow.data.manifest import Manifest, hash_blocks, read_manifest
from megaflow.errors import UserError

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
DTYPE_CODES: dict[int, np.dtype] = {4: np.dtype("<i4"), 8: np.dtype("<u2")}
UINT16_VOCABULARY = 65_500
"""Vocabularies below this size are stored in two bytes a token."""
CHUNK = 1 << 20
"""Index entries written at a time."""

Int64Array = npt.NDArray[np.int64]
Verify = Literal["off", "lazy", "full"]
"""When blocks are held against the manifest's checksums: never, when they are first read, or all of them at opening."""


def token_dtype(vocab_size: int) -> np.dtype:
    """The type tokens of a vocabulary are stored in."""
    return DTYPE_CODES[8] if vocab_size < UINT16_VOCABULARY else DTYPE_CODES[4]


def corpus_path(prefix: str | Path, suffix: str) -> Path:
    """`<prefix>.<suffix>`, whatever dots the prefix has."""
    return Path(f"{prefix}.{suffix}")


def pack_suffix(seq_length: int) -> str:
    """Suffix of the pack index for sequences of `seq_length`."""
    return f"packs-{seq_length}"


class Corpus:
    """A corpus opened for reading: nothing is read but headers until tokens are asked for.

    Attributes: `prefix`, `manifest`, `tokens` (memory-mapped, [num_tokens]), `num_tokens`, `num_documents`.
    """

    def __init__(self, prefix: Path, manifest: Manifest, dtype: np.dtype, documents: int) -> None:
        self.prefix = prefix
        self.manifest = manifest
        self.num_documents = documents
        self.num_tokens = manifest.tokens
        self.tokens: np.ndarray = _map(corpus_path(prefix, "bin"), dtype)
        self._mask = _map(corpus_path(prefix, "mask"), np.dtype("u1")) if "mask" in manifest.blocks else None

    @classmethod
    def open(cls, prefix: str | Path, verify: Verify = "lazy") -> Corpus:
        """Open `<prefix>.bin`, `.idx` and `.json`, checking the header's arithmetic and the files' sizes.

        Raises:
            UserError: a file is missing, or is not what its header and the manifest say.
        """
        prefix = Path(prefix)
        manifest = read_manifest(corpus_path(prefix, "json"))
        dtype, documents = _check_index(prefix, manifest)
        _check_size(corpus_path(prefix, "bin"), manifest.tokens * dtype.itemsize)
        if "mask" in manifest.blocks:
            _check_size(corpus_path(prefix, "mask"), (manifest.tokens + 7) // 8)
        if manifest.seq_length is not None:
            _check_size(corpus_path(prefix, pack_suffix(manifest.seq_length)), ((manifest.packs or 0) + 1) * 8)
        return cls(prefix, manifest, dtype, documents)

    @property
    def has_mask(self) -> bool:
        """Whether any token carries no loss."""
        return self._mask is not None

    @cached_property
    def doc_starts(self) -> Int64Array:
        """[num_documents + 1] first token of each document, and the number of tokens last."""
        offsets = np.fromfile(
            corpus_path(self.prefix, "idx"), "<i8", self.num_documents, offset=HEADER.size + 4 * self.num_documents
        )
        starts = np.append(offsets // self.tokens.itemsize, self.num_tokens)
        if np.any(starts[1:] <= starts[:-1]):
            raise UserError(f"{corpus_path(self.prefix, 'idx')}: document offsets do not increase; prepare it again")
        return starts

    @cached_property
    def pack_starts(self) -> Int64Array:
        """[packs + 1] first document of each pack, and the number of documents last.

        Raises:
            UserError: the corpus is not packed, or its pack index is damaged.
        """
        if self.manifest.seq_length is None:
            raise UserError(f"{self.prefix}: a {self.manifest.kind} corpus has no packs")
        path = corpus_path(self.prefix, pack_suffix(self.manifest.seq_length))
        starts = np.fromfile(path, "<u8").astype(np.int64)
        if starts[0] != 0 or starts[-1] != self.num_documents or np.any(starts[1:] <= starts[:-1]):
            raise UserError(f"{path}: not a pack index of {self.num_documents} documents; prepare it again")
        return starts

    def loss_mask(self, start: int, stop: int) -> npt.NDArray[np.bool_]:
        """[stop - start] whether each token of the range carries loss as a label."""
        if self._mask is None:
            return np.ones(stop - start, dtype=np.bool_)
        first = start // 8
        bits = np.unpackbits(self._mask[first : (stop + 7) // 8], bitorder="little")
        return bits[start - 8 * first : stop - 8 * first].view(np.bool_)


def _map(path: Path, dtype: np.dtype) -> np.ndarray:
    """A plain array over a memory-mapped file (slices of np.memmap itself are several times slower)."""
    return np.asarray(np.memmap(path, dtype=dtype, mode="r"))


def _check_size(path: Path, expected: int) -> None:
    try:
        size = path.stat().st_size
    except OSError:
        raise UserError(f"{path}: no such file, though the corpus's manifest names it; prepare it again") from None
    if size != expected:
        raise UserError(f"{path}: {size} bytes where {expected} belong; it was cut or changed, prepare it again")


def _check_index(prefix: Path, manifest: Manifest) -> tuple[np.dtype, int]:
    """Check `.idx` without reading its arrays: header, size, first and last entries."""
    path = corpus_path(prefix, "idx")
    try:
        with path.open("rb") as file:
            header = file.read(HEADER.size)
            magic, version, code, documents, entries = HEADER.unpack(header.ljust(HEADER.size, b"\0"))
            if magic != MAGIC:
                raise UserError(f"{path}: not an MMIDIDX index")
            if version != 1 or code not in DTYPE_CODES:
                raise UserError(f"{path}: version {version}, dtype code {code}; read are version 1, codes 4 and 8")
            if entries != documents + 1 or documents != manifest.documents or documents == 0:
                raise UserError(
                    f"{path}: {documents} sequences and {entries - 1} documents where the manifest says "
                    f"{manifest.documents}; prepare it again"
                )
            _check_size(path, HEADER.size + 12 * documents + 8 * entries)
            file.seek(HEADER.size + 4 * (documents - 1))
            last_length = int.from_bytes(file.read(4), "little", signed=True)
            file.seek(HEADER.size + 12 * documents - 8)
            last_offset = int.from_bytes(file.read(8), "little", signed=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    dtype = DTYPE_CODES[code]
    end = last_offset + last_length * dtype.itemsize
    if end != manifest.tokens * dtype.itemsize:
        raise UserError(f"{path}: documents end at byte {end} of {manifest.tokens * dtype.itemsize}; prepare it again")
    return dtype, documents


class CorpusWriter:
    """Writes a corpus beside its final names and puts it there at once.

    Files are written as `.tmp-<name>` in the prefix's folder; `finish` completes them, then renames, the manifest last.
    Leaving the `with` block without `finish`, by an exception or otherwise, removes them.
    """

    def __init__(self, prefix: str | Path, dtype: np.dtype) -> None:
        self.prefix = Path(prefix)
        self.dtype = dtype
        self.prefix.parent.mkdir(parents=True, exist_ok=True)
        self.tokens = 0
        self.loss_tokens = 0
        self._lengths: list[npt.NDArray[np.int32]] = []
        self._suffixes = ["bin", "idx", "mask"]
        self._masked = False
        self._mask_rest = np.empty(0, dtype=np.uint8)
        self._bin = self._temporary("bin").open("wb")
        self._mask = self._temporary("mask").open("wb")

    def __enter__(self) -> CorpusWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bin.close()
        self._mask.close()
        for suffix in [*self._suffixes, "json"]:
            self._temporary(suffix).unlink(missing_ok=True)

    def _temporary(self, suffix: str) -> Path:
        return self.prefix.with_name(f".tmp-{self.prefix.name}.{suffix}")

    def add_document(self, ids: npt.ArrayLike, mask: npt.ArrayLike | None = None) -> None:
        """Append one document: its ids, and 1 or 0 for each token that carries loss or not (default all 1)."""
        tokens = np.asarray(ids)
        bits = None if mask is None else np.asarray(mask, dtype=np.uint8)
        self.add_documents(tokens, np.array([len(tokens)], dtype=np.int32), bits)

    def add_documents(self, tokens: np.ndarray, lengths: npt.NDArray[np.int32], mask: np.ndarray | None = None) -> None:
        """Append documents given back to back: `tokens` [sum(lengths)], `mask` the same shape, 0 = no loss.

        Raises:
            ValueError: an empty document, lengths that do not add up, or ids the token type cannot hold.
        """
        if lengths.sum(dtype=np.int64) != len(tokens) or np.any(lengths <= 0):
            raise ValueError("documents need at least one token, and lengths must sum to the tokens given")
        limits = np.iinfo(self.dtype)
        if len(tokens) and not limits.min <= int(tokens.min()) <= int(tokens.max()) <= limits.max:
            raise ValueError(f"token ids {tokens.min()}..{tokens.max()} do not fit {self.dtype}")
        self._bin.write(tokens.astype(self.dtype).tobytes())
        bits = np.ones(len(tokens), dtype=np.uint8) if mask is None else (mask != 0).astype(np.uint8)
        starts = np.cumsum(lengths, dtype=np.int64) - lengths
        self.loss_tokens += int(bits.sum(dtype=np.int64)) - int(bits[starts].sum(dtype=np.int64))
        self._masked |= not bits.all()
        bits = np.concatenate([self._mask_rest, bits])
        whole = len(bits) // 8 * 8
        self._mask.write(np.packbits(bits[:whole], bitorder="little").tobytes())
        self._mask_rest = bits[whole:]
        self._lengths.append(lengths.astype(np.int32))
        self.tokens += len(tokens)

    def write_packs(self, seq_length: int, documents_before: Int64Array) -> None:
        """Write the pack index: `documents_before` [packs + 1]."""
        suffix = pack_suffix(seq_length)
        self._suffixes.append(suffix)
        self._temporary(suffix).write_bytes(documents_before.astype("<u8").tobytes())

    def _write_index(self) -> int:
        lengths = np.concatenate([np.empty(0, np.int32), *self._lengths])
        with self._temporary("idx").open("wb") as file:
            file.write(HEADER.pack(MAGIC, 1, _code(self.dtype), len(lengths), len(lengths) + 1))
            file.write(lengths.astype("<i4").tobytes())
            offset = 0
            for i in range(0, len(lengths), CHUNK):
                sizes = lengths[i : i + CHUNK].astype(np.int64) * self.dtype.itemsize
                ends = offset + np.cumsum(sizes)
                file.write((ends - sizes).astype("<i8").tobytes())
                offset = int(ends[-1])
            for i in range(0, len(lengths) + 1, CHUNK):
                file.write(np.arange(i, min(i + CHUNK, len(lengths) + 1), dtype="<i8").tobytes())
        return len(lengths)

    def complete(self, manifest: Manifest) -> Manifest:
        """Write everything still missing under temporary names; counts and checksums are filled in here."""
        self._mask.write(np.packbits(self._mask_rest, bitorder="little").tobytes())
        self._bin.close()
        self._mask.close()
        documents = self._write_index()
        if not self._masked:
            self._temporary("mask").unlink()
            self._suffixes.remove("mask")
        counts = {"documents": documents, "tokens": self.tokens, "loss_tokens": self.loss_tokens}
        blocks = {suffix: hash_blocks(self._temporary(suffix)) for suffix in self._suffixes}
        manifest = manifest.model_copy(update={**counts, "blocks": blocks})
        self._temporary("json").write_text(manifest.to_json(), encoding="utf-8")
        for suffix in [*self._suffixes, "json"]:
            with self._temporary(suffix).open("rb") as file:
                os.fsync(file.fileno())
        return manifest

    def commit(self) -> None:
        """Give the completed files their names, taking away a corpus of this name first; the manifest comes last."""
        remove_corpus(self.prefix)
        for suffix in [*self._suffixes, "json"]:
            os.replace(self._temporary(suffix), corpus_path(self.prefix, suffix))
        with contextlib.suppress(OSError):  # some file systems cannot sync a folder
            folder = os.open(self.prefix.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)

    def finish(self, manifest: Manifest) -> Manifest:
        """Complete and commit; returns the manifest as written."""
        manifest = self.complete(manifest)
        self.commit()
        return manifest


def _code(dtype: np.dtype) -> int:
    return next(code for code, known in DTYPE_CODES.items() if known == dtype)


def remove_corpus(prefix: Path) -> None:
    """Remove a corpus's files, its manifest first so that what remains of an interrupted removal is no corpus."""
    for suffix in ("json", "bin", "idx", "mask"):
        corpus_path(prefix, suffix).unlink(missing_ok=True)
    for packs in prefix.parent.glob("*.packs-*"):
        if packs.name.startswith(f"{prefix.name}.packs-"):
            packs.unlink()
