"""The preparation of a corpus: read, tokenise in several processes, shuffle, pack, write.

The files written depend on the inputs and options alone: not on the number of processes, and of Python's or numpy's
random generators nothing is used.
"""

from __future__ import annotations

import shutil
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from megaflow import __version__
from megaflow.data.corpus.files import Int64Array, corpus_path, pack_suffix, token_dtype
from megaflow.data.corpus.manifest import EncoderInfo, Manifest, TokenizerInfo
from megaflow.data.corpus.writer import (
    CorpusWriter,
    check_name,
    locked,
    remove_corpus,
    remove_temporaries,
    temporary_path,
)
from megaflow.data.prepare.dedup import duplicates
from megaflow.data.prepare.encode import PrepareOptions, encode_all
from megaflow.data.prepare.encoders import encoder_version
from megaflow.data.prepare.readers import Chunk, Format, input_files, read_chunks
from megaflow.data.prepare.shuffle import Limits, packed, shuffled, write_in_order
from megaflow.data.prepare.spool import Mark, Spool
from megaflow.data.sources import heldout_prefix
from megaflow.data.tokenizer import Tokenizer, load_tokenizer
from megaflow.errors import UserError

Progress = Callable[[str, int, int], None]
"""Called with what is being done ("read" or "shuffle"), and how many bytes or tokens of it are done, of how many."""
FREE = ("tokenizer", "dedup", "seed", "language", "workers", "max_bad", "overwrite", "command")
"""Options that what is kept of a preparation does not depend on; the tokenizer is compared by its content."""


@dataclass
class PrepareReport:
    """What a preparation did: the manifests written, and the first few records it could not use."""

    manifest: Manifest | None = None
    heldout: Manifest | None = None
    records: int = 0
    num_bad: int = 0
    num_too_long: int = 0
    num_compared: int = 0
    num_duplicates: int = 0
    bad: list[str] = field(default_factory=list)
    too_long: list[str] = field(default_factory=list)


def prepare_corpus(
    prefix: str | Path,
    inputs: Sequence[str | Path],
    options: PrepareOptions,
    progress: Progress | None = None,
    limits: Limits | None = None,
) -> PrepareReport:
    """Make the corpus `<prefix>` (and `<prefix>.heldout`) of the input files, in their order.

    Nothing appears under a final name unless everything succeeded. A corpus that is replaced is there whole until the
    new one is complete beside it; while they change places there is none.

    Tokenised documents are kept in the folder `.tmp-<name>.work` until the corpus is complete. However a preparation
    ends before that, by an error, Ctrl-C or kill -9, the same call continues it, and the corpus is the one that an
    undisturbed preparation gives.

    Args:
        limits: on what is held in memory; the corpus does not depend on them.

    Raises:
        UserError: an input or option is wrong, too many records are bad, there is nothing to train on, another process
            is preparing a corpus of this name, or it cannot be written.
    """
    prefix = Path(prefix)
    try:
        _check_place(prefix, options)
        files = input_files(inputs, options.txt_per_line)
        tokenizer = load_tokenizer(options.tokenizer)
        prefix.parent.mkdir(parents=True, exist_ok=True)
        with locked(prefix):
            _check_place(prefix, options)  # another process may have come before
            return _prepare(prefix, files, options, tokenizer, progress, limits or Limits())
    except OSError as error:  # of the outputs: readers name their own files
        where = f"{prefix}: " + (f"{error.filename}: " if error.filename else "")
        raise UserError(
            f"{where}cannot be written ({error.strerror or error}); give another OUT, or make room or leave to write "
            "there"
        ) from error


def _check_place(prefix: Path, options: PrepareOptions) -> None:
    """Refuse a name that cannot be a corpus's, and one that is taken."""
    check_name(prefix)
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
    prefix: Path,
    files: Sequence[tuple[Path, Format]],
    options: PrepareOptions,
    tokenizer: Tokenizer,
    progress: Progress | None,
    limits: Limits,
) -> PrepareReport:
    for side in (prefix, heldout_prefix(prefix)):
        remove_temporaries(side)
    about = TokenizerInfo.of(tokenizer)
    made_by = {
        "version of megaflow": __version__,
        "tokenizer": about.model_dump(exclude={"path"}),
        "encoder": options.encoder and encoder_version(options.encoder),
        "options": {name: value for name, value in asdict(options).items() if name not in FREE},
    }
    status = [(str(path), path.stat()) for path, _ in files]
    unchanged = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in status]
    masked = options.format.loss == "response"
    folder = temporary_path(prefix, "work")
    spool = Spool(folder, token_dtype(tokenizer.vocab_size), masked, made_by, unchanged, limits.piece_bytes)
    try:
        with spool:
            if spool.discarded:
                _say(f"{prefix}: what an earlier run kept is of other {', '.join(spool.discarded)}: discarded")
            elif spool.mark.records:
                _say(f"{prefix}: continues after the first {spool.mark.records:,} records, which an earlier run kept")
            _encode(files, options, spool, progress)
            report = _write(prefix, spool, options, about, progress, limits)
    except BaseException:
        if spool.saved.documents:
            _say(
                f"{prefix}: {spool.saved.records:,} records are kept in {folder}: the same command continues after them"
            )
        else:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    shutil.rmtree(folder)
    return report


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def _encode(
    files: Sequence[tuple[Path, Format]], options: PrepareOptions, spool: Spool, progress: Progress | None
) -> None:
    """Tokenise what the spool does not have yet."""
    sizes = [path.stat().st_size for path, _ in files]
    begun = spool.mark
    places: deque[tuple[int, int]] = deque()  # of the chunks on their way: file, number in it

    def chunks() -> Iterator[Chunk]:
        for number, (path, format) in enumerate(files[begun.inputs :], start=begun.inputs):
            before, skip = sum(sizes[:number]), begun.chunks if number == begun.inputs else 0
            for chunk_number, chunk in enumerate(
                read_chunks(path, format, options.format.fields, skip), start=skip + 1
            ):
                if progress is not None:
                    progress("read", before + chunk.bytes_read, sum(sizes))
                places.append((number, chunk_number))
                yield chunk

    for encoded in encode_all(chunks(), options, begun.records):
        spool.add(encoded, *places.popleft())
    spool.complete(len(files))


