"""Several corpora made one: shards that this project wrote, or token files of other tools."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import numpy as np

from megaflow.data.corpus.files import Int64Array, corpus_path, token_dtype
from megaflow.data.corpus.foreign import is_foreign, read_foreign, tokens_path
from megaflow.data.corpus.manifest import Manifest, TokenizerInfo
from megaflow.data.corpus.prefixes import is_url
from megaflow.data.corpus.shards import AnyCorpus, open_corpus, open_heldout_corpus
from megaflow.data.corpus.writer import CorpusWriter, check_name, locked, remove_corpus, remove_temporaries
from megaflow.data.sources import heldout_prefix
from megaflow.data.tokenizer import Tokenizer, load_tokenizer
from megaflow.errors import UserError

COPIED_TOKENS = 1 << 22
"""Tokens copied at a time, unless one document has more."""
Progress = Callable[[int], None]
"""Called with the number of bytes of tokens done so far."""


@dataclass
class MergeReport:
    """What a merge wrote.

    Attributes:
        manifest, heldout: of the corpora written.
        no_start, no_end: documents of other tools that lack our begin or end token.
        empty: documents without a token, which were left out.
    """

    manifest: Manifest | None = None
    heldout: Manifest | None = None
    documents: int = 0
    no_start: int = 0
    no_end: int = 0
    empty: int = 0


@dataclass(frozen=True)
class MergeOptions:
    """See `megaflow data merge --help`."""

    tokenizer: str | None = None
    language: str | None = None
    add_special: bool = False
    overwrite: bool = False
    command: str = ""


@dataclass
class _Written:
    """Corpora complete under temporary names, put in place together."""

    stack: ExitStack
    out: Path
    replaced: Sequence[Path]
    writers: list[CorpusWriter] = field(default_factory=list)

    def writer(self, prefix: Path, dtype: np.dtype) -> CorpusWriter:
        self.writers.append(self.stack.enter_context(CorpusWriter(prefix, dtype)))
        return self.writers[-1]

    def commit(self) -> None:
        for prefix in self.replaced:
            remove_corpus(prefix)
        for writer in reversed(self.writers):  # the corpus last: a kill leaves none without its held-out documents
            writer.commit()


def merge_corpora(
    out: Path, prefixes: Sequence[str], options: MergeOptions, progress: Progress | None = None
) -> MergeReport:
    """Write the documents of the corpora `prefixes`, in their order, as the corpus `out`.

    Corpora with a manifest, which may be URLs, keep packs, masks and held-out documents; they must agree as the shards
    of a source must. Those of other tools are taken as running text, and need `options.tokenizer` and
    `options.language`.

    Raises:
        UserError: a corpus is missing, damaged or unlike the first one; or `out` is there or cannot be written.
    """
    check_name(out)
    foreign = [is_foreign(Path(prefix)) for prefix in prefixes]
    # of other tools' corpora nothing is held out, but another merge may have made `<out>.heldout` of some
    sides = [out] if all(foreign) and not options.overwrite else [out, heldout_prefix(out)]
    for side in sides:
        if corpus_path(side, "json").exists() and not options.overwrite:
            raise UserError(f"{side}: a corpus is there already; choose another name or give --overwrite")
    replaced = {side.resolve() for side in sides}
    taken = next((prefix for prefix in prefixes if not is_url(prefix) and Path(prefix).resolve() in replaced), None)
    if taken is not None:
        raise UserError(f"{out}: would replace {taken}, which is one of the corpora to be merged; choose another name")
    if any(foreign) and not all(foreign):
        ours, theirs = prefixes[foreign.index(False)], prefixes[foreign.index(True)]
        raise UserError(f"{theirs}: has no manifest, unlike {ours}; merge the corpora without one by themselves first")
    merge = _merge_foreign if all(foreign) else _merge_shards
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with locked(out), ExitStack() as stack:
            for side in sides:
                remove_temporaries(side)
            written = _Written(stack, out, sides)
            report = merge(written, prefixes, options, progress or (lambda done: None))
            written.commit()
        return report
    except OSError as error:
        raise UserError(
            f"{out}: cannot be written ({error.strerror or error}); give another OUT, or make room"
        ) from None


def _merge_shards(written: _Written, prefixes: Sequence[str], options: MergeOptions, progress: Progress) -> MergeReport:
    corpus, held = open_corpus(prefixes), open_heldout_corpus(prefixes)
    if options.tokenizer or options.language or options.add_special:
        raise UserError(
            f"{prefixes[0]}: has a manifest; --tokenizer, --language and --add-special are for corpora without"
        )
    report = MergeReport(documents=corpus.num_documents)
    report.manifest = _copy(written, written.out, corpus, options.command, progress)
    if held is not None:
        report.heldout = _copy(written, heldout_prefix(written.out), held, options.command, lambda done: None)
    return report


def _copy(written: _Written, out: Path, corpus: AnyCorpus, command: str, progress: Progress) -> Manifest:
    manifest, done = corpus.manifest, 0
    writer = written.writer(out, token_dtype(manifest.tokenizer.vocab_size))
    for start, ends in _document_groups(corpus):
        stop = start + int(ends[-1])
        tokens = corpus.tokens(start, stop)
        mask = corpus.loss_mask(start, stop) if corpus.has_mask else None
        writer.add_documents(tokens, np.diff(ends, prepend=0).astype(np.int32), mask)
        done += tokens.nbytes
        progress(done)
    if manifest.seq_length is not None:
        last = (corpus.pack(index)[1] for index in range(corpus.num_packs))
        writer.write_packs(manifest.seq_length, np.fromiter(chain([0], last), dtype=np.int64))
    return writer.complete(manifest.model_copy(update={"blocks": {}, "command": command}))


def _document_groups(corpus: AnyCorpus) -> Iterator[tuple[int, Int64Array]]:
    """First token of a group of documents, and the ends of its documents counted from there."""
    start = document = 0
    while start < corpus.num_tokens:
        ends = corpus.starts_within(start, min(start + COPIED_TOKENS, corpus.num_tokens))
        if not len(ends):  # a document of more tokens
            ends = np.array([corpus.document_start(document + 1) - start])
        yield start, ends
        start += int(ends[-1])
        document += len(ends)


def _merge_foreign(
    written: _Written, prefixes: Sequence[str], options: MergeOptions, progress: Progress
) -> MergeReport:
    if options.tokenizer is None or options.language is None:
        raise UserError(
            f"{prefixes[0]}: has no manifest; give --tokenizer and --language of the text that it was made of"
        )
    tokenizer = load_tokenizer(options.tokenizer)
    writer = written.writer(written.out, token_dtype(tokenizer.vocab_size))
    report, num_bytes, done = MergeReport(), 0, 0
    for prefix in map(Path, prefixes):
        before = 0
        for tokens, lengths in read_foreign(prefix):
            _check_ids(tokens, tokenizer, prefix, before)
            before, done = before + len(tokens), done + tokens.nbytes
            lengths = _count(report, lengths)
            if len(lengths):
                tokens, lengths = _with_special(tokens, lengths, tokenizer, report, options.add_special)
                num_bytes += _text_bytes(tokens, lengths, tokenizer)
                writer.add_documents(tokens, lengths.astype(np.int32))
            progress(done)
    if not writer.tokens:
        raise UserError(f"{prefixes[0]}: there are no documents to merge")
    manifest = Manifest(
        kind="text",
        language=options.language,
        documents=0,
        tokens=0,
        loss_tokens=0,
        bytes=num_bytes,
        loss_bytes=num_bytes,
        tokenizer=TokenizerInfo.of(tokenizer),
        shuffle_seed=0,
        command=options.command,
    )
    report.manifest = writer.complete(manifest)
    return report


def _check_ids(tokens: np.ndarray, tokenizer: Tokenizer, prefix: Path, before: int) -> None:
    if len(tokens) and (int(tokens.min()) < 0 or int(tokens.max()) >= tokenizer.vocab_size):
        at = int(np.argmax((tokens < 0) | (tokens >= tokenizer.vocab_size)))
        raise UserError(
            f"{tokens_path(prefix)}: token {before + at} is id {tokens[at]}, outside the vocabulary of "
            f"{tokenizer.vocab_size} of {tokenizer.path}; give the tokenizer that it was made with"
        )


def _count(report: MergeReport, lengths: Int64Array) -> Int64Array:
    """The lengths without those of empty documents, which are counted."""
    kept = lengths[lengths > 0]
    report.empty += len(lengths) - len(kept)
    report.documents += len(kept)
    if len(kept) and int(kept.max()) > np.iinfo(np.int32).max:
        raise UserError(f"a document has {kept.max()} tokens, more than an index can hold; split it")
    return kept


def _with_special(
    tokens: np.ndarray, lengths: Int64Array, tokenizer: Tokenizer, report: MergeReport, add: bool
) -> tuple[np.ndarray, Int64Array]:
    """Count documents without begin or end token, and give those they lack to them if `add`."""
    ends = np.cumsum(lengths)
    starts = ends - lengths
    no_start, no_end = tokens[starts] != tokenizer.start_id, tokens[ends - 1] != tokenizer.eos_id
    report.no_start += int(no_start.sum())
    report.no_end += int(no_end.sum())
    if not add:
        return tokens, lengths
    places = np.concatenate([ends[no_end], starts[no_start]])  # of two at one place the first stays first
    values = np.repeat([tokenizer.eos_id, tokenizer.start_id], [no_end.sum(), no_start.sum()])
    return np.insert(tokens.astype(np.int64), places, values), lengths + no_start + no_end


def _text_bytes(tokens: np.ndarray, lengths: Int64Array, tokenizer: Tokenizer) -> int:
    """Bytes of the documents' text."""
    return sum(len(tokenizer.decode(ids.tolist()).encode()) for ids in np.split(tokens, np.cumsum(lengths)[:-1]))
