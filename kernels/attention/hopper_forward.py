"""Flash attention for Hopper GPUs in Gluon: the forward pass of FlashAttention-3 (Shah et al., arXiv 2407.08608).

A tile is a block of queries of one head. Programs stay on their multiprocessor and take tile after tile. In each, one
warp copies and two warpgroups compute, each for half of a tile's queries. A warpgroup starts the product of its queries
with the next keys and that of its weights with the values before, and works out the softmax of the former while the
tensor cores are busy with the latter (section 3.2 of the paper). The warpgroups take turns in starting products, so the
softmax of one also hides behind products of the other (section 3.1).
"""

from __future__ import annotations

import torch
from torch import Tensor

from megaflow.kernels.attention.flash_forward import LOG2_E, masked_range
from megaflow.kernels.attention.hopper_gluon import (
    coordinates,
    descriptor,
    gl,
    hopper,
    jit,
    new_barriers,
    operand,
    position,
    product,
    tell,
    told,
    visible,
)
from megaflow.kernels.attention.segments import Segments
from megaflow.kernels.jit import programs
from megaflow.kernels.tuned import tuned

CACHE = 32 * 1024 * 1024
"""Bytes of keys and values that programs work on at one time; the second-level cache should hold them."""


@jit
def tile_at(tile, sizes, order, BLOCK_M: gl.constexpr):
    """The first query and the head of a tile: later queries first, which see more keys, `together` heads at a time."""
    _, heads, sequences, seq_q, _ = sizes
    blocks, together, _ = order
    section = tile // (together * blocks)
    within = tile - section * (together * blocks)
    width = gl.minimum(together, heads * sequences - section * together)
    turn = within // width
    pair = section * together + within - turn * width
    sequence = pair // heads
    return sequence * seq_q + (blocks - 1 - turn) * BLOCK_M, pair - sequence * heads


