"""A checkpoint folder that is not one folder to all ranks is refused before anything is trained."""

from __future__ import annotations

from pathlib import Path

import pytest

from megaflow.checkpoint import shared
from megaflow.checkpoint.store import CheckpointStore
from megaflow.config_parallel import ParallelConfig
from megaflow.errors import UserError
from megaflow.parallel.mesh import ParallelContext
from tests.distributed import run_ranks


def make_store(folders: list[Path], patience: float) -> str:
    shared.PATIENCE = patience
    ctx = ParallelContext.create(ParallelConfig(), "cpu")
    try:
        CheckpointStore(folders[ctx.rank], ctx)
    except UserError as error:
        return str(error)
    return ""


def test_a_folder_of_each_machine_s_own_is_refused_on_every_rank(tmp_path: Path) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    folders[1].mkdir()
    messages = run_ranks(2, make_store, folders, 0.1)
    assert messages[0] == messages[1].replace(str(folders[1]), str(folders[0]))
    assert "rank 1 on " in messages[0]
    assert "put run_dir on a file system that all machines share" in messages[0]
    assert len(messages[0].splitlines()) == 1
    assert list(folders[0].iterdir()) == []


def test_a_shared_folder_passes_and_keeps_no_mark(tmp_path: Path) -> None:
    assert run_ranks(2, make_store, [tmp_path / "a"] * 2, 60.0) == ["", ""]
    assert list((tmp_path / "a").iterdir()) == []


def test_a_slow_file_system_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = iter([False, False, True])
    monkeypatch.setattr(shared.os.path, "exists", lambda path: next(seen))
    assert shared._appears(tmp_path / "mark")
