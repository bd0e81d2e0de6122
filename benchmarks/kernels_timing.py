"""How long a call takes: on a GPU by events, with a cold cache and launches queued ahead; without one by the clock."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch

from benchmarks.kernels_floors import Ceilings

MOST, FEWEST = 100, 5
"""Runs of a call."""
SLEEP_CYCLES_PER_MS = 2_000_000
"""Of a GPU's clock, which runs at about 2 GHz or more slowly."""


@dataclass(frozen=True)
class Times:
    """Of the runs of a call, milliseconds."""

    ms: float
    """The median."""
    low: float
    """A quarter of the runs are faster."""
    high: float
    """A quarter are slower."""
    runs: int

    @classmethod
    def of(cls, samples: list[float]) -> Times:
        low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
        return cls(median, low, high, len(samples))

    def as_dict(self) -> dict[str, Any]:
        return {key: round(value, 6) for key, value in asdict(self).items()}


class Timer(Protocol):
    """Measures calls."""

    def measure(self, call: Callable[[], Any], prepare: Callable[[], Any] | None, seconds: float) -> Times:
        """About so many seconds of runs; before each, `prepare` makes its inputs anew, unmeasured."""

    def ceilings(self) -> Ceilings:
        """What this device reaches."""


class HostTimer:
    """By the clock, on a CPU; for rehearsals."""

    def measure(self, call: Callable[[], Any], prepare: Callable[[], Any] | None, seconds: float) -> Times:
        samples: list[float] = []
        begin = time.perf_counter()
        while len(samples) < 2 or (time.perf_counter() - begin < seconds and len(samples) < MOST):
            if prepare is not None:
                prepare()
            start = time.perf_counter()
            call()
            samples.append(1e3 * (time.perf_counter() - start))
        return Times.of(samples)

    def ceilings(self) -> Ceilings:
        source = torch.empty(2**22, dtype=torch.uint8)
        target = torch.zeros_like(source)
        copied = self.measure(lambda: target.copy_(source), None, 0.05)
        a, b = (torch.randn(256, 256).bfloat16() for _ in range(2))
        product = self.measure(lambda: a @ b, None, 0.05)
        return Ceilings(2 * len(source) / copied.ms / 1e9, 2 * 256**3 / product.ms / 1e9)


class GpuTimer:
    """By events on the current GPU.

    Before every run a buffer of several times the L2 cache's size is read, which leaves none of the inputs there and
    no writes to be waited for, and the GPU sleeps until the host has queued the run's launches, so that the host's time
    counts only where a call waits for the GPU. What a call writes last is still in the cache when it ends.
    """

    def __init__(self) -> None:
        size = torch.cuda.get_device_properties(0).L2_cache_size
        self.buffer = torch.zeros(max(4 * size, 2**28) // 4, dtype=torch.int32, device="cuda")

    def measure(self, call: Callable[[], Any], prepare: Callable[[], Any] | None, seconds: float) -> Times:
        host = 0.0
        for _ in range(3):  # compiles, plans and fills the allocator's cache
            if prepare is not None:
                prepare()
            torch.cuda.synchronize()
            start = time.perf_counter()
            call()
            host = time.perf_counter() - start
        torch.cuda.synchronize()
        cycles = int(min(1.5 * host + 1e-4, 0.01) * 1e3 * SLEEP_CYCLES_PER_MS)
        begin = time.perf_counter()
        first = self._run(call, prepare, cycles)
        torch.cuda.synchronize()
        count = min(max(int(seconds / (time.perf_counter() - begin)), FEWEST), MOST)
        events = [first, *(self._run(call, prepare, cycles) for _ in range(count - 1))]
        torch.cuda.synchronize()
        return Times.of([start.elapsed_time(end) for start, end in events])

    def _run(self, call: Callable[[], Any], prepare: Callable[[], Any] | None, cycles: int) -> tuple[Any, Any]:
        if prepare is not None:
            prepare()
        torch.cuda._sleep(cycles)
        self.buffer.max()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        return start, end

    def ceilings(self) -> Ceilings:
        source = torch.randint(256, (2**32,), dtype=torch.uint8, device="cuda")
        target = torch.empty_like(source)
        copied = self.measure(lambda: target.copy_(source), None, 0.2)
        copied_bytes = 2 * len(source)
        a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
        out = torch.empty_like(a)
        product = self.measure(lambda: torch.mm(a, b, out=out), None, 0.2)
        return Ceilings(copied_bytes / copied.ms / 1e9, 2 * 8192**3 / product.ms / 1e9)


def timer_of(device: torch.device) -> Timer:
    """The one for a device."""
    return GpuTimer() if device.type == "cuda" else HostTimer()
