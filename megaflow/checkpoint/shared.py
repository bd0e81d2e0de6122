"""Is a folder one folder to all ranks? Machines that each write to a disk of their own make no whole checkpoint."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megaflow.errors import UserError

PATIENCE = 60.0
"""Seconds until what one machine wrote must have appeared on the others: as long as NFS keeps a folder's entries."""


def check_shared(directory: Path, rank: int, everyones: Callable[[Any], list[Any]]) -> None:
    """Checks that all ranks see in `directory` what rank 0 writes there; called by all ranks together.

    Args:
        directory: a folder that rank 0 has made.
        everyones: gives the values of all ranks, by rank.

    Raises:
        UserError: on every rank, naming the first one that does not see it, and its machine.
    """
    mark, fault = everyones(_leave_mark(directory) if rank == 0 else None)[0]
    if fault:
        raise UserError(f"{directory}: cannot be written: {fault}")
    blind = everyones(None if _appears(directory / mark) else socket.gethostname())
    if rank == 0:
        (directory / mark).rmdir()
    for other, host in enumerate(blind):
        if host is not None:
            raise UserError(
                f"{directory}: rank {other} on {host} does not see what rank 0 writes there; put run_dir on a file "
                "system that all machines share"
            )


def _leave_mark(directory: Path) -> tuple[str, str | None]:
    """The name of a new empty folder there, removed by the next start if not before; what went wrong, if anything."""
    name = f".tmp-seen-{os.urandom(4).hex()}"
    try:
        (directory / name).mkdir()
    except OSError as error:
        return name, error.strerror
    return name, None


def _appears(path: Path) -> bool:
    """Waits until the path is there, but not for ever."""
    deadline = time.monotonic() + PATIENCE
    while not os.path.exists(path):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True
