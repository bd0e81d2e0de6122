"""What a preparation keeps on disk while it works: whole, its own, and its own process's."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megaflow.data.corpus.writer import CorpusWriter, fcntl, locked
from megaflow.data.prepare import prepare, spool
from megaflow.data.prepare.encode import PrepareOptions
from megaflow.data.prepare.prepare import prepare_corpus
from megaflow.data.prepare.spool import Spool
from megaflow.errors import UserError
from tests.data.killing import SMALL, content, in_child, journal, killed


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
    try:
        with pytest.raises(UserError, match=r"/c: another process is writing a corpus of this name") as caught:
            prepare_corpus(tmp_path / "c", inputs, some_bad)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert "\n" not in str(caught.value)
    prepare_corpus(tmp_path / "cc", inputs, some_bad)
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


def test_rows_of_the_spool_come_in_parts(tmp_path: Path, some_bad: PrepareOptions, inputs: list[Path]) -> None:
    """However many documents are read at a time, the corpus is the same."""
    prepare_corpus(tmp_path / "c", inputs, some_bad)

    def run() -> None:
        spool.ROWS = 7
        prepare_corpus(tmp_path / "d", inputs, some_bad, limits=SMALL)

    assert in_child(run) == 0
    assert content(tmp_path / "d") == content(tmp_path / "c")


def test_a_file_written_anew_is_read_anew(tmp_path: Path, some_bad: PrepareOptions, inputs: list[Path]) -> None:
    assert killed(lambda: prepare_corpus(tmp_path / "c", inputs, some_bad, limits=SMALL), CorpusWriter, "complete", 1)
    before, status = inputs[0].read_bytes(), inputs[0].stat()
    inputs[0].write_bytes(before.replace(b"hello", b"olleh"))
    os.utime(inputs[0], ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    prepare_corpus(tmp_path / "c", inputs, some_bad)
    prepare_corpus(tmp_path / "d", inputs, some_bad)
    assert content(tmp_path / "c") == content(tmp_path / "d")
