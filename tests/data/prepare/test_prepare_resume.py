"""Preparations that were killed and go on: what is done is not done again, and the corpus is the undisturbed one."""

from __future__ import annotations

import os
import select
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megaflow.data.corpus.writer import CorpusWriter
from megaflow.data.prepare import prepare, readers
from megaflow.data.prepare.encode import PrepareOptions
from megaflow.data.prepare.prepare import PrepareReport, prepare_corpus
from megaflow.data.prepare.shuffle import Buckets
from megaflow.data.prepare.spool import Spool
from tests.data.killing import SMALL, content, counted_chunks, journal, killed, remove
from tests.data.preparing import PAIRS, example_options, write_jsonl


@pytest.mark.parametrize(
    ("owner", "name", "call", "after"),
    [
        (Spool, "add", 1, False),
        (Spool, "add", 17, True),
        (Spool, "save", 1, False),
        (Spool, "save", 2, True),
        (Spool, "save", 4, False),
        (Spool, "_write_journal", 1, True),
        (Spool, "complete", 1, True),
        (prepare, "duplicates", 1, True),
        (Buckets, "append", 5, True),
        (CorpusWriter, "add_documents", 3, True),
        (CorpusWriter, "complete", 2, False),
        (prepare, "remove_corpus", 1, True),
        (os, "replace", 2, True),
    ],
)
def test_a_killed_preparation_goes_on_to_the_same_corpus(
    tmp_path: Path,
    some_bad: PrepareOptions,
    inputs: list[Path],
    monkeypatch: pytest.MonkeyPatch,
    owner: Any,
    name: str,
    call: int,
    after: bool,
) -> None:
    with counted_chunks(monkeypatch) as all_chunks:
        undisturbed = prepare_corpus(tmp_path / "c", inputs, some_bad, limits=SMALL)
    expected = content(tmp_path / "c")
    remove(tmp_path / "c")

    def run() -> PrepareReport:
        return prepare_corpus(tmp_path / "c", inputs, some_bad, limits=SMALL)

    assert killed(run, owner, name, call, after)
    assert not (tmp_path / "c.json").exists()
    marks = journal(tmp_path / "c")
    chunks_done = 0
    if marks:
        inputs_before = {str(path) for path in inputs[: marks[-1]["inputs"]]}
        chunks_done = sum(chunk.file in inputs_before for chunk in all_chunks) + marks[-1]["chunks"]
    with counted_chunks(monkeypatch) as chunks:
        resumed = run()
    assert chunks == all_chunks[chunks_done:]
    assert content(tmp_path / "c") == expected
    assert resumed == undisturbed
    assert not list(tmp_path.glob(".tmp-*"))


@pytest.mark.parametrize("workers", [(1, 2, 1), (2, 1, 3)])
def test_any_number_of_kills_and_of_workers(
    tmp_path: Path, sp_model: Path, monkeypatch: pytest.MonkeyPatch, workers: tuple[int, ...]
) -> None:
    """Packed examples with a mask, some of them too long."""
    monkeypatch.setattr(readers, "CHUNK_BYTES", 300)
    paths = [write_jsonl(tmp_path / "a.jsonl", PAIRS), write_jsonl(tmp_path / "b.jsonl", [*PAIRS[:9], {"en": 1}])]
    options = replace(example_options(sp_model, "parallel", "tab", "response"), seq_length=14)
    report = prepare_corpus(tmp_path / "c", paths, options)
    assert 0 < report.num_too_long < 150
    assert report.num_duplicates == 9
    limits = replace(SMALL, piece_bytes=700)
    pipes = []
    for kill in range(4):
        pipes.append(os.pipe())

        def run(number: int = workers[kill % len(workers)]) -> None:
            prepare_corpus(tmp_path / "d", paths, replace(options, workers=number), limits=limits)

        assert killed(run, Spool, "save", 2, after=bool(kill % 2))
        os.close(pipes[-1][1])
    resumed = prepare_corpus(tmp_path / "d", paths, options, limits=limits)
    assert content(tmp_path / "d") == content(tmp_path / "c")
    assert resumed == report
    for end, _ in pipes:  # the workers ended with the process that was killed: nobody can write any more
        assert select.select([end], [], [], 20)[0]
        os.close(end)


