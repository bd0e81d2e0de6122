"""Saves in the background: a step waits for a copy in host memory, a thread for the disk."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from threading import Thread
from types import TracebackType
from typing import Any

import torch

from megaflow.checkpoint.shards import Shards
from megaflow.checkpoint.store import CheckpointStore, as_shards
from megaflow.errors import UserError

ALIGNMENT = 64  # bytes, of every copied block


class HostCopy:
    """A copy of the tensors to save, in one buffer of host memory that is kept from save to save.

    For tensors on a GPU the buffer is pinned and the copy queued on the current stream, so the host does not wait.
    """

    def __init__(self) -> None:
        self.buffer = torch.empty(0, dtype=torch.uint8)

    def take(self, tensors: Mapping[str, Shards | torch.Tensor]) -> tuple[dict[str, Shards], torch.cuda.Event | None]:
        """The tensors as they are now, whole blocks in the host buffer, which the next call overwrites.

        Returns them with the event that says when the copy is there; None when it is there already.
        """
        shards = as_shards(tensors)
        blocks = [block for shard in shards.values() for _, block in shard.blocks]
        gpu = next((block.device for block in blocks if block.is_cuda), None)
        sizes = [block.numel() * shard.dtype.itemsize for shard in shards.values() for _, block in shard.blocks]
        needed = sum(map(_room, sizes))
        if self.buffer.numel() != needed:
            self.buffer = _host_memory(needed, pinned=gpu is not None)
        start, copies = 0, {}
        for name, shard in shards.items():
            copied = []
            for number, (offset, block) in enumerate(shard.blocks):
                size = block.numel() * shard.dtype.itemsize
                place = self.buffer[start : start + size].view(shard.dtype).view(block.shape)
                copied.append((offset, shard.copy_block(number, place, non_blocking=True)))
                start += _room(size)
            copies[name] = Shards(name, shard.global_shape, shard.dtype, copied)
        return copies, torch.cuda.current_stream(gpu).record_event() if gpu is not None else None


def _room(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _host_memory(size: int, pinned: bool) -> torch.Tensor:
    """Bytes of host memory; exactly as many, where torch's own pinned memory is rounded up to a power of two."""
    memory = torch.empty(size, dtype=torch.uint8)
    if pinned and size:
        error = torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), size, 0)
        if int(error):
            raise UserError(
                f"checkpoint.asynchronous: {size} bytes of host memory cannot be pinned (CUDA error {int(error)}); "
                "give the job more memory, or set it to false"
            )
    return memory


class CheckpointSaver:
    """Saves the checkpoints of a run, at most one at a time; as a context, it is left when the last is committed.

    All ranks call it alike. A failed save is the same UserError on every rank, but they may notice it at different
    steps: `failed` is to be agreed upon before any of them calls `save` or `wait`, which raise it.

    Args:
        asynchronous: False for saves that are committed when `save` returns.
        say: called with a line for each checkpoint that was committed, when next asked.
        patience: seconds that an error waits for the save under way, which other ranks may have left.
    """

    def __init__(self, store: CheckpointStore, asynchronous: bool, say: Callable[[str], None], patience: float) -> None:
        self.store, self.asynchronous, self.say, self.patience = store, asynchronous, say, patience
        self.copy = HostCopy()
        self.under_way: Future[str] | None = None

    def save(self, step: int, tensors: Mapping[str, Shards | torch.Tensor], scalars: Mapping[str, Any]) -> None:
        """Waits for the last save, then begins one of the state as it is now; see `CheckpointStore.save`."""
        self.wait()
        self.under_way = Future()
        if not self.asynchronous:
            _write(self.under_way, self.store, step, tensors, scalars)
            self.wait()
            return
        shards, copied = self.copy.take(tensors)
        captured = json.loads(json.dumps(scalars))
        # a daemon, for whoever interrupts the run twice does not want to wait for it
        arguments = (self.under_way, self.store, step, shards, captured, copied)
        Thread(target=_write, args=arguments, name=f"save of step {step}", daemon=True).start()

    @property
    def failed(self) -> bool:
        """Whether the save under way is known to have failed on this rank."""
        return self.under_way is not None and self.under_way.done() and self.under_way.exception() is not None

    def poll(self) -> None:
        """Says which checkpoint was committed since last asked; does not wait."""
        if self.under_way is not None and self.under_way.done() and not self.failed:
            self.wait()

    def wait(self) -> None:
        """Waits for the save under way. Raises UserError, the same on every rank, when one of them could not write."""
        under_way, self.under_way = self.under_way, None
        if under_way is not None:
            self.say(under_way.result())

    def __enter__(self) -> CheckpointSaver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.wait()
        elif issubclass(kind, Exception) and self.under_way is not None:  # an interrupt does not wait
            with suppress(TimeoutError):
                fault = self.under_way.exception(self.patience)
                self.say(str(fault) if fault else self.under_way.result())


def _write(
    outcome: Future[str],
    store: CheckpointStore,
    step: int,
    tensors: Mapping[str, Shards | torch.Tensor],
    scalars: Mapping[str, Any],
    copied: torch.cuda.Event | None = None,
) -> None:
    """Saves, once the copy is there; the outcome is the line that says so."""
    try:
        if copied is not None:
            copied.synchronize()
        outcome.set_result(f"step {step}  saved {store.save(step, tensors, scalars)}")
    except BaseException as error:
        outcome.set_exception(error)
