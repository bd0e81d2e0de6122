"""Linear and embedding layers cut over the tensor-parallel ranks (Shoeybi et al., 2019).

Weights are local and plain; `megaflow.model.placement` says which part of which global tensor each one is.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megaflow.parallel.mesh import ParallelContext
from megaflow.parallel.regions import (
    all_gather_sequence,
    all_reduce,
    leave_tensor_region,
    reduce_scatter_sequence,
)

VOCAB_MULTIPLE = 64
"""Each rank's vocabulary rows are padded to a multiple of this, for the matrix units."""


def vocabulary_rows(vocab_size: int, tp: int) -> int:
    """Rows of the vocabulary that each of `tp` ranks holds, padding included."""
    return -(-vocab_size // (VOCAB_MULTIPLE * tp)) * VOCAB_MULTIPLE


def empty_weight(rows: int, columns: int, parallel: ParallelContext, dtype: torch.dtype) -> nn.Parameter:
    """A weight on the rank's device: zeros, because padding rows of a vocabulary are never filled."""
    return nn.Parameter(torch.zeros(rows, columns, dtype=dtype, device=parallel.device))


class _ColumnParallel(torch.autograd.Function):
    """`x @ weight.T` with the collective of each direction under a matrix product of the backward pass.

    Under sequence parallelism only this rank's part of x is kept, and gathered again for the weight gradient.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, parallel: ParallelContext) -> Tensor:
        ctx.parallel = parallel
        ctx.save_for_backward(x, weight)
        whole = all_gather_sequence(x, parallel).wait() if parallel.sequence_parallel else x
        return whole @ weight.T

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, weight = ctx.saved_tensors
        grad, parallel = grads[0], ctx.parallel
        gathering = all_gather_sequence(x, parallel) if parallel.sequence_parallel else None
        grad_x = grad @ weight
        reducing = (reduce_scatter_sequence if parallel.sequence_parallel else all_reduce)(grad_x, parallel)
        whole = gathering.wait() if gathering else x
        grad_weight = grad.flatten(0, -2).T @ whole.flatten(0, -2)
        return reducing.wait(), grad_weight, None


def column_parallel_linear(x: Tensor, weight: Tensor, parallel: ParallelContext) -> Tensor:
    """`[S, B, H]` (its part of S under sequence parallelism) times `[rows / tp, H]` gives `[S, B, rows / tp]`."""
    if parallel.tp == 1:
        return F.linear(x, weight)
    return _ColumnParallel.apply(x, weight, parallel)


class ColumnParallelLinear(nn.Module):
    """A linear layer whose output features are cut over tp; takes what `RowParallelLinear` gives."""

    def __init__(self, in_features: int, out_features: int, parallel: ParallelContext, dtype: torch.dtype) -> None:
        super().__init__()
        self.parallel = parallel
        self.weight = empty_weight(parallel.tp_share(out_features), in_features, parallel, dtype)

    def forward(self, x: Tensor) -> Tensor:
        return column_parallel_linear(x, self.weight, self.parallel)


class RowParallelLinear(nn.Module):
    """A linear layer whose input features are cut over tp: the ranks' partial results are summed."""

    def __init__(self, in_features: int, out_features: int, parallel: ParallelContext, dtype: torch.dtype) -> None:
        super().__init__()
        self.parallel = parallel
        self.weight = empty_weight(out_features, parallel.tp_share(in_features), parallel, dtype)

    def forward(self, x: Tensor) -> Tensor:
        return leave_tensor_region(F.linear(x, self.weight), self.parallel)


class VocabParallelEmbedding(nn.Module):
    """An embedding whose rows are cut over tp: ranks give zeros for others' ids, and their results are summed."""

    def __init__(self, vocab_size: int, hidden_size: int, parallel: ParallelContext, dtype: torch.dtype) -> None:
        super().__init__()
        self.parallel = parallel
        rows = vocabulary_rows(vocab_size, parallel.tp)
        self.vocab_start = rows * parallel.tp_rank
        self.weight = empty_weight(rows, hidden_size, parallel, dtype)

    def forward(self, tokens: Tensor) -> Tensor:
        """Vectors `[S, B, H]` (this rank's part of S under sequence parallelism) of the ids `[S, B]`."""
        if self.parallel.tp == 1:
            return F.embedding(tokens, self.weight)
        row = tokens - self.vocab_start
        here = (row >= 0) & (row < self.weight.shape[0])
        vectors = F.embedding(torch.where(here, row, 0), self.weight) * here[..., None]
        return leave_tensor_region(vectors, self.parallel)
