"""Flash attention over segments in Triton: the gradients of keys and values, over the queries that see them."""

from __future__ import annotations

from megaflow.kernels.attention.flash_forward import masked_range, place
from megaflow.kernels.jit import jit, tl


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
    lse_block = tl.load(lse + query, mask=query < queries if MASK else None, other=0.0 if MASK else None)
    weights = tl.exp2(scores * scale - lse_block[None, :])
    if MASK:
        visible = (query[None, :] >= begin[:, None]) & (query[None, :] < end[:, None])
        weights = tl.where(visible, weights, 0.0)
    grad_v = tl.dot(weights.to(grad_block.dtype), grad_block, grad_v, input_precision=PRECISION)
    grad_weights = tl.dot(v_block, tl.trans(grad_block), input_precision=PRECISION)
    delta_block = tl.load(delta + query, mask=query < queries if MASK else None, other=0.0 if MASK else None)
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
    for MASK in tl.static_range(2):
        count = masked if MASK else (past - full) // BLOCK_M
        for number in tl.range(GROUP * count, num_stages=1 if MASK else None):
            member = number // count
            block = (start if MASK else full) + (number - member * count) * BLOCK_M
            if MASK:
                block += tl.where(block >= full, past - full, 0)
            q_head = head * GROUP + member
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
