"""Flash attention over segments in Triton: the gradients of queries, over the keys that they see."""

from __future__ import annotations

from megaflow.kernels.attention.flash_forward import masked_range, place
from megaflow.kernels.jit import jit, tl


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
