"""Rows of an embedding that may be cut into shards by rows, and the sum of their gradients."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megaflow.kernels.backend import Backend
from megaflow.kernels.jit import jit, needs_triton, next_power_of_2, tl

COLUMNS, TOKENS = 512, 16
"""Columns that a program sums, and tokens whose gradients it reads at a time."""


def reference(tokens: Tensor, weight: Tensor, vocab_start: int | None) -> Tensor:
    """The rows of weight `[V_local, H]`, whose first has the id `vocab_start`, for the ids in tokens `[...]`.

    The result is `[..., H]`, zero for ids that this shard does not have. vocab_start None: it has all.
    """
    if vocab_start is None:
        return F.embedding(tokens, weight)
    row = tokens - vocab_start
    here = (row >= 0) & (row < weight.shape[0])
    return F.embedding(torch.where(here, row, 0), weight) * here[..., None]


@jit
def gradient_kernel(
    order,
    rows,
    ends,
    grad_out,
    grad_weight,
    columns,
    valid_rows,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Sums what all occurrences of one row contribute to COLUMNS columns, in fp32 and always in the same order.

    order: places of the tokens, row by row; rows: each one's row; ends: where in the order that row ends. The program
    of a row's first occurrence does the work, the others do nothing.
    """
    first = tl.program_id(0)
    row = tl.load(rows + first)
    before = tl.load(rows + first - 1, mask=first > 0, other=-1)
    if (row != before) & (row < valid_rows):
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        end = tl.load(ends + first)
        total = tl.zeros([COLUMNS], tl.float32)
        for start in range(first, end, TOKENS):
            number = start + tl.arange(0, TOKENS)
            place = tl.load(order + number, mask=number < end, other=0).to(tl.int64)
            mask = (number < end)[:, None] & (column < columns)[None, :]
            part = tl.load(grad_out + place[:, None] * columns + column[None, :], mask=mask, other=0.0)
            total += tl.sum(part.to(tl.float32), 0)
        target = grad_weight + row.to(tl.int64) * columns + column
        tl.store(target, total.to(grad_weight.dtype.element_ty), mask=column < columns)


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: Tensor, vocab_start: int | None) -> Tensor:
        ctx.vocab_start, ctx.rows = vocab_start, weight.shape[0]
        ctx.save_for_backward(tokens)
        return reference(tokens, weight, vocab_start)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return None, embedding_gradient(ctx.saved_tensors[0], grads[0], ctx.rows, ctx.vocab_start), None


def embedding(tokens: Tensor, weight: Tensor, vocab_start: int | None) -> Tensor:
    """`reference` whose gradient is summed in fp32, without atomic additions: equal bits in every run."""
    return _Embedding.apply(tokens, weight, vocab_start)


def embedding_gradient(tokens: Tensor, grad_out: Tensor, valid_rows: int, vocab_start: int | None) -> Tensor:
    """The gradient `[valid_rows, H]` of a shard's weight from that of its rows `[..., H]`, in the dtype of these."""
    grad_out, columns = grad_out.contiguous(), grad_out.shape[-1]
    row = tokens.flatten() - (vocab_start or 0)
    here = (row >= 0) & (row < valid_rows)
    rows, order = torch.where(here, row, valid_rows).int().sort(stable=True)  # others' come last
    ends = torch.searchsorted(rows, rows, right=True, out_int32=True)
    grad_weight = grad_out.new_zeros(valid_rows, columns)
    block = min(COLUMNS, next_power_of_2(columns))
    grid = (len(rows), -(-columns // block))
    gradient_kernel[grid](
        order, rows, ends, grad_out, grad_weight, columns, valid_rows, TOKENS=TOKENS, COLUMNS=block, num_warps=4
    )
    return grad_weight


BACKENDS = (Backend("triton", embedding, needs_triton), Backend("reference", reference))
