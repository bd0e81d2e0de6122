"""Records to token ids, in several processes with their order kept."""

from __future__ import annotations

import ctypes
import signal
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing import get_context
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from megaflow.data.corpus.files import Int64Array, token_dtype
from megaflow.data.prepare.encoders import Encode, EncoderName, Ids, differences, load_encoder, own_encoder
from megaflow.data.prepare.readers import BadRecord, Chunk
from megaflow.data.prepare.templates import COMPARED, HELDOUT, Example, ExampleFormat, chosen
from megaflow.data.tokenizer import Tokenizer, load_tokenizer
from megaflow.errors import UserError

SHOWN = 5
"""Bad records and too long examples that are named; all are counted."""
CHUNKS_AHEAD = 4
"""Chunks given out per process before their results are waited for."""
PR_SET_PDEATHSIG = 1
"""Of Linux's prctl: the signal to send to a process when its parent ends."""
COMPARED_SHARE = 0.01
"""Share of documents, by hash of their text, that the tokenizer itself encodes too where another library does."""
COMPARED_FIRST = 1000
"""Records that are compared all of them, from the first on, in whole chunks."""


@dataclass(frozen=True)
class PrepareOptions:
    """What to make of the inputs; see `megaflow prepare --help`. `encoder`: None for the tokenizer's own library."""

    format: ExampleFormat
    language: str
    tokenizer: str
    encoder: EncoderName | None = None
    seq_length: int | None = None
    heldout: float = 0.01
    dedup: bool = True
    seed: int = 0
    workers: int = 1
    max_bad: float = 0.01
    txt_per_line: bool = False
    overwrite: bool = False
    command: str = ""


@dataclass(frozen=True)
class Comparison:
    """How many documents both encoded, how many came out different, and where the first one does."""

    documents: int = 0
    different: int = 0
    first: str = ""


@dataclass
class Encoded:
    """A chunk's documents: tokens back to back and one entry per document in the arrays.

    Attributes:
        tokens, mask: ids, and 0 where a token carries no loss (None if all do).
        lengths, bytes, loss_bytes, heldout: per document.
        hashes: [D, 2] 128 bits of each document's text.
        records: how many records the chunk had; blank lines are none.
        bad, too_long: `file:line: reason` of the first few; `num_bad`, `num_too_long` count all.
        comparison: of the encoder with the tokenizer itself.
    """

    tokens: np.ndarray
    mask: npt.NDArray[np.uint8] | None
    lengths: npt.NDArray[np.int32]
    bytes: Int64Array
    loss_bytes: Int64Array
    heldout: npt.NDArray[np.bool_]
    hashes: npt.NDArray[np.uint64]
    records: int
    num_bad: int
    num_too_long: int
    bad: list[str]
    too_long: list[str]
    comparison: Comparison


@lru_cache(maxsize=1)
def _tokenizer(path: str) -> Tokenizer:
    return load_tokenizer(path)


@lru_cache(maxsize=1)
def _encoder(path: str, name: EncoderName | None) -> Encode:
    tokenizer = _tokenizer(path)
    return own_encoder(tokenizer) if name in (None, tokenizer.library) else load_encoder(name, tokenizer)


def encode_chunk(chunk: Chunk, options: PrepareOptions, compare_all: bool = False) -> Encoded:
    """Tokenise a chunk's records; runs in a worker process.

    Args:
        compare_all: with every document, not a share of them, see whether another encoder gives the tokenizer's ids.
    """
    examples, places, bad, records = _examples(chunk, options.format)
    segments = [segment for example in examples for segment in example.segments]
    document = np.repeat(np.arange(len(examples)), [len(example.segments) for example in examples])  # of each segment
    ids = _encoder(options.tokenizer, options.encoder)([segment.text for segment in segments])
    comparison = _compare(examples, document, ids, places, compare_all, options)

    def per_document(values: npt.ArrayLike) -> Int64Array:
        return np.bincount(document, weights=values, minlength=len(examples)).astype(np.int64)

    ends = np.array([segment.ends for segment in segments], np.int64)
    ends[np.flatnonzero(np.diff(document, append=len(examples)))] = 1
    lengths = per_document(ids.lengths + ends) + 1
    sizes = np.array([len(segment.text.encode()) for segment in segments], np.int64)
    loss = np.array([segment.loss for segment in segments], np.bool_)
    fits = lengths <= (options.seq_length or np.iinfo(np.int64).max)
    whole = fits[document]  # segments of documents that fit
    tokens, mask = _framed(ids.of(whole), ends[whole], lengths[fits], loss[whole], _tokenizer(options.tokenizer))
    too_long = [f"{places[i]}: {lengths[i]} tokens" for i in np.flatnonzero(~fits)]
    return Encoded(
        tokens=tokens,
        mask=mask if options.format.loss == "response" else None,
        lengths=lengths[fits].astype(np.int32),
        bytes=per_document(sizes)[fits],
        loss_bytes=per_document(sizes * loss)[fits],
        heldout=np.array([chosen(e.key, HELDOUT, options.heldout) for e in examples], np.bool_)[fits],
        hashes=_hashes(examples)[fits],
        records=records,
        num_bad=len(bad),
        num_too_long=len(too_long),
        bad=bad[:SHOWN],
        too_long=too_long[:SHOWN],
        comparison=comparison,
    )


