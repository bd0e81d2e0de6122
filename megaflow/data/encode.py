"""Records to token ids, in several processes with their order kept."""

from __future__ import annotations

import signal
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing import get_context

import numpy as np
import numpy.typing as npt

from megaflow.data.corpus import Int64Array, token_dtype
from megaflow.data.readers import BadRecord, Chunk
from megaflow.data.templates import HELDOUT, ExampleFormat, chosen
from megaflow.data.tokenizer import Tokenizer, load_tokenizer
from megaflow.errors import UserError

SHOWN = 5
"""Bad records and too long examples that are named; all are counted."""
CHUNKS_AHEAD = 4
"""Chunks given out per process before their results are waited for."""


@dataclass(frozen=True)
class PrepareOptions:
    """What to make of the inputs; see `megaflow prepare --help`."""

    format: ExampleFormat
    language: str
    tokenizer: str
    seq_length: int | None = None
    heldout: float = 0.01
    seed: int = 0
    workers: int = 1
    max_bad: float = 0.01
    txt_per_line: bool = False
    overwrite: bool = False
    command: str = ""


@dataclass
class Encoded:
    """A chunk's documents: tokens back to back and one entry per document in the arrays.

    Attributes:
        tokens, mask: ids, and 0 where a token carries no loss (None if all do).
        lengths, bytes, loss_bytes, heldout: per document.
        records: how many records the chunk had; blank lines are none.
        bad, too_long: `file:line: reason` of the first few; `num_bad`, `num_too_long` count all.
    """

    tokens: np.ndarray
    mask: npt.NDArray[np.uint8] | None
    lengths: npt.NDArray[np.int32]
    bytes: Int64Array
    loss_bytes: Int64Array
    heldout: npt.NDArray[np.bool_]
    records: int
    num_bad: int
    num_too_long: int
    bad: list[str]
    too_long: list[str]


@lru_cache(maxsize=1)
def _tokenizer(path: str) -> Tokenizer:
    return load_tokenizer(path)


def encode_chunk(chunk: Chunk, options: PrepareOptions) -> Encoded:
    """Tokenise a chunk's records; runs in a worker process."""
    tokenizer = _tokenizer(options.tokenizer)
    bad: list[str] = []
    examples, numbers = [], []
    blank = 0
    for number, record in enumerate(chunk.records, start=chunk.first):
        if chunk.format in ("jsonl", "lines") and (not record or record.isspace()):
            blank += 1
            continue
        try:
            examples.append(options.format.example(record, chunk.format))
            numbers.append(number)
        except BadRecord as reason:
            bad.append(f"{chunk.file}:{number}: {reason}")
    segments = [segment for example in examples for segment in example.segments]
    ids = iter(tokenizer.encode_batch([segment.text for segment in segments]))
    start, end = tokenizer.start_id, tokenizer.eos_id
    tokens: list[int] = []
    mask: list[npt.NDArray[np.uint8]] = []
    rows: list[tuple[int, int, int, bool]] = []
    too_long: list[str] = []
    for number, example in zip(numbers, examples, strict=True):
        pieces = [next(ids) for _ in example.segments]
        length = sum(map(len, pieces)) + 2
        if options.seq_length is not None and length > options.seq_length:
            too_long.append(f"{chunk.file}:{number}: {length} tokens")
            continue
        tokens += [start, *(i for piece in pieces for i in piece), end]
        bits = [
            np.full(len(piece), segment.loss, np.uint8) for segment, piece in zip(example.segments, pieces, strict=True)
        ]
        mask += [np.ones(1, np.uint8), *bits, np.ones(1, np.uint8)]
        sizes = [(len(segment.text.encode()), segment.loss) for segment in example.segments]
        held = chosen(example.key, HELDOUT, options.heldout)
        rows.append((length, sum(size for size, _ in sizes), sum(size for size, loss in sizes if loss), held))
    columns = np.array(rows, dtype=np.int64).reshape(-1, 4)
    masked = options.format.loss == "response" and bool(mask)
    return Encoded(
        tokens=np.array(tokens, dtype=token_dtype(tokenizer.vocab_size)),
        mask=np.concatenate(mask) if masked else None,
        lengths=columns[:, 0].astype(np.int32),
        bytes=columns[:, 1],
        loss_bytes=columns[:, 2],
        heldout=columns[:, 3].astype(np.bool_),
        records=len(chunk.records) - blank,
        num_bad=len(bad),
        num_too_long=len(too_long),
        bad=bad[:SHOWN],
        too_long=too_long[:SHOWN],
    )


def _reset_signals() -> None:
    """Leave Ctrl-C to the parent, which stops the workers; end on SIGTERM as processes do."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def encode_all(chunks: Iterator[Chunk], options: PrepareOptions) -> Iterator[Encoded]:
    """The result of each chunk, in order, from `options.workers` processes.

    Raises:
        UserError: a worker was killed.
    """
    if options.workers == 1:
        yield from (encode_chunk(chunk, options) for chunk in chunks)
        return
    pool = ProcessPoolExecutor(options.workers, mp_context=get_context("fork"), initializer=_reset_signals)
    waiting: deque[Future[Encoded]] = deque()
    try:
        for chunk in chunks:
            waiting.append(pool.submit(encode_chunk, chunk, options))
            if len(waiting) > CHUNKS_AHEAD * options.workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise UserError("a worker process was killed, most likely for memory; use fewer --workers") from error
    except BlockingIOError as error:
        raise UserError("the system has no room for more processes; use fewer --workers") from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
