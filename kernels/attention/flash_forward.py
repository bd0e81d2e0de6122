"""Flash attention (Dao, arXiv 2307.08691) over segments in Triton: the forward pass.

A program takes a block of queries of one head, wherever segments begin and end in it, and goes over the blocks of keys
that some of them see. Softmax is in base 2: scores are scaled by log2(e) beforehand.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megaflow.kernels.attention.segments import Segments
from megaflow.kernels.jit import jit, next_power_of_2, tl
from megaflow.kernels.tuned import tuned

LOG2_E = 1.4426950408889634


@jit
def place(first, seq_length, stride_s, stride_b, COUNT: tl.constexpr, EVEN: tl.constexpr):
    """Where COUNT tokens from the `first` on are, in elements: a scalar, and what to add to it for each of them.

    EVEN: all of them are of one sequence.
    """
    if EVEN:
        sequence = first // seq_length
        start = sequence.to(tl.int64) * stride_b + (first - sequence * seq_length).to(tl.int64) * stride_s
        rows = tl.arange(0, COUNT) * stride_s
    else:
        token = first + tl.arange(0, COUNT)
        sequence = token // seq_length
        start = (first * 0).to(tl.int64)
        rows = sequence.to(tl.int64) * stride_b + (token - sequence * seq_length).to(tl.int64) * stride_s
    return start, rows


@jit
def masked_range(begin, begin_last, end_first, end, BLOCK: tl.constexpr):
    """The blocks of [begin, end) that need a mask: `count` from `start` on, without those from `full` to `past`.

    Between `begin_last` and `end_first` everything is visible to the whole block on the other side.
    """
    start = begin // BLOCK * BLOCK
    full = tl.maximum(tl.cdiv(begin_last, BLOCK) * BLOCK, start)
    past = tl.maximum(end_first // BLOCK * BLOCK, full)
    count = (full - start) // BLOCK + tl.cdiv(tl.maximum(end - past, 0), BLOCK)
    return start, full, past, count


@jit
def add_keys(
    acc,
    top,
    denominator,
    q,
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
    """The output so far with BLOCK_N keys from `first` on; top: the largest score of each query."""
    channel = tl.arange(0, BLOCK_D)
    start, rows = place(first, seq_k, stride_ks, stride_kb, BLOCK_N, EVEN)
    k += start
    v += start
    key = first + tl.arange(0, BLOCK_N)
    if MASK:
        exists = (key < keys)[None, :] & (channel < D)[:, None]
        keys_block = tl.load(k + (rows[None, :] + channel[:, None]), mask=exists, other=0.0)
    elif D != BLOCK_D:
        keys_block = tl.load(k + (rows[None, :] + channel[:, None]), mask=(channel < D)[:, None], other=0.0)
    else:
        keys_block = tl.load(k + (rows[None, :] + channel[:, None]))
    scores = tl.dot(q, keys_block, input_precision=PRECISION)
    if MASK:
        visible = (key[None, :] >= begin[:, None]) & (key[None, :] < end[:, None])
        scores = tl.where(visible, scores, float("-inf"))
    higher = tl.maximum(top, tl.max(scores, 1) * scale)
    base = tl.where(higher == float("-inf"), 0.0, higher) if MASK else higher  # no key so far
    weights = tl.exp2(scores * scale - base[:, None])
    shrink = tl.exp2(top - base)
    denominator = denominator * shrink + tl.sum(weights, 1)
    acc *= shrink[:, None]
    if MASK:
        values = tl.load(v + (rows[:, None] + channel[None, :]), mask=tl.trans(exists), other=0.0)
    elif D != BLOCK_D:
        values = tl.load(v + (rows[:, None] + channel[None, :]), mask=(channel < D)[None, :], other=0.0)
    else:
        values = tl.load(v + (rows[:, None] + channel[None, :]))
    acc = tl.dot(weights.to(values.dtype), values, acc, input_precision=PRECISION)
    return acc, higher, denominator


@jit
def forward_kernel(
    q,
    k,
    v,
    out,
    lse,
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
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EVEN_Q: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """BLOCK_M queries of one head; the later, longer ones first. scale: of the scores, times log2(e)."""
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    head = tl.program_id(1)
    query = first + tl.arange(0, BLOCK_M)
    channel = tl.arange(0, BLOCK_D)
    exists = (query < queries)[:, None] & (channel < D)[None, :]
    k += (head // GROUP) * stride_kh
    v += (head // GROUP) * stride_kh
    start_q, rows = place(first, seq_q, stride_qs, stride_qb, BLOCK_M, EVEN_Q)
    q += start_q + head * stride_qh
    q_block = tl.load(q + (rows[:, None] + channel[None, :]), mask=exists, other=0.0)
    begin = tl.load(seen + query, mask=query < queries, other=0)
    end = tl.load(seen + queries + query, mask=query < queries, other=0)

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    denominator = tl.zeros([BLOCK_M], tl.float32)
    last = tl.minimum(first + BLOCK_M, queries) - 1
    start, full, past, masked = masked_range(
        tl.load(seen + first),
        tl.load(seen + last),
        tl.load(seen + queries + first),
        tl.load(seen + queries + last),
        BLOCK_N,
    )
    for MASK in tl.static_range(2):
        for number in tl.range(masked if MASK else (past - full) // BLOCK_N, num_stages=1 if MASK else None):
            block = start + number * BLOCK_N if MASK else full + number * BLOCK_N
            if MASK:
                block += tl.where(block >= full, past - full, 0)
            acc, top, denominator = add_keys(
                acc,
                top,
                denominator,
                q_block,
                k,
                v,
                block,
                begin,
                end,
                keys,
                seq_k,
                stride_ks,
                stride_kb,
                scale,
                MASK,
                D,
                BLOCK_D,
                BLOCK_N,
                EVEN_K,
                PRECISION,
            )
    start_o, rows = place(first, seq_q, stride_os, stride_ob, BLOCK_M, EVEN_Q)
    denominator = tl.where(denominator > 0.0, denominator, 1.0)  # queries past the last see no key
    acc /= denominator[:, None]
    out += start_o + head * stride_oh
    tl.store(out + (rows[:, None] + channel[None, :]), acc.to(out.dtype.element_ty), mask=exists)
    tl.store(lse + head * queries + query, top + tl.log2(denominator), mask=query < queries)


def flash_forward(segments: Segments, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The output `[S, B, heads, D]`, and the base-2 log of every softmax's denominator, fp32 `[heads, T]`.

    q, k, v: as `unpack` gives them; k and v may not differ in strides.
    """
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[2], segments.queries, dtype=torch.float32, device=q.device)
    options = tuned("flash_forward", q.shape[-1], q.dtype)
    grid = (-(-segments.queries // options["BLOCK_M"]), q.shape[2])
    forward_kernel[grid](
        *(q, k, v, out, lse, segments.seen, segments.queries, segments.keys, q.shape[0], k.shape[0]),
        *(*q.stride()[:3], *k.stride()[:3], *out.stride()[:3], LOG2_E * q.shape[-1] ** -0.5),
        **common_options(q, k, options),
    )
    return out, lse


def common_options(q: Tensor, k: Tensor, options: dict[str, Any]) -> dict[str, Any]:
    """What the kernels of both passes are specialised for."""
    return {
        **options,
        "GROUP": q.shape[2] // k.shape[2],
        "D": q.shape[-1],
        "BLOCK_D": max(next_power_of_2(q.shape[-1]), 16),
        "EVEN_Q": q.shape[1] == 1 or q.shape[0] % options["BLOCK_M"] == 0,
        "EVEN_K": k.shape[1] == 1 or k.shape[0] % options["BLOCK_N"] == 0,
        "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",
    }
