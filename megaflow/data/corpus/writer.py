"""Writing a corpus: beside its final names first, then into place, so that half of one is never taken for a corpus."""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt

from megaflow.data.corpus.files import DTYPE_CODES, HEADER, MAGIC, Int64Array, corpus_path, pack_suffix
from megaflow.data.corpus.manifest import Manifest, hash_blocks
from megaflow.errors import UserError

CHUNK = 1 << 20
"""Index entries written at a time."""


class CorpusWriter:
    """Writes a corpus beside its final names and puts it there at once.

    Files are written as `.tmp-<name>` in the prefix's folder; `complete` completes them, `commit` renames them, the
    manifest last. Leaving the `with` block without `commit`, by an exception or otherwise, removes them.
    """

    def __init__(self, prefix: str | Path, dtype: np.dtype) -> None:
        self.prefix = Path(prefix)
        self.dtype = dtype
        self.prefix.parent.mkdir(parents=True, exist_ok=True)
        self.tokens = 0
        self.loss_tokens = 0
        self.documents = 0
        self._suffixes = ["bin", "idx", "mask"]
        self._masked = False
        self._mask_rest = np.empty(0, dtype=np.uint8)
        self._bin = self._temporary("bin").open("wb")
        self._mask = self._temporary("mask").open("wb")
        self._idx = self._temporary("idx").open("w+b")
        self._idx.write(bytes(HEADER.size))  # filled in when the documents are counted

    def __enter__(self) -> CorpusWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in (self._bin, self._mask, self._idx):
            with suppress(OSError):  # of a full disk, which has been raised before
                file.close()
        for suffix in [*self._suffixes, "json"]:
            self._temporary(suffix).unlink(missing_ok=True)

    def _temporary(self, suffix: str) -> Path:
        return temporary_path(self.prefix, suffix)

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
        self._idx.write(lengths.astype("<i4").tobytes())
        self.documents += len(lengths)
        self.tokens += len(tokens)

    def write_packs(self, seq_length: int, documents_before: Int64Array) -> None:
        """Write the pack index: `documents_before` [packs + 1]."""
        suffix = pack_suffix(seq_length)
        self._suffixes.append(suffix)
        self._temporary(suffix).write_bytes(documents_before.astype("<u8").tobytes())

    def _write_index(self) -> None:
        """Behind the lengths: where each document begins, and the numbers of the documents; then the header."""
        offset = 0
        for i in range(0, self.documents, CHUNK):
            self._idx.seek(HEADER.size + 4 * i)
            lengths = np.frombuffer(self._idx.read(4 * min(CHUNK, self.documents - i)), "<i4")
            ends = offset + np.cumsum(lengths, dtype=np.int64) * self.dtype.itemsize
            self._idx.seek(0, os.SEEK_END)
            self._idx.write((ends - lengths.astype(np.int64) * self.dtype.itemsize).astype("<i8").tobytes())
            offset = int(ends[-1])
        for i in range(0, self.documents + 1, CHUNK):
            self._idx.write(np.arange(i, min(i + CHUNK, self.documents + 1), dtype="<i8").tobytes())
        self._idx.seek(0)
        self._idx.write(HEADER.pack(MAGIC, 1, _code(self.dtype), self.documents, self.documents + 1))
        self._idx.close()

    def complete(self, manifest: Manifest) -> Manifest:
        """Write everything still missing under temporary names; counts and checksums are filled in here."""
        self._mask.write(np.packbits(self._mask_rest, bitorder="little").tobytes())
        self._bin.close()
        self._mask.close()
        self._write_index()
        if not self._masked:
            self._temporary("mask").unlink()
            self._suffixes.remove("mask")
        counts = {"documents": self.documents, "tokens": self.tokens, "loss_tokens": self.loss_tokens}
        blocks = {suffix: hash_blocks(self._temporary(suffix), manifest.block_bytes) for suffix in self._suffixes}
        manifest = manifest.model_copy(update={**counts, "blocks": blocks})
        self._temporary("json").write_text(manifest.to_json(), encoding="utf-8")
        for suffix in [*self._suffixes, "json"]:
            with self._temporary(suffix).open("rb") as file:
                os.fsync(file.fileno())
        return manifest

    def commit(self) -> None:
        """Give the completed files their names, taking away a corpus of this name first; the manifest comes last."""
        remove_corpus(self.prefix)
        for suffix in self._suffixes:
            os.replace(self._temporary(suffix), corpus_path(self.prefix, suffix))
        _sync_folder(self.prefix)
        os.replace(self._temporary("json"), corpus_path(self.prefix, "json"))
        _sync_folder(self.prefix)


def _code(dtype: np.dtype) -> int:
    return next(code for code, known in DTYPE_CODES.items() if known == dtype)


def check_name(prefix: Path) -> None:
    """Refuse what cannot be a corpus's name.

    Raises:
        UserError: it is a URL, or no name at all.
    """
    if ":/" in str(prefix):
        raise UserError(f"OUT {prefix}: corpora are written to local folders; give one, and copy the files to the URL")
    if prefix.name in ("", ".."):
        raise UserError(f"{prefix}: not a corpus's name; OUT is a folder and the start of a file name, as data/en")


@contextmanager
def locked(prefix: Path) -> Iterator[None]:
    """Keeps other processes from writing a corpus of this name.

    Raises:
        UserError: another process is at it.
    """
    path = temporary_path(prefix, "lock")
    with ExitStack() as stack:
        while True:
            file = stack.enter_context(path.open("w"))
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of this process alone, not of those it forks
            except (BlockingIOError, PermissionError):
                raise UserError(
                    f"{prefix}: another process is writing a corpus of this name; wait for it or give another name"
                ) from None
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                    break  # otherwise its last holder removed it between opening and locking
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def temporary_path(prefix: Path, suffix: str) -> Path:
    """Where a file is written before it gets the name `<prefix>.<suffix>`."""
    return prefix.with_name(f".tmp-{prefix.name}.{suffix}")


def remove_temporaries(prefix: Path) -> None:
    """Remove what a killed preparation of this name left behind."""
    ours = re.compile(re.escape(temporary_path(prefix, "").name) + r"(bin|idx|mask|json|packs-\d+)")
    for path in prefix.parent.iterdir():
        if ours.fullmatch(path.name):
            path.unlink()


def _sync_folder(prefix: Path) -> None:
    """Make the names in the prefix's folder last through a power cut."""
    with suppress(OSError):  # some file systems cannot sync a folder
        folder = os.open(prefix.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


def remove_corpus(prefix: Path) -> None:
    """Remove a corpus's files, its manifest first so that what remains of an interrupted removal is no corpus."""
    corpus_path(prefix, "json").unlink(missing_ok=True)
    _sync_folder(prefix)
    for suffix in ("bin", "idx", "mask"):
        corpus_path(prefix, suffix).unlink(missing_ok=True)
    for packs in prefix.parent.glob("*.packs-*"):
        if packs.name.startswith(f"{prefix.name}.packs-"):
            packs.unlink()
