"""Jobs for the tests of `benchmarks/worker.py`: without torch, so that a process is soon there."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator


def work(job: str) -> Iterator[str]:
    """What the job is called."""
    yield f"began {job}"
    if job == "exit":
        os._exit(3)
    if job == "hang":
        time.sleep(60)
    if job == "raise":
        raise ValueError("first line\nsecond line")
    yield f"ended {job} in {os.getpid()}"
