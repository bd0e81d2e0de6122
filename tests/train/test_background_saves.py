"""Runs that save in the background end, stop, die and resume as if every save had been waited for."""

from __future__ import annotations

import contextlib
import io
import os
import resource
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from megaflow import pretrain
from megaflow.checkpoint import storage
from megaflow.checkpoint.store import open_checkpoint, step_directories, step_name
from megaflow.config import Config
from megaflow.config_load import dump_config
from megaflow.train.run import Run
from tests.distributed import RankError, run_ranks
from tests.train.runs import MakeConfig, assert_bitwise_equal, losses, run


def checkpoints(config: Config) -> Path:
    return Path(config.run_dir) / "checkpoints"


def saved_steps(config: Config) -> list[int]:
    return [int(path.name[5:]) for path in step_directories(checkpoints(config))]


class Slow:
    """Called in every step: files are written two steps after their save began, or when the run leaves."""

    def __init__(self, last: int) -> None:
        self.last, self.step, self.write = last, 0, storage.write_safetensors

    def __call__(self, rank: int, planned: Run) -> None:
        self.step = planned.sampler.step
        storage.write_safetensors = self.hold  # type: ignore[assignment]

    def hold(self, *args: Any) -> storage.FileRecord:
        begun = self.step
        while self.step < min(begun + 2, self.last):
            time.sleep(0.001)
        return self.write(*args)


@pytest.mark.parametrize("world", [1, 2])
def test_what_is_saved_while_training_goes_on_is_what_a_waiting_run_saves(make_config: MakeConfig, world: int) -> None:
    waiting = make_config("waiting", checkpoint__asynchronous=False)
    ahead = make_config("ahead")
    run(waiting, world)
    run(ahead, world, during=Slow(12))
    assert saved_steps(ahead) == saved_steps(waiting) == [8, 12]
    for step in (8, 12):
        ours, theirs = (open_checkpoint(checkpoints(config) / step_name(step)) for config in (ahead, waiting))
        assert ours.names() == theirs.names()
        assert [name for name in ours.names() if not torch.equal(ours.read(name), theirs.read(name))] == []
        assert ours.manifest.scalars | {"config": 0} == theirs.manifest.scalars | {"config": 0}
    assert losses(ahead) == losses(waiting)


def kill_in_thread(rank_to_kill: int, step: int, function: str, after: bool) -> Any:
    """Called in every step: lets the rank die within the save of a step."""

    def during(rank: int, planned: Run) -> None:
        if rank != rank_to_kill or planned.sampler.step != step:
            return
        owner = {"write_safetensors": storage, "rename": Path, "fsync": os}[function]
        original = getattr(owner, function)

        def die(*args: Any) -> Any:
            if after:
                original(*args)
            os.kill(os.getpid(), signal.SIGKILL)

        setattr(owner, function, die)

    return during


def test_killed_in_a_background_save_and_resumed(make_config: MakeConfig) -> None:
    """Also when the other rank waits for it, in a save or in a step."""
    whole = make_config("whole")
    run(whole, 2)
    for rank, function, after, left in ((1, "fsync", True, 4), (0, "rename", False, 4), (0, "rename", True, 8)):
        broken = make_config(f"broken-{function}-{after}")
        with pytest.raises(RankError):
            run(broken, 2, during=kill_in_thread(rank, 8, function, after))
        assert saved_steps(broken)[-1] == left
        run(broken, 2)
        assert saved_steps(broken) == [8, 12]
        assert not list(checkpoints(broken).glob(".tmp-*"))
        assert_bitwise_equal(whole, broken)
        assert losses(broken) == losses(whole)


def test_a_signal_during_a_save_finishes_it_and_saves_the_last_step(make_config: MakeConfig) -> None:
    whole, stopped = make_config("whole"), make_config("stopped")
    slow = Slow(last=6)  # the signal falls into step 5 and is taken up with step 6

    def during(rank: int, planned: Run) -> None:
        slow(rank, planned)
        if planned.sampler.step == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    run(whole)
    run(stopped, during=during)
    assert saved_steps(stopped) == [4, 6]
    run(stopped)
    assert_bitwise_equal(whole, stopped)


def test_a_failed_save_ends_the_run_on_every_rank(make_config: MakeConfig) -> None:
    """Rank 1 has no room for step 8, which rank 0 notices in step 9; resumed from step 4."""
    config = make_config("run", checkpoint__keep=3)

    def during(rank: int, planned: Run) -> None:
        if rank == 1 and planned.sampler.step == 8:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
        if rank == 0 and planned.sampler.step == 9:
            while any(thread.name == "save of step 8" for thread in threading.enumerate()):
                time.sleep(0.001)

    with pytest.raises(RankError, match=r"UserError: cannot save .*step-00000008: rank 1: \[Errno 27\] File too large"):
        run(config, 2, during=during)
    assert saved_steps(config) == [4]
    assert losses(config)[-1][0] == 10, "the ranks agree on it in the next step's reduction"
    run(config, 2)
    whole = make_config("whole")
    run(whole, 2)
    assert_bitwise_equal(whole, config)


def start_on_a_full_disk(config: Config, folder: Path) -> tuple[int, str]:
    """The exit code and the standard error of the program where no file may grow to a checkpoint's size."""
    (folder / "config.yaml").write_text(dump_config(config))
    said = io.StringIO()
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(said):
        patch.setattr(sys, "argv", ["pretrain.py", "--config", str(folder / "config.yaml")])
        return pretrain.main(), said.getvalue()


def test_a_full_disk_is_one_line_and_exit_code_2(make_config: MakeConfig, tmp_path: Path) -> None:
    run(make_config("run", train__steps=4))
    config = make_config("run")
    ((code, said),) = run_ranks(1, start_on_a_full_disk, config, tmp_path)
    assert code == 2
    assert said.startswith(f"error: cannot save {checkpoints(config)}/step-00000")
    assert "File too large" in said
    assert len(said.splitlines()) == 1
    assert saved_steps(config) == [4]
