"""Attention over sequences that are cut over ranks: keys and values are gathered, queries stay where they are.

As in Llama 3 (arXiv 2407.21783, section 3.3.2); `megaflow.data.zigzag` makes the cut. With grouped key-value heads
there is far less of keys and values than of anything else in a layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megaflow.parallel import collectives
from megaflow.parallel.mesh import ParallelContext


class _GatherKeysValues(torch.autograd.Function):
    """One all-gather forward, one reduce-scatter backward."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, index: Tensor, parallel: ParallelContext) -> Any:
        ctx.parallel, ctx.tokens = parallel, parallel.cp * len(own)
        ctx.save_for_backward(index)
        whole = own.new_empty(ctx.tokens, *own.shape[1:])
        collectives.all_gather(whole, own.contiguous(), group=parallel.group("cp"))
        return whole.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (index,), parallel, grad = ctx.saved_tensors, ctx.parallel, grads[0]
        # a key is packed at most twice, so that on a GPU too the sum does not depend on the order of additions
        whole = grad.new_zeros(ctx.tokens, *grad.shape[1:]).index_add_(0, index, grad)
        own = whole.new_empty(ctx.tokens // parallel.cp, *whole.shape[1:])
        collectives.reduce_scatter(own, whole, group=parallel.group("cp"))
        return own, None, None


def gather_keys_values(own: Tensor, index: Tensor, parallel: ParallelContext) -> Tensor:
    """The keys and values that this rank's queries attend to, `[K, 2 kv_heads, head_dim]`, out of all ranks' tokens.

    own: this rank's keys and values side by side, `[T, 2 kv_heads, head_dim]`. index: `[K]` places among the
    `[cp * T]` tokens, rank after rank. Gradients are summed over the ranks in the dtype of `own`, as those of other
    activations are.
    """
    return _GatherKeysValues.apply(own, index, parallel)
