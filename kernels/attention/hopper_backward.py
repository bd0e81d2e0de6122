"""Flash attention for Hopper GPUs in Gluon: the backward pass, in two kernels as in `flash_backward.py`."""

from __future__ import annotations

from torch import Tensor

from megaflow.kernels.attention.flash_forward import LOG2_E
from megaflow.kernels.attention.hopper_backward_keys import keys_kernel
from megaflow.kernels.attention.hopper_backward_queries import queries_kernel
from megaflow.kernels.attention.hopper_gluon import descriptor, flat_descriptor
from megaflow.kernels.attention.segments import Segments
from megaflow.kernels.tuned import tuned


def hopper_backward(
    segments: Segments,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad_out: Tensor,
    lse: Tensor,
    delta: Tensor,
    grads: tuple[Tensor, Tensor, Tensor],
) -> None:
    """`flash_backward` for tensors that `suits` accepts."""
    grad_q, grad_k, grad_v = grads
    seq_q, _, heads, head_dim = q.shape
    group = heads // k.shape[2]
    sizes = segments.queries, segments.keys, seq_q, k.shape[0]
    strides = q.stride()[1:3], k.stride()[1:3], grad_out.stride()[1:3]
    scales = head_dim**-0.5, LOG2_E * head_dim**-0.5
    options = tuned("hopper_backward_keys", head_dim, q.dtype)
    block_m, block_n = options["BLOCK_M"], options["BLOCK_N"]
    keys_kernel[-(-segments.keys // block_n), k.shape[2]](
        *(descriptor(q, block_m), *(descriptor(x, block_n // 2) for x in (k, v)), descriptor(grad_out, block_m)),
        *(flat_descriptor(lse, block_m), flat_descriptor(delta, block_m)),
        *(*(descriptor(x, block_n // 2) for x in (grad_k, grad_v)), segments.seen_by, sizes, *strides, *scales),
        GROUP=group,
        **options,
    )
    options = tuned("hopper_backward_queries", head_dim, q.dtype)
    block_m, block_n = options["BLOCK_M"], options["BLOCK_N"]
    queries_kernel[-(-segments.queries // block_m), heads](
        *(descriptor(q, block_m // 2), *(descriptor(x, block_n) for x in (k, v)), descriptor(grad_out, block_m // 2)),
        *(lse, delta, descriptor(grad_q, block_m // 2), segments.seen, sizes, *strides, *scales),
        GROUP=group,
        **options,
    )
