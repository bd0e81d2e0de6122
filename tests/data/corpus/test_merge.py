"""Merging: shards become what they were one after the other; files of other tools are not believed."""

from __future__ import annotations

import json
import os
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megaflow.data.corpus.corpus import Corpus
from megaflow.data.corpus.files import HEADER, MAGIC, corpus_path
from megaflow.data.corpus.merge import MergeOptions, merge_corpora
from megaflow.data.prepare.encode import PrepareOptions
from megaflow.data.prepare.prepare import prepare_corpus
from megaflow.data.prepare.templates import ExampleFormat
from megaflow.data.sources import open_source
from megaflow.errors import UserError
from tests.data.conftest import SAMPLE
from tests.data.corpora import read_window


def prepare(prefix: Path, pairs: list[tuple[str, str]], model: Path, **options: object) -> None:
    """A packed corpus with masks and held-out documents."""
    path = prefix.with_suffix(".jsonl")
    path.write_text("".join(json.dumps({"en": a, "zh": b}) + "\n" for a, b in pairs))
    form = ExampleFormat(kind="parallel", fields=("en", "zh"), template="tab", loss="response")
    given = {"format": form, "language": "en-zh", "tokenizer": str(model), "seq_length": 64, "heldout": 0.2}
    prepare_corpus(prefix, [path], PrepareOptions(**{**given, **options}))  # type: ignore[arg-type]


def names(prefixes: list[Path]) -> list[str]:
    """As they are given on a command line."""
    return [str(prefix) for prefix in prefixes]


@pytest.fixture
def shards(tmp_path: Path, sp_model: Path) -> list[Path]:
    """Three packed shards of different sizes."""
    prefixes = []
    for shard, count in enumerate((7, 31, 12)):
        prefixes.append(tmp_path / f"pairs-{shard:05d}")
        pairs = [(f"{shard} {i} {SAMPLE[i % 3]}"[:40], SAMPLE[3 + i % 2][:4] + str(i)) for i in range(count)]
        prepare(prefixes[-1], pairs, sp_model)
    return prefixes


def windows(prefix: Path) -> list[list[list[int]]]:
    source = open_source("pairs", prefix, 64, 0, "full")
    read = (read_window(source, 0, index) for index in range(source.num_windows))
    return [[window.tokens.tolist(), window.labels.tolist(), window.lengths.tolist()] for window in read]


def test_merged_shards_are_the_shards_one_after_the_other(tmp_path: Path, shards: list[Path]) -> None:
    report = merge_corpora(tmp_path / "all", names(shards), MergeOptions(command="megaflow data merge"))
    for side in ("", ".heldout"):
        parts = [Path(f"{shard}{side}") for shard in shards]
        whole = Path(f"{tmp_path}/all{side}")
        assert windows(whole) == [window for part in parts for window in windows(part)]
        manifests = [Corpus.open(part).manifest for part in parts]
        merged = Corpus.open(whole).manifest
        for name in ("documents", "tokens", "loss_tokens", "bytes", "loss_bytes", "packs", "heldout_documents"):
            assert getattr(merged, name) == sum(getattr(manifest, name) for manifest in manifests), name
        assert merged.command == "megaflow data merge"
    assert report.manifest is not None
    assert not list(tmp_path.glob(".tmp-*"))


def test_one_shard_merged_is_the_shard(tmp_path: Path, shards: list[Path]) -> None:
    merge_corpora(tmp_path / "one", names(shards[:1]), MergeOptions())
    for suffix in ("bin", "idx", "mask", "packs-64", "heldout.bin", "heldout.idx"):
        assert corpus_path(tmp_path / "one", suffix).read_bytes() == corpus_path(shards[0], suffix).read_bytes()


