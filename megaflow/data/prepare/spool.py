"""Tokenised documents on their way into a corpus, kept on disk so that a killed preparation continues.

A folder holds them in input order, with a journal that says how far each whole piece on disk reaches. Everything after
the last journalled piece is cut off and made again; everything before it is used as it is.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from megaflow.data.prepare.encode import SHOWN, Encoded

ROW = np.dtype([("length", "<i4"), ("bytes", "<i8"), ("loss_bytes", "<i8"), ("heldout", "?"), ("hash", "<u8", (2,))])
"""What the spool says of a document."""
ROWS = 1 << 19
"""Documents read at a time."""
JOURNAL = "journal.jsonl"

RowArray = npt.NDArray[np.void]
BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Mark:
    """How far a preparation has come.

    Attributes:
        inputs: input files that are done.
        chunks: chunks of the next one that are done.
        documents, tokens: on disk.
        records, num_bad, num_too_long, bad, too_long: as in `Encoded`, over everything so far.
        num_compared: documents that the tokenizer itself encoded too.
    """

    inputs: int = 0
    chunks: int = 0
    documents: int = 0
    tokens: int = 0
    records: int = 0
    num_bad: int = 0
    num_too_long: int = 0
    num_compared: int = 0
    bad: tuple[str, ...] = ()
    too_long: tuple[str, ...] = ()

    def after(self, encoded: Encoded, inputs: int, chunks: int) -> Mark:
        """The mark behind one more chunk, the `chunks`-th of its file."""
        return Mark(
            inputs=inputs,
            chunks=chunks,
            documents=self.documents + len(encoded.lengths),
            tokens=self.tokens + len(encoded.tokens),
            records=self.records + encoded.records,
            num_bad=self.num_bad + encoded.num_bad,
            num_too_long=self.num_too_long + encoded.num_too_long,
            num_compared=self.num_compared + encoded.comparison.documents,
            bad=(*self.bad, *encoded.bad)[:SHOWN],
            too_long=(*self.too_long, *encoded.too_long)[:SHOWN],
        )


class Batch(NamedTuple):
    """Consecutive documents: one entry of `rows` each, `tokens` and `mask` (0 = no loss) back to back."""

    rows: RowArray
    tokens: np.ndarray
    mask: npt.NDArray[np.uint8] | None


class Spool:
    """Tokenised documents in input order, in the folder `folder`.

    Args:
        dtype: of a token.
        masked: documents have a loss mask.
        made_by: what the documents depend on besides the input files; JSON, by name.
        inputs: of each input file what tells whether it has changed; JSON.
        piece_bytes: written between two entries of the journal.

    Attributes:
        mark: how far it reaches; on opening, as far as an earlier preparation got with the same `made_by` and with
            the same files up to there.
        saved: the part of it that outlives a kill.
        discarded: what an earlier preparation had otherwise, so that nothing of it can be used; empty if there was
            none or it is used.
        left_out: True for the documents, in input order, that `rows` and `batches` pass over.
    """

    def __init__(
        self,
        folder: Path,
        dtype: np.dtype,
        masked: bool,
        made_by: dict[str, Any],
        inputs: Sequence[Any],
        piece_bytes: int,
    ) -> None:
        self.folder = folder
        self.dtype = dtype
        self.piece_bytes = piece_bytes
        self.left_out: BoolArray | None = None
        self._sizes = {"rows": ROW.itemsize, "tokens": dtype.itemsize}  # of an entry in each file
        if masked:
            self._sizes["mask"] = 1
        folder.mkdir(exist_ok=True)
        self._header = json.loads(json.dumps({"made_by": made_by, "inputs": inputs}))
        self.mark, self.discarded = self._kept()
        self.saved = self.mark
        self._unsaved = 0
        for path in folder.iterdir():
            if path.name not in self._sizes and path.name != JOURNAL:
                path.unlink()
        self._files = {name: self._open(name) for name in self._sizes}
        self._write_journal()

    def __enter__(self) -> Spool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in [*self._files.values(), self._journal]:
            file.close()

    def _kept(self) -> tuple[Mark, list[str]]:
        """The last mark in the journal that holds for this preparation, or why none does."""
        entries = list(_whole_lines(self.folder / JOURNAL))
        if not entries:
            return Mark(), []
        header, *marks = entries
        made_by, now = header["made_by"], self._header["made_by"]
        others = sorted(name for name in made_by.keys() | now.keys() if made_by.get(name) != now.get(name))
        if others or not marks:
            return Mark(), others if marks else []
        for entry in reversed(marks):
            mark = Mark(**{**entry, "bad": tuple(entry["bad"]), "too_long": tuple(entry["too_long"])})
            read = mark.inputs + (mark.chunks > 0)
            if header["inputs"][:read] == self._header["inputs"][:read] and self._holds(mark):
                return mark, []
        return Mark(), ["inputs"]

    def _holds(self, mark: Mark) -> bool:
        """Whether the files are as long as `mark` says; after a power cut they may not be."""
        paths = {name: self.folder / name for name in self._sizes}
        return all(path.is_file() and path.stat().st_size >= self._end(name, mark) for name, path in paths.items())

    def _end(self, name: str, mark: Mark) -> int:
        return self._sizes[name] * (mark.documents if name == "rows" else mark.tokens)

    def _open(self, name: str) -> Any:
        path = self.folder / name
        path.touch()
        file = path.open("r+b")
        file.truncate(self._end(name, self.mark))
        file.seek(0, os.SEEK_END)
        return file

    def _write_journal(self) -> None:
        """Begin the journal anew, with the mark that holds."""
        beside = self.folder / f"{JOURNAL}.new"
        with beside.open("wb") as file:
            file.write(_line(self._header))
            if self.mark != Mark():
                file.write(_line(asdict(self.mark)))
            file.flush()
            os.fsync(file.fileno())
        beside.rename(self.folder / JOURNAL)
        self._journal = (self.folder / JOURNAL).open("ab")

    def add(self, encoded: Encoded, inputs: int, chunks: int) -> None:
        """Append a chunk's documents: it is the `chunks`-th chunk of the input file after the first `inputs`."""
        rows = np.empty(len(encoded.lengths), dtype=ROW)
        rows["length"], rows["heldout"], rows["hash"] = encoded.lengths, encoded.heldout, encoded.hashes
        rows["bytes"], rows["loss_bytes"] = encoded.bytes, encoded.loss_bytes
        written = {"rows": rows.tobytes(), "tokens": encoded.tokens.astype(self.dtype).tobytes()}
        if "mask" in self._sizes:
            mask = np.ones(len(encoded.tokens), np.uint8) if encoded.mask is None else encoded.mask
            written["mask"] = mask.tobytes()
        for name, data in written.items():
            self._files[name].write(data)
            self._unsaved += len(data)
        self.mark = self.mark.after(encoded, inputs, chunks)
        if self._unsaved >= self.piece_bytes:
            self.save()

    def complete(self, inputs: int) -> None:
        """Say that all `inputs` files are done."""
        self.mark = replace(self.mark, inputs=inputs, chunks=0)
        self.save()

    def save(self) -> None:
        """Make everything so far outlive a kill or a power cut."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        self._journal.write(_line(asdict(self.mark)))
        self._journal.flush()
        os.fsync(self._journal.fileno())
        self.saved, self._unsaved = self.mark, 0

    def rows(self) -> Iterator[RowArray]:
        """The documents' rows, at most `ROWS` at a time."""
        with (self.folder / "rows").open("rb") as file:
            for first in range(0, self.mark.documents, ROWS):
                rows = np.fromfile(file, ROW, min(ROWS, self.mark.documents - first))
                yield rows if self.left_out is None else rows[~self.left_out[first : first + len(rows)]]

    def batches(self, tokens: int) -> Iterator[Batch]:
        """The documents, about `tokens` tokens and at most `ROWS` documents at a time."""
        files = {name: (self.folder / name).open("rb") for name in self._sizes}
        try:
            for first in range(0, self.mark.documents, ROWS):
                rows = np.fromfile(files["rows"], ROW, min(ROWS, self.mark.documents - first))
                left_out = None if self.left_out is None else self.left_out[first : first + len(rows)]
                for start, stop in cuts(rows["length"], tokens):
                    part = rows[start:stop]
                    count = int(part["length"].sum(dtype=np.int64))
                    ids = np.fromfile(files["tokens"], self.dtype, count)
                    mask = np.fromfile(files["mask"], np.uint8, count) if "mask" in files else None
                    if left_out is not None and left_out[start:stop].any():
                        kept = ~left_out[start:stop]
                        inside = np.repeat(kept, part["length"])
                        part, ids, mask = part[kept], ids[inside], None if mask is None else mask[inside]
                    if len(part):
                        yield Batch(part, ids, mask)
        finally:
            for file in files.values():
                file.close()


def cuts(lengths: npt.NDArray[np.int32], tokens: int) -> Iterator[tuple[int, int]]:
    """Ranges of documents of about `tokens` tokens together, at least one document each."""
    ends = np.cumsum(lengths, dtype=np.int64)
    edges = np.searchsorted(ends, np.arange(tokens, ends[-1] if len(ends) else 0, tokens))
    edges = np.unique(np.concatenate([[0], edges, [len(lengths)]]))
    yield from zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)


def _line(entry: dict[str, Any]) -> bytes:
    return json.dumps(entry).encode() + b"\n"


def _whole_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The entries of a journal up to one that a kill or a power cut damaged."""
    if path.is_file():
        for line in path.read_bytes().splitlines():
            try:
                yield json.loads(line)
            except ValueError:
                return
