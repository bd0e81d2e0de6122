"""Shards read as one corpus give what the merged corpus gives."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megaflow.config_data import SourceConfig
from megaflow.data import native
from megaflow.data.corpus import shards
from megaflow.data.corpus.blocks import BlockFile
from megaflow.data.corpus.corpus import Corpus
from megaflow.data.corpus.manifest import Manifest
from megaflow.data.corpus.merge import MergeOptions, merge_corpora
from megaflow.data.corpus.shards import ListedCorpus, open_corpus, open_heldout_corpus
from megaflow.data.corpus.writer import CorpusWriter
from megaflow.data.packing import pack
from megaflow.data.sources import PackedSource, SequentialSource, Source, TextSource, open_heldouts, open_sources
from megaflow.errors import UserError
from tests.data.corpora import TOKENIZER, document_starts, finish, read_window
from tests.distributed import run_ranks

LENGTH = 12


def write_shard(
    prefix: Path,
    lengths: Sequence[int],
    seed: int,
    seq_length: int | None = None,
    masked: bool = True,
    wide: bool = False,
    **changes: object,
) -> str:
    """A corpus of random ids and mask bits, in blocks of 32 bytes; its prefix."""
    random = np.random.default_rng(seed)
    sizes, packs = np.array(lengths, dtype=np.int32), None
    with CorpusWriter(prefix, np.dtype("<i4" if wide else "<u2")) as writer:
        if seq_length is not None:
            order, before = pack(sizes, seq_length)
            sizes, packs = sizes[order], len(before) - 1
            writer.write_packs(seq_length, before)
        total = int(sizes.sum())
        mask = random.integers(0, 2, size=total) if masked else None
        writer.add_documents(random.integers(3, 999, size=total), sizes, mask)
        fields: dict[str, object] = {
            "kind": "text" if seq_length is None else "parallel",
            "language": "en",
            "tokenizer": TOKENIZER,
            "seq_length": seq_length,
            "packs": packs,
            "block_bytes": 32,
        }
        counts = {"documents": 0, "tokens": 0, "loss_tokens": 0, "bytes": 7, "loss_bytes": 5, "shuffle_seed": 0}
        finish(writer, Manifest(**{**fields, **counts, **changes}))  # type: ignore[arg-type]
    return str(prefix)


def every_window(source: Source, epochs: int = 3) -> list[tuple[list[list[int]], int]]:
    """Every window of some epochs, and its count of labels with loss."""
    found = []
    for epoch, index in itertools.product(range(epochs), range(source.num_windows)):
        window = read_window(source, epoch, index)
        arrays = [a.tolist() for a in (window.tokens, window.labels, window.positions, window.lengths)]
        found.append((arrays, source.loss_tokens(epoch, index)))
    return found


def sources_of(corpus: shards.AnyCorpus) -> list[Source]:
    if corpus.manifest.kind != "text":
        return [PackedSource("a", corpus, LENGTH)]
    return [TextSource("a", corpus, LENGTH, seed=3), SequentialSource("a", corpus, LENGTH)]


shard_lengths = st.lists(st.lists(st.integers(1, LENGTH), min_size=1, max_size=8), min_size=2, max_size=5)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    lengths=shard_lengths,
    packed=st.booleans(),
    masked=st.lists(st.booleans(), min_size=5, max_size=5),
    wide=st.lists(st.booleans(), min_size=5, max_size=5),
    use_native=st.booleans(),
)
def test_windows_are_those_of_the_merged_corpus(
    tmp_path_factory: pytest.TempPathFactory,
    lengths: list[list[int]],
    packed: bool,
    masked: list[bool],
    wide: list[bool],
    use_native: bool,
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    lengths = [[*lengths[0], LENGTH], *lengths[1:]]  # at least one window
    prefixes = [
        write_shard(folder / f"s{i}", sizes, i, LENGTH if packed else None, masked[i], wide[i])
        for i, sizes in enumerate(lengths)
    ]
    merge_corpora(folder / "merged", [Path(prefix) for prefix in prefixes], MergeOptions())
    listed, merged = open_corpus(prefixes), Corpus.open(folder / "merged")
    assert isinstance(listed, ListedCorpus)
    with pytest.MonkeyPatch.context() as patch:
        if not use_native:
            patch.setattr(native, "library", lambda: None)
        for ours, theirs in zip(sources_of(listed), sources_of(merged), strict=True):
            assert every_window(ours) == every_window(theirs)
    assert document_starts(listed) == document_starts(merged)  # type: ignore[arg-type]
    assert [listed.pack(i) for i in range(listed.num_packs)] == [merged.pack(i) for i in range(merged.num_packs)]
    for start, stop in itertools.combinations(range(0, merged.num_tokens + 1, 3), 2):
        assert listed.tokens(start, stop).tolist() == merged.tokens(start, stop).tolist()
        assert listed.loss_mask(start, stop).tolist() == merged.loss_mask(start, stop).tolist()
        assert listed.starts_within(start, stop).tolist() == merged.starts_within(start, stop).tolist()
    sums = ("documents", "tokens", "loss_tokens", "bytes", "loss_bytes", "packs", "kind", "seq_length", "language")
    for name in sums:
        assert getattr(listed.manifest, name) == getattr(merged.manifest, name), name
    assert listed.has_mask == merged.has_mask


def mappings(folder: Path) -> int:
    return sum(f"{folder}/" in line for line in Path("/proc/self/maps").read_text().splitlines())


def test_few_shards_are_mapped_and_no_file_stays_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prefixes = [write_shard(tmp_path / f"s{i}", [9, 4, 11, 8], i) for i in range(7)]
    whole = every_window(sources_of(open_corpus(prefixes))[0])
    checked: list[tuple[Path, int]] = []
    check = BlockFile._check_block
    monkeypatch.setattr(BlockFile, "_check_block", lambda f, b: (checked.append((f.path, b)), check(f, b))[1])
    monkeypatch.setattr(shards, "MAPPED_SHARDS", 2)
    files = len(os.listdir("/proc/self/fd"))
    source = sources_of(open_corpus(prefixes))[0]
    assert every_window(source) == whole
    assert mappings(tmp_path) <= 2 * 3
    assert len(os.listdir("/proc/self/fd")) == files
    assert len(checked) == len(set(checked))  # what was found sound is not looked at again when mapped again
    del source
    assert mappings(tmp_path) == 0


def test_the_identity_of_a_list_is_its_shards_in_order(tmp_path: Path) -> None:
    a, b = (write_shard(tmp_path / name, [9, 4, 7], seed) for seed, name in enumerate("ab"))
    alone = Corpus.open(a).manifest
    assert open_corpus([a]).manifest == alone
    fingerprints = [open_corpus(paths).manifest.fingerprint for paths in ([a, b], [b, a], a, b)]
    assert len(set(fingerprints)) == 4
    assert open_corpus([a, b]).manifest.fingerprint == fingerprints[0]


def test_patterns_and_held_out_corpora(tmp_path: Path) -> None:
    for seed, name in enumerate(["zh-2", "zh-1", "zh-10", "en-1", "zh-1.heldout", "zh-2.heldout", ".zh-3"]):
        write_shard(tmp_path / name, [9, 4, 7 + seed], seed)
    pattern = f"{tmp_path}/zh-*"
    names = [Path(prefix).name for prefix in open_corpus(pattern).prefixes]
    assert names == ["zh-1", "zh-10", "zh-2"]
    assert open_corpus([f"{tmp_path}/zh-1*", f"{tmp_path}/en-1"]).num_documents == 9
    sources = open_sources({"zh": pattern, "en": f"{tmp_path}/en-1", "ten": f"{tmp_path}/zh-10"}, LENGTH, 0)
    held, *none = open_heldouts(sources, LENGTH)
    assert none == [None, None]
    assert held is not None
    assert [Path(prefix).name for prefix in held.corpus.prefixes] == ["zh-1.heldout", "zh-2.heldout"]
    assert isinstance(held, SequentialSource)
    literal = write_shard(tmp_path / "odd[1]", [5], 9)
    assert open_corpus(literal).num_tokens == 5  # a name, though it looks like a pattern


def test_a_text_held_out_by_several_shards_is_read_once(tmp_path: Path) -> None:
    shards = [write_shard(tmp_path / f"zh-{seed}", [9, 4], seed) for seed in range(3)]
    for shard, seed in zip(shards, (5, 6, 5), strict=True):
        write_shard(Path(f"{shard}.heldout"), [12], seed)
    held, same = open_heldout_corpus(shards), open_heldout_corpus(shards[::2])
    assert held is not None
    assert same is not None
    assert held.prefixes == [f"{shard}.heldout" for shard in shards[:2]]
    assert same.num_documents == 1
    with pytest.raises(UserError, match=r"zh-1\.heldout: was held out of another corpus of the list"):
        open_corpus([*shards, f"{shards[1]}.heldout"])


def test_shards_that_differ_are_refused(tmp_path: Path) -> None:
    write_shard(tmp_path / "a", [9, 4], 0)
    other = TOKENIZER.model_copy(update={"eos_id": 5, "path": "u.model"})
    write_shard(tmp_path / "eos", [9, 4], 1, tokenizer=other)
    write_shard(tmp_path / "sha", [9, 4], 1, tokenizer=TOKENIZER.model_copy(update={"sha256": "xx"}))
    write_shard(tmp_path / "kind", [9, 4], 1, seq_length=LENGTH)
    write_shard(tmp_path / "long", [9, 4], 2, seq_length=2 * LENGTH)
    write_shard(tmp_path / "loss", [9, 4], 1, loss="response")
    write_shard(tmp_path / "share", [9, 4], 1, heldout=0.25)
    write_shard(tmp_path / "copy", [9, 4], 0)
    write_shard(tmp_path / "cut", [9, 4], 3)
    (tmp_path / "cut.bin").write_bytes((tmp_path / "cut.bin").read_bytes()[:-2])
    for names, message in [
        ("a eos", r"eos: its tokenizer \(u.model\) has another eos_id than that of .*a "),
        ("a sha", r"sha: its tokenizer .* has another sha256"),
        ("a kind", r"kind: its kind is parallel where that of .*a is text"),
        ("kind long", r"long: its seq_length is 24 where that of .*kind is 12"),
        ("a loss", r"loss: its loss is response where"),
        ("a share", r"share: --heldout was 0\.25 where that of .*a was 0, so texts that one holds out"),
        ("a copy", r"copy: holds the same data as .*a; list a shard once"),
        ("a a", r"a: holds the same data as .*a; list a shard once"),
        ("a gone", r"gone.json: no such corpus manifest"),
        ("a cut", r"cut.bin: 24 bytes where 26 belong"),
        ("", r"an empty list"),
    ]:
        with pytest.raises(UserError, match=message):
            open_corpus([str(tmp_path / name) for name in names.split()])


def test_the_damaged_shard_is_named(tmp_path: Path) -> None:
    prefixes = [write_shard(tmp_path / f"s{i}", [9, 4, 11, 8], i) for i in range(3)]
    path = tmp_path / "s1.bin"
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    with pytest.raises(UserError, match=r"s1\.bin: bytes 32 to 63"):
        open_corpus(prefixes, "full")
    with pytest.raises(UserError, match=r"s1\.bin: bytes 32 to 63 \(documents \d to 3\) are not what was written"):
        every_window(sources_of(open_corpus(prefixes))[1])


def test_what_the_config_says_of_paths(tmp_path: Path) -> None:
    a, b = (write_shard(tmp_path / name, [9], seed) for seed, name in enumerate("ab"))
    for path in (a, [a, b], f"{tmp_path}/*", [f"{tmp_path}/a*", b], "memory://bucket/a", ["memory://x/a-*", a]):
        assert SourceConfig(path=path).path == path  # type: ignore[arg-type]
    for path, message in [
        ([a, f"{tmp_path}/c"], r"no file .*/c.bin; write the corpus with `megaflow prepare .*/c \.\.\.`"),
        (f"{a}.bin", r"a\.bin: is a file of a corpus; give its prefix, \S*/a "),
        ("a" * 300, "File name too long"),
        (f"{tmp_path}/c*", r"no file matches .*/c\*\.json"),
        ([a, 5], "5 should be a valid string"),
        (None, "None should be a valid string"),
        ([], "an empty list; name a corpus"),
        ("nothing://bucket/a", r"nothing://bucket/a: cannot be opened \(Protocol not known: nothing\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            SourceConfig(path=path)  # type: ignore[arg-type]


def from_threads(prefixes: list[str], damaged: str) -> tuple[bool, list[str]]:
    """Whether eight threads read what one reads, and what they say who meet a damaged block at once."""

    def words(corpus: Corpus) -> str:
        try:
            corpus.tokens(0, 4)
        except UserError as error:
            return str(error)
        return "sound"

    shards.MAPPED_SHARDS = 2
    alone = every_window(sources_of(open_corpus(prefixes))[0])
    shared, bad = open_corpus(prefixes), Corpus.open(damaged)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: every_window(sources_of(shared)[0]), range(8)))
        said = list(pool.map(lambda _: words(bad), range(8)))
    return all(windows == alone for windows in found), said


def test_threads_read_at_once(tmp_path: Path) -> None:
    prefixes = [write_shard(tmp_path / f"s{i}", [9, 4, 11, 8], i) for i in range(7)]
    damaged = write_shard(tmp_path / "damaged", [40], 9)
    (tmp_path / "damaged.bin").write_bytes(b"\1" + (tmp_path / "damaged.bin").read_bytes()[1:])
    ((same, said),) = run_ranks(1, from_threads, prefixes, damaged)
    assert same
    assert all("damaged.bin: bytes 0 to 31" in words for words in said)