def _check(prefix: Path, mark: Mark, documents: int, heldout: int, max_bad: float) -> None:
    """Refuse too many bad records, and nothing to train on."""
    if mark.num_bad > max_bad * mark.records:
        raise UserError(
            f"{mark.num_bad} of {mark.records} records cannot be used, more than --max-bad {max_bad:g} allows; "
            f"the first: {mark.bad[0]}"
        )
    if documents == heldout:
        left_out = f", {mark.num_too_long} are longer than --seq-length" if mark.num_too_long else ""
        raise UserError(
            f"{prefix}: no documents to train on: of {mark.records} records {heldout} are held out{left_out}; give "
            "inputs with more text, or other --heldout or --seq-length"
        )


def _write(
    prefix: Path,
    spool: Spool,
    options: PrepareOptions,
    tokenizer: TokenizerInfo,
    progress: Progress | None,
    limits: Limits,
) -> PrepareReport:
    """Leave out duplicates, shuffle, pack and write both sides of the spooled documents."""
    if options.dedup and spool.mark.documents:
        spool.left_out = duplicates(spool, limits.partition_documents)
    sums = np.zeros((2, 3), np.int64)  # documents, bytes and loss bytes; of those to train on and of those held out
    for rows in spool.rows():
        for side in (0, 1):
            chosen = rows[rows["heldout"] == side]
            sums[side] += [len(chosen), chosen["bytes"].sum(), chosen["loss_bytes"].sum()]
    documents, mark = int(sums[:, 0].sum()), spool.mark
    _check(prefix, mark, documents, int(sums[1, 0]), options.max_bad)
    report = PrepareReport(
        records=mark.records,
        num_compared=mark.num_compared,
        num_duplicates=mark.documents - documents,
        num_bad=mark.num_bad,
        num_too_long=mark.num_too_long,
        bad=list(mark.bad),
        too_long=list(mark.too_long),
    )
    with ExitStack() as stack:
        writers = [
            (bool(side), stack.enter_context(CorpusWriter(heldout_prefix(prefix) if side else prefix, spool.dtype)))
            for side in (0, 1)
            if sums[side, 0]
        ]
        places = shuffled(options.seed, documents)
        packs: Sequence[int | None] = [None, None]
        if options.seq_length is not None:
            places, packs = packed(spool, places, options.seq_length, writers)
        show = None if progress is None else partial(progress, "shuffle")
        write_in_order(spool, places, writers, show, limits)
        manifests = [
            writer.complete(_manifest(options, tokenizer, report, sums[int(held)], number, int(sums[1, 0])))
            for (held, writer), number in zip(writers, packs, strict=False)
        ]
        # the old corpus goes first, the new one's manifest comes last: held-out documents are never those of another
        remove_corpus(prefix)
        remove_corpus(heldout_prefix(prefix))
        for _, writer in reversed(writers):
            writer.commit()
    report.manifest, report.heldout = (*manifests, None)[:2]
    return report


def _manifest(
    options: PrepareOptions,
    tokenizer: TokenizerInfo,
    report: PrepareReport,
    sums: Int64Array,
    packs: int | None,
    heldout_documents: int,
) -> Manifest:
    format = options.format
    encoder = None
    if options.encoder not in (None, tokenizer.library):
        encoder = EncoderInfo(
            library=options.encoder, version=encoder_version(options.encoder), compared=report.num_compared
        )
    return Manifest(
        kind=format.kind,
        language=options.language,
        documents=0,
        tokens=0,
        loss_tokens=0,
        bytes=int(sums[1]),
        loss_bytes=int(sums[2]),
        tokenizer=tokenizer,
        encoder=encoder,
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
        duplicates=report.num_duplicates,
        command=options.command,
    )