def _hashes(examples: Sequence[Example]) -> npt.NDArray[np.uint64]:
    """[D, 2] hashes of documents' texts; the bounds of what the loss covers are part of a text."""
    digests = (xxhash.xxh3_128_digest("\0".join(s.text for s in example.segments).encode()) for example in examples)
    return np.frombuffer(b"".join(digests), "<u8").reshape(-1, 2)


def _framed(
    ids: Ids, ends: Int64Array, lengths: Int64Array, loss: npt.NDArray[np.bool_], tokenizer: Tokenizer
) -> tuple[np.ndarray, npt.NDArray[np.uint8]]:
    """Tokens of documents of `lengths`, with begin and ends, and their mask; `ids`, `ends`, `loss` are of segments."""
    starts = np.cumsum(lengths) - lengths
    tokens = np.full(lengths.sum(), tokenizer.eos_id, token_dtype(tokenizer.vocab_size))
    inside = np.ones(len(tokens), np.bool_)
    inside[starts] = False
    within = np.flatnonzero(inside)  # where segments and their ends are
    inside[within[(np.cumsum(ids.lengths + ends) - 1)[ends == 1]]] = False
    tokens[starts], tokens[inside] = tokenizer.start_id, ids.ids
    mask = np.ones(len(tokens), np.uint8)
    mask[inside] = np.repeat(loss, ids.lengths)
    return tokens, mask


def _is_blank(record: Any, chunk: Chunk) -> bool:
    """Whether a line is none at all."""
    return chunk.format in ("jsonl", "lines") and (not record or record.isspace())


def _examples(chunk: Chunk, format: ExampleFormat) -> tuple[list[Example], list[str], list[str], int]:
    """Documents of a chunk, `file:line` of each, what is wrong with other records, and the number of all of them."""
    examples, places, bad = [], [], []
    records = 0
    for number, record in enumerate(chunk.records, start=chunk.first):
        if _is_blank(record, chunk):
            continue
        records += 1
        place = f"{chunk.file}:{number}"
        try:
            examples.append(format.example(record, chunk.format))
            places.append(place)
        except BadRecord as reason:
            bad.append(f"{place}: {reason}")
    return examples, places, bad, records


def _compare(
    examples: Sequence[Example],
    document: Int64Array,
    ids: Ids,
    places: Sequence[str],
    compare_all: bool,
    options: PrepareOptions,
) -> Comparison:
    """Have the tokenizer itself encode some of the documents; `document` and `ids` are of their segments."""
    tokenizer = _tokenizer(options.tokenizer)
    if options.encoder in (None, tokenizer.library):
        return Comparison()
    compared = np.array([compare_all or chosen(e.key, COMPARED, COMPARED_SHARE) for e in examples], np.bool_)
    texts = [s.text for example, also in zip(examples, compared, strict=True) if also for s in example.segments]
    unequal = differences(ids.of(compared[document]), texts, tokenizer)
    if not unequal:
        return Comparison(int(compared.sum()))
    document = document[compared[document]]
    first, pieces = next(iter(unequal.items()))
    return Comparison(
        documents=int(compared.sum()),
        different=len({document[text] for text in unequal}),
        first=f"{places[document[first]]}: {options.encoder} gives {pieces}",
    )


def _reset_signals() -> None:
    """Leave Ctrl-C to the parent, which stops the workers; end on SIGTERM as processes do, and with the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with suppress(OSError, AttributeError):  # of Linux; workers of a killed parent would wait for ever
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def encode_all(chunks: Iterator[Chunk], options: PrepareOptions, before: int = 0) -> Iterator[Encoded]:
    """The result of each chunk, in order, from `options.workers` processes.

    Args:
        before: records that came before these chunks.

    Raises:
        UserError: a worker was killed, or the encoder gives other ids than the tokenizer itself.
    """
    compared = 0
    with closing(_encode_all(_with_comparison(chunks, before), options)) as results:
        for encoded in results:
            compared += encoded.comparison.documents
            if encoded.comparison.different:
                different = encoded.comparison.different
                raise UserError(
                    f"--encoder {options.encoder}: not the tokenizer's ids: {encoded.comparison.first}; of {compared} "
                    f"documents compared {different} ({different / compared:.1%}) differ; leave --encoder out"
                )
            yield encoded


def _with_comparison(chunks: Iterator[Chunk], before: int) -> Iterator[tuple[Chunk, bool]]:
    """Each chunk, and whether all of it is compared."""
    for chunk in chunks:
        compare_all = before < COMPARED_FIRST
        yield chunk, compare_all
        if compare_all:
            before += sum(not _is_blank(record, chunk) for record in chunk.records)


def _encode_all(chunks: Iterator[tuple[Chunk, bool]], options: PrepareOptions) -> Generator[Encoded]:
    if options.workers == 1:
        yield from (encode_chunk(chunk, options, compare_all) for chunk, compare_all in chunks)
        return
    pool = ProcessPoolExecutor(options.workers, mp_context=get_context("fork"), initializer=_reset_signals)
    waiting: deque[Future[Encoded]] = deque()
    try:
        for chunk, compare_all in chunks:
            waiting.append(pool.submit(encode_chunk, chunk, options, compare_all))
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
