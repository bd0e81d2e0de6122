"""What a rank holds of a global tensor, and the plans by which torch DCP saves and loads it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from megaflow.kernels.adamw import PIECE, join_master

if TYPE_CHECKING:
    from megaflow.model.placement import Piece
    from megaflow.parallel.parameters import FlatRange


@dataclass
class Shards:
    """A named global tensor and the rectangles of it that this rank holds.

    Each block is (offset of the rectangle in the global tensor, a view of the storage that holds it): saving reads
    the views, loading writes through them. Blocks of one rank must not overlap; ranks may hold equal blocks
    (replicas), which are saved once. Empty blocks are dropped. `joined` makes shards whose blocks are put together of
    two when they are read.
    """

    name: str
    global_shape: tuple[int, ...]
    dtype: torch.dtype
    blocks: list[tuple[tuple[int, ...], torch.Tensor]] = field(default_factory=list)
    remainders: list[torch.Tensor] = field(default_factory=list)
    """Of joined shards, what the bf16 numbers of each block lack of fp32 (int16); they can be read only."""

    def __post_init__(self) -> None:
        self.global_shape = tuple(self.global_shape)
        self.blocks = [(tuple(offset), block.detach()) for offset, block in self.blocks if block.numel()]

    @classmethod
    def whole(cls, name: str, tensor: torch.Tensor) -> Shards:
        """A tensor held whole, alike on every rank that names it."""
        return cls(name, tuple(tensor.shape), tensor.dtype, [((0,) * tensor.dim(), tensor)])

    @property
    def nbytes(self) -> int:
        """Size of the whole global tensor in bytes."""
        return prod(self.global_shape) * self.dtype.itemsize

    def block(self, index: MetadataIndex) -> torch.Tensor:
        """The block at the index's global offset: the view or, of joined shards, a copy in host memory.

        KeyError when this rank holds none there.
        """
        for number, (offset, block) in enumerate(self.blocks):
            if torch.Size(offset) == index.offset:
                return self.copy_block(number, torch.empty(block.shape, dtype=self.dtype)) if self.remainders else block
        raise KeyError(f"{self.name}: no block at {index.offset}")

    def copy_block(self, number: int, into: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        """Copies the block with this number in `blocks` into a contiguous tensor of its shape and returns that."""
        _, block = self.blocks[number]
        if not self.remainders:
            return into.copy_(block, non_blocking=non_blocking)
        high, low, whole = block.flatten(), self.remainders[number].flatten(), into.view(-1)
        for start in range(0, len(whole), PIECE):
            part = slice(start, start + PIECE)
            whole[part].copy_(join_master(high[part], low[part]), non_blocking=non_blocking)
        return into

    # The names below are the protocol torch.distributed.checkpoint looks for on values of a state dict.

    def __create_write_items__(self, fqn: str, _: Any) -> list[WriteItem]:
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=chunk,
                    properties=TensorProperties(dtype=self.dtype),
                    size=torch.Size(self.global_shape),
                ),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(torch.Size(offset), block.shape) for offset, block in self.blocks]


def shards_of(
    placement: Mapping[str, Sequence[Piece]], tensors: Mapping[str, torch.Tensor | FlatRange], group: str
) -> dict[str, Shards]:
    """Cut local tensors, or ranges of them, keyed by parameter name, into the canonical tensors a placement names.

    The tensors may be the parameters or anything of their shapes (master weights, moments); `group` says which, and
    `<group>/<canonical name>` is the key in the checkpoint.
    """
    shards: dict[str, Shards] = {}
    for parameter, tensor in tensors.items():
        for piece in placement[parameter]:
            key = f"{group}/{piece.name}"
            shard = shards.setdefault(key, Shards(key, piece.global_shape, tensor.dtype))
            held = [((0,) * tensor.ndim, tensor)] if isinstance(tensor, torch.Tensor) else list(tensor.rectangles())
            for offset, rectangle in held:
                shard.blocks += _overlap(piece, offset, rectangle.detach())
    return shards


def joined(params: Mapping[str, Shards], remainders: Mapping[str, Shards]) -> dict[str, Shards]:
    """Shards of fp32 tensors that are kept split, as `split_master` does; of both parts they are the same blocks."""
    return {
        name: Shards(
            name, held.global_shape, torch.float32, held.blocks, [block for _, block in remainders[name].blocks]
        )
        for name, held in params.items()
    }


def _overlap(
    piece: Piece, offset: tuple[int, ...], rectangle: torch.Tensor
) -> list[tuple[tuple[int, ...], torch.Tensor]]:
    """The block that a piece and a rectangle at an offset of the local parameter have in common, if any."""
    start, block = [], rectangle
    for dim, (begin, size) in enumerate(zip(piece.local_offset, piece.shape, strict=True)):
        low = max(begin, offset[dim])
        high = min(begin + size, offset[dim] + rectangle.shape[dim])
        if low >= high:
            return []
        start.append(piece.global_offset[dim] + low - begin)
        block = block.narrow(dim, low - offset[dim], high - low)
    return [(tuple(start), block)]


class ShardsSavePlanner(DefaultSavePlanner):
    """Plans a save of `Shards`: each replicated block is written by the rank that has least to write."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def set_up_planner(
        self, state_dict: dict[str, Any], storage_meta: StorageMeta | None = None, is_coordinator: bool = False
    ) -> None:
        self.state_dict = state_dict
        self.is_coordinator = is_coordinator

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        return super().create_global_plan(balance(all_plans))

    def lookup_object(self, index: MetadataIndex) -> torch.Tensor:
        return self.state_dict[index.fqn].block(index)


class ShardsLoadPlanner(DefaultLoadPlanner):
    """Plans a load into `Shards`; torch's own planner replaces values it does not know by None."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        self.state_dict = state_dict
        self.metadata = metadata
        self.is_coordinator = is_coordinator

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        return self.state_dict[index.fqn].block(index)


def block_bytes(item: WriteItem) -> int:
    """Bytes of the block a write item stands for."""
    assert item.tensor_data is not None
    return prod(item.tensor_data.chunk.sizes) * item.tensor_data.properties.dtype.itemsize


def balance(plans: list[SavePlan]) -> list[SavePlan]:
    """Give every block to one of its holders, the largest block first, each to the holder with the least so far.

    torch's own choice weighs a block by its whole tensor and takes blocks in order of appearance, which leaves the
    output head, the last and largest, to a rank that already has its share.
    """
    holders: dict[MetadataIndex, list[int]] = {}
    items: dict[MetadataIndex, WriteItem] = {}
    for rank, plan in enumerate(plans):
        for item in plan.items:
            holders.setdefault(item.index, []).append(rank)
            items[item.index] = item
    load = [0] * len(plans)
    chosen: list[list[WriteItem]] = [[] for _ in plans]
    for index, item in sorted(items.items(), key=lambda pair: -block_bytes(pair[1])):
        rank = min(holders[index], key=lambda r: load[r])
        load[rank] += block_bytes(item)
        chosen[rank].append(item)
    return [dataclasses.replace(plan, items=kept) for plan, kept in zip(plans, chosen, strict=True)]
