"""The gated activation of the feed-forward block (Shazeer, 2020)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megaflow.kernels.backend import Backend
from megaflow.kernels.jit import jit, needs_triton, next_power_of_2, tl

BLOCK = 2048
"""Columns that a program takes, at most."""


def reference_forward(gate_up: Tensor) -> Tensor:
    """`silu(gate) * up`."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def reference_backward(gate_up: Tensor, grad_out: Tensor) -> Tensor:
    """The gradient of gate and up from the gradient of the result."""
    (gate, up), grad = gate_up.chunk(2, dim=-1), torch.empty_like(gate_up)
    grad_gate, grad_up = grad.chunk(2, dim=-1)
    torch.ops.aten.silu.out(gate, out=grad_up).mul_(grad_out)
    torch.mul(grad_out, up, out=grad_gate)
    torch.ops.aten.silu_backward.grad_input(grad_gate, gate, grad_input=grad_gate)
    return grad


@jit
def forward_kernel(gate_up, out, columns, BLOCK: tl.constexpr):
    """BLOCK columns of one row, rounded once."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < columns
    gate = tl.load(gate_up + row * 2 * columns + column, mask=mask).to(tl.float32)
    up = tl.load(gate_up + row * 2 * columns + columns + column, mask=mask).to(tl.float32)
    result = gate * tl.sigmoid(gate) * up
    tl.store(out + row * columns + column, result.to(out.dtype.element_ty), mask=mask)


@jit
def backward_kernel(gate_up, grad_out, grad_gate_up, columns, BLOCK: tl.constexpr):
    """The gradients of gate and up, from what the forward pass read."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < columns
    start = row * 2 * columns
    gate = tl.load(gate_up + start + column, mask=mask).to(tl.float32)
    up = tl.load(gate_up + start + columns + column, mask=mask).to(tl.float32)
    grad = tl.load(grad_out + row * columns + column, mask=mask).to(tl.float32)
    share = tl.sigmoid(gate)
    silu = gate * share
    grad_gate = grad * up * (share + silu * (1.0 - share))
    dtype = grad_gate_up.dtype.element_ty
    tl.store(grad_gate_up + start + column, grad_gate.to(dtype), mask=mask)
    tl.store(grad_gate_up + start + columns + column, (grad * silu).to(dtype), mask=mask)


class Passes(NamedTuple):
    """The two passes of a backend."""

    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]


class _SwiGLU(torch.autograd.Function):
    """Keeps its input alone: the activation is computed again."""

    @staticmethod
    def forward(ctx: Any, passes: Passes, gate_up: Tensor) -> Tensor:
        ctx.passes = passes
        ctx.save_for_backward(gate_up)
        return passes.forward(gate_up)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return None, ctx.passes.backward(ctx.saved_tensors[0], grads[0])


def swiglu(passes: Passes, gate_up: Tensor) -> Tensor:
    """`silu(gate) * up` of `gate_up [..., 2 F]`, whose halves are gate and up; the result is `[..., F]`."""
    return _SwiGLU.apply(passes, gate_up)


def triton_forward(gate_up: Tensor) -> Tensor:
    """`reference_forward` in fp32 in one pass."""
    gate_up, columns = gate_up.contiguous(), gate_up.shape[-1] // 2
    out = gate_up.new_empty(*gate_up.shape[:-1], columns)
    forward_kernel[_grid(out)](gate_up, out, columns, BLOCK=_block(columns))
    return out


def triton_backward(gate_up: Tensor, grad_out: Tensor) -> Tensor:
    """`reference_backward` in fp32 in one pass."""
    gate_up, grad_out, columns = gate_up.contiguous(), grad_out.contiguous(), grad_out.shape[-1]
    grad = torch.empty_like(gate_up)
    backward_kernel[_grid(grad_out)](gate_up, grad_out, grad, columns, BLOCK=_block(columns))
    return grad


def _block(columns: int) -> int:
    return min(BLOCK, next_power_of_2(columns))


def _grid(out: Tensor) -> tuple[int, int]:
    columns = out.shape[-1]
    return out.numel() // columns, -(-columns // _block(columns))


BACKENDS = (
    Backend("triton", partial(swiglu, Passes(triton_forward, triton_backward)), needs_triton),
    Backend("reference", partial(swiglu, Passes(reference_forward, reference_backward))),
)
