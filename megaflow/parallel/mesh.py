"""Which rank this process is, and its groups: one immutable object, passed to whoever needs it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from megaflow.errors import UserError


@dataclass(frozen=True)
class ParallelContext:
    """A rank's place in the grid of data-parallel x tensor-parallel ranks; tensor-parallel neighbours are adjacent."""

    device: torch.device
    rank: int = 0
    world_size: int = 1
    dp: int = 1
    """Data-parallel size: model replicas, each with its own sequences."""
    dp_rank: int = 0
    tp: int = 1
    """Tensor-parallel size: ranks that share one replica."""
    tp_rank: int = 0
    sequence_parallel: bool = False
    """Norms and residuals are cut along the sequence over the tensor-parallel ranks."""
    groups: dict[str, dist.ProcessGroup] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def single(cls, device: torch.device | str = "cpu") -> ParallelContext:
        """The context of a process on its own."""
        return cls(torch.device(device))

    @classmethod
    def create(cls, tp: int, sequence_parallel: bool, device: torch.device | str) -> ParallelContext:
        """The context of this rank of the initialised default process group; collective.

        Raises:
            ValueError: when tp does not divide the number of ranks.
        """
        world = dist.get_world_size()
        if world % tp:
            raise ValueError(f"tp {tp} does not divide the {world} ranks")
        sizes = {"dp": world // tp, "tp": tp}
        mesh = init_device_mesh(torch.device(device).type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))
        dp_rank, tp_rank = divmod(dist.get_rank(), tp)
        return cls(
            device=torch.device(device),
            rank=dist.get_rank(),
            world_size=world,
            dp=sizes["dp"],
            dp_rank=dp_rank,
            tp=tp,
            tp_rank=tp_rank,
            sequence_parallel=sequence_parallel and tp > 1,
            groups={name: mesh.get_group(name) for name, size in sizes.items() if size > 1},
        )

    @property
    def tp_group(self) -> dist.ProcessGroup:
        """The ranks that share this replica; RuntimeError when there is only this one."""
        return self._group("tp")

    @property
    def dp_group(self) -> dist.ProcessGroup:
        """The ranks that hold the same cut of the other replicas; RuntimeError when there is only this one."""
        return self._group("dp")

    def _group(self, name: str) -> dist.ProcessGroup:
        if name not in self.groups:
            raise RuntimeError(f"there is no {name} group: its size is 1")
        return self.groups[name]

    def tp_share(self, size: int) -> int:
        """This rank's part of a dimension that is cut evenly over tp; ValueError when it is not divisible."""
        if size % self.tp:
            raise ValueError(f"{size} cannot be cut evenly over {self.tp} tensor-parallel ranks")
        return size // self.tp


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
