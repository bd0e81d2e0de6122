"""Order and choice of a corpus's documents, made out of core: equal to the direct formulas, in bounded memory."""

from __future__ import annotations

import itertools
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megaflow.data.corpus import writer
from megaflow.data.corpus.corpus import Corpus
from megaflow.data.corpus.manifest import Manifest
from megaflow.data.corpus.writer import CorpusWriter
from megaflow.data.packing import pack
from megaflow.data.prepare import shuffle, spool
from megaflow.data.prepare.dedup import duplicates
from megaflow.data.prepare.encode import Comparison, Encoded, PrepareOptions
from megaflow.data.prepare.prepare import prepare_corpus
from megaflow.data.prepare.shuffle import Limits, packed, shuffled, write_in_order
from megaflow.data.prepare.spool import Spool
from megaflow.data.sampler.order import hash_ints, perm_inverse_many, perm_many
from tests.data.corpora import finish
from tests.data.corpus.test_corpus import manifest
from tests.data.preparing import PAIRS, documents, example_options, texts, write_jsonl

U2 = np.dtype("<u2")
SETTINGS = settings(max_examples=30, deadline=None, derandomize=True)


def encoded(lengths: np.ndarray, heldout: np.ndarray, hashes: np.ndarray, first: int = 0) -> Encoded:
    """Documents that say in each token which they are."""
    tokens = np.repeat(np.arange(first, first + len(lengths)) % 60_000, lengths).astype(U2)
    columns = {"bytes": lengths.astype(np.int64), "loss_bytes": lengths.astype(np.int64)}
    counts: dict[str, Any] = {"records": len(lengths), "num_bad": 0, "num_too_long": 0, "bad": [], "too_long": []}
    mask = (np.arange(len(tokens)) % 3 > 0).astype(np.uint8)
    arrays = {"lengths": lengths.astype(np.int32), "heldout": heldout, "hashes": hashes.reshape(-1, 2)}
    return Encoded(tokens=tokens, mask=mask, **arrays, **columns, **counts, comparison=Comparison())


def spooled(folder: Path, chunks: list[Encoded], masked: bool = True) -> Spool:
    kept = Spool(folder / "work", U2, masked, {}, [], 1 << 20)
    for number, chunk in enumerate(chunks, start=1):
        kept.add(chunk, 0, number)
    kept.complete(1)
    return kept


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    """A new folder each time."""
    numbers = itertools.count()
    return lambda: tmp_path_factory.mktemp(f"case{next(numbers)}")


