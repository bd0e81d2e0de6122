"""Stand-ins for the parts of Gluon's language that kernels for Hopper use.

What touches memory or barriers stops before it does so, and is called by `call`, so that others may come first.
"""

from __future__ import annotations

from types import GeneratorType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from tests.kernels.gluon_simulator_machine import Barrier, Fault, Operation, Slot, Steps, join
from tests.kernels.gluon_simulator_values import LAYOUT, Accumulator, Descriptor, Pointer, Shared, Tensor, tensor

if TYPE_CHECKING:
    from tests.kernels.gluon_simulator import Simulator


def call(function: Any, *args: Any, **kwargs: Any) -> Steps:
    result = function(*args, **kwargs)
    return (yield from result) if isinstance(result, GeneratorType) else result


def layout(*args: Any, **kwargs: Any) -> Any:
    return LAYOUT


class Language:
    """Of `gl`, and of `tl` in functions that are shared with Triton's kernels."""

    float32, int32, int64, uint32 = np.float32, np.int32, np.int64, np.uint32
    static_range = range
    NVMMADistributedLayout = DotOperandLayout = SliceLayout = staticmethod(layout)
    BlockedLayout = SwizzledSharedLayout = staticmethod(layout)

    def __init__(self, simulator: Simulator) -> None:
        self.simulator = simulator

    def program_id(self, axis: int) -> int:
        return self.simulator.program[axis]

    def num_programs(self, axis: int) -> int:
        return self.simulator.grid[axis]

    def arange(self, start: int, end: int, layout: Any) -> Tensor:
        return tensor(np.arange(start, end, dtype=np.int32))

    def full(self, shape: list[int], value: Any, dtype: Any, layout: Any) -> Tensor:
        return tensor(np.full(shape, value, dtype))

    def zeros(self, shape: list[int], dtype: Any, layout: Any) -> Tensor:
        return tensor(np.zeros(shape, dtype))

    def cdiv(self, x: int, y: int) -> int:
        return -(-x // y)

    def maximum(self, x: Any, y: Any) -> Any:
        return tensor(np.maximum(x, y)) if isinstance(x, np.ndarray) else max(x, y)

    def minimum(self, x: int, y: int) -> int:
        return min(x, y)

    def where(self, condition: Any, x: Any, y: Any) -> Any:
        if not isinstance(condition, np.ndarray):
            return x if condition else y
        return tensor(np.where(condition, x, y).astype(next(v.dtype for v in (x, y) if isinstance(v, np.ndarray))))

    def max(self, x: Tensor, axis: int) -> Any:
        return tensor(np.max(x, axis)) if x.ndim > 1 else int(np.max(x))

    def sum(self, x: Tensor, axis: int) -> Tensor:
        return tensor(np.sum(x, axis, dtype=x.dtype))

    def exp2(self, x: Tensor) -> Tensor:
        return tensor(np.exp2(x))

    def log2(self, x: Tensor) -> Tensor:
        return tensor(np.log2(x))

    def convert_layout(self, x: Tensor, layout: Any) -> Tensor:
        return x

    def load(self, pointer: Pointer, mask: Any = None, other: Any = 0) -> Any:
        at = pointer.places(mask)
        values = pointer.array[at] if mask is None else np.where(mask, pointer.array[at], other)
        return tensor(values.astype(pointer.array.dtype)) if at.ndim else int(values)

    def store(self, pointer: Pointer, value: Any, mask: Any = None) -> None:
        at = pointer.places(mask)
        kept = slice(None) if mask is None else np.asarray(mask)
        pointer.array[at[kept]] = value[kept]

    def atomic_add(self, pointer: Pointer, value: int, sem: str) -> int:
        before = int(pointer.array[pointer.at])
        pointer.array[pointer.at] += value
        return before

    def allocate_shared_memory(self, dtype: Any, shape: list[int], layout: Any) -> Shared:
        machine = self.simulator.machine
        count, block = (1, shape) if len(shape) == 1 else (shape[0], shape[1:])
        label = f"shared memory {len(machine.slots)} ({list(shape)} {np.dtype(dtype)})"
        nothing = -1 if np.dtype(dtype).kind == "i" else np.nan
        slots = [Slot(np.full(block, nothing, dtype), f"block {number} of {label}") for number in range(count)]
        machine.slots += slots
        return Shared(machine, slots, len(shape) == 1)

    def warp_specialize(self, functions: list[tuple[Any, tuple[Any, ...]]], warps: list[int], registers: Any) -> Steps:
        assert len(functions) == len(warps) + 1 == len(registers) + 1
        machine = self.simulator.machine
        main = machine.current
        for number, (function, args) in enumerate(functions):
            machine.add(f"partition {number} ({function.__name__})", call(function, *args), main.clock)
        main.clock[main.agent] += 1
        main.waits_at = lambda: "its partitions"
        parts = machine.partitions[1:]
        yield lambda: all(part.finished for part in parts)


class Hopper:
    """Of `hopper`: copies, products and barriers."""

    def __init__(self, simulator: Simulator) -> None:
        self.simulator = simulator
        self.mbarrier = SimpleNamespace(
            MBarrierLayout=layout, init=self._init, expect=self._expect, arrive=self._arrive, wait=self._wait
        )
        self.tma = SimpleNamespace(
            async_copy_global_to_shared=self._load, async_copy_shared_to_global=self._store, store_wait=self._store_wait
        )

    def _init(self, shared: Shared, count: int) -> None:
        shared.slot.barrier = Barrier(count, f"the barrier in {shared.slot.label}")
        shared.slot.unfenced.add(self.simulator.machine.current.agent)

    def _expect(self, shared: Shared, count: int) -> Steps:
        yield None
        barrier, partition = self._barrier(shared), self.simulator.machine.current
        barrier.bytes += count
        self._release(barrier, partition, 1)

    def _arrive(self, shared: Shared, count: int, pred: Any = True) -> Steps:
        yield None
        if pred:
            self._release(self._barrier(shared), self.simulator.machine.current, count)

    def _wait(self, shared: Shared, parity: int, pred: Any = True) -> Steps:
        barrier, partition = self._barrier(shared), self.simulator.machine.current
        if not pred:
            return
        partition.waits_at = lambda: f"parity {parity} of {barrier.state()}"
        yield lambda: barrier.passes(parity)
        join(partition.clock, barrier.clock)

    def _barrier(self, shared: Shared) -> Barrier:
        if shared.slot.barrier is None:
            raise Fault(f"{shared.slot.label} is used as a barrier without init")
        return shared.slot.barrier

    def _release(self, barrier: Barrier, partition: Any, count: int) -> None:
        barrier.arrive(partition.clock, count)
        partition.clock[partition.agent] += 1

    def fence_async_shared(self) -> Steps:
        yield None
        for slot in self.simulator.machine.slots:
            slot.unfenced.discard(self.simulator.machine.current.agent)

    def _load(self, tensor: Descriptor, at: list[int], shared: Shared, block: Shared) -> Steps:
        yield None
        barrier, part, slot = self._barrier(shared), tensor.part(at, block), block.slot

        def act(operation: Operation) -> None:
            slot.array[...] = 0
            slot.array[tuple(slice(size) for size in part.shape)] = part
            barrier.deliver(operation.clock, tensor.block_type.nbytes)

        operation = self.simulator.machine.start(f"the copy to {slot.label}", act)
        shared.slot.show_to_operations()
        slot.show_to_operations()
        slot.write(operation.agent, operation.clock)

    def _store(self, tensor: Descriptor, at: list[int], block: Shared) -> Steps:
        yield None
        part, slot = tensor.part(at, block), block.slot

        def act(operation: Operation) -> None:
            part[...] = slot.array[tuple(slice(size) for size in part.shape)]

        operation = self.simulator.machine.start(f"the copy from {slot.label}", act)
        slot.show_to_operations()
        slot.read(operation.agent, operation.clock)
        self.simulator.machine.current.stores.append(operation)

    def _store_wait(self, pending: int) -> Steps:
        partition = self.simulator.machine.current
        yield from self._retire(partition, partition.stores, pending)

    def warpgroup_mma(self, a: Any, b: Shared, acc: Any, use_acc: bool = True, is_async: bool = False) -> Steps:
        yield None
        assert is_async
        assert a.dtype == b.dtype
        assert a.shape[1] == b.shape[0]
        assert isinstance(acc, Accumulator) or acc.shape == (a.shape[0], b.shape[1])
        before = acc.operation if isinstance(acc, Accumulator) else None

        def act(operation: Operation) -> Any:
            left = a.value if isinstance(a, Shared) else a
            total = left.astype(np.float32) @ b.value.astype(np.float32)
            if use_acc:
                total = total + (acc if before is None else before.result)
            return tensor(total)

        operation = self.simulator.machine.start(f"a product of {a.shape} and {b.shape}", act)
        for shared in (a, b):
            if isinstance(shared, Shared):
                shared.slot.show_to_operations()
                shared.slot.read(operation.agent, operation.clock)
        self.simulator.machine.current.products.append(operation)
        return Accumulator(operation)

    def warpgroup_mma_wait(self, pending: int, deps: list[Any]) -> Steps:
        partition = self.simulator.machine.current
        yield from self._retire(partition, partition.products, pending)
        for dep in deps:
            if isinstance(dep, Accumulator) and dep.operation in partition.products:
                dep.used()
        results = tuple(dep.operation.result if isinstance(dep, Accumulator) else dep for dep in deps)
        return results[0] if len(results) == 1 else results

    def _retire(self, partition: Any, operations: list[Operation], pending: int) -> Steps:
        """Waits until at most so many of a partition's operations are in flight."""
        waited = operations[: max(len(operations) - pending, 0)]
        partition.waits_at = lambda: "operations that it has started"
        yield lambda: all(operation.done for operation in waited)
        for operation in waited:
            operations.remove(operation)
            join(partition.clock, {operation.agent: 1})
