"""Background saves: the state of the moment they began, committed or nothing, whatever training does meanwhile."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megaflow.checkpoint import shards, storage
from megaflow.checkpoint.background import CheckpointSaver, HostCopy
from megaflow.checkpoint.shards import Shards, joined
from megaflow.checkpoint.store import CheckpointStore, open_checkpoint
from megaflow.errors import UserError
from megaflow.kernels.adamw import split_master
from megaflow.parallel.mesh import ParallelContext
from tests.checkpoint.test_store import error_of, load, local, whole
from tests.distributed import run_ranks


def place() -> ParallelContext:
    """This rank's, cut over all ranks; without groups, for the store makes its own."""
    rank, world = dist.get_rank(), dist.get_world_size()
    return ParallelContext(torch.device("cpu"), rank, world, tp=world, tp_rank=rank)


def saver_of(directory: Path, say: Callable[[str], None], patience: float = 60) -> CheckpointSaver:
    return CheckpointSaver(CheckpointStore(directory, place()), True, say, patience)


def state_of(step: int) -> tuple[dict[str, Shards | torch.Tensor], dict[str, Any]]:
    return local(whole(step), place()), {"step": step, "consumed": {"en": [1, 2]}}


def overwrite(tensors: dict[str, Shards | torch.Tensor], by: dict[str, Shards | torch.Tensor]) -> None:
    """What an optimizer step does: other values in the same storage."""
    for name, tensor in tensors.items():
        other = by[name]
        if isinstance(tensor, Shards) and isinstance(other, Shards):
            for (_, old), (_, new) in zip(tensor.blocks, other.blocks, strict=True):
                old.copy_(new)
        elif isinstance(tensor, torch.Tensor) and isinstance(other, torch.Tensor):
            tensor.copy_(other)


class Gate:
    """Holds back the writing of files until it is opened, once for each save."""

    def __init__(self) -> None:
        self.reached, self.opened, self.write = (
            threading.Semaphore(0),
            threading.Semaphore(0),
            storage.write_safetensors,
        )

    def __call__(self, *args: Any) -> storage.FileRecord:
        self.reached.release()
        self.opened.acquire()
        return self.write(*args)


def train_while_saving(directory: Path) -> list[str]:
    """Two saves in quick succession of one state that goes on; what was said of them."""
    said: list[str] = []
    gate = storage.write_safetensors = Gate()  # type: ignore[assignment]
    saver = saver_of(directory, said.append)
    tensors, scalars = state_of(1)
    saver.save(1, tensors, scalars)
    gate.reached.acquire()
    memory = saver.copy.buffer.data_ptr()
    overwrite(tensors, state_of(2)[0])
    scalars["step"] = 2
    saver.poll()
    assert said == [], "nothing is said to be saved before it is committed"
    assert "no checkpoint here" in error_of(open_checkpoint, directory)
    gate.opened.release()

    saver.save(2, tensors, scalars)
    assert said == [f"step 1  saved {directory}/step-00000001"], "one at a time"
    assert saver.copy.buffer.data_ptr() == memory, "one copy in memory"
    gate.reached.acquire()
    overwrite(tensors, state_of(3)[0])
    found = open_checkpoint(directory)  # while another process writes the next one
    assert found.manifest.step == 1
    assert all(torch.equal(found.read(name), tensor) for name, tensor in whole(1).items())
    gate.opened.release()
    with saver:
        pass
    return said


@pytest.mark.parametrize("world", [1, 2])
def test_a_save_holds_the_state_of_its_step(tmp_path: Path, world: int) -> None:
    said = run_ranks(world, train_while_saving, tmp_path)
    assert said == [[f"step {step}  saved {tmp_path}/step-{step:08d}" for step in (1, 2)]] * world
    for step in (1, 2):
        found = open_checkpoint(tmp_path / f"step-{step:08d}")
        assert found.manifest.scalars == {"step": step, "consumed": {"en": [1, 2]}}
        assert [name for name, tensor in whole(step).items() if not torch.equal(found.read(name), tensor)] == []
    assert load(tmp_path, 1) == 2


def fail_in_the_background(directory: Path, damage: str) -> tuple[str, list[str]]:
    """A save, then one that one rank cannot finish, seen at once by some ranks and later by others."""
    said: list[str] = []
    saver = saver_of(directory, said.append)
    saver.save(1, *state_of(1))
    saver.wait()
    if damage == "removed" and dist.get_rank() == 0:
        shutil.rmtree(directory)
    elif damage == "read-only" and dist.get_rank() == 0:

        def refuse(*_: Any) -> None:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(directory))

        os.mkdir = refuse  # type: ignore[assignment]
    elif damage == "full" and dist.get_rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50, resource.RLIM_INFINITY))
    dist.barrier()
    saver.save(2, *state_of(2))
    if dist.get_rank() == 0:
        while not saver.failed:
            saver.poll()
    message = error_of(saver.save, 3, *state_of(3))
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert not saver.failed, "told once"
    return message, said


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("removed", "rank 0: [Errno 2] No such file or directory"),
        ("read-only", "rank 0: [Errno 30] Read-only file system"),
        ("full", "rank 1: [Errno 27] File too large"),
    ],
)
def test_a_failure_is_the_same_line_on_every_rank(tmp_path: Path, damage: str, words: str) -> None:
    directory = tmp_path / "checkpoints"
    results = run_ranks(2, fail_in_the_background, directory, damage)
    messages = {message for message, _ in results}
    assert len(messages) == 1
    message = messages.pop()
    assert message.startswith(f"cannot save {directory}/step-00000002: {words}")
    assert "\n" not in message
    assert all(said == [f"step 1  saved {directory}/step-00000001"] for _, said in results)
    if damage != "removed":
        assert [path.name for path in directory.iterdir()] == ["step-00000001"]
        assert load(directory, 1) == 1


