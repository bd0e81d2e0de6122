"""Root-mean-square normalisation (Zhang and Sennrich, 2019), and with it the addition to the residual stream."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megaflow.kernels.backend import Backend, row_blocks
from megaflow.kernels.jit import jit, needs_triton, next_power_of_2, programs, tl

PROGRAMS_PER_MULTIPROCESSOR = 4
"""Of the backward pass; each writes its part of the weight gradient."""


def reference_forward(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The sum (x itself without delta), its normalisation, and fp32 `1 / sqrt(mean + eps)` of every row."""
    total = x if delta is None else x + delta
    out = torch.empty_like(total, memory_format=torch.contiguous_format)
    rstd = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    rows, results, scales = total.flatten(0, -2), out.view(-1, x.shape[-1]), rstd.view(-1)
    for block in row_blocks(rows):
        wide = rows[block].float()
        torch.rsqrt(wide.square().mean(-1) + eps, out=scales[block])
        results[block] = (wide * scales[block, None]).mul_(weight)
    return total, out, rstd


def reference_backward(
    grad_out: Tensor, grad_total: Tensor | None, total: Tensor, weight: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of the sum, that of the residual stream `grad_total` included, and of the weight."""
    grad_x = torch.empty_like(total, memory_format=torch.contiguous_format)
    sums = torch.zeros(total.shape[-1], dtype=torch.float32, device=total.device)
    rows, grads, results, scales = (x.flatten(0, -2) for x in (total, grad_out, grad_x, rstd[..., None]))
    added = None if grad_total is None else grad_total.flatten(0, -2)
    wide = weight.float()
    for block in row_blocks(rows):
        normed = rows[block] * scales[block]
        grad = grads[block] * normed
        sums += grad.sum(0)
        normed *= torch.mv(grad, wide)[:, None] / total.shape[-1]
        torch.mul(grads[block], wide, out=grad).sub_(normed).mul_(scales[block])
        results[block] = grad if added is None else grad.add_(added[block])
    return grad_x, sums.to(weight.dtype)


@jit
def forward_kernel(
    x, delta, weight, total, out, rstd, columns, eps, ADD: tl.constexpr, MASK: tl.constexpr, BLOCK: tl.constexpr
):
    """One row. ADD: there is a delta. MASK: the row is not BLOCK long."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < columns if MASK else None
    other = 0.0 if MASK else None
    start = row * columns
    value = tl.load(x + start + column, mask=mask, other=other).to(tl.float32)
    if ADD:
        value += tl.load(delta + start + column, mask=mask, other=other).to(tl.float32)
        rounded = value.to(total.dtype.element_ty)
        tl.store(total + start + column, rounded, mask=mask)
        value = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, 0) / columns + eps)
    tl.store(rstd + row, scale)
    result = value * scale * tl.load(weight + column, mask=mask, other=other).to(tl.float32)
    tl.store(out + start + column, result.to(out.dtype.element_ty), mask=mask)


@jit
def backward_kernel(
    grad_out,
    grad_total,
    total,
    weight,
    rstd,
    grad_x,
    grad_weight,
    rows,
    columns,
    ADD: tl.constexpr,
    MASK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Rows in turns; `grad_weight [programs, columns]` gets this program's sum, fp32. ADD: there is a grad_total."""
    column = tl.arange(0, BLOCK)
    mask = column < columns if MASK else None
    other = 0.0 if MASK else None
    scale_out = tl.load(weight + column, mask=mask, other=other).to(tl.float32)
    sums = tl.zeros([BLOCK], tl.float32)
    start = tl.program_id(0).to(tl.int64) * columns
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        normed = tl.load(total + start + column, mask=mask, other=other).to(tl.float32)
        grad = tl.load(grad_out + start + column, mask=mask, other=other).to(tl.float32)
        scale = tl.load(rstd + row)
        normed *= scale
        sums += grad * normed
        grad *= scale_out
        along = tl.sum(grad * normed, 0) / columns
        grad = (grad - normed * along) * scale
        if ADD:
            grad += tl.load(grad_total + start + column, mask=mask, other=other).to(tl.float32)
        tl.store(grad_x + start + column, grad.to(grad_x.dtype.element_ty), mask=mask)
        start += tl.num_programs(0).to(tl.int64) * columns
    tl.store(grad_weight + tl.program_id(0) * columns + column, sums, mask=mask)


class Passes(NamedTuple):
    """The two passes of a backend."""

    forward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor]]


class _RMSNorm(torch.autograd.Function):
    """Keeps the residual stream, which others keep too, and a number per row."""

    @staticmethod
    def forward(ctx: Any, passes: Passes, x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> Any:
        ctx.set_materialize_grads(False)
        ctx.passes, ctx.added = passes, delta is not None
        total, out, rstd = passes.forward(x, delta, weight, eps)
        ctx.save_for_backward(total, weight, rstd)
        return (total, out) if ctx.added else out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        grad_total, grad_out = grads if ctx.added else (None, grads[0])
        if grad_out is None:
            return None, grad_total, grad_total if ctx.added else None, None, None
        grad_x, grad_weight = ctx.passes.backward(grad_out, grad_total, *ctx.saved_tensors)
        return None, grad_x, grad_x if ctx.added else None, grad_weight, None


def rms_norm(passes: Passes, x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The residual stream `x + delta`, and `weight * (x + delta) / sqrt(mean((x + delta)^2) + eps)` of its rows.

    Computed in fp32 from the sum as it is rounded to the dtype of x, and rounded once.

    x, delta: `[..., H]`, weight: `[H]`; both results have the shape and dtype of x. Without delta the first is x.
    """
    if delta is None:
        return x, _RMSNorm.apply(passes, x, None, weight, eps)
    return _RMSNorm.apply(passes, x, delta, weight, eps)


def triton_forward(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """`reference_forward` in one pass over the rows."""
    x = x.contiguous()
    delta = None if delta is None else delta.contiguous()
    columns = x.shape[-1]
    total, out = x if delta is None else torch.empty_like(x), torch.empty_like(x)
    rstd = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    forward_kernel[(rstd.numel(),)](
        x, delta, weight, total, out, rstd, columns, eps, ADD=delta is not None, **_block(columns)
    )
    return total, out, rstd


def triton_backward(
    grad_out: Tensor, grad_total: Tensor | None, total: Tensor, weight: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    """`reference_backward` in one pass over the rows."""
    grad_out = grad_out.contiguous()
    grad_total = None if grad_total is None else grad_total.contiguous()
    rows, columns = rstd.numel(), total.shape[-1]
    grad_x = torch.empty_like(total)
    count = programs(total.device, PROGRAMS_PER_MULTIPROCESSOR, rows)
    parts = torch.empty(count, columns, dtype=torch.float32, device=total.device)
    backward_kernel[(count,)](
        grad_out,
        grad_total,
        total,
        weight,
        rstd,
        grad_x,
        parts,
        rows,
        columns,
        ADD=grad_total is not None,
        **_block(columns),
    )
    return grad_x, parts.sum(0).to(weight.dtype)


def _block(columns: int) -> dict[str, Any]:
    block = next_power_of_2(columns)
    return {"BLOCK": block, "MASK": block != columns, "num_warps": min(max(block // 512, 4), 16)}


BACKENDS = (
    Backend("triton", partial(rms_norm, Passes(triton_forward, triton_backward)), needs_triton),
    Backend("reference", partial(rms_norm, Passes(reference_forward, reference_backward))),
)
