"""A rank's parameters as one flat tensor in buckets, whose optimizer state is sharded (ZeRO-1)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from megaflow.config_parallel import ParallelConfig
from megaflow.parallel import collectives
from megaflow.parallel.regions import Pending

if TYPE_CHECKING:
    from megaflow.model.llama import Llama

ALIGNMENT = 32
"""Every rank's part of a bucket is a multiple of so many elements, for kernels that read 16 bytes at a time."""


@dataclass(frozen=True, eq=False)
class Bucket:
    """Parameters that lie side by side in the flat tensors and travel together."""

    names: tuple[str, ...]
    kind: Literal["matrices", "tied", "norms"]
    """Tied: the embedding that is the output head too, alone."""
    start: int
    """Where it begins in the flat tensors."""
    numel: int
    """Its length, padded so that every data rank's part is equal and aligned."""

    def of(self, flat: Tensor) -> Tensor:
        """Its part of a flat tensor."""
        return flat[self.start : self.start + self.numel]


@dataclass(frozen=True)
class FlatRange:
    """Consecutive elements, in row-major order, of a tensor of one or two dimensions."""

    values: Tensor
    """`[n]`, a view of the storage."""
    start: int
    """The first one's place in the flattened tensor."""
    shape: tuple[int, ...]
    """Of the whole tensor."""

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    def rectangles(self) -> Iterator[tuple[tuple[int, ...], Tensor]]:
        """The offset in the tensor and a view of every rectangle: a part of a row, whole rows, a part of a row."""
        begin, end = self.start, self.start + len(self.values)
        if len(self.shape) == 1:
            yield (begin,), self.values
            return
        columns = self.shape[1]
        while begin < end:
            row, column = divmod(begin, columns)
            rows = 1 if column else max((end - begin) // columns, 1)
            stop = min(end, (row + rows) * columns)
            yield (row, column), self.values[begin - self.start : stop - self.start].view(rows, -1)
            begin = stop


class FlatParameters:
    """All parameters of a model as views of one flat tensor, cut into buckets.

    First the matrices, which take weight decay, in the order in which a backward pass comes to them; last, in one
    bucket, the norm weights (one dimension), which take none and are alike on every tp rank. With `parallel.zero` the
    rank's optimizer state is 1 / data of every bucket (Rajbhandari et al., arXiv 1910.02054): it updates that part of
    the parameters, and `gather` fetches the others. Parameters must have one dtype.

    Args:
        model: gets forward pre-hooks which wait for the parameters of the module.
        parallel: `zero` and `bucket_mib` are read.
        bucket_bytes: of fp32 gradients in a bucket, instead of `bucket_mib`; a larger parameter has one for itself.
    """

    def __init__(self, model: Llama, parallel: ParallelConfig, bucket_bytes: int | None = None) -> None:
        self.model = model
        self.ctx = model.ctx
        self.shards = self.ctx.data if parallel.zero else 1
        """Parts of a bucket's optimizer state."""
        named = dict(model.named_parameters())
        tied = model.config.tie_embeddings
        self.tied_apart = tied and self.ctx.pp > 1 and ("embed.weight" in named) != ("head.norm.weight" in named)
        """Whether another pipeline rank holds a copy of this rank's tied embedding."""
        self.tied_copy = "head.weight" if self.tied_apart and "head.weight" in named else None
        """The copy on the last pipeline rank, which is neither saved nor counted."""
        self.buckets = self._cut(named, (bucket_bytes or parallel.bucket_mib * 2**20) // 4)
        self.bucket_of = {name: bucket for bucket in self.buckets for name in bucket.names}
        self.parameters = {name: named[name] for name in self.bucket_of}
        """Name to parameter, in the order of the flat tensor."""
        numel = sum(bucket.numel for bucket in self.buckets)
        self.flat = torch.zeros(numel, dtype=model.dtype, device=self.ctx.device)
        """The storage `[N]`, padding included."""
        for name, view in self.views(self.flat).items():
            view.copy_(self.parameters[name].detach())
            self.parameters[name].data = view
        self.gathering: dict[Bucket, Pending] = {}
        for module in model.modules():
            if buckets := self._buckets_of(module):
                module.register_forward_pre_hook(self._waits_for(buckets))

    def _cut(self, named: dict[str, nn.Parameter], limit: int) -> list[Bucket]:
        """Buckets of at most `limit` elements, or one parameter."""
        buckets: list[Bucket] = []
        kinds: dict[Literal["matrices", "tied", "norms"], list[str]] = {"matrices": [], "tied": [], "norms": []}
        for name in reversed(named):
            tied = self.model.config.tie_embeddings and name in ("embed.weight", "head.weight")
            kinds["norms" if named[name].ndim == 1 else "tied" if tied else "matrices"].append(name)
        multiple, start = self.ctx.data * ALIGNMENT, 0
        for kind, names in kinds.items():
            while names:
                taken = [names.pop(0)]
                numel = named[taken[0]].numel()
                while names and (kind == "norms" or numel + named[names[0]].numel() <= limit):
                    numel += named[names[0]].numel()
                    taken.append(names.pop(0))
                padded = -(-numel // multiple) * multiple
                buckets.append(Bucket(tuple(taken), kind, start, padded))
                start += padded
        return buckets

    @property
    def numel(self) -> int:
        """Parameters of this rank, without padding."""
        return sum(parameter.numel() for parameter in self.parameters.values())

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """A flat tensor `[N]` laid out like the parameters (gradients), as views by parameter name."""
        views = {}
        for bucket in self.buckets:
            start = bucket.start
            for name in bucket.names:
                parameter = self.parameters[name]
                views[name] = flat[start : start + parameter.numel()].view(parameter.shape)
                start += parameter.numel()
        return views

    def own_of(self, values: Tensor) -> Tensor:
        """The part of a bucket's values `[numel]` whose optimizer state is this rank's."""
        return values.chunk(self.shards)[self.ctx.data_rank] if self.shards > 1 else values

    def own(self, flat: Tensor) -> list[Tensor]:
        """That part of each bucket of a flat tensor `[N]`."""
        return [self.own_of(bucket.of(flat)) for bucket in self.buckets]

    def parts(self, flat: Tensor) -> list[Tensor]:
        """Of each bucket of a flat tensor the part that is this rank's among the data ranks, sharded or not."""
        return [bucket.of(flat).chunk(self.ctx.data)[self.ctx.data_rank] for bucket in self.buckets]

    def range_of(self, name: str, own: list[Tensor]) -> FlatRange:
        """What tensors like `own` (master weights, moments) hold of a parameter; maybe nothing."""
        bucket = self.bucket_of[name]
        values = own[self.buckets.index(bucket)]
        first = len(values) * self.ctx.data_rank if self.shards > 1 else 0
        before = sum(self.parameters[other].numel() for other in bucket.names[: bucket.names.index(name)])
        parameter = self.parameters[name]
        begin = min(max(first - before, 0), parameter.numel())
        end = max(min(first + len(values) - before, parameter.numel()), begin)
        at = before + begin - first
        return FlatRange(values[at : at + end - begin], begin, tuple(parameter.shape))

    def gather(self) -> None:
        """Start fetching the parts of all parameters that other ranks have updated, in the order of a forward pass.

        A module's forward pre-hook waits for what it needs; whoever reads parameters otherwise calls `wait` first.
        """
        self.wait()
        if self.shards == 1:
            return
        for bucket in reversed(self.buckets):
            whole = bucket.of(self.flat)
            own, group = self.own_of(whole), self.ctx.group("data")
            self.gathering[bucket] = Pending(whole, collectives.all_gather(whole, own, group=group, async_op=True))

    def wait(self, buckets: Iterable[Bucket] | None = None) -> None:
        """Wait until these buckets' parameters, or all, are fetched."""
        for bucket in self.buckets if buckets is None else buckets:
            if pending := self.gathering.pop(bucket, None):
                pending.wait()

    def _buckets_of(self, module: nn.Module) -> set[Bucket]:
        own = {id(parameter) for parameter in module.parameters(recurse=False)}
        return {self.bucket_of[name] for name, parameter in self.parameters.items() if id(parameter) in own}

    def _waits_for(self, buckets: set[Bucket]) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: object) -> None:
            if self.gathering:
                self.wait(buckets)

        return hook
