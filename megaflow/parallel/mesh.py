"""Which rank this process is, and its groups: one immutable object, passed to whoever needs it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist

from megaflow.config_parallel import ParallelConfig
from megaflow.errors import UserError
from megaflow.parallel import symmetric

PIPELINE_CHANNELS = ("forward_up", "forward_down", "backward_up", "backward_down")
"""Groups of the pipeline ranks, one for each pass and direction, so that plain sends and receives never cross."""


@dataclass(frozen=True)
class ParallelContext:
    """A rank's place in the grid pp x dp x cp x tp; tensor-parallel neighbours are adjacent, pipeline stages far apart.

    Ranks that differ in dp hold other sequences, in cp other parts of them, in tp other parts of each layer, in pp
    other layers.
    """

    device: torch.device
    rank: int = 0
    world_size: int = 1
    pp: int = 1
    """Pipeline-parallel size: ranks that share a replica's layers."""
    pp_rank: int = 0
    dp: int = 1
    """Data-parallel size: model replicas, each with its own sequences."""
    dp_rank: int = 0
    cp: int = 1
    """Context-parallel size: ranks that share each sequence."""
    cp_rank: int = 0
    tp: int = 1
    """Tensor-parallel size: ranks that share each layer."""
    tp_rank: int = 0
    sequence_parallel: bool = False
    """Norms and residuals are cut along the sequence over the tensor-parallel ranks."""
    symmetric_memory: bool = False
    """Products and collectives of the cut layers' forward pass are fused; with sequence parallelism only."""
    groups: dict[str, dist.ProcessGroup] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def single(cls, device: torch.device | str = "cpu") -> ParallelContext:
        """The context of a process on its own."""
        return cls(torch.device(device))

    @classmethod
    def create(cls, parallel: ParallelConfig, device: torch.device | str) -> ParallelContext:
        """The context of this rank of the initialised default process group; collective.

        Raises:
            ValueError: when pp x cp x tp does not divide the number of ranks.
            UserError: parallel.symmetric_memory where there is none.
        """
        if parallel.symmetric_memory and (missing := symmetric.missing(parallel.tp)):
            raise UserError(f"parallel.symmetric_memory true: here it {missing}; leave it out")
        world, rank = dist.get_world_size(), dist.get_rank()
        if world % parallel.replica:
            raise ValueError(f"pp x cp x tp = {parallel.replica} does not divide the {world} ranks")
        sizes = {"pp": parallel.pp, "dp": world // parallel.replica, "cp": parallel.cp, "tp": parallel.tp}
        grid = torch.arange(world).view(tuple(sizes.values()))
        pipelines = grid.flatten(1).T
        rows = {
            "tp": grid.flatten(0, -2),
            "cp": grid.movedim(2, -1).flatten(0, -2),
            # not the cp group even without dp: keys and values must not wait for gradients under way
            "data": grid.permute(0, 3, 1, 2).reshape(-1, sizes["dp"] * sizes["cp"]),
            **dict.fromkeys(PIPELINE_CHANNELS, pipelines),
            "embedding": pipelines[:, [0, -1]] if parallel.pp > 1 else pipelines,
        }
        groups = _groups(rows, timedelta(seconds=parallel.timeout))
        if parallel.symmetric_memory:
            symmetric.enable(groups["tp"])
        places = {f"{name}_rank": int((grid == rank).nonzero()[0, i]) for i, name in enumerate(sizes)}
        return cls(
            device=torch.device(device),
            rank=rank,
            world_size=world,
            sequence_parallel=parallel.sequence_parallel and parallel.tp > 1,
            symmetric_memory=parallel.symmetric_memory,
            groups=groups,
            **sizes,
            **places,
        )

    @property
    def data(self) -> int:
        """Ranks that hold the same weights and see other tokens: dp x cp."""
        return self.dp * self.cp

    @property
    def data_rank(self) -> int:
        """This rank's place among those."""
        return self.dp_rank * self.cp + self.cp_rank

    @property
    def layout(self) -> dict[str, int]:
        """The sizes, for logs and checkpoints."""
        return {"world_size": self.world_size, "pp": self.pp, "dp": self.dp, "cp": self.cp, "tp": self.tp}

    @property
    def tp_group(self) -> dist.ProcessGroup:
        """The ranks that share each layer; RuntimeError when there is only this one."""
        return self.group("tp")

    def group(self, name: str) -> dist.ProcessGroup:
        """The group of that name.

        "tp", "cp": the ranks that differ in that one coordinate. "data": in dp or cp, which see other tokens and hold
        the same weights. The `PIPELINE_CHANNELS`: in pp. "embedding": the first and last pipeline rank.

        Raises:
            RuntimeError: when this rank would be alone in it.
        """
        if name not in self.groups:
            raise RuntimeError(f"there is no {name} group: its size is 1")
        return self.groups[name]

    def tp_share(self, size: int) -> int:
        """This rank's part of a dimension that is cut evenly over tp; ValueError when it is not divisible."""
        if size % self.tp:
            raise ValueError(f"{size} cannot be cut evenly over {self.tp} tensor-parallel ranks")
        return size // self.tp


def _groups(rows: dict[str, torch.Tensor], timeout: timedelta) -> dict[str, dist.ProcessGroup]:
    """Makes groups of the rows of ranks under each name, and gives those that this rank is in; none of one rank."""
    groups = {}
    for name, ranks in rows.items():
        if ranks.shape[1] == 1:
            continue
        # without a timeout of their own, groups have torch's and not that of the default group
        own, _ = dist.new_subgroups_by_enumeration(ranks.tolist(), timeout=timeout, group_desc=name)
        if isinstance(own, dist.ProcessGroup):
            groups[name] = own
    return groups


def on_main_rank(ctx: ParallelContext, action: Callable[[], None]) -> None:
    """Runs `action` on rank 0 while the others wait; a UserError it raises is raised on every rank."""
    fault: list[str | None] = [None]
    if ctx.rank == 0:
        try:
            action()
        except UserError as error:
            fault = [str(error)]
    if ctx.world_size > 1:
        dist.broadcast_object_list(fault, src=0)
    if fault[0] is not None:
        raise UserError(fault[0])
