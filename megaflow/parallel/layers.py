"""Linear and embedding layers cut over the tensor-parallel ranks (Shoeybi et al., 2019).

Weights are local and plain; `megaflow.model.placement` says which part of which global tensor each one is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megaflow.parallel.mesh import ParallelContext
from megaflow.parallel.regions import (
    all_gather_sequence,
    all_reduce,
    gathered_product,
    leave_tensor_region,
    reduce_scatter_sequence,
    summed_product,
)
from megaflow.parallel.vocabulary import vocabulary_rows


def empty_weight(rows: int, columns: int, parallel: ParallelContext, dtype: torch.dtype) -> nn.Parameter:
    """A weight on the rank's device: zeros, because padding rows of a vocabulary are never filled."""
    return nn.Parameter(torch.zeros(rows, columns, dtype=dtype, device=parallel.device))


class Job(NamedTuple):
    """A weight gradient that was put off; `run` computes it and hands it over."""

    weight: nn.Parameter
    run: Callable[[], None]


class DeferredGradients:
    """Lets a backward pass compute input gradients only (Qi et al., arXiv 2401.10241).

    A model's linear layers share one. Gradients of norms and embeddings are never put off.
    """

    def __init__(self) -> None:
        self.add: Callable[[nn.Parameter, Tensor], None] = _add_to_grad
        """What takes a weight gradient that a job has computed; at first it is added to `weight.grad`."""
        self.accumulate: Callable[[nn.Parameter, Tensor], None] | None = None
        """What takes a weight gradient in fp32 for which autograd then has none; without it autograd gets it."""
        self._jobs: list[Job] | None = None

    @contextmanager
    def collect(self) -> Iterator[list[Job]]:
        """Puts off the weight gradients of the backward passes inside: each is a job in the list, to be run once."""
        self._jobs = []
        try:
            yield self._jobs
        finally:
            self._jobs = None

    @property
    def collecting(self) -> bool:
        """Whether weight gradients are put off now."""
        return self._jobs is not None

    def weight_gradient(self, weight: nn.Parameter, compute: Callable[[], Tensor]) -> Tensor | None:
        """What a linear layer returns to autograd: the gradient, or None where it is put off."""
        if self._jobs is None:
            return compute()
        self._jobs.append(Job(weight, lambda: self.add(weight, compute())))
        return None

    def computed_gradient(self, weight: nn.Parameter, grad: Tensor) -> Tensor | None:
        """The same for a gradient in fp32 that is there already: putting it off would hold its memory for nothing."""
        if self.accumulate is None:
            return grad
        self.accumulate(weight, grad)
        return None


def _add_to_grad(weight: nn.Parameter, grad: Tensor) -> None:
    weight.grad = grad if weight.grad is None else weight.grad.add_(grad)


def _outer(grad: Tensor, x: Tensor) -> Tensor:
    """The weight gradient `[rows, columns]` from grad `[..., rows]` and x `[..., columns]`."""
    return grad.flatten(0, -2).T @ x.flatten(0, -2)


class _Linear(torch.autograd.Function):
    """`x @ weight.T` on this rank alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: nn.Parameter, deferred: DeferredGradients) -> Tensor:
        ctx.weight, ctx.deferred = weight, deferred
        ctx.save_for_backward(x)
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, grad = ctx.saved_tensors[0].detach(), grads[0]  # detached: a job must not hold the graph
        grad_weight = ctx.deferred.weight_gradient(ctx.weight, lambda: _outer(grad, x))
        return grad @ ctx.weight, grad_weight, None


class _ColumnParallel(torch.autograd.Function):
    """`x @ weight.T` whose collectives of the backward pass are each under a matrix product.

    Under sequence parallelism only this rank's part of x is kept, and gathered again for the weight gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: nn.Parameter, parallel: ParallelContext, deferred: DeferredGradients
    ) -> Tensor:
        ctx.weight, ctx.parallel, ctx.deferred = weight, parallel, deferred
        ctx.save_for_backward(x)
        return gathered_product(x, weight, parallel)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, grad, parallel = ctx.saved_tensors[0].detach(), grads[0], ctx.parallel
        now = parallel.sequence_parallel and not ctx.deferred.collecting
        gathering = all_gather_sequence(x, parallel) if now else None
        grad_x = grad @ ctx.weight
        reducing = (reduce_scatter_sequence if parallel.sequence_parallel else all_reduce)(grad_x, parallel)

        def compute() -> Tensor:
            if not parallel.sequence_parallel:
                return _outer(grad, x)
            return _outer(grad, (gathering or all_gather_sequence(x, parallel)).wait())

        grad_weight = ctx.deferred.weight_gradient(ctx.weight, compute)
        return reducing.wait(), grad_weight, None, None


