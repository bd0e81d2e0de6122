"""Flash attention for Hopper GPUs in Gluon: the gradient of queries.

A program takes a block of queries of one head, half of it for each of two warpgroups, which keep the queries and the
gradients of their outputs in registers, and goes over the blocks of keys that some of them see, which another warp
copies.
"""

from __future__ import annotations

from megaflow.kernels.attention.flash_forward import masked_range
from megaflow.kernels.attention.hopper_gluon import (
    coordinates,
    gl,
    hopper,
    jit,
    new_barriers,
    operand,
    position,
    product,
    visible,
)


@jit
def first_query(BLOCK_M: gl.constexpr):
    """Where the program's block begins: later, longer ones first."""
    return (gl.num_programs(0) - 1 - gl.program_id(0)) * BLOCK_M


@jit
def copy(tensors, smem, barriers, ranges, sizes, stride_q, stride_k, stride_o, GROUP: gl.constexpr):
    """The copying warp: queries and gradients of outputs once, then keys and values block by block."""
    q, k, v, grad_out, grad_q = tensors
    q_smem, k_smem, v_smem, grad_smem = smem
    queries_ready, ready, free, done = barriers
    start, full, past, masked, total = ranges
    _, _, seq_q, seq_k = sizes
    ROWS: gl.constexpr = q_smem.shape[1]
    STAGES: gl.constexpr = k_smem.shape[0]
    BLOCK_N: gl.constexpr = k_smem.shape[1]
    first = first_query(2 * ROWS)
    head = gl.program_id(1)
    row, column = coordinates(first, head, seq_q, stride_q)
    row_o, column_o = coordinates(first, head, seq_q, stride_o)
    for half in gl.static_range(2):
        arrived = queries_ready.index(half)
        hopper.mbarrier.expect(arrived, 2 * q.block_type.nbytes)
        hopper.tma.async_copy_global_to_shared(q, [row + half * ROWS, column], arrived, q_smem.index(half))
        at = [row_o + half * ROWS, column_o]
        hopper.tma.async_copy_global_to_shared(grad_out, at, arrived, grad_smem.index(half))
    for number in range(total):
        block = position(number, start, full, past, masked, BLOCK_N)
        row_k, column_k = coordinates(block, head // GROUP, seq_k, stride_k)
        stage = number % STAGES
        hopper.mbarrier.wait(free.index(stage), (number // STAGES & 1) ^ 1)
        hopper.mbarrier.expect(ready.index(stage), 2 * k.block_type.nbytes)
        hopper.tma.async_copy_global_to_shared(k, [row_k, column_k], ready.index(stage), k_smem.index(stage))
        hopper.tma.async_copy_global_to_shared(v, [row_k, column_k], ready.index(stage), v_smem.index(stage))
    hopper.mbarrier.wait(done.index(0), 0)
    for half in gl.static_range(2):
        hopper.tma.async_copy_shared_to_global(grad_q, [row + half * ROWS, column], q_smem.index(half))
    hopper.tma.store_wait(0)


@jit
def add_keys(grad_q, count, total, block, rows, seen, smem, barriers, scale, MASK: gl.constexpr):
    """The gradient so far, still to be scaled, with the `count`th block of keys, which has been copied.

    rows: queries, gradients of their outputs, lse and delta.
    """
    q_block, grad_block, lse_block, delta_block = rows
    _, k_smem, v_smem, _ = smem
    _, ready, free, _ = barriers
    STAGES: gl.constexpr = k_smem.shape[0]
    BLOCK_N: gl.constexpr = k_smem.shape[1]
    SCORES: gl.constexpr = q_block.type.layout.parent
    stage = count % STAGES
    k_block = k_smem.index(stage)
    scores = product(q_block, k_block, SCORES)
    grad_weights = product(grad_block, v_smem.index(stage), SCORES)
    scores = hopper.warpgroup_mma_wait(1, deps=[scores])
    weights = gl.exp2(scores * scale - lse_block[:, None])
    if MASK:
        key = block + gl.arange(0, BLOCK_N, gl.SliceLayout(0, SCORES))
        weights = gl.where(visible(key, seen), weights, 0.0)
    # this wait, earlier than needed, keeps the assembler from moving the next one in front of the weights
    hopper.mbarrier.wait(ready.index((count + 1) % STAGES), (count + 1) // STAGES & 1, pred=count + 1 < total)
    grad_weights = hopper.warpgroup_mma_wait(0, deps=[grad_weights])
    left = operand(weights * (grad_weights - delta_block[:, None]), grad_q, k_smem.dtype)
    grad_q = hopper.warpgroup_mma(left, k_block, grad_q, is_async=True)
    grad_q = hopper.warpgroup_mma_wait(0, deps=[grad_q])
    hopper.mbarrier.arrive(free.index(stage), count=1)
    return grad_q


@jit
def compute(smem, barriers, ranges, lse, delta, seen, queries, scale, base_scale, HALF: gl.constexpr):
    """A computing warpgroup, for one half of the queries."""
    q_smem, k_smem, _, grad_smem = smem
    queries_ready, ready, _, done = barriers
    start, full, past, masked, total = ranges
    ROWS: gl.constexpr = q_smem.shape[1]
    D: gl.constexpr = q_smem.shape[2]
    BLOCK_N: gl.constexpr = k_smem.shape[1]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    GRADS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    query = first_query(2 * ROWS) + HALF * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, SCORES))
    exists = query < queries
    begin = gl.load(seen + query, mask=exists, other=0)
    end = gl.load(seen + queries + query, mask=exists, other=0)
    seen_keys = begin, (end - begin).to(gl.uint32)
    lse_block = gl.load(lse + gl.program_id(1) * queries + query, mask=exists, other=0.0)
    delta_block = gl.load(delta + gl.program_id(1) * queries + query, mask=exists, other=0.0)
    grad_q = gl.zeros([ROWS, D], gl.float32, GRADS)
    hopper.mbarrier.wait(queries_ready.index(HALF), 0)
    q_block = q_smem.index(HALF).load(gl.DotOperandLayout(0, SCORES, 2))
    grad_block = grad_smem.index(HALF).load(gl.DotOperandLayout(0, SCORES, 2))
    rows = q_block, grad_block, lse_block, delta_block
    hopper.mbarrier.wait(ready.index(0), 0, pred=total > 0)
    for MASK in gl.static_range(1, -1, -1):
        for number in range(0 if MASK else masked, masked if MASK else total):
            block = position(number, start, full, past, masked, BLOCK_N)
            grad_q = add_keys(grad_q, number, total, block, rows, seen_keys, smem, barriers, base_scale, MASK)
    q_smem.index(HALF).store((grad_q * scale).to(q_smem.dtype))
    hopper.fence_async_shared()
    hopper.mbarrier.arrive(done.index(0), count=1)


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
    sizes,
    stride_q,
    stride_k,
    stride_o,
    scale,
    base_scale,
    GROUP: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    COMPUTE_REGISTERS: gl.constexpr,
    COPY_REGISTERS: gl.constexpr,
):
    """The gradient of BLOCK_M queries of one head.

    q, k, v, grad_out and grad_q are descriptors; base_scale: the scale of scores for a softmax in base 2.
    """
    D: gl.constexpr = q.block_type.shape[1]
    q_smem = gl.allocate_shared_memory(q.dtype, [2, BLOCK_M // 2, D], q.layout)
    k_smem = gl.allocate_shared_memory(q.dtype, [STAGES, BLOCK_N, D], k.layout)
    v_smem = gl.allocate_shared_memory(q.dtype, [STAGES, BLOCK_N, D], v.layout)
    grad_smem = gl.allocate_shared_memory(q.dtype, [2, BLOCK_M // 2, D], grad_out.layout)
    smem = (q_smem, k_smem, v_smem, grad_smem)
    barriers = (new_barriers(2, 1), new_barriers(STAGES, 1), new_barriers(STAGES, 2), new_barriers(1, 2))
    hopper.fence_async_shared()
    queries = sizes[0]
    first = first_query(BLOCK_M)
    last = gl.minimum(first + BLOCK_M, queries) - 1
    start, full, past, masked = masked_range(
        gl.load(seen + first),
        gl.load(seen + last),
        gl.load(seen + queries + first),
        gl.load(seen + queries + last),
        BLOCK_N,
    )
    ranges = (start, full, past, masked, masked + (past - full) // BLOCK_N)
    tensors = (q, k, v, grad_out, grad_q)
    gl.warp_specialize(
        [
            (compute, (smem, barriers, ranges, lse, delta, seen, queries, scale, base_scale, 0)),
            (compute, (smem, barriers, ranges, lse, delta, seen, queries, scale, base_scale, 1)),
            (copy, (tensors, smem, barriers, ranges, sizes, stride_q, stride_k, stride_o, GROUP)),
        ],
        [4, 1],
        [COMPUTE_REGISTERS, COPY_REGISTERS],
    )
