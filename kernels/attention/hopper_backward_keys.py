"""Flash attention for Hopper GPUs in Gluon: the gradients of keys and values.

A program takes a block of keys of one head, half of it for each of two warpgroups, and goes over the blocks of queries
that see some of them, which another warp copies. Everything is computed transposed, a row for each key, so that weights
and gradients of scores are where the next product takes its left side: in registers.
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
    tell,
    told,
    visible,
)


@jit
def copy(tensors, smem, barriers, ranges, sizes, stride_q, stride_k, stride_o, GROUP: gl.constexpr):
    """The copying warp: keys and values once, then queries block by block, of all heads that share the keys."""
    q, k, v, grad_out, lse, delta, grad_k, grad_v = tensors
    q_smem, k_smem, v_smem, grad_smem, lse_smem, delta_smem, _, blocks = smem
    keys_ready, ready, free, done = barriers
    start, full, past, masked, total = ranges
    queries, _, seq_q, seq_k = sizes
    ROWS: gl.constexpr = k_smem.shape[1]
    STAGES: gl.constexpr = q_smem.shape[0]
    BLOCK_M: gl.constexpr = q_smem.shape[1]
    head = gl.program_id(1)
    row, column = coordinates(gl.program_id(0) * (2 * ROWS), head, seq_k, stride_k)
    for half in gl.static_range(2):
        at = [row + half * ROWS, column]
        hopper.mbarrier.expect(keys_ready.index(half), k.block_type.nbytes + v.block_type.nbytes)
        hopper.tma.async_copy_global_to_shared(k, at, keys_ready.index(half), k_smem.index(half))
        hopper.tma.async_copy_global_to_shared(v, at, keys_ready.index(half), v_smem.index(half))
    count = 0
    for place in range(2 * GROUP):  # as in `compute`
        MASK = place < GROUP
        q_head = head * GROUP + place % GROUP
        for number in range(gl.where(MASK, 0, masked), gl.where(MASK, masked, total)):
            block = position(number, start, full, past, masked, BLOCK_M)
            stage = count % STAGES
            arrived = ready.index(stage)
            hopper.mbarrier.wait(free.index(stage), (count // STAGES & 1) ^ 1)
            tell(blocks, stage, block)
            hopper.mbarrier.expect(arrived, 2 * q.block_type.nbytes + 2 * lse.block_type.nbytes)
            row_q, column_q = coordinates(block, q_head, seq_q, stride_q)
            hopper.tma.async_copy_global_to_shared(q, [row_q, column_q], arrived, q_smem.index(stage))
            row_o, column_o = coordinates(block, q_head, seq_q, stride_o)
            hopper.tma.async_copy_global_to_shared(grad_out, [row_o, column_o], arrived, grad_smem.index(stage))
            at_lse = q_head * queries + block
            hopper.tma.async_copy_global_to_shared(lse, [at_lse], arrived, lse_smem.index(stage))
            hopper.tma.async_copy_global_to_shared(delta, [at_lse], arrived, delta_smem.index(stage))
            count += 1
    hopper.mbarrier.wait(done.index(0), 0)
    for half in gl.static_range(2):
        at = [row + half * ROWS, column]
        hopper.tma.async_copy_shared_to_global(grad_k, at, k_smem.index(half))
        hopper.tma.async_copy_shared_to_global(grad_v, at, v_smem.index(half))
    hopper.tma.store_wait(0)


@jit
def add_queries(sums, count, seen, smem, barriers, scale, MASK: gl.constexpr, HALF: gl.constexpr):
    """The gradients so far, of keys still to be scaled, with the `count`th block of queries."""
    grad_k, grad_v = sums
    q_smem, k_smem, v_smem, grad_smem, lse_smem, delta_smem, columns, blocks = smem
    _, ready, free, _ = barriers
    STAGES: gl.constexpr = q_smem.shape[0]
    BLOCK_M: gl.constexpr = q_smem.shape[1]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    stage = count % STAGES
    q_block = q_smem.index(stage)
    grad_block = grad_smem.index(stage)
    hopper.mbarrier.wait(ready.index(stage), count // STAGES & 1)
    scores = product(k_smem.index(HALF), q_block, SCORES)
    grad_weights = product(v_smem.index(HALF), grad_block, SCORES)
    lse_block = lse_smem.index(stage).load(gl.SliceLayout(0, SCORES))
    scores = hopper.warpgroup_mma_wait(1, deps=[scores])
    weights = gl.exp2(scores * scale - lse_block[None, :])
    if MASK:
        query = told(blocks, stage) + columns.load(gl.SliceLayout(0, SCORES))
        weights = gl.where(visible(query, seen), weights, 0.0)
    left = operand(weights, grad_v, q_smem.dtype)
    grad_v = hopper.warpgroup_mma(left, grad_block, grad_v, is_async=True)
    delta_block = delta_smem.index(stage).load(gl.SliceLayout(0, SCORES))
    grad_weights = hopper.warpgroup_mma_wait(1, deps=[grad_weights])
    left = operand(weights * (grad_weights - delta_block[None, :]), grad_k, q_smem.dtype)
    grad_k = hopper.warpgroup_mma(left, q_block, grad_k, is_async=True)
    grad_k, grad_v = hopper.warpgroup_mma_wait(0, deps=[grad_k, grad_v])
    hopper.mbarrier.arrive(free.index(stage), count=1)
    return grad_k, grad_v


@jit
def compute(smem, barriers, ranges, seen_by, keys, scale, base_scale, GROUP: gl.constexpr, HALF: gl.constexpr):
    """A computing warpgroup, for one half of the keys."""
    q_smem, k_smem, v_smem, _, _, _, _, _ = smem
    keys_ready, _, _, done = barriers
    _, _, _, masked, total = ranges
    ROWS: gl.constexpr = k_smem.shape[1]
    D: gl.constexpr = k_smem.shape[2]
    BLOCK_M: gl.constexpr = q_smem.shape[1]
    GRADS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    key = gl.program_id(0) * (2 * ROWS) + HALF * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, SCORES))
    begin = gl.load(seen_by + key, mask=key < keys, other=0)
    end = gl.load(seen_by + keys + key, mask=key < keys, other=0)
    seen = begin, (end - begin).to(gl.uint32)
    sums = gl.zeros([ROWS, D], gl.float32, GRADS), gl.zeros([ROWS, D], gl.float32, GRADS)
    hopper.mbarrier.wait(keys_ready.index(HALF), 0)
    for count in range(GROUP * masked):
        sums = add_queries(sums, count, seen, smem, barriers, base_scale, True, HALF)
    for count in range(GROUP * masked, GROUP * total):
        sums = add_queries(sums, count, seen, smem, barriers, base_scale, False, HALF)
    k_smem.index(HALF).store((sums[0] * scale).to(k_smem.dtype))
    v_smem.index(HALF).store(sums[1].to(k_smem.dtype))
    hopper.fence_async_shared()
    hopper.mbarrier.arrive(done.index(0), count=1)


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
    """Gradients of BLOCK_N keys and values of one key-value head, over the GROUP heads that share it.

    All tensors but seen_by are descriptors; base_scale: the scale of scores for a softmax in base 2.
    """
    D: gl.constexpr = q.block_type.shape[1]
    q_smem = gl.allocate_shared_memory(q.dtype, [STAGES, BLOCK_M, D], q.layout)
    k_smem = gl.allocate_shared_memory(q.dtype, [2, BLOCK_N // 2, D], k.layout)
    v_smem = gl.allocate_shared_memory(q.dtype, [2, BLOCK_N // 2, D], v.layout)
    grad_smem = gl.allocate_shared_memory(q.dtype, [STAGES, BLOCK_M, D], grad_out.layout)
    lse_smem = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M], lse.layout)
    delta_smem = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M], delta.layout)
    columns = gl.allocate_shared_memory(gl.int32, [BLOCK_M], lse.layout)
    # the compiler would keep columns of a mask in registers all the time, where there is no room
    columns.store(gl.arange(0, BLOCK_M, gl.BlockedLayout([1], [32], [4], [0])))
    blocks = gl.allocate_shared_memory(gl.int32, [STAGES, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    smem = (q_smem, k_smem, v_smem, grad_smem, lse_smem, delta_smem, columns, blocks)
    barriers = (new_barriers(2, 1), new_barriers(STAGES, 1), new_barriers(STAGES, 2), new_barriers(1, 2))
    hopper.fence_async_shared()
    first = gl.program_id(0) * BLOCK_N
    keys = sizes[1]
    last = gl.minimum(first + BLOCK_N, keys) - 1
    start, full, past, masked = masked_range(
        gl.load(seen_by + first),
        gl.load(seen_by + last),
        gl.load(seen_by + keys + first),
        gl.load(seen_by + keys + last),
        BLOCK_M,
    )
    ranges = (start, full, past, masked, masked + (past - full) // BLOCK_M)
    tensors = (q, k, v, grad_out, lse, delta, grad_k, grad_v)
    gl.warp_specialize(
        [
            (compute, (smem, barriers, ranges, seen_by, keys, scale, base_scale, GROUP, 0)),
            (compute, (smem, barriers, ranges, seen_by, keys, scale, base_scale, GROUP, 1)),
            (copy, (tensors, smem, barriers, ranges, sizes, stride_q, stride_k, stride_o, GROUP)),
        ],
        [4, 1],
        [COMPUTE_REGISTERS, COPY_REGISTERS],
    )
