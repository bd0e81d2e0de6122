"""Parameters and their gradient sums as two flat tensors: one optimizer kernel, one reduction each."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megaflow.parallel.mesh import ParallelContext


class FlatParameters:
    """All parameters of a model as views of one flat tensor, matrices first, then the norm weights.

    Matrices are cut over tp and take weight decay; norm weights (one dimension) are alike on every tp rank and take
    none. Parameters must have one dtype.
    """

    def __init__(self, model: nn.Module) -> None:
        named = list(model.named_parameters())
        self.parameters = dict(
            [item for item in named if item[1].ndim > 1] + [item for item in named if item[1].ndim == 1]
        )
        """Name to parameter, in the order of the flat tensor."""
        self.decay_numel = sum(p.numel() for p in self.parameters.values() if p.ndim > 1)
        """Length of the first part, the matrices."""
        self.flat = torch.cat([p.detach().flatten() for p in self.parameters.values()])
        """The storage `[N]`."""
        for parameter, view in zip(self.parameters.values(), self.views(self.flat).values(), strict=True):
            parameter.data = view

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """A flat tensor `[N]` laid out like the parameters (gradients, moments), as views by parameter name."""
        pieces = flat.split([p.numel() for p in self.parameters.values()])
        return {name: piece.view(p.shape) for (name, p), piece in zip(self.parameters.items(), pieces, strict=True)}


class GradientBuffer:
    """fp32 sums of the gradients of all micro-batches, then of all ranks, in the layout of `FlatParameters`.

    fp32 parameters accumulate into it as their `.grad`; gradients of other dtypes are added and dropped as they come.
    """

    def __init__(self, parameters: FlatParameters, ctx: ParallelContext) -> None:
        self.ctx = ctx
        self.decay_numel = parameters.decay_numel
        self.flat = torch.zeros_like(parameters.flat, dtype=torch.float32)
        """The sums `[N]`."""
        for parameter, view in zip(parameters.parameters.values(), parameters.views(self.flat).values(), strict=True):
            if parameter.dtype == torch.float32:
                parameter.grad = view
            else:
                parameter.register_post_accumulate_grad_hook(_adds_into(view))

    def zero(self) -> None:
        """Start a new optimizer step."""
        self.flat.zero_()

    def reduce(self) -> None:
        """Sum over the ranks: everything over dp and, under sequence parallelism, the norm weights over tp.

        With the sequence cut, each tp rank has seen only its part of the tokens at the norms.
        """
        if self.ctx.sequence_parallel:
            dist.all_reduce(self.flat[self.decay_numel :], group=self.ctx.tp_group)
        if self.ctx.dp > 1:
            dist.all_reduce(self.flat, group=self.ctx.group("dp"))

    def squared_norm(self) -> Tensor:
        """This rank's share of the squared norm, an fp64 scalar: summed over tp it counts every parameter once."""
        own = self.flat if self.ctx.tp_rank == 0 else self.flat[: self.decay_numel]
        return torch.linalg.vector_norm(own, dtype=torch.float64).square()


def _adds_into(main: Tensor) -> Callable[[Tensor], None]:
    def hook(parameter: Tensor) -> None:
        assert parameter.grad is not None
        main.add_(parameter.grad)
        parameter.grad = None

    return hook
