"""Input files of `megaflow prepare`: JSONL, plain text (both also zstd-compressed) and Parquet, read in chunks.

Chunks are cut by size alone, so they are the same however many processes work on them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

from megaflow.errors import UserError

CHUNK_BYTES = 1 << 20
PARQUET_ROWS = 1024
READ_BYTES = 1 << 18

Format = Literal["jsonl", "lines", "document", "parquet"]


@dataclass(frozen=True)
class Chunk:
    """Consecutive records of one file.

    Attributes:
        file: as given on the command line.
        first: number of the first record's line or row, from 1.
        format: "jsonl" (a line of JSON each), "lines" or "document" (plain text), "parquet" (a dict each).
        records: undecoded lines or documents, or dicts.
        bytes_read: how far into the file the reader is, for progress.
    """

    file: str
    first: int
    format: Format
    records: list[Any]
    bytes_read: int


class BadRecord(ValueError):
    """An input record that cannot be used; the message says why."""


def file_format(path: Path, txt_per_line: bool = False) -> Format:
    """Format of an input file by its name.

    Raises:
        UserError: the file is missing or of an unknown kind.
    """
    if not path.is_file():
        raise UserError(f"{path}: {'is a folder; name the files in it' if path.is_dir() else 'no such file'}")
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] == ".zst":
        suffixes.pop()
    elif suffixes and suffixes[-1] == ".parquet":
        return "parquet"
    if suffixes and suffixes[-1] in (".jsonl", ".ndjson"):
        return "jsonl"
    if suffixes and suffixes[-1] == ".txt":
        return "lines" if txt_per_line else "document"
    raise UserError(f"{path}: unknown kind of file; inputs are .jsonl, .txt (each also .zst) and .parquet")


def read_chunks(path: Path, format: Format, fields: Sequence[str]) -> Iterator[Chunk]:
    """The records of a file in order; of Parquet only the columns `fields`.

    Raises:
        UserError: the file is damaged, cut short, or lacks a column.
    """
    if format == "parquet":
        yield from _read_parquet(path, fields)
        return
    try:
        with path.open("rb") as file:
            blocks = (
                _decompressed(file, path) if path.suffix.lower() == ".zst" else iter(lambda: file.read(READ_BYTES), b"")
            )
            if format == "document":
                yield Chunk(str(path), 1, format, [b"".join(blocks)], file.tell())
                return
            first = 1
            for lines in _line_groups(blocks):
                yield Chunk(str(path), first, format, lines, file.tell())
                first += len(lines)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error


def _decompressed(file: BinaryIO, path: Path) -> Iterator[bytes]:
    """Blocks of a zstd file of one or more frames; a cut one is an error, where stream readers would end silently."""
    import zstandard

    decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)
    frame = decompressor.decompressobj()
    begun = False
    try:
        while data := file.read(READ_BYTES):
            while data:
                begun = True
                yield frame.decompress(data)
                data = b""
                if frame.eof:
                    data = frame.unused_data
                    frame, begun = decompressor.decompressobj(), False
    except zstandard.ZstdError as error:
        raise UserError(f"{path}: not valid zstd data: {error}") from error
    if begun:
        raise UserError(f"{path}: the zstd data ends in the middle; the file was cut short")


def _line_groups(blocks: Iterator[bytes]) -> Iterator[list[bytes]]:
    """Lines without their ends, in groups of about `CHUNK_BYTES`, cut by content alone."""
    lines: list[bytes] = []
    size = 0
    rest: list[bytes] = []
    for block in blocks:
        *whole, last = block.split(b"\n")
        for line in whole:
            if rest:
                line = b"".join([*rest, line])
                rest = []
            lines.append(line)
            size += len(line)
            if size >= CHUNK_BYTES:
                yield lines
                lines, size = [], 0
        if last:
            rest.append(last)
    if rest:
        lines.append(b"".join(rest))
    if lines:
        yield lines


def _read_parquet(path: Path, fields: Sequence[str]) -> Iterator[Chunk]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        columns = [field for field in fields if field in file.schema_arrow.names]
        if not columns:
            raise UserError(f"{path}: no column {fields[0]}; it has {', '.join(file.schema_arrow.names)}")
        first, size = 1, path.stat().st_size
        for batch in file.iter_batches(PARQUET_ROWS, columns=columns, use_threads=False):
            rows = batch.to_pylist()
            done = size * (first + len(rows) - 1) // max(1, file.metadata.num_rows)
            yield Chunk(str(path), first, "parquet", rows, done)
            first += len(rows)
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{path}: cannot be read as Parquet: {str(error).splitlines()[0]}") from error
