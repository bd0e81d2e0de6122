"""The preparation of a corpus: read, tokenise in several processes, shuffle, pack, write.

The files written depend on the inputs and options alone: not on the number of processes, and of Python's or numpy's
random generators nothing is used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt

from megaflow.data.corpus import Int64Array, corpus_path, pack_suffix, token_dtype
from megaflow.data.encode import SHOWN, Encoded, PrepareOptions, encode_all
from megaflow.data.manifest import EncoderInfo, Manifest, TokenizerInfo
from megaflow.data.order import hash_ints, perm_many
from megaflow.data.packing import pack
from megaflow.data.readers import Chunk, file_format, read_chunks
from megaflow.data.sources import heldout_prefix
from megaflow.data.tokenizer import load_tokenizer
from megaflow.data.writer import CorpusWriter, remove_corpus, remove_temporaries, temporary_path
from megaflow.errors import UserError

GATHER_TOKENS = 1 << 22
"""Tokens copied at a time into the shuffled corpus."""

Progress = Callable[[int], None]
"""Called with the number of input bytes done so far."""


@dataclass
class PrepareReport:
    """What a preparation did: the manifests written, and the first few records it could not use."""

    manifest: Manifest | None = None
    heldout: Manifest | None = None
    records: int = 0
    num_bad: int = 0
    num_too_long: int = 0
    num_compared: int = 0
    bad: list[str] = field(default_factory=list)
    too_long: list[str] = field(default_factory=list)


class _Spool:
    """Encoded documents in input order: tokens and mask in temporary files, one entry per document in memory."""

    def __init__(self, prefix: Path, dtype: np.dtype, masked: bool) -> None:
        self.dtype = dtype
        self.paths = [temporary_path(prefix, f"spool-{part}") for part in ("tokens", "mask")]
        self.files: list[IO[bytes]] = [path.open("wb") for path in self.paths]
        self.masked = masked
        self.columns: list[npt.NDArray[np.int64]] = []

    def __enter__(self) -> _Spool:
        return self

    def __exit__(self, *_: object) -> None:
        for file, path in zip(self.files, self.paths, strict=True):
            file.close()
            path.unlink(missing_ok=True)

    def add(self, encoded: Encoded) -> None:
        self.files[0].write(encoded.tokens.tobytes())
        if self.masked and encoded.mask is not None:
            self.files[1].write(encoded.mask.tobytes())
        columns = (encoded.lengths, encoded.bytes, encoded.loss_bytes, encoded.heldout)
        self.columns.append(np.stack([column.astype(np.int64) for column in columns]))

    def documents(self) -> npt.NDArray[np.int64]:
        """[4, D] length, bytes, loss bytes and held out or not, of every document."""
        return np.concatenate([np.empty((4, 0), np.int64), *self.columns], axis=1)

    def copy(self, writer: CorpusWriter, order: Int64Array, lengths: Int64Array) -> None:
        """Append the documents `order` to `writer`; `lengths` are those of all documents."""
        for file in self.files:
            file.flush()
        tokens = np.memmap(self.paths[0], dtype=self.dtype, mode="r")
        mask = np.memmap(self.paths[1], dtype=np.uint8, mode="r") if self.masked else None
        starts = np.cumsum(lengths) - lengths
        cuts = np.searchsorted(np.cumsum(lengths[order]), np.arange(GATHER_TOKENS, lengths.sum(), GATHER_TOKENS))
        for part in np.split(order, np.unique(cuts)):
            if len(part):
                sizes = lengths[part]
                index = np.repeat(starts[part] - (np.cumsum(sizes) - sizes), sizes) + np.arange(sizes.sum())
                writer.add_documents(tokens[index], sizes.astype(np.int32), None if mask is None else mask[index])


def prepare_corpus(
    prefix: str | Path, inputs: Sequence[str | Path], options: PrepareOptions, progress: Progress | None = None
) -> PrepareReport:
    """Make the corpus `<prefix>` (and `<prefix>.heldout`) of the input files, in their order.

    Nothing appears under a final name unless everything succeeded. A corpus that is replaced is there whole until the
    new one is complete beside it; while they change places there is none.

    Raises:
        UserError: an input or option is wrong, too many records are bad, there is nothing to train on, or the corpus
            cannot be written.
    """
    prefix = Path(prefix)
    try:
        return _prepare(prefix, inputs, options, progress)
    except OSError as error:  # of the outputs: readers name their own files
        where = f"{prefix}: " + (f"{error.filename}: " if error.filename else "")
        raise UserError(
            f"{where}cannot be written ({error.strerror or error}); give another OUT, or make room or leave to write "
            "there"
        ) from error


def _check_place(prefix: Path, options: PrepareOptions) -> None:
    """Refuse a name that cannot be a corpus's, and one that is taken."""
    if prefix.name in ("", ".."):
        raise UserError(f"{prefix}: not a corpus's name; OUT is a folder and the start of a file name, as data/en")
    suffixes = ["bin", "idx", "mask", "json"]
    if options.seq_length is not None:
        suffixes.append(pack_suffix(options.seq_length))
    for side in (prefix, heldout_prefix(prefix)):
        for path in (corpus_path(side, suffix) for suffix in suffixes):
            if path.is_dir():
                raise UserError(f"{path}: is a folder, where a file of the corpus belongs; choose another name")
    if corpus_path(prefix, "json").exists() and not options.overwrite:
        raise UserError(f"{prefix}: a corpus is there already; choose another name or give --overwrite")


