"""Steps prepared ahead, in threads beside the one that trains."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

Plan = TypeVar("Plan")
Part = TypeVar("Part")


class Prefetcher(Generic[Plan, Part]):
    """Plans steps one after another in one thread, and does the parts of each in others.

    Threads, not processes: copies, checksums and C++ let the training thread run meanwhile, and what they fill needs no
    second copy to get there. A step's parts come back in order, whichever thread finished first.

    Args:
        plan: makes the next step's plan; called from one thread, in order.
        parts: the tasks of a plan; called from the same thread.
        workers: threads for the parts; 0 plans and does them in `next`, in the calling thread.
    """

    def __init__(
        self, plan: Callable[[], Plan], parts: Callable[[Plan], Sequence[Callable[[], Part]]], workers: int
    ) -> None:
        self._plan, self._parts, self._threaded = plan, parts, workers > 0
        self._planner = ThreadPoolExecutor(1, "plan")
        self._workers = ThreadPoolExecutor(max(1, workers), "read")  # its threads start with their first task
        self._ahead: deque[Future[tuple[Plan, list[Future[Part]]]]] = deque()

    def next(self, ahead: int) -> tuple[Plan, list[Part]]:
        """The next step, waited for; `ahead` more (none if negative) are being prepared when it returns.

        Raises what planning this step, or one of its parts, raised.
        """
        if not self._threaded:
            plan = self._plan()
            return plan, [part() for part in self._parts(plan)]
        self._prepare(1)
        plan, parts = self._ahead.popleft().result()
        results = [part.result() for part in parts]
        self._prepare(ahead)  # last: a thread that wakes up takes the interpreter from this one
        return plan, results

    def _prepare(self, steps: int) -> None:
        while len(self._ahead) < steps:
            self._ahead.append(self._planner.submit(self._begin))

    def _begin(self) -> tuple[Plan, list[Future[Part]]]:
        plan = self._plan()
        return plan, [self._workers.submit(part) for part in self._parts(plan)]

    def close(self) -> None:
        """Drops what was prepared and ends the threads; waits for what each is at."""
        self._planner.shutdown(cancel_futures=True)  # first, as it hands on to the workers
        self._workers.shutdown(cancel_futures=True)
