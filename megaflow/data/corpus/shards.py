"""Many corpora seen as one: the tokens, documents and packs of the shards back to back, in order.

Windows are those of the merged corpus: one may lie over the end of a shard and the start of the next.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megaflow.data.corpus.blocks import Verify
from megaflow.data.corpus.corpus import Corpus
from megaflow.data.corpus.files import Int32Array, Int64Array, corpus_path
from megaflow.data.corpus.manifest import SUMMED, Manifest, read_manifest
from megaflow.data.corpus.prefixes import Paths, expand, is_url
from megaflow.data.corpus.remote import RemoteCorpus, check_remote_files, default_cache_dir, fetch_manifest
from megaflow.errors import UserError

MAPPED_SHARDS = 1024
"""Shards of one corpus that are mapped at a time, of at most four files each; Linux lets a process map 65,530."""
CONNECTIONS = 16
"""Manifests fetched at a time."""


@dataclass(frozen=True)
class Shard:
    """A corpus known by its manifest; `open` maps its files."""

    prefix: str
    manifest: Manifest
    open: Callable[[], Corpus]


class ListedCorpus:
    """Corpora read as one, by the methods of `Corpus`; UserError where a shard is damaged.

    A shard is mapped when it is first read, in the slot of its number modulo `MAPPED_SHARDS`; the one that was there
    before is let go of. Threads may read at once.

    Attributes: as those of `Corpus`; `prefix` describes all shards. The manifest's sums are those of the shards, and
    its `blocks` are their fingerprints, so that its own fingerprint is a hash of them in order.
    """

    def __init__(self, shards: Sequence[Shard]) -> None:
        """Take shards that agree; see `open_corpus`."""
        manifests = [shard.manifest for shard in shards]
        self.prefixes = [shard.prefix for shard in shards]
        self.prefix = f"{shards[0].prefix} and {len(shards) - 1} more"
        self.manifest = _combined(shards)
        self.num_tokens = self.manifest.tokens
        self.num_documents = self.manifest.documents
        self.num_packs = self.manifest.packs or 0
        self.has_mask = any("mask" in manifest.blocks for manifest in manifests)
        self._shards = shards
        self._mapped: list[tuple[int, Corpus] | None] = [None] * min(len(shards), MAPPED_SHARDS)
        self._tokens_before = [0, *accumulate(manifest.tokens for manifest in manifests)]
        self._documents_before = [0, *accumulate(manifest.documents for manifest in manifests)]
        self._packs_before = [0, *accumulate(manifest.packs or 0 for manifest in manifests)]

    def shard(self, index: int) -> Corpus:
        """A shard, mapped."""
        slot = index % len(self._mapped)
        mapped = self._mapped[slot]  # one look and one store: threads need no lock
        if mapped is None or mapped[0] != index:
            mapped = self._mapped[slot] = (index, self._shards[index].open())
        return mapped[1]

    def _parts(self, start: int, stop: int) -> Iterator[tuple[Corpus, int, int, int]]:
        """The shards under tokens `start .. stop - 1`, a range of each, and where its first token lies in the whole."""
        index = bisect_right(self._tokens_before, start) - 1
        while start < stop:
            before, end = self._tokens_before[index], min(stop, self._tokens_before[index + 1])
            yield self.shard(index), start - before, end - before, start
            start, index = end, index + 1

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """[stop - start] the ids of tokens `start .. stop - 1`; `start < stop`."""
        parts = [corpus.tokens(first, last) for corpus, first, last, _ in self._parts(start, stop)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def loss_mask(self, start: int, stop: int) -> npt.NDArray[np.bool_]:
        """[stop - start] whether each token of the range carries loss as a label; `start < stop`."""
        parts = [corpus.loss_mask(first, last) for corpus, first, last, _ in self._parts(start, stop)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def starts_within(self, start: int, stop: int) -> Int64Array:
        """[D] where documents start in tokens `start + 1 .. stop` (inclusive), as `Corpus.starts_within`."""
        parts = [
            corpus.starts_within(first, last) + (at - start) for corpus, first, last, at in self._parts(start, stop)
        ]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def fill(self, start: int, stop: int, window: Int32Array) -> Int64Array:
        """Fill `window` [3, S] from tokens `start .. stop - 1`, as `Corpus.fill`; the lengths of the documents."""
        index = bisect_right(self._tokens_before, start) - 1
        before = self._tokens_before[index]
        if stop <= self._tokens_before[index + 1]:  # nearly always
            return self.shard(index).fill(start - before, stop - before, window)
        lengths = []
        for corpus, first, last, at in self._parts(start, stop):
            end = at - start + last - first if at + last - first < stop else window.shape[1]  # the last one pads
            lengths.append(corpus.fill(first, last, window[:, at - start : end]))
        return np.concatenate(lengths)

    def count_labels(self, start: int, stop: int) -> int:
        """How many of tokens `start + 1 .. stop` are labels with loss, as `Corpus.count_labels`."""
        return sum(corpus.count_labels(first, last) for corpus, first, last, _ in self._parts(start, stop))

    def document_start(self, document: int) -> int:
        """First token of `document`; the number of tokens for the number of documents."""
        if document == self.num_documents:
            return self.num_tokens
        index = bisect_right(self._documents_before, document) - 1
        return self._tokens_before[index] + self.shard(index).document_start(document - self._documents_before[index])

    def pack(self, index: int) -> tuple[int, int]:
        """First and last (exclusive) document of a pack."""
        shard = bisect_right(self._packs_before, index) - 1
        first, last = self.shard(shard).pack(index - self._packs_before[shard])
        return self._documents_before[shard] + first, self._documents_before[shard] + last


AnyCorpus = Corpus | ListedCorpus


def open_corpus(paths: Paths, verify: Verify = "lazy", cache_dir: str | Path | None = None) -> AnyCorpus:
    """Open one corpus, or several as one; of a corpus at a URL, index and packs are fetched.

    Args:
        paths: prefix, URL or pattern, or a list of them; see `expand`.
        verify: when blocks are held against the manifests' checksums; see `Verify`.
        cache_dir: where what is fetched is kept; None: `default_cache_dir`.

    Raises:
        UserError: a file is missing, damaged or cannot be fetched, or shards do not agree.
    """
    prefixes = expand(paths)
    if not prefixes:
        raise UserError("an empty list of corpora; name one")
    listed = set(prefixes)
    held = next((held for prefix in prefixes if (held := f"{prefix}.heldout") in listed), None)
    if held is not None:
        raise UserError(f"{held}: was held out of another corpus of the list; leave it out, or it is trained on")
    shards = []
    for prefix, shard in zip(prefixes, _describe(prefixes, verify, cache_dir), strict=True):
        if shard is None:
            raise UserError(f"{prefix}.json: no such corpus manifest; copy the whole corpus there")
        shards.append(shard)
    return _opened(shards, verify)


def open_heldout_corpus(paths: Paths, verify: Verify = "lazy", cache_dir: str | Path | None = None) -> AnyCorpus | None:
    """The documents held out of a corpus, or of several in their order; None if no preparation held out any.

    Of shards that held out the same documents, as when each met one text, the first counts.

    Raises:
        UserError: as `open_corpus`.
    """
    prefixes = [f"{prefix}.heldout" for prefix in expand(paths)]
    prefixes = [prefix for prefix in prefixes if is_url(prefix) or corpus_path(prefix, "json").exists()]
    shards: dict[str, Shard] = {}
    for shard in _describe(prefixes, verify, cache_dir):
        if shard is not None:
            shards.setdefault(shard.manifest.fingerprint, shard)
    return _opened(list(shards.values()), verify) if shards else None


def _opened(shards: Sequence[Shard], verify: Verify) -> AnyCorpus:
    """Check that shards agree, and their files. Those at URLs, known to be there, are left for their first touch."""
    if len(shards) == 1:
        return shards[0].open()
    for shard in shards[1:]:
        _check_agree(shards[0], shard)
    corpus = ListedCorpus(shards)
    for index, shard in enumerate(shards):
        if verify == "full" or not is_url(shard.prefix):
            corpus.shard(index)
    return corpus


def _describe(prefixes: Sequence[str], verify: Verify, cache_dir: str | Path | None) -> list[Shard | None]:
    """Every corpus by its manifest; None for a URL where there is none."""
    cache = default_cache_dir() if cache_dir is None else Path(cache_dir).expanduser()

    def describe(prefix: str) -> Shard | None:
        if not is_url(prefix):
            manifest = read_manifest(corpus_path(prefix, "json"))
            return Shard(prefix, manifest, partial(Corpus, prefix, manifest, verify, {}))
        fetched = fetch_manifest(prefix)
        if fetched is None:
            return None
        check_remote_files(prefix, fetched)
        return Shard(prefix, fetched, partial(RemoteCorpus, prefix, fetched, verify, {}, cache))

    if sum(map(is_url, prefixes)) < 2:
        return [describe(prefix) for prefix in prefixes]
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        return list(pool.map(describe, prefixes))


def _check_agree(one: Shard, other: Shard) -> None:
    ours, theirs = one.manifest, other.manifest
    for name in ("kind", "loss", "seq_length"):
        if getattr(ours, name) != getattr(theirs, name):
            raise UserError(
                f"{other.prefix}: its {name} is {getattr(theirs, name)} where that of {one.prefix} is "
                f"{getattr(ours, name)}; the shards of a source must be prepared alike"
            )
    for name in ("sha256", "probe", "bos_id", "eos_id"):
        if getattr(ours.tokenizer, name) != getattr(theirs.tokenizer, name):
            raise UserError(
                f"{other.prefix}: its tokenizer ({theirs.tokenizer.path}) has another {name} than that of {one.prefix} "
                f"({ours.tokenizer.path}); the shards of a source must be prepared alike"
            )
    if ours.heldout != theirs.heldout:
        raise UserError(
            f"{other.prefix}: --heldout was {theirs.heldout:g} where that of {one.prefix} was {ours.heldout:g}, so "
            "texts that one holds out may be trained on in the other; prepare them with the same share"
        )


def _combined(shards: Sequence[Shard]) -> Manifest:
    """One manifest for all shards."""
    first, manifests = shards[0].manifest, [shard.manifest for shard in shards]
    seen: dict[str, str] = {}
    for shard in shards:
        same = seen.setdefault(shard.manifest.fingerprint, shard.prefix)
        if same is not shard.prefix:
            raise UserError(f"{shard.prefix}: holds the same data as {same}; list a shard once")
    changed: dict[str, object] = {name: sum(getattr(manifest, name) for manifest in manifests) for name in SUMMED}
    if first.packs is not None:
        changed["packs"] = sum(manifest.packs or 0 for manifest in manifests)
    changed["language"] = "+".join(sorted({manifest.language for manifest in manifests}))
    return first.model_copy(update={**changed, "blocks": {"shards": list(seen)}})
