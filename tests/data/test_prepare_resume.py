"""Preparations that were killed and go on: what is done is not done again, and the corpus is the undisturbed one."""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from megaflow.data import encode, prepare, readers, spool
from megaflow.data.encode import PrepareOptions
from megaflow.data.prepare import PrepareReport, prepare_corpus
from megaflow.data.readers import Chunk
from megaflow.data.shuffle import Buckets, Limits
from megaflow.data.spool import Spool
from megaflow.data.writer import CorpusWriter, fcntl, locked
from megaflow.errors import UserError
from tests.data.preparing import PAIRS, example_options, texts, write_jsonl

SMALL = Limits(piece_bytes=3000, partition_documents=40, batch_tokens=500, bucket_tokens=2000, bucket_documents=50)


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a process wrote outlives it without."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Files of several kinds and many chunks, with a bad record and a duplicate each."""
    monkeypatch.setattr(readers, "CHUNK_BYTES", 500)
    monkeypatch.setattr(readers, "READ_BYTES", 100)
    monkeypatch.setattr(readers, "PARQUET_ROWS", 5)
    written = [{"text": text} for text in texts(200)]
    folder = tmp_path / "in"
    folder.mkdir()
    parts = [[*written[i : i + 50], written[0], {"text": ""}] for i in (0, 50, 100, 150)]
    paths = [write_jsonl(folder / "a.jsonl", parts[0]), write_jsonl(folder / "b.jsonl.zst", parts[1])]
    paths += [folder / "c.parquet", folder / "d.arrow"]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(parts[2]), paths[2])
    table = pyarrow.Table.from_pylist(parts[3])
    with pyarrow.OSFile(str(paths[3]), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table, max_chunksize=12)
    return paths


@pytest.fixture
def some_bad(options: PrepareOptions) -> PrepareOptions:
    return replace(options, max_bad=0.1)


def content(prefix: Path) -> dict[str, bytes]:
    """A corpus's files by suffix."""
    return {path.name.removeprefix(prefix.name): path.read_bytes() for path in prefix.parent.glob(f"{prefix.name}.*")}


def remove(prefix: Path) -> None:
    for path in prefix.parent.glob(f"{prefix.name}.*"):
        path.unlink()


def in_child(run: Callable[[], object]) -> int:
    """The wait status of a process that runs `run`."""
    pid = os.fork()
    if pid == 0:
        try:
            run()
        finally:
            os._exit(0)
    return os.waitpid(pid, 0)[1]


def killed(run: Callable[[], object], owner: Any, name: str, call: int, after: bool = False) -> bool:
    """Whether a process that runs `run` was killed, as it is before (or after) the `call`-th call of a function."""

    def main() -> None:
        original = getattr(owner, name)
        calls = 0

        def counted(*arguments: Any, **named: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == call and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = original(*arguments, **named)
            if calls == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(owner, name, counted)
        run()

    status = in_child(main)
    assert os.WIFSIGNALED(status) or status == 0
    return os.WIFSIGNALED(status)


@contextmanager
def counted_chunks(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Chunk]]:
    """The chunks that this process tokenises meanwhile."""
    chunks: list[Chunk] = []
    original = encode.encode_chunk

    def count(chunk: Chunk, *arguments: Any) -> Any:
        chunks.append(chunk)
        return original(chunk, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(encode, "encode_chunk", count)
        yield chunks


def journal(prefix: Path) -> list[dict[str, Any]]:
    path = prefix.with_name(f".tmp-{prefix.name}.work") / "journal.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()[1:]]


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
    def run(seen: list[tuple[int, int]]) -> None:
        prepare_corpus(tmp_path / "c", inputs, some_bad, lambda *done: seen.append(done), SMALL)

    whole: list[tuple[int, int]] = []
    rest: list[tuple[int, int]] = []
    total = sum(path.stat().st_size for path in inputs)
    assert killed(lambda: run([]), Spool, "save", 4)
    shutil.copytree(tmp_path / ".tmp-c.work", tmp_path / "kept")
    run(rest)
    assert rest == sorted(rest)
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


def test_a_file_written_anew_is_read_anew(tmp_path: Path, some_bad: PrepareOptions, inputs: list[Path]) -> None:
    assert killed(lambda: prepare_corpus(tmp_path / "c", inputs, some_bad, limits=SMALL), CorpusWriter, "complete", 1)
    before, status = inputs[0].read_bytes(), inputs[0].stat()
    inputs[0].write_bytes(before.replace(b"hello", b"olleh"))
    os.utime(inputs[0], ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    prepare_corpus(tmp_path / "c", inputs, some_bad)
    prepare_corpus(tmp_path / "d", inputs, some_bad)
    assert content(tmp_path / "c") == content(tmp_path / "d")


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "journal.jsonl").write_bytes((folder / "journal.jsonl").read_bytes()[:-5]),
        lambda folder: (folder / "journal.jsonl").write_bytes((folder / "journal.jsonl").read_bytes() + b"\0\0\0"),
        lambda folder: (folder / "journal.jsonl").write_bytes(b""),
        lambda folder: (folder / "journal.jsonl").unlink(),
        lambda folder: (folder / "rows").write_bytes((folder / "rows").read_bytes()[:1000]),
        lambda folder: (folder / "tokens").unlink(),
        lambda folder: (folder / "other").write_bytes(b"x"),
    ],
)
def test_what_a_power_cut_leaves_is_used_as_far_as_it_is_whole(
    tmp_path: Path, some_bad: PrepareOptions, inputs: list[Path], damage: Callable[[Path], object]
) -> None:
    prepare_corpus(tmp_path / "d", inputs, some_bad)
    assert killed(lambda: prepare_corpus(tmp_path / "c", inputs, some_bad, limits=SMALL), Spool, "save", 4)
    assert len(journal(tmp_path / "c")) == 3
    damage(tmp_path / ".tmp-c.work")
    prepare_corpus(tmp_path / "c", inputs, some_bad, limits=SMALL)
    assert content(tmp_path / "c") == content(tmp_path / "d")


