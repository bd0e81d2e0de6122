"""Flash attention as one differentiable operation, and what the passes of all its kernels share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megaflow.kernels.attention.flash_backward import flash_backward
from megaflow.kernels.attention.flash_forward import flash_forward
from megaflow.kernels.attention.segments import Segments, unpack
from megaflow.kernels.jit import jit, next_power_of_2, tl

ROWS = 16
"""Rows that a program of `delta_kernel` takes."""


class Passes(NamedTuple):
    """The two passes of a backend, with the signatures of `flash_forward` and `flash_backward`."""

    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., None]


class _Flash(torch.autograd.Function):
    """Keeps its inputs, its output and a number per query and head."""

    @staticmethod
    def forward(ctx: Any, passes: Passes, heads: int, segments: Segments, *tensors: Tensor) -> Tensor:
        ctx.passes, ctx.heads, ctx.segments = passes, heads, segments
        out, lse = passes.forward(segments, *unpack(heads, *tensors))
        ctx.save_for_backward(out, lse, *tensors)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        out, lse, *tensors = ctx.saved_tensors
        grad_out = grads[0].contiguous()
        results = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device) for x in tensors]
        inputs, outputs = unpack(ctx.heads, *tensors), unpack(ctx.heads, *results)
        delta = output_delta(out, grad_out)
        ctx.passes.backward(ctx.segments, *inputs, grad_out, lse, delta, outputs)
        return None, None, None, *results


def attend(passes: Passes, heads: int, segments: Segments, *tensors: Tensor) -> Tensor:
    """Attention by the passes, which read the tensors where they are: see `unpack`."""
    return _Flash.apply(passes, heads, segments, *tensors)


def flash(heads: int, segments: Segments, *tensors: Tensor) -> Tensor:
    """`reference` without copies of the inputs and without scores in memory; the backward pass is deterministic."""
    whole = (x if x.stride(-1) == 1 else x.contiguous() for x in tensors)
    return attend(Passes(flash_forward, flash_backward), heads, segments, *whole)


def output_delta(out: Tensor, grad_out: Tensor) -> Tensor:
    """The products of the rows of contiguous outputs and their gradients `[S, B, heads, D]`, fp32 `[heads, T]`."""
    seq_length, sequences, heads, head_dim = out.shape
    queries = seq_length * sequences
    delta = torch.empty(heads, queries, dtype=torch.float32, device=out.device)
    delta_kernel[(-(-queries * heads // ROWS),)](
        *(out, grad_out, delta, queries, heads, sequences, seq_length),
        D=head_dim,
        BLOCK_D=next_power_of_2(head_dim),
        ROWS=ROWS,
        num_warps=4,
    )
    return delta


@jit
def delta_kernel(
    out,
    grad_out,
    delta,
    queries,
    heads,
    sequences,
    seq_length,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The product of every row `[S, B, heads]` of the output with its gradient, to `delta [heads, T]`."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, BLOCK_D)
    exists = row < queries * heads
    where = row.to(tl.int64)[:, None] * D + channel[None, :]
    mask = exists[:, None] & (channel < D)[None, :]
    product = tl.load(out + where, mask=mask, other=0.0).to(tl.float32)
    product *= tl.load(grad_out + where, mask=mask, other=0.0).to(tl.float32)
    token = row // heads
    query = (token % sequences) * seq_length + token // sequences
    tl.store(delta + (row % heads) * queries + query, tl.sum(product, 1), mask=exists)
