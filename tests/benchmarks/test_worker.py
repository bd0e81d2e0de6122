"""Jobs that take their process along do not stop those that come after."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import pytest

from benchmarks.worker import JobDied, Worker, is_fatal, one_line
from tests.benchmarks.jobs import work


@pytest.fixture
def worker() -> Iterator[Worker]:
    worker = Worker(work, patience=20)
    yield worker
    worker.close()


def collect(worker: Worker, job: str) -> tuple[list[str], str | None]:
    """The messages of a job, and why it died."""
    found: list[str] = []
    try:
        found.extend(worker.run(job))
    except JobDied as died:
        return found, str(died)
    return found, None


def test_jobs_share_a_process_until_one_dies(worker: Worker) -> None:
    first, second = (collect(worker, job)[0][1].rpartition(" ")[2] for job in ("a", "b"))
    assert first == second != str(os.getpid())
    assert collect(worker, "exit") == (["began exit"], "its process ended with exit code 3")
    messages, died = collect(worker, "c")
    assert died is None
    assert messages[1].rpartition(" ")[2] != first


def test_an_error_is_told_in_one_line(worker: Worker) -> None:
    assert collect(worker, "raise") == (["began raise"], "ValueError: first line")
    assert collect(worker, "a")[1] is None


def test_silence_is_ended(worker: Worker) -> None:
    assert collect(worker, "a")[1] is None  # the process is there
    worker.patience = 0.2
    assert collect(worker, "hang") == (["began hang"], "said nothing for 0 s")
    assert collect(worker, "a")[1] is None
    with pytest.raises(JobDied, match="no time was left"):
        list(worker.run("hang", time.time() + 0.1))


def test_inline_jobs_run_here() -> None:
    inline = Worker(work, patience=1, inline=True)
    assert list(inline.run("a"))[1] == f"ended a in {os.getpid()}"


def test_errors_behind_which_the_gpu_is_lost() -> None:
    assert is_fatal(RuntimeError("CUDA error: an illegal memory access was encountered"))
    assert not is_fatal(RuntimeError("CUDA out of memory"))
    assert one_line(ValueError("\n  text\nmore")) == "ValueError: text"