def _prepare(
    prefix: Path, inputs: Sequence[str | Path], options: PrepareOptions, progress: Progress | None
) -> PrepareReport:
    _check_place(prefix, options)
    formats = [file_format(Path(path), options.txt_per_line) for path in inputs]
    tokenizer = load_tokenizer(options.tokenizer)
    dtype = token_dtype(tokenizer.vocab_size)
    prefix.parent.mkdir(parents=True, exist_ok=True)
    for side in (prefix, heldout_prefix(prefix)):
        remove_temporaries(side)
    report = PrepareReport()

    def chunks() -> Iterator[Chunk]:
        before = 0
        for path, format in zip(map(Path, inputs), formats, strict=True):
            for chunk in read_chunks(path, format, options.format.fields):
                if progress is not None:
                    progress(before + chunk.bytes_read)
                yield chunk
            before += path.stat().st_size

    with _Spool(prefix, dtype, options.format.loss == "response") as spool:
        for encoded in encode_all(chunks(), options):
            spool.add(encoded)
            _count(report, encoded)
        _check_bad(report, options.max_bad)
        _write(prefix, spool, options, TokenizerInfo.of(tokenizer), report)
    return report


def _count(report: PrepareReport, encoded: Encoded) -> None:
    report.records += encoded.records
    report.num_bad += encoded.num_bad
    report.num_too_long += encoded.num_too_long
    report.num_compared += encoded.comparison.documents
    report.bad += encoded.bad[: SHOWN - len(report.bad)]
    report.too_long += encoded.too_long[: SHOWN - len(report.too_long)]


def _check_bad(report: PrepareReport, max_bad: float) -> None:
    if report.num_bad > max_bad * report.records:
        raise UserError(
            f"{report.num_bad} of {report.records} records cannot be used, more than --max-bad {max_bad:g} allows; "
            f"the first: {report.bad[0]}"
        )


def _write(
    prefix: Path, spool: _Spool, options: PrepareOptions, tokenizer: TokenizerInfo, report: PrepareReport
) -> None:
    """Shuffle, pack and write both sides of the spooled documents."""
    columns = spool.documents()
    lengths, heldout = columns[0], columns[3].astype(np.bool_)
    if not np.any(~heldout):
        left_out = f", {report.num_too_long} are longer than --seq-length" if report.num_too_long else ""
        raise UserError(f"no documents to train on: of {report.records} records {heldout.sum()} are held out{left_out}")
    total = len(lengths)
    order = perm_many(hash_ints(options.seed, total), total, np.arange(total, dtype=np.int64))
    with ExitStack() as stack:
        finished = []
        for held in (True, False):
            chosen_documents = order[heldout[order] == held]
            if len(chosen_documents):
                side = heldout_prefix(prefix) if held else prefix
                writer = stack.enter_context(CorpusWriter(side, spool.dtype))
                packs = None
                if options.seq_length is not None:
                    inside, before = pack(lengths[chosen_documents].astype(np.int32), options.seq_length)
                    chosen_documents, packs = chosen_documents[inside], len(before) - 1
                    writer.write_packs(options.seq_length, before)
                spool.copy(writer, chosen_documents, lengths)
                sums = columns[1:3, chosen_documents].sum(axis=1)
                manifest = writer.complete(_manifest(options, tokenizer, report, sums, packs, int(heldout.sum())))
                finished.append((writer, manifest, held))
        # the old corpus goes first, the new one's manifest comes last: held-out documents are never those of another
        remove_corpus(prefix)
        remove_corpus(heldout_prefix(prefix))
        for writer, manifest, held in finished:
            writer.commit()
            if held:
                report.heldout = manifest
            else:
                report.manifest = manifest


def _manifest(
    options: PrepareOptions,
    tokenizer: TokenizerInfo,
    report: PrepareReport,
    sums: Int64Array,
    packs: int | None,
    heldout_documents: int,
) -> Manifest:
    format = options.format
    other = None if options.encoder in (None, tokenizer.library) else options.encoder
    return Manifest(
        kind=format.kind,
        language=options.language,
        documents=0,
        tokens=0,
        loss_tokens=0,
        bytes=int(sums[0]),
        loss_bytes=int(sums[1]),
        tokenizer=tokenizer,
        encoder=None if other is None else EncoderInfo.of(other, report.num_compared),
        shuffle_seed=options.seed,
        seq_length=options.seq_length,
        packs=packs,
        template=format.template or None,
        loss=format.loss,
        plain_fraction=format.plain_fraction if format.kind == "instruction" else None,
        heldout=options.heldout,
        heldout_documents=heldout_documents,
        bad_records=report.num_bad,
        too_long=report.num_too_long,
        command=options.command,
    )
