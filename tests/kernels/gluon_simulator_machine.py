"""What a Hopper multiprocessor does behind a kernel's back: copies, products and barriers, each at a time of its own.

Partitions take turns at random, and asynchronous operations happen at any moment between their start and what waits for
them. Faults are found whether or not they do harm in one run: every partition and operation has a vector clock (Fidge,
1988), and memory may be touched only by those whose clock includes what was done to it before.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from pathlib import Path
from types import GeneratorType
from typing import Any

import numpy as np

Clock = dict[int, int]
Steps = Generator[Callable[[], bool] | None, None, Any]
"""A kernel at work: it stops where others may come first, and says what it waits for, if anything."""


class Fault(AssertionError):
    """What a kernel does wrong."""


def join(clock: Clock, other: Clock) -> None:
    for agent, time in other.items():
        clock[agent] = max(clock.get(agent, 0), time)


@dataclass
class Slot:
    """A block of shared memory, the unit in which it is written and read."""

    array: np.ndarray[Any, Any]
    label: str
    written: tuple[int, int] | None = None
    """By whom and when; `reads` since then."""
    reads: Clock = field(default_factory=dict)
    unfenced: set[int] = field(default_factory=set)
    """Partitions whose ordinary stores asynchronous operations may not see yet."""
    barrier: Barrier | None = None

    def read(self, agent: int, clock: Clock) -> None:
        if self.written is None:
            raise Fault(f"{self.label} is read, but nothing was ever written there")
        if clock.get(self.written[0], 0) < self.written[1]:
            raise Fault(f"{self.label} is read before what is written there has arrived and been waited for")
        self.reads[agent] = clock[agent]

    def write(self, agent: int, clock: Clock) -> None:
        if self.written is not None and clock.get(self.written[0], 0) < self.written[1]:
            raise Fault(f"{self.label} is written while something else is written there")
        if any(clock.get(reader, 0) < time for reader, time in self.reads.items()):
            raise Fault(f"{self.label} is overwritten while it is still being read")
        self.written, self.reads = (agent, clock[agent]), {}

    def show_to_operations(self) -> None:
        if self.unfenced:
            raise Fault(f"{self.label} has ordinary stores without fence_async_shared before an asynchronous operation")


@dataclass
class Barrier:
    """An mbarrier: a phase ends when `count` have arrived and all expected bytes have been copied."""

    count: int
    label: str
    pending: int = 0
    bytes: int = 0
    phase: int = 0
    gathered: Clock = field(default_factory=dict)
    """What those know that arrived in this phase; `clock`: in all phases before."""
    clock: Clock = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.pending = self.count

    def arrive(self, clock: Clock, count: int = 1) -> None:
        if count > self.pending:
            raise Fault(f"{self.label}: more arrivals than the {self.count} of a phase")
        self.pending -= count
        join(self.gathered, clock)
        self.settle()

    def deliver(self, clock: Clock, count: int) -> None:
        if count > self.bytes:
            raise Fault(f"{self.label}: {count} bytes were copied, but only {self.bytes} expected")
        self.bytes -= count
        join(self.gathered, clock)
        self.settle()

    def settle(self) -> None:
        if self.pending == self.bytes == 0:
            self.phase += 1
            self.pending = self.count
            join(self.clock, self.gathered)
            self.gathered = {}

    def passes(self, parity: int) -> bool:
        return self.phase % 2 != parity

    def state(self) -> str:
        return f"{self.label}, phase {self.phase}: {self.pending} arrivals and {self.bytes} bytes are missing"


@dataclass
class Operation:
    """A copy or a product in flight."""

    agent: int
    clock: Clock
    label: str
    act: Callable[[], Any]
    done: bool = False
    result: Any = None


@dataclass
class Partition:
    """Warps that run the same code."""

    agent: int
    name: str
    steps: Steps
    clock: Clock
    products: list[Operation] = field(default_factory=list)
    stores: list[Operation] = field(default_factory=list)
    """In flight and not yet waited for, as are products."""
    waits_for: Callable[[], bool] | None = None
    waits_at: Callable[[], str] = str
    """What for, in words."""
    finished: bool = False

    def place(self) -> str:
        """The innermost line of the kernel that it is in."""
        steps, place = self.steps, self.name
        while isinstance(steps, GeneratorType):
            if steps.gi_frame is not None and not Path(steps.gi_code.co_filename).name.startswith("gluon_simulator"):
                place = f"{self.name}, line {steps.gi_frame.f_lineno}"
            steps = steps.gi_yieldfrom
        return place


class Machine:
    """One program: its partitions, its shared memory and what is in flight."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.haste = rng.choice((0.02, 0.5, 0.98))
        """How likely an operation goes before a partition."""
        self.agents = itertools.count(1)
        self.partitions: list[Partition] = []
        self.flying: list[Operation] = []
        self.slots: list[Slot] = []
        self.current: Partition

    def add(self, name: str, steps: Steps, clock: Clock) -> Partition:
        agent = next(self.agents)
        self.partitions.append(Partition(agent, name, steps, {**clock, agent: 1}))
        return self.partitions[-1]

    def start(self, label: str, act: Callable[[Operation], Any]) -> Operation:
        """An asynchronous operation of the current partition."""
        agent = next(self.agents)
        operation = Operation(agent, {**self.current.clock, agent: 1}, label, lambda: None)
        operation.act = lambda: act(operation)
        self.current.clock[self.current.agent] += 1
        self.flying.append(operation)
        return operation

    def run(self, name: str, steps: Steps) -> None:
        self.add(name, steps, {})
        while any(not partition.finished for partition in self.partitions):
            ready = [p for p in self.partitions if not p.finished and (p.waits_for is None or p.waits_for())]
            # products of a partition happen in the order in which it started them
            later = {id(op) for p in self.partitions for op in [op for op in p.products if not op.done][1:]}
            operations = [operation for operation in self.flying if id(operation) not in later]
            if operations and (not ready or self.rng.random() < self.haste):
                self._perform(self.rng.choice(operations))
            elif ready:
                self._advance(self.rng.choice(ready))
            else:
                waiting = "; ".join(f"{p.place()} waits for {p.waits_at()}" for p in self.partitions if not p.finished)
                raise Fault(f"deadlock: {waiting}")
        if self.flying:
            raise Fault(f"the program ends before {self.flying[0].label} does")

    def _perform(self, operation: Operation) -> None:
        self.flying.remove(operation)
        operation.result = operation.act()
        operation.done = True

    def _advance(self, partition: Partition) -> None:
        self.current = partition
        try:
            partition.waits_for = next(partition.steps)
        except StopIteration:
            partition.finished = True
            for operation in (*partition.products, *partition.stores):
                raise Fault(f"{partition.name} ends without waiting for {operation.label}") from None