def test_progress_goes_on_where_it_was(tmp_path: Path, some_bad: PrepareOptions, inputs: list[Path]) -> None:
    shuffled: list[tuple[int, int]] = []

    def run(seen: list[tuple[int, int]]) -> None:
        steps = {"read": seen, "shuffle": shuffled}
        prepare_corpus(tmp_path / "c", inputs, some_bad, lambda step, *done: steps[step].append(done), SMALL)

    whole: list[tuple[int, int]] = []
    rest: list[tuple[int, int]] = []
    total = sum(path.stat().st_size for path in inputs)
    assert killed(lambda: run([]), Spool, "save", 4)
    shutil.copytree(tmp_path / ".tmp-c.work", tmp_path / "kept")
    run(rest)
    assert rest == sorted(rest)
    assert len(shuffled) > 4
    assert shuffled == sorted(shuffled)
    assert shuffled[-1][0] == shuffled[-1][1] > 0
    remove(tmp_path / "c")
    run(whole)
    assert whole[-len(rest) :] == rest
    assert whole[0][0] < inputs[0].stat().st_size < rest[0][0]
    assert {of for _, of in whole} == {total}
    assert whole[-1][0] <= total


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"heldout": 0.3}, "other options: discarded"),
        ({"txt_per_line": True}, "other options: discarded"),
        ({"seed": 5}, "continues after the first"),
        ({"dedup": False}, "continues after the first"),
        ({"workers": 2}, "continues after the first"),
    ],
)
def test_other_options_discard_what_depends_on_them(
    tmp_path: Path,
    some_bad: PrepareOptions,
    inputs: list[Path],
    capfd: pytest.CaptureFixture[str],
    change: dict[str, Any],
    said: str,
) -> None:
    assert killed(lambda: prepare_corpus(tmp_path / "c", inputs, some_bad, limits=SMALL), CorpusWriter, "complete", 1)
    capfd.readouterr()
    changed = replace(some_bad, **change)
    prepare_corpus(tmp_path / "c", inputs, changed, limits=SMALL)
    (line,) = capfd.readouterr().err.splitlines()
    assert said in line
    prepare_corpus(tmp_path / "d", inputs, changed)
    assert content(tmp_path / "c") == content(tmp_path / "d")
    assert not capfd.readouterr().err


def test_another_tokenizer_discards(
    tmp_path: Path, some_bad: PrepareOptions, inputs: list[Path], hf_json: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """By its content: under another name it may be the same."""
    tokenizer = Path(shutil.copy(some_bad.tokenizer, tmp_path / "t.model"))
    assert killed(lambda: prepare_corpus(tmp_path / "c", inputs, some_bad, limits=SMALL), Spool, "save", 3)
    moved = replace(some_bad, tokenizer=str(tokenizer))
    assert killed(lambda: prepare_corpus(tmp_path / "c", inputs, moved, limits=SMALL), Spool, "save", 2)
    assert "continues after" in capfd.readouterr().err
    prepare_corpus(tmp_path / "c", inputs, replace(some_bad, tokenizer=str(hf_json)), limits=SMALL)
    assert "other tokenizer: discarded" in capfd.readouterr().err


@pytest.mark.parametrize("changed", [0, 1, 2, 3])
def test_inputs_are_used_up_to_one_that_changed(
    tmp_path: Path,
    some_bad: PrepareOptions,
    inputs: list[Path],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    changed: int,
) -> None:
    assert killed(lambda: prepare_corpus(tmp_path / "c", inputs, some_bad, limits=SMALL), CorpusWriter, "complete", 1)
    capfd.readouterr()
    inputs = [*inputs[:changed], write_jsonl(tmp_path / "new.jsonl", [{"text": f"new {i}"} for i in range(100)])]
    with counted_chunks(monkeypatch) as chunks:
        prepare_corpus(tmp_path / "c", inputs, some_bad, limits=SMALL)
    assert ("other inputs: discarded" if changed == 0 else "continues after") in capfd.readouterr().err
    assert {chunk.file for chunk in chunks} <= {str(path) for path in inputs[max(0, changed - 1) :]}
    prepare_corpus(tmp_path / "d", inputs, some_bad)
    assert content(tmp_path / "c") == content(tmp_path / "d")
