"""Gradient sums of a rank and their reduction, bucket by bucket under the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megaflow.config_parallel import ParallelConfig
from megaflow.parallel import collectives
from megaflow.parallel.mesh import ParallelContext
from megaflow.parallel.parameters import Bucket, FlatParameters
from megaflow.parallel.regions import Pending

CASTS_HELD = 2
"""Copies of buckets, in another dtype than that of the sums, that may be under way at a time: each takes memory."""


class _Reduction(NamedTuple):
    pending: Pending
    target: Tensor
    """Where in the sums the result belongs."""

    def complete(self) -> None:
        result = self.pending.wait()
        if result is not self.target:
            self.target.copy_(result)


class GradientBuffer:
    """Sums of the gradients of all micro-batches, then of all ranks, in the layout of `FlatParameters`.

    Parameters of the sums' dtype accumulate into it as their `.grad`; gradients of others are added and dropped as
    they come, and so are those that the model's linear layers have put off. A bucket whose parameters have all had
    their last gradient of the step (`final`) is reduced over the ranks that see other tokens while the backward pass
    goes on: reduce-scattered where the optimizer state is sharded (Rajbhandari et al., arXiv 1910.02054), all-reduced
    where it is not. Ranks that hold the same weights run the same passes, so they start these collectives in the same
    order.
    """

    def __init__(
        self,
        parameters: FlatParameters,
        ctx: ParallelContext,
        parallel: ParallelConfig,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.parameters = parameters
        self.ctx = ctx
        self.cast = torch.bfloat16 if parallel.grad_reduce == "bf16" else torch.float32
        self.flat = torch.zeros_like(parameters.flat, dtype=dtype)
        """The sums `[N]`; after `finish` only `parameters.own(flat)` is whole."""
        self.sums = parameters.views(self.flat)
        self.names = {parameter: name for name, parameter in parameters.parameters.items()}
        self.reductions: list[_Reduction] = []
        self.awaited: dict[Bucket, set[str]] = {}
        """Buckets not reduced yet, with the parameters whose last gradient has not come."""
        self.closing: set[str] = set()
        """Parameters whose next gradient is the last of the step."""
        for name, parameter in parameters.parameters.items():
            if parameter.dtype == dtype:
                parameter.grad = self.sums[name]
            parameter.register_post_accumulate_grad_hook(self._hook(name))
        parameters.model.deferred.add = self.add
        parameters.model.deferred.accumulate = self.accumulate
        self.zero()

    def zero(self) -> None:
        """Start a new optimizer step."""
        self.flat.zero_()
        self.closing.clear()
        self.awaited = {bucket: set(bucket.names) for bucket in self.parameters.buckets}

    def final(self, names: Iterable[str]) -> None:
        """Announce that the next gradient of these parameters is the last of this step.

        Gradients that are put off must be announced after their backward pass, which autograd takes for a gradient
        too. Norms, a tied embedding and what was never announced are reduced in `finish`.
        """
        self.closing.update(names)

    def add(self, parameter: nn.Parameter, grad: Tensor) -> None:
        """Add a gradient that did not come through autograd."""
        name = self.names[parameter]
        self.sums[name].add_(grad)
        self._accumulated(name)

    def accumulate(self, parameter: nn.Parameter, grad: Tensor) -> None:
        """Add a gradient inside a backward pass that has none for autograd, which counts it all the same."""
        self.sums[self.names[parameter]].add_(grad)

    def finish(self) -> None:
        """End the step: reduce what is left and wait for all of it.

        Under sequence parallelism each tp rank has seen only its part of the tokens at the norms: their sums are added
        over tp. Copies of tied embeddings on two pipeline ranks are added too. Both come after the reduction over the
        data, so that with sharding they carry 1 / data of it.
        """
        for bucket in list(self.awaited):
            self._reduce(bucket)
        while self.reductions:
            self.reductions.pop(0).complete()
        for bucket, own in zip(self.parameters.buckets, self.parameters.own(self.flat), strict=True):
            if bucket.kind == "norms" and self.ctx.sequence_parallel:
                dist.all_reduce(own, group=self.ctx.tp_group)
            if bucket.kind == "tied" and self.parameters.tied_apart:
                dist.all_reduce(own, group=self.ctx.group("embedding"))

    def squared_norm(self) -> Tensor:
        """This rank's share of the squared norm, an fp64 scalar: the sum over all ranks counts every parameter once.

        Every data rank takes its part of a bucket, whether it holds all of it or not; tp rank 0 takes the norms, and
        the first pipeline rank the tied embedding.
        """
        counted = []
        for bucket, part in zip(self.parameters.buckets, self.parameters.parts(self.flat), strict=True):
            again = bucket.kind == "norms" and self.ctx.tp_rank > 0
            if not again and self.parameters.tied_copy not in bucket.names:
                counted.append(part)
        if not counted:
            return torch.zeros((), dtype=torch.float64, device=self.flat.device)
        total: Tensor = self.parameters.model.ops.squared_norm(counted)
        return total

    def _hook(self, name: str) -> Callable[[Tensor], None]:
        main = self.sums[name]

        def accumulated(parameter: Tensor) -> None:
            if parameter.dtype != main.dtype and parameter.grad is not None:
                main.add_(parameter.grad)
                parameter.grad = None
            self._accumulated(name)

        return accumulated

    def _accumulated(self, name: str) -> None:
        """Takes note of a gradient; reduces the bucket when it was the last of the last parameter."""
        bucket = self.parameters.bucket_of[name]
        if bucket not in self.awaited:
            raise RuntimeError(f"{name}: a gradient came after the one that was announced as the last of the step")
        if name in self.closing:
            self.closing.remove(name)
            self.awaited[bucket].remove(name)
            if bucket.kind == "matrices" and not self.awaited[bucket]:
                self._reduce(bucket)

    def _reduce(self, bucket: Bucket) -> None:
        del self.awaited[bucket]
        if self.ctx.data == 1:
            return
        if self.cast != self.flat.dtype and len(self.reductions) == CASTS_HELD:
            self.reductions.pop(0).complete()
        whole = bucket.of(self.flat)
        sent, group = whole.to(self.cast), self.ctx.group("data")
        if self.parameters.shards > 1:
            result = self.parameters.own_of(sent)
            work = collectives.reduce_scatter(result, sent, group=group, async_op=True)
        else:
            result, work = sent, dist.all_reduce(sent, group=group, async_op=True)
        target = result if sent is whole else self.parameters.own_of(whole)
        self.reductions.append(_Reduction(Pending(result, work), target))