def test_a_document_longer_than_a_group_is_copied_whole(
    tmp_path: Path, sp_model: Path, shards: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megaflow.data.corpus.merge.COPIED_TOKENS", 3)
    merge_corpora(tmp_path / "all", names(shards), MergeOptions())
    assert windows(tmp_path / "all") == [window for shard in shards for window in windows(shard)]


def test_shards_that_were_prepared_otherwise_are_refused(
    tmp_path: Path, shards: list[Path], sp_model: Path, hf_json: Path
) -> None:
    pairs = [("one two", "一二"), ("three four", "三四")] * 4
    other = tmp_path / "other"
    for options, why in (
        ({"seq_length": 32}, "its seq_length is 32 where that of .* is 64"),
        ({"tokenizer": str(hf_json)}, r"its tokenizer \("),
        ({"format": ExampleFormat(kind="parallel", fields=("en", "zh"), template="tab")}, "its loss is all where"),
    ):
        prepare(other, pairs, sp_model, heldout=0.0, overwrite=True, **options)
        with pytest.raises(UserError, match=f"^{other}: {why}"):
            merge_corpora(tmp_path / "all", names([*shards, other]), MergeOptions())
    with pytest.raises(UserError, match="is one of the corpora to be merged"):
        merge_corpora(shards[0], names(shards), MergeOptions(overwrite=True))
    with pytest.raises(UserError, match="there already"):
        merge_corpora(shards[0], names(shards[1:]), MergeOptions())
    with pytest.raises(UserError, match=r"none\.json: no such corpus manifest"):
        merge_corpora(tmp_path / "all", names([*shards, tmp_path / "none"]), MergeOptions())
    with pytest.raises(UserError, match=r"would replace .*00000\.heldout, which is one of the corpora to be merged"):
        merge_corpora(shards[0], names([*shards[1:], Path(f"{shards[0]}.heldout")]), MergeOptions(overwrite=True))
    assert not list(tmp_path.glob("*all*"))


@pytest.mark.parametrize(
    ("out", "why"), [(".", "not a corpus's name"), ("a/..", "not a corpus's name"), ("s3://b/zh", "to local folders")]
)
def test_names_that_no_corpus_can_have(out: str, why: str, shards: list[Path]) -> None:
    with pytest.raises(UserError, match=why):
        merge_corpora(Path(out), names(shards), MergeOptions())


def test_a_merge_killed_at_any_rename_leaves_no_corpus_without_its_held_out_documents(
    tmp_path: Path, shards: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    renames, seen = 9, 0  # of the tokens, index, mask, packs and manifest of both sides, but for the last
    rename = os.replace
    for allowed in range(renames + 1):
        done = []

        def rename_some(source: Path, target: Path, allowed: int = allowed, done: list[Path] = done) -> None:
            if len(done) == allowed:
                raise KeyboardInterrupt
            done.append(target)
            rename(source, target)

        monkeypatch.setattr("megaflow.data.corpus.writer.os.replace", rename_some)
        with pytest.raises(KeyboardInterrupt):
            merge_corpora(tmp_path / "all", names(shards), MergeOptions(overwrite=True))
        seen += corpus_path(tmp_path / "all.heldout", "json").exists()
        assert not corpus_path(tmp_path / "all", "json").exists()
    assert 0 < seen <= renames
    monkeypatch.setattr("megaflow.data.corpus.writer.os.replace", rename)
    merge_corpora(tmp_path / "all", names(shards), MergeOptions(overwrite=True))
    assert windows(tmp_path / "all") == [window for shard in shards for window in windows(shard)]


def foreign_files(prefix: Path, lengths: list[int], offsets: list[int], bounds: list[int], code: int = 8) -> None:
    """Token files as another tool might write them, right or wrong."""
    tokens = np.full(sum(lengths), 5, "<u2")
    corpus_path(prefix, "bin").write_bytes(tokens.tobytes())
    numbers = [*lengths, *offsets, *bounds]
    header = HEADER.pack(MAGIC, 1, code, len(lengths), len(bounds))
    packed = struct.pack(f"<{len(lengths)}i{len(offsets) + len(bounds)}q", *numbers)
    corpus_path(prefix, "idx").write_bytes(header + packed)


@pytest.mark.parametrize(
    ("lengths", "offsets", "bounds", "code", "why"),
    [
        ([3, 4], [0, 6], [0, 1, 2], 7, "idx: dtype code 7 does not hold token ids"),
        ([3, 4], [0, 8], [0, 1, 2], 8, "idx: sequence 1 has length 4 at byte 8"),
        ([3, -1, 5], [0, 6, 4], [0, 3], 8, "idx: sequence 1 has length -1"),
        ([3, 4], [0, 6], [0, 2, 1, 2], 8, "idx: document 1 is said to run from 2 to 1 of 2"),
        ([3, 4], [0, 6], [0, 9, 2], 8, "idx: document 0 is said to run from 0 to 9 of 2"),
        ([3, 4], [0, 6], [0, 1], 8, "idx: the documents hold sequences 0 to 0 of 2"),
        ([3, 4], [0, 6], [], 8, "idx: 58 bytes where 2 sequences and -1 documents"),
        ([0, 0], [0, 0], [0, 2], 8, "there are no documents to merge"),
    ],
)
def test_contradictory_indices_are_refused(
    tmp_path: Path, sp_model: Path, lengths: list[int], offsets: list[int], bounds: list[int], code: int, why: str
) -> None:
    foreign_files(tmp_path / "in", lengths, offsets, bounds, code)
    with pytest.raises(UserError, match=why):
        merge_corpora(tmp_path / "out", [str(tmp_path / "in")], MergeOptions(str(sp_model), "en"))
    assert not list(tmp_path.glob("*out*"))


def test_other_tools_documents_may_be_held_out_by_a_merge_of_their_own(tmp_path: Path, sp_model: Path) -> None:
    foreign_files(tmp_path / "train", [3, 4], [0, 6], [0, 1, 2])
    foreign_files(tmp_path / "test", [5], [0], [0, 1])
    options = MergeOptions(str(sp_model), "en")
    merge_corpora(tmp_path / "out.heldout", [str(tmp_path / "test")], options)
    merge_corpora(tmp_path / "out", [str(tmp_path / "train")], options)
    assert [Corpus.open(tmp_path / name).num_tokens for name in ("out", "out.heldout")] == [7, 5]
    merge_corpora(tmp_path / "out", [str(tmp_path / "train")], replace(options, overwrite=True))
    assert sorted(path.name for path in tmp_path.glob("out.*")) == ["out.bin", "out.idx", "out.json"]


@pytest.mark.parametrize(
    ("size", "why"),
    [(12, "6 tokens where the index has 7 or more"), (16, "8 tokens where the index has 7"), (13, "no whole number")],
)
def test_tokens_and_index_of_different_lengths_are_refused(tmp_path: Path, sp_model: Path, size: int, why: str) -> None:
    foreign_files(tmp_path / "in", [3, 4], [0, 6], [0, 1, 2])
    corpus_path(tmp_path / "in", "bin").write_bytes((b"\5\0" * 8)[:size])
    with pytest.raises(UserError, match=why):
        merge_corpora(tmp_path / "out", [str(tmp_path / "in")], MergeOptions(str(sp_model), "en"))


def test_corpora_with_and_without_manifest_do_not_mix(tmp_path: Path, sp_model: Path, shards: list[Path]) -> None:
    foreign_files(tmp_path / "in", [3, 4], [0, 6], [0, 1, 2])
    with pytest.raises(UserError, match=f"^{tmp_path}/in: has no manifest, unlike"):
        merge_corpora(tmp_path / "out", names([*shards, tmp_path / "in"]), MergeOptions())
    with pytest.raises(UserError, match="are for corpora without"):
        merge_corpora(tmp_path / "out", names(shards), MergeOptions(language="en"))
