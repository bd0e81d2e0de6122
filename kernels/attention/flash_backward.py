"""Flash attention over segments in Triton: the backward pass.

One kernel goes over keys and sums what all queries that see them contribute, another goes over queries; both compute
the scores again. One kernel for both would add the gradients of queries up in memory, in any order: this takes seven
products instead of five and gives equal bits in every run.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megaflow.kernels.attention.flash_forward import LOG2_E, common_options, masked_range, place
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


@jit
def add_queries(
    grad_k,
    grad_v,
    k_block,
    v_block,
    q,
    grad_out,
    lse,
    delta,
    first,
    begin,
    end,
    queries,
    seq_q,
    stride_qs,
    stride_qb,
    stride_os,
    stride_ob,
    scale,
    MASK: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The gradients so far with BLOCK_M queries from `first` on; grad_k still to be scaled."""
    channel = tl.arange(0, BLOCK_D)
    query = first + tl.arange(0, BLOCK_M)
    start_q, rows_q = place(first, seq_q, stride_qs, stride_qb, BLOCK_M, EVEN)
    start_o, rows_o = place(first, seq_q, stride_os, stride_ob, BLOCK_M, EVEN)
    q += start_q
    grad_out += start_o
    exists = (query < queries)[:, None] & (channel < D)[None, :]
    if MASK or D != BLOCK_D:
        q_block = tl.load(q + (rows_q[:, None] + channel[None, :]), mask=exists, other=0.0)
        grad_block = tl.load(grad_out + (rows_o[:, None] + channel[None, :]), mask=exists, other=0.0)
    else:
        q_block = tl.load(q + (rows_q[:, None] + channel[None, :]))
        grad_block = tl.load(grad_out + (rows_o[:, None] + channel[None, :]))
    scores = tl.dot(k_block, tl.trans(q_block), input_precision=PRECISION)
    lse_block = tl.load(lse + query, mask=query < queries if MASK else None)
    weights = tl.exp2(scores * scale - lse_block[None, :])
    if MASK:
        visible = (query[None, :] >= begin[:, None]) & (query[None, :] < end[:, None])
        weights = tl.where(visible, weights, 0.0)
    grad_v = tl.dot(weights.to(grad_block.dtype), grad_block, grad_v, input_precision=PRECISION)
    grad_weights = tl.dot(v_block, tl.trans(grad_block), input_precision=PRECISION)
    delta_block = tl.load(delta + query, mask=query < queries if MASK else None)
    grad_scores = weights * (grad_weights - delta_block[None, :])
    grad_k = tl.dot(grad_scores.to(q_block.dtype), q_block, grad_k, input_precision=PRECISION)
    return grad_k, grad_v


