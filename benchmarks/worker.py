"""A process that does jobs and may die of one, as programs on a GPU do: the next job finds another in its place."""

from __future__ import annotations

import math
import multiprocessing
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

Work = Callable[[Any], Iterator[Any]]
"""Does a job, and yields messages on the way; at the top level of a module."""

FATAL = ("CUDA error", "device-side assert", "CUDA_ERROR", "CUDNN_STATUS_EXECUTION_FAILED")
"""In the text of errors behind which a process cannot use the GPU any more."""


GRACE = 3.0
"""Seconds that an idle process has to end."""


class JobDied(Exception):
    """A job whose process died or was silent for too long; says which."""


def one_line(error: BaseException) -> str:
    """An error's kind and the first line of its text, at most 200 characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}"[:200] if lines else type(error).__name__


def is_fatal(error: BaseException) -> bool:
    """Whether the process has lost the GPU."""
    return any(sign in str(error) for sign in FATAL)


class Worker:
    """Does jobs one after the other, in a process of its own or, `inline`, in this one.

    patience: seconds without a message after which the process is killed.
    """

    def __init__(self, work: Work, patience: float, inline: bool = False) -> None:
        self.work, self.patience, self.inline = work, patience, inline
        self._process: Any = None
        self._connection: Connection | None = None

    def run(self, job: Any, stop: float = math.inf) -> Iterator[Any]:
        """The messages of a job, as they come; at the time `stop`, as `time.time()` tells it, it is ended.

        Raises:
            JobDied: with the reason, if it did not end by itself; inline, errors come as they are.
        """
        if self.inline:
            yield from self.work(job)
            return
        if self._process is None:
            self._start()
        assert self._connection is not None
        whole = False
        try:
            self._connection.send(job)
            while True:
                left = stop - time.time()
                if not self._connection.poll(max(min(self.patience, left), 0)):
                    raise JobDied(
                        "no time was left" if left < self.patience else f"said nothing for {self.patience:.0f} s"
                    )
                kind, content = self._connection.recv()
                if kind == "failed":
                    raise JobDied(content)
                if kind == "done":
                    whole = True
                    return
                yield content
        except (EOFError, ConnectionError):
            self._process.join(5)
            raise JobDied(f"its process ended with exit code {self._process.exitcode}") from None
        finally:
            if not whole:
                self.close(grace=0)

    def close(self, grace: float = GRACE) -> None:
        """Ends the process; kills it where it does not end by itself in so many seconds."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        if self._process is not None:
            self._process.join(grace)
            self._process.kill()
            self._process.join()
            self._process = None

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other, self.work), daemon=False)
        self._process.start()
        other.close()


def _serve(connection: Connection, work: Work) -> None:
    """Does what comes over the connection; ends with the first job that fails, for it may have lost the GPU."""
    while True:
        try:
            job = connection.recv()
        except EOFError:
            return
        try:
            for message in work(job):
                connection.send(("message", message))
            connection.send(("done", None))
        except Exception as error:
            connection.send(("failed", one_line(error)))
            return