def leave_by(directory: Path, error: type[BaseException], goes_on: bool) -> tuple[list[str], list[str]]:
    """What is committed, and said, when the context is left by an error while a save is under way, or hangs."""
    said: list[str] = []
    gate = storage.write_safetensors = Gate()  # type: ignore[assignment]
    saver = saver_of(directory, said.append, 60 if goes_on else 0.1)
    try:
        with saver:
            saver.save(1, *state_of(1))
            gate.reached.acquire()
            if goes_on:
                gate.opened.release()
            raise error
    except error:
        pass
    return [path.name for path in directory.iterdir()], said


def test_an_error_waits_for_the_save_but_not_for_ever_an_interrupt_does_not(tmp_path: Path) -> None:
    committed = (["step-00000001"], [f"step 1  saved {tmp_path}/error/step-00000001"])
    assert run_ranks(1, leave_by, tmp_path / "error", UserError, True) == [committed]
    unfinished = ([".tmp-step-00000001"], [])
    assert run_ranks(1, leave_by, tmp_path / "silence", RuntimeError, False) == [unfinished]
    assert run_ranks(1, leave_by, tmp_path / "interrupt", KeyboardInterrupt, False) == [unfinished]


def test_a_save_that_is_not_asynchronous_is_committed_when_it_returns(tmp_path: Path) -> None:
    said: list[str] = []
    saver = CheckpointSaver(CheckpointStore(tmp_path), False, said.append, 60)
    saver.save(1, {"a": torch.ones(3)}, {})
    assert said == [f"step 1  saved {tmp_path}/step-00000001"]
    assert saver.copy.buffer.numel() == 0, "nothing is copied"


def test_a_copy_keeps_offsets_and_values_of_views(tmp_path: Path) -> None:
    base = torch.arange(60.0).view(6, 10)
    tensors = {
        "column": Shards("column", (6, 8), torch.float32, [((0, 2), base[:, 3:7]), ((5, 0), base[1:2, :2])]),
        "bytes": torch.tensor([7, 8, 9], dtype=torch.uint8),
        "scalar": torch.tensor(5),
        "flag": torch.tensor([True, False]),
        "none here": Shards("none here", (4,), torch.float32, []),
    }
    copies, event = HostCopy().take(tensors)
    assert event is None
    assert copies.keys() == tensors.keys()
    wanted = base.clone()
    base.zero_()
    (first, left), (second, right) = copies["column"].blocks
    assert (first, second, copies["column"].global_shape) == ((0, 2), (5, 0), (6, 8))
    assert torch.equal(left, wanted[:, 3:7])
    assert torch.equal(right, wanted[1:2, :2])
    for name in ("bytes", "scalar", "flag"):
        assert torch.equal(copies[name].blocks[0][1], tensors[name])
        assert copies[name].dtype == tensors[name].dtype
    assert copies["none here"].blocks == []


@pytest.mark.parametrize("asynchronous", [False, True])
def test_split_master_weights_are_saved_whole(
    tmp_path: Path, asynchronous: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In pieces, and of blocks that lie apart in memory too."""
    monkeypatch.setattr(shards, "PIECE", 5)
    master = torch.randn(6, 10)
    parts = [
        {"model/a": Shards("model/a", (6, 6), part.dtype, [((0, 0), part[:4, 3:9]), ((4, 0), part[4:, 3:9])])}
        for part in split_master(master)
    ]
    saver = CheckpointSaver(CheckpointStore(tmp_path), asynchronous, lambda line: None, 60)
    saver.save(1, joined(*parts), {})
    for part in parts:
        for _, block in part["model/a"].blocks:
            block.zero_()  # as the next step would change them
    saver.wait()
    assert torch.equal(open_checkpoint(tmp_path).read("model/a"), master[:, 3:9])


@pytest.mark.gpu
def test_a_copy_from_a_gpu_is_of_the_moment_it_was_taken() -> None:
    tensor = torch.ones(1 << 22, device="cuda")
    copy = HostCopy()
    for value in (1.0, 2.0):
        copies, event = copy.take(
            {"a": tensor, "strided": Shards("strided", (2,), torch.float32, [((0,), tensor[::2])])}
        )
        tensor += 1
        assert event is not None
        event.synchronize()
        assert all((block == value).all() and not block.is_cuda for s in copies.values() for _, block in s.blocks)
    assert torch.cuda.cudart().cudaHostUnregister(copy.buffer.data_ptr()) == torch.cuda.cudart().cudaError.success