@jit
def fetch(tensor, block, head, seq_length, strides, smem, ready, free, count):
    """Copies the `count`th block of keys or values into its place once that is free."""
    STAGES: gl.constexpr = smem.shape[0]
    stage = count % STAGES
    row, column = coordinates(block, head, seq_length, strides)
    hopper.mbarrier.wait(free.index(stage), (count // STAGES & 1) ^ 1)
    hopper.mbarrier.expect(ready.index(stage), tensor.block_type.nbytes)
    hopper.tma.async_copy_global_to_shared(tensor, [row, column], ready.index(stage), smem.index(stage))


@jit
def await_block(ready, count, STAGES: gl.constexpr, pred=True):
    """Until the `count`th block has been copied."""
    hopper.mbarrier.wait(ready.index(count % STAGES), count // STAGES & 1, pred=pred)


@jit
def copy(q, k, v, smem, barriers, seen, counter, sizes, order, stride_q, stride_k, GROUP: gl.constexpr):
    """The copying warp."""
    q_smem, k_smem, v_smem, _, plan = smem
    q_ready, q_free, k_ready, k_free, v_ready, v_free, _ = barriers
    queries, _, _, seq_q, seq_k = sizes
    ROWS: gl.constexpr = q_smem.shape[1]
    BLOCK_N: gl.constexpr = k_smem.shape[1]
    tile = gl.program_id(0)
    done = 0
    copied = 0
    while tile < order[2]:
        following = gl.num_programs(0) + gl.atomic_add(counter, 1, sem="relaxed")
        first, head = tile_at(tile, sizes, order, 2 * ROWS)
        last = gl.minimum(first + 2 * ROWS, queries) - 1
        start, full, past, masked = masked_range(
            gl.load(seen + first),
            gl.load(seen + last),
            gl.load(seen + queries + first),
            gl.load(seen + queries + last),
            BLOCK_N,
        )
        total = gl.maximum(masked + (past - full) // BLOCK_N, 1)
        for half in gl.static_range(2):
            hopper.mbarrier.wait(q_free.index(half), (done & 1) ^ 1)
        for number in gl.static_range(5):
            tell(plan, number, (tile, start, full, past, masked)[number])
        row, column = coordinates(first, head, seq_q, stride_q)
        for half in gl.static_range(2):
            hopper.mbarrier.expect(q_ready.index(half), q.block_type.nbytes)
            at = [row + half * ROWS, column]
            hopper.tma.async_copy_global_to_shared(q, at, q_ready.index(half), q_smem.index(half))
        for number in range(total + 1):  # values are needed one block later than keys
            if number < total:
                block = position(number, start, full, past, masked, BLOCK_N)
                fetch(k, block, head // GROUP, seq_k, stride_k, k_smem, k_ready, k_free, copied + number)
            if number > 0:
                block = position(number - 1, start, full, past, masked, BLOCK_N)
                fetch(v, block, head // GROUP, seq_k, stride_k, v_smem, v_ready, v_free, copied + number - 1)
        copied += total
        done += 1
        tile = following
    for half in gl.static_range(2):
        hopper.mbarrier.wait(q_free.index(half), (done & 1) ^ 1)
    tell(plan, 0, tile)
    for half in gl.static_range(2):
        hopper.mbarrier.arrive(q_ready.index(half), count=1)


@jit
def hide(scores, block, seen):
    """Scores of keys from `block` on, those that their query does not see made minus infinity."""
    LAYOUT: gl.constexpr = scores.type.layout
    COLUMNS: gl.constexpr = scores.shape[1]
    key = block + gl.arange(0, COLUMNS, gl.SliceLayout(0, LAYOUT))
    return gl.where(visible(key, seen), scores, float("-inf"))


@jit
def softmax(scores, top, denominator, scale, MASK: gl.constexpr):
    """Weights of scores, how much smaller former ones become, the largest score so far and the denominator so far."""
    higher = gl.maximum(top, gl.max(scores, 1) * scale)
    base = gl.where(higher == float("-inf"), 0.0, higher) if MASK else higher  # no key so far
    weights = gl.exp2(scores * scale - base[:, None])
    shrink = gl.exp2(top - base)
    return weights, shrink, higher, denominator * shrink + gl.sum(weights, 1)


@jit
def step(
    state, count, turns, more, q_block, seen, block, smem, barriers, scale, MASK: gl.constexpr, HALF: gl.constexpr
):
    """The state after the `count`th block of keys, which has been copied, and the values before it.

    state: outputs, weights not yet multiplied by values, largest scores, denominators; more: whether a block follows.
    """
    acc, weights, top, denominator = state
    _, k_smem, v_smem, _, _ = smem
    _, _, k_ready, k_free, v_ready, v_free, turn = barriers
    STAGES: gl.constexpr = k_smem.shape[0]
    hopper.mbarrier.wait(turn.index(HALF), (turns & 1) ^ (1 - HALF))
    SCORES: gl.constexpr = q_block.type.layout.parent
    scores = product(q_block, k_smem.index(count % STAGES), SCORES)
    await_block(v_ready, count - 1, STAGES)
    acc = hopper.warpgroup_mma(weights, v_smem.index((count - 1) % STAGES), acc, is_async=True)
    hopper.mbarrier.arrive(turn.index(1 - HALF), count=1)
    scores = hopper.warpgroup_mma_wait(1, deps=[scores])
    hopper.mbarrier.arrive(k_free.index(count % STAGES), count=1)
    if MASK:
        scores = hide(scores, block, seen)
    weights, shrink, top, denominator = softmax(scores, top, denominator, scale, MASK)
    # this wait, earlier than needed, keeps the assembler from moving the next one in front of the softmax
    await_block(k_ready, count + 1, STAGES, more)
    acc = hopper.warpgroup_mma_wait(0, deps=[acc])
    hopper.mbarrier.arrive(v_free.index((count - 1) % STAGES), count=1)
    acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, acc.type.layout))[:, None]
    return acc, operand(weights, acc, k_smem.dtype), top, denominator


@jit
def compute(smem, barriers, out, lse, seen, sizes, order, stride_o, scale, HALF: gl.constexpr):
    """A computing warpgroup, for one half of every tile."""
    q_smem, k_smem, v_smem, out_smem, plan = smem
    q_ready, q_free, k_ready, k_free, v_ready, v_free, _turn = barriers
    queries = sizes[0]
    ROWS: gl.constexpr = q_smem.shape[1]
    D: gl.constexpr = q_smem.shape[2]
    STAGES: gl.constexpr = k_smem.shape[0]
    BLOCK_N: gl.constexpr = k_smem.shape[1]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    staged = out_smem.index(HALF)
    done = 0
    count = 0
    turns = 0
    hopper.mbarrier.wait(q_ready.index(HALF), 0)
    tile = told(plan, 0)
    while tile < order[2]:
        start = told(plan, 1)
        full = told(plan, 2)
        past = told(plan, 3)
        masked = told(plan, 4)
        q_block = q_smem.index(HALF).load(gl.DotOperandLayout(0, SCORES, 2))
        hopper.fence_async_shared()  # the next queries are copied to where these have been read
        hopper.mbarrier.arrive(q_free.index(HALF), count=1)
        total = gl.maximum(masked + (past - full) // BLOCK_N, 1)
        first, head = tile_at(tile, sizes, order, 2 * ROWS)
        first += HALF * ROWS
        query = first + gl.arange(0, ROWS, gl.SliceLayout(1, SCORES))
        begin = gl.load(seen + query, mask=query < queries, other=0)
        end = gl.load(seen + queries + query, mask=query < queries, other=0)
        seen_keys = begin, (end - begin).to(gl.uint32)

        await_block(k_ready, count, STAGES)
        scores = product(q_block, k_smem.index(count % STAGES), SCORES)
        scores = hopper.warpgroup_mma_wait(0, deps=[scores])
        hopper.mbarrier.arrive(k_free.index(count % STAGES), count=1)
        block = position(0, start, full, past, masked, BLOCK_N)
        scores = hide(scores, block, seen_keys)
        top = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, SCORES))
        denominator = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, SCORES))
        weights, _, top, denominator = softmax(scores, top, denominator, scale, True)
        acc = gl.zeros([ROWS, D], gl.float32, OUT)
        state = acc, operand(weights, acc, k_smem.dtype), top, denominator
        await_block(k_ready, count + 1, STAGES, total > 1)
        for MASK in gl.static_range(1, -1, -1):
            for number in range(1 if MASK else gl.maximum(masked, 1), masked if MASK else total):
                block = position(number, start, full, past, masked, BLOCK_N)
                more = number + 1 < total
                at = count + number
                state = step(state, at, turns, more, q_block, seen_keys, block, smem, barriers, scale, MASK, HALF)
                turns += 1
        acc, weights, top, denominator = state
        count += total
        await_block(v_ready, count - 1, STAGES)
        acc = hopper.warpgroup_mma(weights, v_smem.index((count - 1) % STAGES), acc, is_async=True)
        acc = hopper.warpgroup_mma_wait(0, deps=[acc])
        hopper.mbarrier.arrive(v_free.index((count - 1) % STAGES), count=1)

        whole = gl.where(denominator > 0.0, denominator, 1.0)  # queries past the last see no key
        acc = acc * gl.convert_layout(1.0 / whole, gl.SliceLayout(1, OUT))[:, None]
        hopper.tma.store_wait(0)
        staged.store(acc.to(staged.dtype))
        hopper.fence_async_shared()
        row, column = coordinates(first - HALF * ROWS, head, sizes[3], stride_o)
        hopper.tma.async_copy_shared_to_global(out, [row + HALF * ROWS, column], staged)
        gl.store(lse + head * queries + query, top + gl.log2(denominator), mask=query < queries)
        done += 1
        hopper.mbarrier.wait(q_ready.index(HALF), done & 1)
        tile = told(plan, 0)
    hopper.tma.store_wait(0)


@jit
def forward_kernel(
    q,
    k,
    v,
    out,
    lse,
    seen,
    counter,
    sizes,
    order,
    stride_q,
    stride_k,
    stride_o,
    scale,
    GROUP: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    COMPUTE_REGISTERS: gl.constexpr,
    COPY_REGISTERS: gl.constexpr,
):
    """All tiles; q, k, v and out are tensor descriptors, `counter` counts tiles taken after each program's first."""
    D: gl.constexpr = q.block_type.shape[1]
    q_smem = gl.allocate_shared_memory(q.dtype, [2, BLOCK_M // 2, D], q.layout)
    k_smem = gl.allocate_shared_memory(q.dtype, [STAGES, BLOCK_N, D], k.layout)
    v_smem = gl.allocate_shared_memory(q.dtype, [STAGES, BLOCK_N, D], v.layout)
    out_smem = gl.allocate_shared_memory(q.dtype, [2, BLOCK_M // 2, D], out.layout)
    plan = gl.allocate_shared_memory(gl.int32, [5, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    smem = (q_smem, k_smem, v_smem, out_smem, plan)
    q_ready = new_barriers(2, 1)
    q_free = new_barriers(2, 1)
    k_ready = new_barriers(STAGES, 1)
    k_free = new_barriers(STAGES, 2)
    v_ready = new_barriers(STAGES, 1)
    v_free = new_barriers(STAGES, 2)
    turn = new_barriers(2, 1)
    barriers = (q_ready, q_free, k_ready, k_free, v_ready, v_free, turn)
    hopper.fence_async_shared()
    gl.warp_specialize(
        [
            (compute, (smem, barriers, out, lse, seen, sizes, order, stride_o, scale, 0)),
            (compute, (smem, barriers, out, lse, seen, sizes, order, stride_o, scale, 1)),
            (copy, (q, k, v, smem, barriers, seen, counter, sizes, order, stride_q, stride_k, GROUP)),
        ],
        [4, 1],
        [COMPUTE_REGISTERS, COPY_REGISTERS],
    )


def hopper_forward(segments: Segments, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """`flash_forward` for tensors that `suits` accepts."""
    seq_q, sequences, heads, head_dim = q.shape
    seq_k, _, kv_heads, _ = k.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(heads, segments.queries, dtype=torch.float32, device=q.device)
    options = tuned("hopper_forward", head_dim, q.dtype)
    half, block_n = options["BLOCK_M"] // 2, options["BLOCK_N"]
    blocks = -(-seq_q // options["BLOCK_M"])
    tiles = blocks * heads * sequences
    fit = CACHE // (2 * seq_k * head_dim * k.element_size()) * (heads // kv_heads)
    together = min(max(fit, 1), heads * sequences)
    forward_kernel[(programs(q.device, 1, tiles),)](
        *(descriptor(q, half), descriptor(k, block_n), descriptor(v, block_n), descriptor(out, half)),
        *(lse, segments.seen, torch.zeros(1, dtype=torch.int32, device=q.device)),
        *((segments.queries, heads, sequences, seq_q, seq_k), (blocks, together, tiles)),
        *(q.stride()[1:3], k.stride()[1:3], out.stride()[1:3], LOG2_E * head_dim**-0.5),
        GROUP=heads // kv_heads,
        **options,
    )
    return out, lse
