"""Collectives over the tensor-parallel ranks, and the two that stand alone inside a backward pass.

Outside a cut layer activations are `[S, B, H]`: whole on every rank or, under sequence parallelism, cut along S
(Korthikanti et al., 2022).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megaflow.parallel import collectives, symmetric
from megaflow.parallel.mesh import ParallelContext


class Pending:
    """The result of a collective under way; `wait` gives it."""

    def __init__(self, tensor: Tensor, work: dist.Work | None) -> None:
        self.tensor = tensor
        self.work = work

    def wait(self) -> Tensor:
        if self.work is not None:
            self.work.wait()
        return self.tensor


def all_reduce(x: Tensor, ctx: ParallelContext) -> Pending:
    """Start the sum of x over the tensor-parallel ranks, in place."""
    return Pending(x, dist.all_reduce(x, group=ctx.tp_group, async_op=True))


def all_gather_sequence(x: Tensor, ctx: ParallelContext) -> Pending:
    """Start putting the ranks' parts `[S / tp, ...]` together to `[S, ...]`."""
    out = x.new_empty(ctx.tp * x.shape[0], *x.shape[1:])
    return Pending(out, collectives.all_gather(out, x.contiguous(), group=ctx.tp_group, async_op=True))


def reduce_scatter_sequence(x: Tensor, ctx: ParallelContext) -> Pending:
    """Start summing x `[S, ...]` over the ranks, each of which keeps its part `[S / tp, ...]`."""
    out = x.new_empty(ctx.tp_share(x.shape[0]), *x.shape[1:])
    return Pending(out, collectives.reduce_scatter(out, x.contiguous(), group=ctx.tp_group, async_op=True))


def gathered_product(x: Tensor, weight: Tensor, ctx: ParallelContext) -> Tensor:
    """`x @ weight.T`; under sequence parallelism of the ranks' parts of x `[S / tp, B, H]`, put together."""
    if ctx.symmetric_memory:
        return symmetric.gathered_product(x, weight, ctx.tp_group)
    whole = all_gather_sequence(x, ctx).wait() if ctx.sequence_parallel else x
    return whole @ weight.T


def summed_product(x: Tensor, weight: Tensor, ctx: ParallelContext) -> Tensor:
    """`x @ weight.T` summed over the ranks; under sequence parallelism each keeps its part `[S / tp, B, H]`."""
    if ctx.symmetric_memory:
        return symmetric.scattered_product(x, weight, ctx.tp_group)
    return (reduce_scatter_sequence if ctx.sequence_parallel else all_reduce)(x @ weight.T, ctx).wait()


class _ReduceFromTensorRegion(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, parallel: ParallelContext) -> Tensor:
        ctx.mark_dirty(x)
        return all_reduce(x, parallel).wait()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0], None


class _ReduceScatterToSequenceRegion(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, parallel: ParallelContext) -> Tensor:
        ctx.parallel = parallel
        return reduce_scatter_sequence(x, parallel).wait()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return all_gather_sequence(grads[0], ctx.parallel).wait(), None


def leave_tensor_region(x: Tensor, parallel: ParallelContext) -> Tensor:
    """Sum the ranks' partial results `[S, B, H]`; under sequence parallelism each rank keeps its part of S.

    Without it the sum overwrites x. Backward, the gradient passes unchanged, or is gathered along S.
    """
    if parallel.tp == 1:
        return x
    region = _ReduceScatterToSequenceRegion if parallel.sequence_parallel else _ReduceFromTensorRegion
    return region.apply(x, parallel)


class TensorRegion:
    """What a cut computation that is a function of its own does at its beginning and its end; see `enter`."""

    def __init__(self, parallel: ParallelContext) -> None:
        self.parallel = parallel

    def enter(self, x: Tensor) -> Tensor:
        """x `[S, B, H]` itself or, under sequence parallelism, the ranks' parts put together."""
        return all_gather_sequence(x, self.parallel).wait() if self.parallel.sequence_parallel else x

    def leave(self, grad: Tensor) -> Pending:
        """Start summing the ranks' gradients of what was entered, which is overwritten; each keeps its part of S."""
        reduce = reduce_scatter_sequence if self.parallel.sequence_parallel else all_reduce
        return reduce(grad, self.parallel)


def gather_last_dimension(x: Tensor, parallel: ParallelContext) -> Tensor:
    """Put the ranks' parts `[..., V / tp]` together to `[..., V]`; for results that are read, without gradient."""
    if parallel.tp == 1:
        return x
    parts = all_gather_sequence(x.detach()[None], parallel).wait()
    return torch.cat(tuple(parts), dim=-1)
