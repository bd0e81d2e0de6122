"""Preparations that are stopped, or may not write: what they leave and what they say."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megaflow.data.corpus.writer import CorpusWriter
from megaflow.data.prepare import encode
from megaflow.data.prepare.encode import PrepareOptions
from megaflow.data.prepare.prepare import prepare_corpus
from megaflow.errors import UserError
from tests.data.preparing import COMMAND, PAIRS, documents, example_options, texts, write_jsonl


def test_an_existing_corpus_is_kept_unless_told(tmp_path: Path, sp_model: Path, options: PrepareOptions) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts(60)])
    prepare_corpus(tmp_path / "c", [path], options)
    with pytest.raises(UserError, match="--overwrite"):
        prepare_corpus(tmp_path / "c", [path], options)
    prepare_corpus(tmp_path / "c", [path], replace(options, heldout=0.0, overwrite=True))
    assert len(documents(tmp_path / "c", sp_model)) == 60
    assert not list(tmp_path.glob("c.heldout*"))


@pytest.mark.parametrize("stage", ["add_documents", "complete", "_write_index"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interruption_leaves_no_corpus_but_the_work_done(
    tmp_path: Path,
    options: PrepareOptions,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    stage: str,
    error: type[BaseException],
) -> None:
    def fail(*_: Any) -> None:
        raise error

    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts(60)])
    monkeypatch.setattr(CorpusWriter, stage, fail)
    with pytest.raises(UserError if error is OSError else error):
        prepare_corpus(tmp_path / "c", [path], options)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".tmp-c.work", "a.jsonl"]
    assert "60 records are kept in" in capsys.readouterr().err


def test_a_kill_while_a_corpus_is_replaced_leaves_no_mix(
    tmp_path: Path, sp_model: Path, options: PrepareOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Old documents must never be trained on where new ones are held out, nor the other way round."""
    options = replace(options, overwrite=True)
    for name in ("new", "old"):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"text": f"{name} {i}"} for i in range(40)])

    def state() -> str:
        if not (tmp_path / "c.json").exists():
            return "none"
        texts = documents(tmp_path / "c", sp_model) + documents(tmp_path / "c.heldout", sp_model)
        (name,) = {text.split()[0] for text in texts}
        assert sorted(texts) == sorted(f"{name} {i}" for i in range(40))
        return name

    def prepare_killed_after(steps: int) -> None:
        def counted(change: Callable[..., Any]) -> Callable[..., Any]:
            def run(*arguments: Any, **named: Any) -> Any:
                nonlocal steps
                steps -= 1
                if steps < 0:  # nor does anything tidy up afterwards
                    raise SystemExit
                return change(*arguments, **named)

            return run

        with monkeypatch.context() as patched, contextlib.suppress(SystemExit):
            patched.setattr(os, "replace", counted(os.replace))
            patched.setattr(Path, "unlink", counted(Path.unlink))
            prepare_corpus(tmp_path / "c", [tmp_path / "new.jsonl"], options)

    states = []
    for steps in range(40):
        prepare_corpus(tmp_path / "c", [tmp_path / "old.jsonl"], options)
        assert not list(tmp_path.glob(".tmp-*"))  # of the last one killed
        prepare_killed_after(steps)
        states.append(state())
    assert [name for name, _ in itertools.groupby(states)] == ["old", "none", "new"]


def test_leftovers_of_another_name_are_kept(tmp_path: Path, options: PrepareOptions) -> None:
    for name in ("c.bin", "c.heldout.idx", "c.packs-64", "c.d.bin", "cc.bin", "c.packs-x"):
        (tmp_path / f".tmp-{name}").touch()
    prepare_corpus(tmp_path / "c", [write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}])], replace(options, heldout=0.0))
    assert sorted(path.name for path in tmp_path.glob(".tmp-*")) == [".tmp-c.d.bin", ".tmp-c.packs-x", ".tmp-cc.bin"]


@pytest.mark.parametrize("workers", ["1", "2"])
def test_sigterm_leaves_no_rubbish(tmp_path: Path, sp_model: Path, workers: str) -> None:
    line = json.dumps({"text": "hello world " * 1000}) + "\n"
    (tmp_path / "a.jsonl").write_text(line * 5000)
    arguments = [str(tmp_path / "c"), str(tmp_path / "a.jsonl"), "--tokenizer", str(sp_model), "--language", "en"]
    with subprocess.Popen([sys.executable, "-c", COMMAND, *arguments, "--workers", workers]) as process:
        spool = tmp_path / ".tmp-c.work" / "tokens"
        while process.poll() is None and not (spool.exists() and spool.stat().st_size):
            time.sleep(0.01)
        process.terminate()
        assert process.wait() == 128 + 15
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("file/x", "cannot be written"),
        (".", "not a corpus's name"),
        ("..", "not a corpus's name"),
        ("/", "not a corpus's name"),
        ("/proc/x", "cannot be written"),
        ("x" * 300, "cannot be written"),
        ("folder", r"folder\.bin: is a folder"),
        ("packed", r"packed\.heldout\.packs-16: is a folder"),
    ],
)
def test_places_that_cannot_be_written_are_named(
    tmp_path: Path, sp_model: Path, monkeypatch: pytest.MonkeyPatch, out: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    Path("folder.bin").mkdir()
    Path("packed.heldout.packs-16").mkdir()
    path = write_jsonl(Path("a.jsonl"), PAIRS)
    before = sorted(Path().iterdir())
    with pytest.raises(UserError, match=message) as caught:
        prepare_corpus(out, [path], replace(example_options(sp_model, "parallel", "tab"), seq_length=16))
    assert str(caught.value).startswith(out)
    assert "\n" not in str(caught.value)
    assert sorted(Path().iterdir()) == before


def test_a_full_disk_is_an_error(tmp_path: Path, options: PrepareOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(CorpusWriter, "add_documents", full)
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts(60)])
    with pytest.raises(UserError, match=r"c: cannot be written \(No space left on device\)"):
        prepare_corpus(tmp_path / "c", [path], options)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".tmp-c.work", "a.jsonl"]


def die(*_: Any) -> None:
    """What the kernel does to a process that takes too much memory."""
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_is_an_error(tmp_path: Path, options: PrepareOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts(5)])
    monkeypatch.setattr(encode, "_tokenizer", die)
    with pytest.raises(UserError, match="fewer --workers"):
        prepare_corpus(tmp_path / "c", [path], replace(options, workers=2))
    assert [p.name for p in tmp_path.iterdir()] == ["a.jsonl"]