class _RowParallel(torch.autograd.Function):
    """`x @ weight.T`, summed over the ranks.

    Under sequence parallelism the gradient is gathered once for both products, while x is made again where it was not
    kept.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: nn.Parameter, parallel: ParallelContext, deferred: DeferredGradients
    ) -> Tensor:
        ctx.weight, ctx.parallel, ctx.deferred = weight, parallel, deferred
        ctx.save_for_backward(x)
        return summed_product(x, weight, parallel)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        gathering = all_gather_sequence(grads[0], ctx.parallel) if ctx.parallel.sequence_parallel else None
        x = ctx.saved_tensors[0].detach()
        grad = gathering.wait() if gathering else grads[0]
        grad_weight = ctx.deferred.weight_gradient(ctx.weight, lambda: _outer(grad, x))
        return grad @ ctx.weight, grad_weight, None, None


def column_parallel_linear(
    x: Tensor, weight: nn.Parameter, parallel: ParallelContext, deferred: DeferredGradients
) -> Tensor:
    """`[S, B, H]` (its part of S under sequence parallelism) times `[rows / tp, H]` gives `[S, B, rows / tp]`."""
    if parallel.tp == 1:
        return _Linear.apply(x, weight, deferred)
    return _ColumnParallel.apply(x, weight, parallel, deferred)


class ColumnParallelLinear(nn.Module):
    """A linear layer whose output features are cut over tp; takes what `RowParallelLinear` gives."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        parallel: ParallelContext,
        dtype: torch.dtype,
        deferred: DeferredGradients,
    ) -> None:
        super().__init__()
        self.parallel, self.deferred = parallel, deferred
        self.weight = empty_weight(parallel.tp_share(out_features), in_features, parallel, dtype)

    def forward(self, x: Tensor) -> Tensor:
        return column_parallel_linear(x, self.weight, self.parallel, self.deferred)


class RowParallelLinear(nn.Module):
    """A linear layer whose input features are cut over tp: the ranks' partial results are summed."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        parallel: ParallelContext,
        dtype: torch.dtype,
        deferred: DeferredGradients,
    ) -> None:
        super().__init__()
        self.parallel, self.deferred = parallel, deferred
        self.weight = empty_weight(out_features, parallel.tp_share(in_features), parallel, dtype)

    def forward(self, x: Tensor) -> Tensor:
        if self.parallel.tp == 1:
            return _Linear.apply(x, self.weight, self.deferred)
        return _RowParallel.apply(x, self.weight, self.parallel, self.deferred)


class VocabParallelEmbedding(nn.Module):
    """An embedding whose rows are cut over tp: ranks give zeros for others' ids, and their results are summed."""

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        parallel: ParallelContext,
        dtype: torch.dtype,
        embedding: Callable[[Tensor, Tensor, int | None], Tensor],
    ) -> None:
        super().__init__()
        self.parallel, self.embedding = parallel, embedding
        rows = vocabulary_rows(vocab_size, parallel.tp)
        self.vocab_start = rows * parallel.tp_rank if parallel.tp > 1 else None
        self.weight = empty_weight(rows, hidden_size, parallel, dtype)

    def forward(self, tokens: Tensor) -> Tensor:
        """Vectors `[S, B, H]` (this rank's part of S under sequence parallelism) of the ids `[S, B]`."""
        return leave_tensor_region(self.embedding(tokens, self.weight, self.vocab_start), self.parallel)
