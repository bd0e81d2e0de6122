"""Preparations killed at any point, for tests."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from megaflow.data.prepare import encode
from megaflow.data.prepare.readers import Chunk
from megaflow.data.prepare.shuffle import Limits
from tests.data.preparing import texts, write_jsonl

SMALL = Limits(piece_bytes=3000, partition_documents=40, batch_tokens=500, bucket_tokens=2000, bucket_documents=50)


def inputs_of_all_kinds(folder: Path) -> list[Path]:
    """Files of several kinds and many chunks, with a bad record and a duplicate each."""
    written = [{"text": text} for text in texts(200)]
    folder.mkdir()
    parts = [[*written[i : i + 50], written[0], {"text": ""}] for i in (0, 50, 100, 150)]
    paths = [write_jsonl(folder / "a.jsonl", parts[0]), write_jsonl(folder / "b.jsonl.zst", parts[1])]
    paths += [folder / "c.parquet", folder / "d.arrow"]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(parts[2]), paths[2])
    table = pyarrow.Table.from_pylist(parts[3])
    with pyarrow.OSFile(str(paths[3]), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table, max_chunksize=12)
    return paths


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
