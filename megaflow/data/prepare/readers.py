"""Input files of `megaflow prepare`: JSONL, plain text (both also zstd-compressed), Parquet and Arrow, read in chunks.

Chunks are cut by size alone, so they are the same however many processes work on them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

from megaflow.errors import UserError

if TYPE_CHECKING:
    import pyarrow

CHUNK_BYTES = 1 << 20
PARQUET_ROWS = 1024
READ_BYTES = 1 << 18

FOLDER_SUFFIXES = (".parquet", ".jsonl", ".jsonl.zst", ".ndjson", ".ndjson.zst")
"""Files that are taken from a folder given as input."""
END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"
"""The last bytes of a whole Arrow stream."""

Format = Literal["jsonl", "lines", "document", "parquet", "arrow"]


@dataclass(frozen=True)
class Chunk:
    """Consecutive records of one file.

    Attributes:
        file: as given on the command line.
        first: number of the first record's line or row, from 1.
        format: "jsonl" (a line of JSON each), "lines" or "document" (plain text), "parquet" or "arrow" (a dict each).
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


def input_files(inputs: Sequence[str | Path], txt_per_line: bool = False) -> list[tuple[Path, Format]]:
    """The files that inputs stand for, in order: a folder stands for those in it.

    Raises:
        UserError: a file is missing or of an unknown kind, or a folder is none of a data set.
    """
    paths: list[Path] = []
    for path in map(Path, inputs):
        paths += _files_in(path) if path.is_dir() else [path]
    return [(path, file_format(path, txt_per_line)) for path in paths]


def _files_in(folder: Path) -> list[Path]:
    """A folder's Parquet or JSONL files by name, or those of a data set that `datasets` saved, in its order."""
    if (folder / "dataset_dict.json").is_file():
        splits = _read_json(folder / "dataset_dict.json").get("splits")
        names = ", ".join(str(folder / str(split)) for split in splits) if isinstance(splits, list) else "its folders"
        raise UserError(f"{folder}: is a folder of several splits; give those to use: {names}")
    if (folder / "state.json").is_file():
        state = _read_json(folder / "state.json")
        if any(value for key, value in state.items() if key.startswith("_indices")):
            raise UserError(f"{folder}: its rows are chosen by an index; save it again after flatten_indices()")
        try:
            return [folder / Path(file["filename"]).name for file in state["_data_files"]]
        except (KeyError, TypeError) as error:
            raise UserError(
                f"{folder / 'state.json'}: names no data files; was it written by save_to_disk()?"
            ) from error
    files = sorted(path for path in folder.iterdir() if path.name.lower().endswith(FOLDER_SUFFIXES) and path.is_file())
    if not files:
        raise UserError(f"{folder}: is a folder without .parquet or .jsonl files or a saved data set; name the files")
    if len({path.suffix.lower() == ".parquet" for path in files}) > 1:
        raise UserError(f"{folder}: is a folder of both .parquet and .jsonl files; name those to use")
    return files


def _read_json(path: Path) -> dict[str, Any]:
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    if not isinstance(read, dict):
        raise UserError(f"{path}: not a JSON object")
    return read


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
    elif suffixes and suffixes[-1] == ".arrow":
        return "arrow"
    if suffixes and suffixes[-1] in (".jsonl", ".ndjson"):
        return "jsonl"
    if suffixes and suffixes[-1] == ".txt":
        return "lines" if txt_per_line else "document"
    raise UserError(
        f"{path}: unknown kind of file; inputs are .jsonl, .txt (each also .zst), .parquet, .arrow and folders of them"
    )


def read_chunks(path: Path, format: Format, fields: Sequence[str], skip: int = 0) -> Iterator[Chunk]:
    """The records of a file in order, without its first `skip` chunks; of Parquet and Arrow only the columns `fields`.

    Raises:
        UserError: the file is damaged, cut short, or lacks a column.
    """
    if format in ("parquet", "arrow"):
        batches = _parquet_batches(path, fields) if format == "parquet" else _arrow_batches(path, fields)
        first = 1
        for number, (batch, done) in enumerate(batches):
            if number >= skip:
                yield Chunk(str(path), first, format, batch.to_pylist(), done)
            first += batch.num_rows
        return
    try:
        with path.open("rb") as file:
            blocks = (
                _decompressed(file, path) if path.suffix.lower() == ".zst" else iter(lambda: file.read(READ_BYTES), b"")
            )
            first = 1
            for number, lines in enumerate([[b"".join(blocks)]] if format == "document" else _line_groups(blocks)):
                if number >= skip:
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


def _columns(path: Path, names: Sequence[str], fields: Sequence[str]) -> list[str]:
    columns = [field for field in fields if field in names]
    if not columns:
        raise UserError(f"{path}: no column {fields[0]}; it has {', '.join(names)}")
    return columns


def _parquet_batches(path: Path, fields: Sequence[str]) -> Iterator[tuple[pyarrow.RecordBatch, int]]:
    """Rows of a Parquet file, and how far into it they are, about."""
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        columns = _columns(path, file.schema_arrow.names, fields)
        rows, size = 0, path.stat().st_size
        for batch in file.iter_batches(PARQUET_ROWS, columns=columns, use_threads=False):
            rows += batch.num_rows
            yield batch, size * rows // max(1, file.metadata.num_rows)
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{path}: cannot be read as Parquet: {str(error).splitlines()[0]}") from error


def _arrow_batches(path: Path, fields: Sequence[str]) -> Iterator[tuple[pyarrow.RecordBatch, int]]:
    """Rows of an Arrow stream, as `datasets` writes them, and how far into it they are."""
    import pyarrow

    try:
        with pyarrow.memory_map(str(path)) as file, pyarrow.ipc.open_stream(file) as stream:
            columns = _columns(path, stream.schema.names, fields)
            for batch in stream:
                for first in range(0, batch.num_rows, PARQUET_ROWS):
                    yield batch.slice(first, PARQUET_ROWS).select(columns), file.tell()
            file.seek(file.size() - len(END_OF_STREAM))
            if file.read() != END_OF_STREAM:
                raise UserError(f"{path}: the Arrow stream has no end; the file was cut short")
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{path}: cannot be read as an Arrow stream: {str(error).splitlines()[0]}") from error
