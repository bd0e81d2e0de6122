"""What the Hopper kernels share: Gluon where Triton has it, tensor descriptors, and blocks of what is visible.

In all of them one warp copies blocks into shared memory (TMA) ahead of two warpgroups that compute with them (wgmma),
each for half of the program's rows. Barriers called `ready` count copied bytes, those called `free` the warpgroups that
no longer need a block.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megaflow.kernels.jit import triton

try:
    if triton is None:
        raise ImportError("no Triton")
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia import hopper
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
except ImportError:
    gluon, gl, hopper, TensorDescriptor = None, None, None, None

__all__ = ["gl", "gluon", "hopper", "jit"]

DTYPES = (torch.bfloat16, torch.float16)
HEAD_DIMS = (64, 128)
ALIGNMENT = 16
"""Bytes that the beginning of what a tensor descriptor describes is a multiple of, and so is that of each row."""
LARGEST = 128
"""Tokens of the largest block of any kernel; where there are several sequences, each must be a multiple of it."""


def jit(function: Any) -> Any:
    """`gluon.jit`; where there is no Gluon the function itself, which nothing calls."""
    return function if gluon is None else gluon.jit(function)


def suits(*tensors: Tensor) -> bool:
    """Whether the kernels can take tensors `[S, B, heads, D]`: their types and shapes, and how they lie in memory."""
    return all(
        x.dtype in DTYPES
        and x.shape[-1] in HEAD_DIMS
        and (x.shape[1] == 1 or x.shape[0] % LARGEST == 0)
        and x.stride(-1) == 1
        and x.stride(0) > 0
        and x.stride(0) * x.element_size() % ALIGNMENT == 0
        and x.data_ptr() % ALIGNMENT == 0
        for x in tensors
    )


def descriptor(x: Tensor, rows: int) -> Any:
    """Of a tensor `[S, B, heads, D]`, in blocks of `rows` tokens of one head: `[S, columns]`, all heads side by side.

    What a block has behind the last token is read as zeros and not written.
    """
    columns = sum((size - 1) * stride for size, stride in zip(x.shape[1:], x.stride()[1:], strict=True)) + 1
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16)
    return TensorDescriptor(x, [x.shape[0], columns], [x.stride(0), 1], [rows, x.shape[-1]], layout)


def flat_descriptor(x: Tensor, count: int) -> Any:
    """Of a contiguous tensor of 32-bit numbers in one dimension, in blocks of `count`."""
    layout = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=1)
    return TensorDescriptor(x, [x.numel()], [1], [count], layout)


@jit
def coordinates(token, head, seq_length, strides):
    """Row and column of a token's head in a tensor of which `descriptor` tells."""
    sequence = token // seq_length
    return token - sequence * seq_length, sequence * strides[0] + head * strides[1]


@jit
def position(number, start, full, past, masked, BLOCK: gl.constexpr):
    """Where a block begins: the `masked` ones of `masked_range` come first, then those between `full` and `past`."""
    block = start + number * BLOCK
    block += gl.where(block >= full, past - full, 0)
    return gl.where(number < masked, block, full + (number - masked) * BLOCK)


@jit
def visible(column, seen):
    """Which of the columns' tokens each row sees; seen: the first that it sees, and how many, unsigned."""
    # a column in front of the first is a large number without a sign
    return (column[None, :] - seen[0][:, None]).to(gl.uint32) < seen[1][:, None]


@jit
def product(left, right, LAYOUT: gl.constexpr):
    """Starts the product of two blocks of tokens; right: in shared memory, left: there or in registers."""
    ROWS: gl.constexpr = left.shape[0]
    COLUMNS: gl.constexpr = right.shape[0]
    zero = gl.zeros([ROWS, COLUMNS], gl.float32, LAYOUT)
    return hopper.warpgroup_mma(left, right.permute((1, 0)), zero, use_acc=False, is_async=True)


@jit
def operand(x, acc, dtype: gl.constexpr):
    """x in a smaller type, in the registers where a product to be added to acc takes its left side."""
    return gl.convert_layout(x.to(dtype), gl.DotOperandLayout(0, acc.type.layout, 2))


@jit
def new_barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    """Barriers in shared memory, each of which waits for so many arrivals."""
    barriers = gl.allocate_shared_memory(gl.int64, [COUNT, 1], hopper.mbarrier.MBarrierLayout())
    for number in gl.static_range(COUNT):
        hopper.mbarrier.init(barriers.index(number), ARRIVALS)
    return barriers


@jit
def tell(plan, number, value):
    """Keeps an integer in shared memory for other partitions; all threads of the one warp that calls it write it."""
    plan.index(number).store(gl.full([1], value, gl.int32, gl.BlockedLayout([1], [32], [1], [0])))


@jit
def told(plan, number):
    """One of these integers; called by a warpgroup."""
    return gl.max(plan.index(number).load(gl.BlockedLayout([1], [32], [4], [0])), 0)
