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
    """One all-gather forward, one reduce-scatter backward, of keys and values side by side."""

    @staticmethod
    def forward(ctx: Any, k: Tensor, v: Tensor, index: Tensor, parallel: ParallelContext) -> Any:
        ctx.parallel, ctx.tokens = parallel, parallel.cp * len(k)
        ctx.save_for_backward(index)
        own = torch.cat((k, v), dim=1)
        whole = own.new_empty(ctx.tokens, *own.shape[1:])
        collectives.all_gather(whole, own, group=parallel.group("cp"))
        return whole.index_select(0, index).chunk(2, dim=1)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (index,), parallel = ctx.saved_tensors, ctx.parallel
        packed = torch.cat(grads, dim=1)
        # a key is packed at most twice, so that on a GPU too the sum does not depend on the order of additions
        whole = packed.new_zeros(ctx.tokens, *packed.shape[1:]).index_add_(0, index, packed)
        own = whole.new_empty(ctx.tokens // parallel.cp, *whole.shape[1:])
        collectives.reduce_scatter(own, whole, group=parallel.group("cp"))
        grad_k, grad_v = own.chunk(2, dim=1)
        return grad_k, grad_v, None, None


def gather_keys_values(k: Tensor, v: Tensor, index: Tensor, parallel: ParallelContext) -> tuple[Tensor, Tensor]:
    """The keys and values that this rank's queries attend to, `[K, kv_heads, head_dim]`, out of all ranks' tokens.

    k, v: this rank's own, `[T, kv_heads, head_dim]`. index: `[K]` places among the `[cp * T]` tokens, rank after rank.
    Gradients are summed over the ranks in the dtype of k and v, as those of other activations are.
    """
    return _GatherKeysValues.apply(k, v, index, parallel)
