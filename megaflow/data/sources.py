"""Sources: corpora seen as numbered windows of S tokens, which is all the sampler and the loader know of them."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from megaflow.data.corpus.blocks import Verify
from megaflow.data.corpus.files import Int32Array, Int64Array
from megaflow.data.corpus.prefixes import Paths
from megaflow.data.corpus.shards import AnyCorpus, open_corpus, open_heldout_corpus
from megaflow.data.sampler.order import window_offset
from megaflow.errors import UserError


class Source(ABC):
    """A corpus under a name, cut into windows of `seq_length`.

    `num_windows` make an epoch, of `documents` documents.
    """

    num_windows: int

    def __init__(self, name: str, corpus: AnyCorpus, seq_length: int) -> None:
        self.name = name
        self.corpus = corpus
        self.seq_length = seq_length
        self.documents = corpus.num_documents

    @abstractmethod
    def read(self, epoch: int, index: int, window: Int32Array) -> Int64Array:
        """Fill `window` [3, S] with window `index` (0 <= index < num_windows) of `epoch`: see `Corpus.fill`.

        Returns:
            [D] lengths of its documents, padding last.

        Raises:
            UserError: what was to be read is damaged.
        """

    @abstractmethod
    def loss_tokens(self, epoch: int, index: int) -> int:
        """How many labels with loss `read` gives that window, from the index and the mask alone.

        Raises:
            UserError: what was to be read is damaged.
        """


class TextSource(Source):
    """Running text: the tokens are a ring, window w of epoch e starts at token `(offset(e) + w * S) mod T`."""

    def __init__(self, name: str, corpus: AnyCorpus, seq_length: int, seed: int) -> None:
        super().__init__(name, corpus, seq_length)
        if corpus.num_tokens < seq_length:
            raise UserError(
                f"source {name} ({corpus.prefix}): {corpus.num_tokens} tokens do not fill a sequence of {seq_length}; "
                "add text or lower the sequence length"
            )
        self.seed = seed
        self.num_windows = corpus.num_tokens // seq_length
        self._offsets: dict[int, int] = {}

    def _offset(self, epoch: int) -> int:
        if epoch not in self._offsets:
            self._offsets[epoch] = window_offset(self.seed, self.name, epoch, self.corpus.num_tokens)
        return self._offsets[epoch]

    def loss_tokens(self, epoch: int, index: int) -> int:
        start = (self._offset(epoch) + index * self.seq_length) % self.corpus.num_tokens
        left = self.corpus.num_tokens - start
        count = self.corpus.count_labels(start, min(start + self.seq_length, self.corpus.num_tokens))
        if self.seq_length > left:  # token 0, which begins a document, is no label with loss
            count += self.corpus.count_labels(0, self.seq_length - left)
        return count

    def read(self, epoch: int, index: int, window: Int32Array) -> Int64Array:
        corpus = self.corpus
        start = (self._offset(epoch) + index * self.seq_length) % corpus.num_tokens
        left = corpus.num_tokens - start
        if self.seq_length <= left:
            return corpus.fill(start, start + self.seq_length, window)
        before = corpus.fill(start, corpus.num_tokens, window[:, :left])
        return np.concatenate([before, corpus.fill(0, self.seq_length - left, window[:, left:])])


class PackedSource(Source):
    """Whole examples, packed by the preparation into windows of S; what a pack leaves free is padding without loss."""

    def __init__(self, name: str, corpus: AnyCorpus, seq_length: int) -> None:
        super().__init__(name, corpus, seq_length)
        packed = corpus.manifest.seq_length
        if packed != seq_length:
            raise UserError(
                f"source {name} ({corpus.prefix}): packed for sequences of {packed}, not {seq_length}; prepare it "
                f"again with: {_repack_command(corpus, seq_length)}"
            )
        self.num_windows = corpus.num_packs

    def _span(self, index: int) -> tuple[int, int]:
        """First and last (exclusive) token of a pack."""
        start, stop = map(self.corpus.document_start, self.corpus.pack(index))
        if not start < stop <= start + self.seq_length:
            raise UserError(f"{self.corpus.prefix}: pack {index} has {stop - start} tokens; prepare it again")
        return start, stop

    def loss_tokens(self, epoch: int, index: int) -> int:
        return self.corpus.count_labels(*self._span(index))

    def read(self, epoch: int, index: int, window: Int32Array) -> Int64Array:
        return self.corpus.fill(*self._span(index), window)


class SequentialSource(Source):
    """Running text from its first token to its last, each label once; the last window is padded. For evaluation."""

    def __init__(self, name: str, corpus: AnyCorpus, seq_length: int) -> None:
        super().__init__(name, corpus, seq_length)
        self.num_windows = -(-(corpus.num_tokens - 1) // seq_length)

    def _span(self, index: int) -> tuple[int, int]:
        start = index * self.seq_length
        return start, min(start + self.seq_length, self.corpus.num_tokens)

    def loss_tokens(self, epoch: int, index: int) -> int:
        return self.corpus.count_labels(*self._span(index))

    def read(self, epoch: int, index: int, window: Int32Array) -> Int64Array:
        return self.corpus.fill(*self._span(index), window)


def _repack_command(corpus: AnyCorpus, seq_length: int) -> str:
    """The command that made the corpus, for another sequence length."""
    command, changed = re.subn(r"(--seq-length[ =])\d+", rf"\g<1>{seq_length}", corpus.manifest.command)
    if not changed:
        command = f"megaflow prepare {corpus.prefix} --kind {corpus.manifest.kind} --seq-length {seq_length} ..."
    return command if "--overwrite" in command else f"{command} --overwrite"


def open_source(
    name: str, paths: Paths, seq_length: int, seed: int, verify: Verify = "lazy", cache_dir: str | None = None
) -> Source:
    """Open the corpus at `paths` as training source `name`; `paths` and `cache_dir` are those of `open_corpus`.

    Raises:
        UserError: the corpus is missing, damaged, too short, or packed for another sequence length.
    """
    corpus = open_corpus(paths, verify, cache_dir)
    if corpus.manifest.kind == "text":
        return TextSource(name, corpus, seq_length, seed)
    return PackedSource(name, corpus, seq_length)


def open_sources(
    paths: Mapping[str, Paths], seq_length: int, seed: int, verify: Verify = "lazy", cache_dir: str | None = None
) -> list[Source]:
    """Open every source of a run, in order, and check that they go together.

    Raises:
        UserError: as `open_source`; or two of them were made with different tokenizers.
    """
    sources = [open_source(name, of_one, seq_length, seed, verify, cache_dir) for name, of_one in paths.items()]
    for source in sources[1:]:
        _check_tokenizers(sources[0], source)
    return sources


def _check_tokenizers(one: Source, other: Source) -> None:
    first, second = one.corpus.manifest.tokenizer, other.corpus.manifest.tokenizer
    if (first.sha256, first.probe) != (second.sha256, second.probe):
        raise UserError(
            f"sources {one.name} ({one.corpus.prefix}) and {other.name} ({other.corpus.prefix}) were made with "
            f"different tokenizers ({first.path}, {second.path}); prepare one of them again with the other's"
        )


def heldout_prefix(prefix: str | Path) -> Path:
    """Prefix of the corpus of documents held out of the one at `prefix`."""
    return Path(f"{prefix}.heldout")


def open_heldout(
    name: str, paths: Paths, seq_length: int, verify: Verify = "lazy", cache_dir: str | None = None
) -> Source | None:
    """The documents held out of the corpus at `paths`, in order; None if its preparation held out none.

    Raises:
        UserError: as `open_source`.
    """
    corpus = open_heldout_corpus(paths, verify, cache_dir)
    if corpus is None:
        return None
    if corpus.manifest.kind == "text":
        return SequentialSource(name, corpus, seq_length)
    return PackedSource(name, corpus, seq_length)


def open_heldouts(
    sources: Sequence[Source], seq_length: int, verify: Verify = "lazy", cache_dir: str | None = None
) -> list[Source | None]:
    """The held-out documents of each source, None for one that has none.

    Raises:
        UserError: as `open_heldout`; or held-out documents were made with another tokenizer than their source.
    """
    heldouts = [open_heldout(source.name, source.corpus.prefixes, seq_length, verify, cache_dir) for source in sources]
    for source, held in zip(sources, heldouts, strict=True):
        if held is not None:
            _check_tokenizers(source, held)
    return heldouts
