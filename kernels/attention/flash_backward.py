"""Flash attention over segments in Triton: the backward pass.

One kernel goes over keys and sums what all queries that see them contribute, another goes over queries; both compute
the scores again. One kernel for both would add the gradients of queries up in memory, in any order: this takes seven
products instead of five and gives equal bits in every run.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megaflow.kernels.attention.flash_backward_keys import keys_kernel
from megaflow.kernels.attention.flash_backward_queries import queries_kernel
from megaflow.kernels.attention.flash_forward import LOG2_E, common_options
from megaflow.kernels.attention.segments import Segments
from megaflow.kernels.jit import jit, next_power_of_2, tl
from megaflow.kernels.tuned import tuned

ROWS = 16
"""Rows that a program of `delta_kernel` takes."""


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


def flash_backward(
    segments: Segments,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grads: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Writes the gradients of q, k and v, as `flash_forward` takes them, into `grads`, which have their strides.

    out and grad_out: contiguous.
    """
    grad_q, grad_k, grad_v = grads
    seq_length, sequences, heads, head_dim = q.shape
    delta = torch.empty_like(lse)
    delta_kernel[(-(-out.numel() // head_dim // ROWS),)](
        *(out, grad_out, delta, segments.queries, heads, sequences, seq_length),
        D=head_dim,
        BLOCK_D=next_power_of_2(head_dim),
        ROWS=ROWS,
        num_warps=4,
    )
    sizes = segments.queries, segments.keys, seq_length, k.shape[0]
    strides = *q.stride()[:3], *k.stride()[:3], *out.stride()[:3]
    scale = head_dim**-0.5
    options = tuned("flash_backward_keys", head_dim, q.dtype)
    keys_kernel[-(-segments.keys // options["BLOCK_N"]), k.shape[2]](
        *(q, k, v, grad_out, lse, delta, grad_k, grad_v, segments.seen_by, *sizes, *strides, scale),
        LOG2_E=LOG2_E,
        **common_options(q, k, options),
    )
    options = tuned("flash_backward_queries", head_dim, q.dtype)
    queries_kernel[-(-segments.queries // options["BLOCK_M"]), heads](
        *(q, k, v, grad_out, lse, delta, grad_q, segments.seen, *sizes, *strides, scale),
        LOG2_E=LOG2_E,
        **common_options(q, k, options),
    )