@jit
def keys_kernel(
    q,
    k,
    v,
    grad_out,
    lse,
    delta,
    grad_k,
    grad_v,
    seen_by,
    queries,
    keys,
    seq_q,
    seq_k,
    stride_qs,
    stride_qb,
    stride_qh,
    stride_ks,
    stride_kb,
    stride_kh,
    stride_os,
    stride_ob,
    stride_oh,
    scale,
    LOG2_E: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EVEN_Q: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Gradients of BLOCK_N keys and values of one key-value head, over the GROUP heads that share it."""
    first = tl.program_id(0) * BLOCK_N
    head = tl.program_id(1)
    key = first + tl.arange(0, BLOCK_N)
    channel = tl.arange(0, BLOCK_D)
    exists = (key < keys)[:, None] & (channel < D)[None, :]
    start_k, rows = place(first, seq_k, stride_ks, stride_kb, BLOCK_N, EVEN_K)
    start_k += head * stride_kh
    at = rows[:, None] + channel[None, :]
    k_block = tl.load(k + start_k + at, mask=exists, other=0.0)
    v_block = tl.load(v + start_k + at, mask=exists, other=0.0)
    begin = tl.load(seen_by + key, mask=key < keys, other=0)
    end = tl.load(seen_by + keys + key, mask=key < keys, other=0)
    last = tl.minimum(first + BLOCK_N, keys) - 1
    start, full, past, masked = masked_range(
        tl.load(seen_by + first),
        tl.load(seen_by + last),
        tl.load(seen_by + keys + first),
        tl.load(seen_by + keys + last),
        BLOCK_M,
    )
    sum_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    sum_v = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for member in tl.range(GROUP):
        q_head = head * GROUP + member
        for MASK in tl.static_range(2):
            for number in tl.range(masked if MASK else (past - full) // BLOCK_M, num_stages=1 if MASK else None):
                block = start + number * BLOCK_M if MASK else full + number * BLOCK_M
                if MASK:
                    block += tl.where(block >= full, past - full, 0)
                sum_k, sum_v = add_queries(
                    sum_k,
                    sum_v,
                    k_block,
                    v_block,
                    q + q_head * stride_qh,
                    grad_out + q_head * stride_oh,
                    lse + q_head * queries,
                    delta + q_head * queries,
                    block,
                    begin,
                    end,
                    queries,
                    seq_q,
                    stride_qs,
                    stride_qb,
                    stride_os,
                    stride_ob,
                    scale * LOG2_E,
                    MASK,
                    D,
                    BLOCK_D,
                    BLOCK_M,
                    EVEN_Q,
                    PRECISION,
                )
    tl.store(grad_k + start_k + at, (sum_k * scale).to(grad_k.dtype.element_ty), mask=exists)
    tl.store(grad_v + start_k + at, sum_v.to(grad_v.dtype.element_ty), mask=exists)


@jit
def add_keys(
    grad_q,
    q_block,
    grad_block,
    lse_block,
    delta_block,
    k,
    v,
    first,
    begin,
    end,
    keys,
    seq_k,
    stride_ks,
    stride_kb,
    scale,
    MASK: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The gradient of queries so far with BLOCK_N keys from `first` on; still to be scaled."""
    channel = tl.arange(0, BLOCK_D)
    key = first + tl.arange(0, BLOCK_N)
    start, rows = place(first, seq_k, stride_ks, stride_kb, BLOCK_N, EVEN)
    k += start
    v += start
    if MASK or D != BLOCK_D:
        exists = (key < keys)[:, None] & (channel < D)[None, :]
        k_block = tl.load(k + (rows[:, None] + channel[None, :]), mask=exists, other=0.0)
        v_block = tl.load(v + (rows[:, None] + channel[None, :]), mask=exists, other=0.0)
    else:
        k_block = tl.load(k + (rows[:, None] + channel[None, :]))
        v_block = tl.load(v + (rows[:, None] + channel[None, :]))
    scores = tl.dot(q_block, tl.trans(k_block), input_precision=PRECISION)
    weights = tl.exp2(scores * scale - lse_block[:, None])
    if MASK:
        visible = (key[None, :] >= begin[:, None]) & (key[None, :] < end[:, None])
        weights = tl.where(visible, weights, 0.0)
    grad_weights = tl.dot(grad_block, tl.trans(v_block), input_precision=PRECISION)
    grad_scores = weights * (grad_weights - delta_block[:, None])
    return tl.dot(grad_scores.to(k_block.dtype), k_block, grad_q, input_precision=PRECISION)


@jit
def queries_kernel(
    q,
    k,
    v,
    grad_out,
    lse,
    delta,
    grad_q,
    seen,
    queries,
    keys,
    seq_q,
    seq_k,
    stride_qs,
    stride_qb,
    stride_qh,
    stride_ks,
    stride_kb,
    stride_kh,
    stride_os,
    stride_ob,
    stride_oh,
    scale,
    LOG2_E: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EVEN_Q: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The gradient of BLOCK_M queries of one head; the later, longer ones first."""
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    head = tl.program_id(1)
    query = first + tl.arange(0, BLOCK_M)
    channel = tl.arange(0, BLOCK_D)
    exists = (query < queries)[:, None] & (channel < D)[None, :]
    k += (head // GROUP) * stride_kh
    v += (head // GROUP) * stride_kh
    start_q, rows_q = place(first, seq_q, stride_qs, stride_qb, BLOCK_M, EVEN_Q)
    start_o, rows_o = place(first, seq_q, stride_os, stride_ob, BLOCK_M, EVEN_Q)
    start_q += head * stride_qh
    start_o += head * stride_oh
    at_q = rows_q[:, None] + channel[None, :]
    at_o = rows_o[:, None] + channel[None, :]
    q_block = tl.load(q + start_q + at_q, mask=exists, other=0.0)
    grad_block = tl.load(grad_out + start_o + at_o, mask=exists, other=0.0)
    lse_block = tl.load(lse + head * queries + query, mask=query < queries, other=0.0)
    delta_block = tl.load(delta + head * queries + query, mask=query < queries, other=0.0)
    begin = tl.load(seen + query, mask=query < queries, other=0)
    end = tl.load(seen + queries + query, mask=query < queries, other=0)
    last = tl.minimum(first + BLOCK_M, queries) - 1
    start, full, past, masked = masked_range(
        tl.load(seen + first),
        tl.load(seen + last),
        tl.load(seen + queries + first),
        tl.load(seen + queries + last),
        BLOCK_N,
    )
    total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for MASK in tl.static_range(2):
        for number in tl.range(masked if MASK else (past - full) // BLOCK_N, num_stages=1 if MASK else None):
            block = start + number * BLOCK_N if MASK else full + number * BLOCK_N
            if MASK:
                block += tl.where(block >= full, past - full, 0)
            total = add_keys(
                total,
                q_block,
                grad_block,
                lse_block,
                delta_block,
                k,
                v,
                block,
                begin,
                end,
                keys,
                seq_k,
                stride_ks,
                stride_kb,
                scale * LOG2_E,
                MASK,
                D,
                BLOCK_D,
                BLOCK_N,
                EVEN_K,
                PRECISION,
            )
    tl.store(grad_q + start_q + at_q, (total * scale).to(grad_q.dtype.element_ty), mask=exists)


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