def test_what_the_journal_says_is_on_disk(
    tmp_path: Path, some_bad: PrepareOptions, inputs: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Synced before the journal is, which is synced itself."""
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(Path(os.readlink(f"/proc/self/fd/{file}")).name))
    prepare_corpus(tmp_path / "c", inputs, some_bad, limits=SMALL)
    assert synced[:7] == ["journal.jsonl.new", *["rows", "tokens", "journal.jsonl"] * 2]


def test_a_name_is_prepared_by_one_process_at_a_time(
    tmp_path: Path, some_bad: PrepareOptions, inputs: list[Path]
) -> None:
    begun, go_on = os.pipe(), os.pipe()

    def wait(*_: Any) -> None:
        os.write(begun[1], b"x")
        os.read(go_on[0], 1)

    pid = os.fork()
    if pid == 0:
        prepare._encode = wait  # type: ignore[assignment]
        try:
            prepare_corpus(tmp_path / "c", inputs, some_bad)
        finally:
            os._exit(0)
    os.read(begun[0], 1)
    with pytest.raises(UserError, match=r"/c: another process is writing a corpus of this name") as caught:
        prepare_corpus(tmp_path / "c", inputs, some_bad)
    assert "\n" not in str(caught.value)
    prepare_corpus(tmp_path / "cc", inputs, some_bad)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert (tmp_path / ".tmp-c.lock").exists()
    prepare_corpus(tmp_path / "c", inputs, some_bad)  # the lock went with the process
    assert content(tmp_path / "c") == content(tmp_path / "cc")
    assert not list(tmp_path.glob(".tmp-*"))
    for end in (*begun, *go_on):
        os.close(end)


def test_a_lock_removed_before_it_is_taken_is_taken_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, original, calls = tmp_path / ".tmp-c.lock", fcntl.lockf, []

    def remove_first(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) == 1:
            path.unlink()
        original(*arguments)

    monkeypatch.setattr(fcntl, "lockf", remove_first)
    with locked(tmp_path / "c"):
        assert path.exists()
    assert len(calls) == 2
    assert not path.exists()


def test_rows_of_the_spool_come_in_parts(tmp_path: Path, some_bad: PrepareOptions, inputs: list[Path]) -> None:
    """However many documents are read at a time, the corpus is the same."""
    prepare_corpus(tmp_path / "c", inputs, some_bad)

    def run() -> None:
        spool.ROWS = 7
        prepare_corpus(tmp_path / "d", inputs, some_bad, limits=SMALL)

    assert in_child(run) == 0
    assert content(tmp_path / "d") == content(tmp_path / "c")
