"""Run a function on several ranks forked from the test process: four ranks start in a quarter of a second."""

from __future__ import annotations

import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# A process that has started OpenMP threads cannot be forked safely, so whoever imports this module stays on one.
torch.set_num_threads(1)


class RankError(AssertionError):
    """A rank raised, died or did not finish in time; the message holds its traceback."""


def run_ranks(world: int, fn: Callable[..., Any], *args: Any, timeout: float = 60) -> list[Any]:
    """Call `fn(*args)` on `world` forked ranks with a gloo process group, and return their results by rank.

    Arguments are inherited through the fork; results must be picklable and are copied back (tensors by value).

    Raises:
        RankError: with the traceback of the rank that raised first, or the ranks still running after `timeout` s.
    """
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        children: dict[Connection, tuple[int, int]] = {}
        sys.stdout.flush()
        sys.stderr.flush()
        for rank in range(world):
            receiver, sender = Pipe(duplex=False)
            pid = os.fork()
            if pid == 0:
                receiver.close()
                _child(rank, world, Path(folder) / "store", sender, timeout, fn, args)
            sender.close()
            children[receiver] = (rank, pid)
        try:
            return _collect(children, world, timeout)
        finally:
            for receiver, (_, pid) in children.items():
                receiver.close()
                _kill(pid)


def _child(
    rank: int, world: int, store: Path, sender: Connection, timeout: float, fn: Callable[..., Any], args: tuple
) -> None:
    """Body of one forked rank; never returns."""
    status = 1
    try:
        torch.set_num_threads(1)
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world))
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(str(store), world),
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=timeout),
        )
        result = pickle.dumps((True, 0.0, fn(*args)))
        dist.barrier()  # a rank that leaves early would break the others' last collective
        sender.send_bytes(result)
        status = 0
    except BaseException:
        sender.send_bytes(pickle.dumps((False, time.monotonic(), traceback.format_exc())))
    finally:
        # Without the interpreter's clean-up: the exit handlers belong to the parent.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _collect(children: dict[Connection, tuple[int, int]], world: int, timeout: float) -> list[Any]:
    results: dict[int, Any] = {}
    pending = dict(children)
    deadline = time.monotonic() + timeout
    while pending:
        ready = wait(list(pending), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            ranks = sorted(rank for rank, _ in pending.values())
            raise RankError(f"ranks {ranks} of {world} did not finish within {timeout} s")
        raised: list[tuple[float, int, str]] = []
        for receiver in ready:
            assert isinstance(receiver, Connection)
            rank, _ = pending.pop(receiver)
            try:
                ok, moment, value = pickle.loads(receiver.recv_bytes())
            except EOFError:
                raise RankError(f"rank {rank} of {world} died without a result") from None
            if ok:
                results[rank] = value
            else:
                raised.append((moment, rank, value))
        if raised:  # a rank that leaves breaks the others' collectives, which may raise before this process looks
            _, rank, value = min(raised)
            raise RankError(f"rank {rank} of {world} raised:\n{value}")
    return [results[rank] for rank in range(world)]


def _kill(pid: int) -> None:
    """Reap a child, with SIGKILL when it has not left by itself within a second."""
    for _ in range(100):
        if os.waitpid(pid, os.WNOHANG)[0]:
            return
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