@SETTINGS
@given(
    n=st.one_of(st.integers(1, 300), st.integers(2**16 - 2, 2**16 + 2), st.just(2**40 + 7)),
    key=st.integers(0, 2**64 - 1),
)
def test_the_inverse_of_a_permutation(n: int, key: int) -> None:
    xs = np.arange(n) if n <= 300 else np.array([0, 1, n // 3, n - 2, n - 1])
    assert perm_inverse_many(key, n, perm_many(key, n, xs)).tolist() == xs.tolist()
    assert perm_many(key, n, perm_inverse_many(key, n, xs)).tolist() == xs.tolist()
    with pytest.raises(ValueError, match="must be in"):
        perm_inverse_many(key, n, np.array([n]))


CASES = {
    "lengths": st.lists(st.integers(1, 30), min_size=1, max_size=60),
    "held": st.integers(0, 2**60),
    "out": st.sampled_from([0, 0x5555555555555555, 0xF0F0F0F00FF]),
    "seed": st.integers(0, 2**63 - 1),
    "limits": st.builds(
        Limits, batch_tokens=st.integers(1, 200), bucket_tokens=st.integers(1, 300), bucket_documents=st.integers(1, 70)
    ),
    "gather": st.sampled_from([1, 17, 10_000]),
    "rows": st.sampled_from([1, 7, 1000]),
    "seq_length": st.sampled_from([None, 32]),
}


@SETTINGS
@given(**CASES)
def test_documents_are_in_the_order_of_the_formula(
    folders: Callable[[], Path],
    lengths: list[int],
    held: int,
    out: int,
    seed: int,
    limits: Limits,
    gather: int,
    rows: int,
    seq_length: int | None,
) -> None:
    """`order[place]` is the keyed permutation of the documents that are not left out."""
    folder = folders()
    sizes = np.array(lengths)
    heldout = np.array([held >> i & 1 for i in range(len(sizes))], np.bool_)
    left_out = np.array([out >> i & 1 for i in range(len(sizes))], np.bool_)
    left_out[0] = False
    heldout[0] = False
    cut = len(sizes) // 3
    parts = [slice(0, cut), slice(cut, None)]
    hashes = np.zeros((len(sizes), 2), np.uint64)
    with (
        pytest.MonkeyPatch.context() as patched,
        spooled(folder, [encoded(sizes[part], heldout[part], hashes[part], part.start) for part in parts]) as kept,
    ):
        patched.setattr(spool, "ROWS", rows)
        patched.setattr(shuffle, "GATHER_TOKENS", gather)
        kept.left_out = left_out
        total = int(np.count_nonzero(~left_out))
        order = np.flatnonzero(~left_out)[perm_many(hash_ints(seed, total), total, np.arange(total))]
        with CorpusWriter(folder / "a", U2) as train, CorpusWriter(folder / "b", U2) as other:
            writers = [(False, train), (True, other)][: 1 + int(heldout[order].any())]
            places = shuffled(seed, total)
            if seq_length is not None:
                places, packs = packed(kept, places, seq_length, writers)
            write_in_order(kept, places, writers, None, limits)
            for side, corpus in writers:
                expected = order[heldout[order] == side]
                if seq_length is not None:
                    inside, before = pack(sizes[expected].astype(np.int32), seq_length)
                    expected = expected[inside]
                    assert packs[side] == len(before) - 1
                finish(corpus, manifest())
                found = Corpus.open(corpus.prefix)
                ids = found.tokens(0, found.num_tokens).tolist()
                assert ids == np.repeat(expected, sizes[expected]).tolist()
                bits = {i: [] for i in range(len(sizes))}
                for part in parts:
                    chunk = encoded(sizes[part], heldout[part], hashes[part], part.start)
                    for document, bit in zip(chunk.tokens.tolist(), (chunk.mask != 0).tolist(), strict=True):
                        bits[document].append(bit)
                assert found.loss_mask(0, found.num_tokens).tolist() == [bit for i in expected for bit in bits[i]]
    assert sorted(path.name for path in (folder / "work").iterdir()) == ["journal.jsonl", "mask", "rows", "tokens"]


@SETTINGS
@given(
    values=st.lists(st.integers(0, 12), min_size=1, max_size=200),
    same=st.sampled_from(["both", "first", "second"]),
    partition=st.sampled_from([1, 3, 50, 1000]),
    rows=st.sampled_from([1, 9, 1000]),
)
def test_all_but_the_first_of_equal_hashes_are_duplicates(
    folders: Callable[[], Path], values: list[int], same: str, partition: int, rows: int
) -> None:
    """Of 128 bits, not of one half of them."""
    hashes = np.zeros((len(values), 2), np.uint64)
    hashes[:, 0] = values if same != "second" else 5
    hashes[:, 1] = values if same != "first" else 5
    sizes = np.ones(len(values), np.int64)
    seen: set[int] = set()
    expected = []
    for value in values:
        expected.append(value in seen)
        seen.add(value)
    with (
        pytest.MonkeyPatch.context() as patched,
        spooled(folders(), [encoded(sizes, np.zeros(len(values), np.bool_), hashes)]) as kept,
    ):
        patched.setattr(spool, "ROWS", rows)
        assert duplicates(kept, partition).tolist() == expected


def test_memory_does_not_grow_with_the_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is read and sorted at a time has limits; ten times the documents take no more of it."""
    monkeypatch.setattr(spool, "ROWS", 1000)
    monkeypatch.setattr(shuffle, "GATHER_TOKENS", 5000)
    monkeypatch.setattr(writer, "CHUNK", 1000)
    limits = Limits(partition_documents=1000, batch_tokens=5000, bucket_tokens=5000, bucket_documents=1000)
    peaks = []
    random = np.random.default_rng(1)
    for run, size in enumerate((10_000, 10_000, 100_000)):  # the first time also loads modules
        folder = tmp_path / str(run)
        folder.mkdir()
        hashes = random.integers(0, size, (size, 1), np.uint64)
        hashes[: size // 2] = 7  # one text is there very often
        chunk = encoded(random.integers(1, 9, size), random.random(size) < 0.1, np.repeat(hashes, 2, axis=1))
        with spooled(folder, [chunk], masked=False) as kept, CorpusWriter(folder / "a", U2) as train:
            del chunk, hashes
            tracemalloc.start()
            kept.left_out = duplicates(kept, limits.partition_documents)
            write_in_order(kept, shuffled(0, shuffle.count(kept)), [(False, train)], None, limits)
            train._write_index()
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
    assert peaks[2] < 1.5 * peaks[1]


def test_the_index_is_written_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = []
    for chunk in (1 << 20, 3):
        monkeypatch.setattr(writer, "CHUNK", chunk)
        with CorpusWriter(tmp_path / str(chunk), U2) as corpus:
            for start in (0, 4):
                lengths = np.arange(1, 5, dtype=np.int32) + start
                corpus.add_documents(np.ones(int(lengths.sum()), np.int64), lengths)
            finish(corpus, manifest())
        files.append((tmp_path / f"{chunk}.idx").read_bytes())
    assert files[0] == files[1]
    lengths = np.arange(1, 9)
    assert np.frombuffer(files[0], "<i4", 8, 34).tolist() == lengths.tolist()
    assert np.frombuffer(files[0], "<i8", 8, 34 + 32).tolist() == (2 * (np.cumsum(lengths) - lengths)).tolist()
    assert np.frombuffer(files[0], "<i8", -1, 34 + 96).tolist() == list(range(9))


def read_all(prefix: Path) -> dict[str, bytes]:
    suffixes = ("bin", "idx", "heldout.bin", "heldout.idx")
    return {suffix: Path(f"{prefix}.{suffix}").read_bytes() for suffix in suffixes}


def test_duplicates_leave_no_trace(tmp_path: Path, sp_model: Path, options: PrepareOptions) -> None:
    written = texts(100)
    once = write_jsonl(tmp_path / "once.jsonl", [{"text": text} for text in written])
    twice = write_jsonl(
        tmp_path / "twice.jsonl",
        [{"text": text, "id": i} for i, text in enumerate([*written, written[3], *written[::-1]])],
    )
    report = prepare_corpus(tmp_path / "a", [once], options)
    assert (report.num_duplicates, report.manifest and report.manifest.duplicates) == (0, 0)
    for name, inputs, count in (("b", [twice], 101), ("c", [once, twice, once], 301)):
        report = prepare_corpus(tmp_path / name, inputs, options, limits=Limits(partition_documents=7))
        assert read_all(tmp_path / name) == read_all(tmp_path / "a")
        assert report.num_duplicates == count
        for found in (report.manifest, report.heldout):
            assert isinstance(found, Manifest)
            assert found.duplicates == count
    report = prepare_corpus(tmp_path / "d", [twice], replace(options, dedup=False))
    found = documents(tmp_path / "d", sp_model) + documents(tmp_path / "d.heldout", sp_model)
    assert sorted(found) == sorted([*written, written[3], *written])
    assert report.num_duplicates == 0


def test_texts_that_differ_at_all_are_kept(tmp_path: Path, sp_model: Path, options: PrepareOptions) -> None:
    written = ["a cat", "a cat ", "A cat", " a cat", "a  cat", "a cat\n"]
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in written])
    prepare_corpus(tmp_path / "c", [path], replace(options, heldout=0.0))
    assert sorted(documents(tmp_path / "c", sp_model)) == sorted(written)


def test_duplicates_of_pairs_and_instructions_are_whole_records(tmp_path: Path, sp_model: Path) -> None:
    pairs = [*PAIRS[:20], {**PAIRS[0], "zh": "公园"}, {**PAIRS[1], "en": "sat"}, PAIRS[2], PAIRS[3]]
    options = replace(example_options(sp_model, "parallel", "tab"), heldout=0.0)
    report = prepare_corpus(tmp_path / "c", [write_jsonl(tmp_path / "a.jsonl", pairs)], options)
    assert report.num_duplicates == 2
    assert len(documents(tmp_path / "c", sp_model)) == 22
    asked = {"instruction": "say", "input": "", "output": "cat sat"}
    records = [asked, {**asked, "output": "cat"}, {**asked, "input": "sat"}, {**asked, "extra": 1}]
    options = replace(example_options(sp_model, "instruction", "{instruction}{input}{output}", "response"), heldout=0.0)
    report = prepare_corpus(tmp_path / "d", [write_jsonl(tmp_path / "b.jsonl", records)], options)
    assert report.num_duplicates == 1
    assert len(documents(tmp_path / "d", sp_model)) == 3
