"""Token files that other tools wrote, read a group of documents at a time: Megatron-LM's and datatrove's.

    <prefix>.bin, .idx          Megatron's indexed dataset (MMIDIDX version 1), as written by Megatron-LM's
                                preprocess_data and megatron-core's IndexedDatasetBuilder, which may put several
                                sequences into a document, and by datatrove's MegatronDocumentTokenizer
    <prefix>.ds, .ds.index      datatrove's DocumentTokenizer: raw tokens, and the u64 end of each document in tokens

Nothing in them is believed before it is checked against the rest: they come without checksums.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import numpy as np
import numpy.typing as npt

from megaflow.data.corpus.files import HEADER, MAGIC, Int64Array, corpus_path
from megaflow.errors import UserError

ID_TYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
"""Megatron's dtype codes that hold ids; 6 and 7 are floating point."""
GROUP_DOCUMENTS = 1 << 18
"""Documents whose index entries are looked at together."""
GROUP_TOKENS = 1 << 22
"""Tokens handed out together, unless one document has more."""

Documents = tuple[np.ndarray, Int64Array]
"""`tokens` of documents back to back, and the `lengths` of the documents, some of which may be 0."""


def is_foreign(prefix: Path) -> bool:
    """Whether token files are there without a manifest of ours."""
    known = corpus_path(prefix, "json").exists()
    return not known and any(corpus_path(prefix, suffix).exists() for suffix in ("idx", "bin", "ds"))


def tokens_path(prefix: Path) -> Path:
    """The file that holds the tokens of a foreign corpus."""
    return corpus_path(prefix, "ds" if corpus_path(prefix, "ds").exists() else "bin")


def read_foreign(prefix: Path) -> Iterator[Documents]:
    """Every document of a foreign corpus, in order.

    Raises:
        UserError: a file is missing, cut short, or contradicts itself; some documents may have been given by then.
    """
    path = tokens_path(prefix)
    return _read_datatrove(path) if path.suffix == ".ds" else _read_megatron(prefix)


def _read_megatron(prefix: Path) -> Iterator[Documents]:
    path = corpus_path(prefix, "idx")
    index, data = _map(path), _map(corpus_path(prefix, "bin"))
    if len(index) < HEADER.size:
        _refuse(path, f"{len(index)} bytes are too few for a header")
    magic, version, code, sequences, entries = HEADER.unpack(index[: HEADER.size].tobytes())
    if magic != MAGIC or version != 1:
        _refuse(path, "not an MMIDIDX index of version 1")
    if code not in ID_TYPES:
        _refuse(path, f"dtype code {code} does not hold token ids; codes {', '.join(map(str, ID_TYPES))} do")
    size = HEADER.size + 12 * sequences + 8 * entries
    if len(index) not in (size, size + sequences) or entries == 0:  # a byte per sequence more where there are modes
        _refuse(path, f"{len(index)} bytes where {sequences} sequences and {entries - 1} documents need {size}")
    lengths = index[HEADER.size :][: 4 * sequences].view("<i4")
    offsets = index[HEADER.size + 4 * sequences :][: 8 * sequences].view("<i8")
    bounds = index[HEADER.size + 12 * sequences :][: 8 * entries].view("<i8")
    tokens = _tokens(data, np.dtype(ID_TYPES[code]), corpus_path(prefix, "bin"))
    if int(bounds[0]) != 0 or int(bounds[-1]) != sequences:
        _refuse(path, f"the documents hold sequences {bounds[0]} to {int(bounds[-1]) - 1} of {sequences}")
    done = 0
    for first in range(0, entries - 1, GROUP_DOCUMENTS):
        group = bounds[first : first + GROUP_DOCUMENTS + 1].astype(np.int64)
        _check_ascending(path, group, sequences, first)
        sizes = lengths[group[0] : group[-1]].astype(np.int64)
        ends = done + np.cumsum(sizes)
        wrong = (sizes < 0) | (offsets[group[0] : group[-1]] != (ends - sizes) * tokens.itemsize)
        if wrong.any():
            at = int(np.argmax(wrong))
            _refuse(path, f"sequence {group[0] + at} has length {sizes[at]} at byte {offsets[group[0] + at]}")
        ends = np.concatenate([[done], ends])[group - group[0]]
        yield from _cut(tokens, ends, corpus_path(prefix, "bin"))
        done = int(ends[-1])
    if done != len(tokens):
        _refuse(corpus_path(prefix, "bin"), f"{len(tokens)} tokens where the index has {done}")


def _read_datatrove(path: Path) -> Iterator[Documents]:
    index, data = _map(path.with_name(f"{path.name}.index")), _map(path)
    if len(index) % 8 or not len(index):
        _refuse(path, f"its .index has {len(index)} bytes, which are no list of document ends")
    bounds = index.view("<u8")
    total = int(bounds[-1])
    itemsize = next((size for size in (2, 4) if total * size == len(data)), None)
    if itemsize is None:
        _refuse(path, f"{len(data)} bytes are not the {total} tokens that its .index has, of 2 or 4 bytes")
    tokens = _tokens(data, np.dtype(f"<u{itemsize}"), path)
    done = 0
    for first in range(0, len(bounds), GROUP_DOCUMENTS):
        ends = np.concatenate([[done], bounds[first : first + GROUP_DOCUMENTS].astype(np.int64)])
        _check_ascending(path, ends, total, first)
        yield from _cut(tokens, ends, path)
        done = int(ends[-1])


def _cut(tokens: np.ndarray, ends: Int64Array, path: Path) -> Iterator[Documents]:
    """The documents between consecutive `ends`, about `GROUP_TOKENS` at a time."""
    if int(ends[-1]) > len(tokens):
        _refuse(path, f"{len(tokens)} tokens where the index has {ends[-1]} or more")
    first = 0
    while first < len(ends) - 1:
        last = int(np.searchsorted(ends, ends[first] + GROUP_TOKENS, side="right")) - 1
        last = max(last, first + 1)
        yield tokens[ends[first] : ends[last]], np.diff(ends[first : last + 1])
        first = last


def _check_ascending(path: Path, bounds: Int64Array, limit: int, first: int) -> None:
    """Refuse documents that begin before the one before them, or outside `0 .. limit`."""
    wrong = (np.diff(bounds) < 0) | (bounds[1:] > limit) | (bounds[1:] < 0)
    if wrong.any():
        at = int(np.argmax(wrong))
        _refuse(path, f"document {first + at} is said to run from {bounds[at]} to {bounds[at + 1]} of {limit}")


def _map(path: Path) -> npt.NDArray[np.uint8]:
    """The bytes of a file, mapped."""
    try:
        if path.stat().st_size == 0:
            return np.empty(0, dtype=np.uint8)
        return np.asarray(np.memmap(path, dtype=np.uint8, mode="r"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); a corpus is given by its prefix") from None


def _tokens(data: npt.NDArray[np.uint8], dtype: np.dtype, path: Path) -> np.ndarray:
    if len(data) % dtype.itemsize:
        _refuse(path, f"{len(data)} bytes are no whole number of tokens of {dtype.itemsize} bytes")
    return data.view(dtype)


def _refuse(path: Path, why: str) -> NoReturn:
    raise UserError(f"{path}: {why}; it was cut or damaged, write it again")
