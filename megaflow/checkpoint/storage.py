"""Tensors on disk: one safetensors file a rank, described by a JSON manifest; no pickle is written or read.

A block of a global tensor is stored under `<tensor name>@<offset,...>`, so each file is a plain safetensors file that
any tool can open. Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterable
from math import prod
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import safe_open
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from megaflow.checkpoint.shards import block_bytes

MANIFEST = "manifest.json"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FileRecord(Record):
    """One file: its size in bytes and the SHA-256 of its content."""

    bytes: int
    sha256: str


class Block(Record):
    """A rectangle of a tensor: global offset, shape, and the file that holds it."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]
    file: str


class TensorRecord(Record):
    """A global tensor and the rectangles it is stored in."""

    dtype: Literal["F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL"]
    shape: tuple[int, ...]
    blocks: list[Block]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * DTYPES[self.dtype].itemsize


class Manifest(Record):
    """What a checkpoint holds: the step, the layout that wrote it, scalars, and every tensor and file."""

    format: Literal[1] = 1
    step: int
    layout: dict[str, int]
    scalars: dict[str, Any]
    files: dict[str, FileRecord]
    tensors: dict[str, TensorRecord]

    def encode(self) -> bytes:
        """One line of JSON, whose last key is the SHA-256 of the line without it.

        Not indented: Python writes that twenty times as slowly, and there may be millions of blocks.
        """
        body = json.dumps(self.model_dump()).encode()
        return body[:-1] + _seal(body)

    @classmethod
    def decode(cls, data: bytes) -> Manifest:
        """Read what `encode` wrote; ValueError for anything that differs from it by as much as a byte."""
        body = data[: -len(_seal(b""))] + b"}"
        if data != body[:-1] + _seal(body):
            raise ValueError("not a manifest of this program, or the content does not match its SHA-256")
        try:
            tree = json.loads(body)
            return cls.model_validate(tree)
        except (ValueError, ValidationError) as error:
            raise ValueError("not a manifest of this program") from error


def _seal(body: bytes) -> bytes:
    """What ends a manifest of that body in place of its last brace."""
    return b', "sha256": "' + hashlib.sha256(body).hexdigest().encode() + b'"}\n'


def block_key(name: str, offset: Iterable[int]) -> str:
    """Name of a block inside its safetensors file."""
    return f"{name}@{','.join(map(str, offset))}"


def write_safetensors(
    path: Path,
    entries: list[tuple[str, torch.dtype, tuple[int, ...]]],
    tensor: Callable[[str], torch.Tensor],
    metadata: dict[str, str] | None = None,
) -> FileRecord:
    """Write a safetensors file with at most one tensor's copy in memory, hashing on the way, and fsync it.

    Args:
        entries: (key, dtype, shape) of each tensor; wide dtypes should come first, to stay aligned.
        tensor: called once for each key, in the order of entries.

    Raises:
        OSError: naming the path.
    """
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for key, dtype, shape in entries:
        start, end = end, end + prod(shape) * dtype.itemsize
        header[key] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    try:
        with open(path, "wb") as file:
            for part in (len(text).to_bytes(8, "little"), text):
                file.write(part)
                digest.update(part)
            for key, dtype, shape in entries:
                value = tensor(key).detach()
                assert (value.dtype, tuple(value.shape)) == (dtype, tuple(shape)), key
                data = value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
                file.write(data)
                digest.update(data)
            file.flush()
            os.fsync(file.fileno())
            return FileRecord(bytes=file.tell(), sha256=digest.hexdigest())
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def check_file(path: Path, record: FileRecord) -> str | None:
    """Why the file is not the one that was written, or None when it is."""
    try:
        size = path.stat().st_size
        if size != record.bytes:
            return f"{path}: {size} bytes instead of {record.bytes}"
        with open(path, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != record.sha256:
                return f"{path}: the content does not match its SHA-256"
    except OSError as error:
        return f"{path}: {error.strerror or error}"
    return None


def fsync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class SafetensorsWriter(StorageWriter):
    """Writes a rank's blocks to `rank-XXXXX.safetensors`; the coordinator ends by handing the manifest to `commit`.

    `prepare(bytes)` and `commit(files, tensors)` run on the coordinator alone, before the first and after the last
    byte; DCP makes an exception in either, or on any rank in between, everyone's.
    """

    def __init__(
        self,
        folder: Path,
        rank: int,
        prepare: Callable[[int], None],
        commit: Callable[[dict[str, FileRecord], dict[str, TensorRecord]], None],
    ) -> None:
        self.folder, self.rank, self.prepare, self.commit = folder, rank, prepare, commit

    def reset(self, checkpoint_id: str | os.PathLike | None = None) -> None:
        pass

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        self.prepare(sum(block_bytes(item) for plan in plans for item in plan.items))
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        name = f"rank-{self.rank:05d}.safetensors"
        items = {block_key(item.index.fqn, item.index.offset or ()): item for item in plan.items}
        entries = []
        for key, item in items.items():
            assert item.tensor_data is not None
            entries.append((key, item.tensor_data.properties.dtype, tuple(item.tensor_data.chunk.sizes)))
        entries.sort(key=lambda entry: (-entry[1].itemsize, entry[0]))
        results = []

        def tensor(key: str) -> torch.Tensor:
            value = planner.resolve_data(items[key])
            assert isinstance(value, torch.Tensor), key
            return value

        if entries:
            record = write_safetensors(self.folder / name, entries, tensor)
            results = [WriteResult(item.index, block_bytes(item), (name, record)) for item in items.values()]
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        written = {result.index: result.storage_data for rank in results for result in rank}
        tensors = {}
        for name, tensor in metadata.state_dict_metadata.items():
            assert isinstance(tensor, TensorStorageMetadata)
            blocks = [
                Block(
                    offset=tuple(chunk.offsets),
                    shape=tuple(chunk.sizes),
                    file=written[MetadataIndex(name, chunk.offsets)][0],
                )
                for chunk in tensor.chunks
            ]
            tensors[name] = TensorRecord.model_validate(
                {"dtype": DTYPE_NAMES[tensor.properties.dtype], "shape": tuple(tensor.size), "blocks": blocks}
            )
        self.commit(dict(written.values()), tensors)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        return False


class SafetensorsReader(StorageReader):
    """Reads only the slices a plan asks for, through memory maps, from files already verified."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest

    def reset(self, checkpoint_id: str | os.PathLike | None = None) -> None:
        pass

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return Metadata(
            {
                name: TensorStorageMetadata(
                    TensorProperties(dtype=DTYPES[tensor.dtype]),
                    torch.Size(tensor.shape),
                    [ChunkStorageMetadata(torch.Size(b.offset), torch.Size(b.shape)) for b in tensor.blocks],
                )
                for name, tensor in self.manifest.tensors.items()
            }
        )

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        by_file: dict[str, list[ReadItem]] = defaultdict(list)
        files = {
            MetadataIndex(name, block.offset): block.file
            for name, tensor in self.manifest.tensors.items()
            for block in tensor.blocks
        }
        for item in plan.items:
            by_file[files[item.storage_index]].append(item)
        for name, items in by_file.items():
            with safe_open(self.folder / name, framework="pt") as file:
                for item in items:
                    key = block_key(item.storage_index.fqn, item.storage_index.offset or ())
                    cut = tuple(slice(o, o + n) for o, n in zip(item.storage_offsets, item.lengths, strict=True))
                    target = planner.resolve_tensor(item)
                    target.copy_(file.get_slice(key)[cut])
                    planner.commit_tensor(item, target)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        return False
