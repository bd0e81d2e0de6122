"""What a simulated kernel computes with: numbers in registers, in shared and in global memory."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import torch

from tests.kernels.gluon_simulator_machine import Fault, Machine, Operation, Slot, Steps

NUMPY = {torch.bfloat16: np.dtype(ml_dtypes.bfloat16), torch.float16: np.dtype(np.float16)}


class Layout:
    """Stands for all of them: the compiler checks layouts."""

    def __getattr__(self, name: str) -> Layout:
        return self


LAYOUT = Layout()


class Tensor(np.ndarray[Any, Any]):
    """In registers."""

    type = SimpleNamespace(layout=LAYOUT)

    def to(self, dtype: Any) -> Tensor:
        return self.astype(dtype)


def tensor(x: Any) -> Tensor:
    return np.asarray(x).view(Tensor)


class Accumulator:
    """The result of a product that may not have been computed yet."""

    __array_ufunc__ = None

    def __init__(self, operation: Operation) -> None:
        self.operation = operation

    def used(self, *others: Any) -> Any:
        raise Fault(f"the result of {self.operation.label} is used before its wait")

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __getitem__ = __array__ = to = used


class Shared:
    """Shared memory: blocks one after the other, or one of them, maybe seen transposed."""

    def __init__(self, machine: Machine, slots: list[Slot], single: bool, transposed: bool = False) -> None:
        self.machine, self.slots, self.single, self.transposed = machine, slots, single, transposed
        block = slots[0].array.T.shape if transposed else slots[0].array.shape
        self.shape = block if single else (len(slots), *block)
        self.dtype = slots[0].array.dtype

    def index(self, number: int) -> Shared:
        if self.single or not 0 <= number < len(self.slots):
            raise Fault(f"there is no block {number} of {self.slots[0].label}")
        return Shared(self.machine, [self.slots[number]], True)

    def permute(self, order: tuple[int, ...]) -> Shared:
        assert self.single
        assert order == (1, 0)
        return Shared(self.machine, self.slots, True, not self.transposed)

    @property
    def slot(self) -> Slot:
        if not self.single:
            raise Fault(f"all blocks of {self.slots[0].label} are used as if they were one")
        return self.slots[0]

    @property
    def value(self) -> Tensor:
        """What is there now."""
        array = self.slot.array
        return tensor(array.T if self.transposed else array).copy()

    def load(self, layout: Any) -> Steps:
        yield None
        self.slot.read(self.machine.current.agent, self.machine.current.clock)
        return self.value

    def store(self, value: Tensor) -> Steps:
        yield None
        assert value.dtype == self.dtype
        assert value.shape == self.shape
        self.slot.write(self.machine.current.agent, self.machine.current.clock)
        self.slot.unfenced.add(self.machine.current.agent)
        self.slot.array[...] = value


class Pointer:
    """Of numbers in global memory."""

    def __init__(self, array: np.ndarray[Any, Any], at: Any = 0) -> None:
        self.array, self.at = array, at

    @classmethod
    def of(cls, x: torch.Tensor) -> Pointer:
        assert x.is_contiguous()
        return cls(x.detach().view(-1).numpy())

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.array, self.at + offset)

    def places(self, mask: Any) -> Any:
        """Indices, 0 in the place of those that the mask leaves out."""
        at = np.asarray(self.at) if mask is None else np.where(mask, self.at, 0)
        if np.any((at < 0) | (at >= self.array.size)):
            raise Fault(f"numbers {at.min()} to {at.max()} of a tensor that has {self.array.size}")
        return at


class Descriptor:
    """Of a tensor that is copied in blocks; behind its last row, but nowhere else, a block may reach over the edge."""

    def __init__(self, of: Any) -> None:
        x = torch.as_strided(of.base.detach(), of.shape, of.strides)
        self.dtype = NUMPY.get(x.dtype, np.dtype(np.float32))
        self.array = x.view(torch.int16).numpy().view(self.dtype) if x.dtype in NUMPY else x.numpy()
        self.layout = LAYOUT
        self.block_type = SimpleNamespace(shape=list(of.block_shape), nbytes=math.prod(of.block_shape) * x.itemsize)

    def part(self, at: list[int], block: Shared) -> np.ndarray[Any, Any]:
        """What the tensor has of a block: fewer rows than the block where it ends."""
        sizes = self.block_type.shape
        if list(block.shape) != sizes or block.dtype != self.dtype:
            raise Fault(f"a block of {sizes} {self.dtype} is copied to or from {block.slot.label}")
        inner = zip(at[1:], sizes[1:], self.array.shape[1:], strict=True)
        if not 0 <= at[0] < self.array.shape[0] + sizes[0] or any(not 0 <= x <= all_ - size for x, size, all_ in inner):
            raise Fault(f"a block of {sizes} at {at} is outside of a tensor of {list(self.array.shape)}")
        return self.array[tuple(slice(x, x + size) for x, size in zip(at, sizes, strict=True))]
