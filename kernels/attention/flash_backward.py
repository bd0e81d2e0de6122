"""Flash attention over segments in Triton: the backward pass.

One kernel goes over keys and sums what all queries that see them contribute, another goes over queries; both compute
the scores again. One kernel for both would add the gradients of queries up in memory, in any order: this takes seven
products instead of five and gives equal bits in every run.
"""

from __future__ import annotations

from torch import Tensor

from megaflow.kernels.attention.flash_backward_keys import keys_kernel
from megaflow.kernels.attention.flash_backward_queries import queries_kernel
from megaflow.kernels.attention.flash_forward import LOG2_E, common_options
from megaflow.kernels.attention.segments import Segments
from megaflow.kernels.tuned import tuned


def flash_backward(
    segments: Segments,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad_out: Tensor,
    lse: Tensor,
    delta: Tensor,
    grads: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Writes the gradients of q, k and v, as `flash_forward` takes them, into `grads`, which have their strides.

    grad_out: contiguous `[S, B, heads, D]`. lse, delta: `[heads, T]`, of `flash_forward` and of `output_delta`.
    """
    grad_q, grad_k, grad_v = grads
    seq_length, _, heads, head_dim = q.shape
    sizes = segments.queries, segments.keys, seq_length, k.shape[0]
    strides = *q.stride()[:3], *k.stride()[:3], *grad_out.stride()[:3]
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
