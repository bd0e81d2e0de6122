"""Checkpoints of a run: written beside and committed by a rename, verified before they are believed.

    <directory>/step-00000100/manifest.json              step, layout, scalars, sizes and SHA-256 of everything
                              rank-00000.safetensors     the blocks this rank wrote
    <directory>/.tmp-*                                   unfinished work, removed at the next start
    <directory>/refused-step-00000200                    failed its checks when a run resumed from an older one

Tensor names are `<group>/<name>`, such as `model/model.embed_tokens.weight` or `exp_avg/lm_head.weight`. There is no
`latest` file: the newest directory that passes its checks is the latest. All ranks must see the same directory.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from torch.distributed.checkpoint.api import CheckpointException

from megaflow.checkpoint.shards import Shards, ShardsLoadPlanner, ShardsSavePlanner
from megaflow.checkpoint.shared import check_shared
from megaflow.checkpoint.storage import (
    DTYPE_NAMES,
    DTYPES,
    MANIFEST,
    FileRecord,
    Manifest,
    SafetensorsReader,
    SafetensorsWriter,
    TensorRecord,
    block_key,
    check_file,
    fsync_directory,
)
from megaflow.errors import UserError

if TYPE_CHECKING:
    from megaflow.parallel.mesh import ParallelContext

logger = logging.getLogger(__name__)
T = TypeVar("T")
STEP_NAME = re.compile(r"step-\d{8,}")


def step_name(step: int) -> str:
    """Name of a step's directory."""
    return f"step-{step:08d}"


def step_directories(directory: Path) -> list[Path]:
    """Committed checkpoints, oldest first."""
    found = [p for p in directory.glob("step-*") if STEP_NAME.fullmatch(p.name)]
    return sorted(found, key=lambda p: int(p.name[5:]))


def read_manifest(path: Path) -> Manifest:
    """Read and check a checkpoint's manifest; ValueError with a line that names the file."""
    file = path / MANIFEST
    try:
        return Manifest.decode(file.read_bytes())
    except OSError as error:
        raise ValueError(f"{file}: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def check_checkpoint(path: Path, rank: int = 0, world_size: int = 1) -> tuple[Manifest | None, str | None]:
    """The manifest and the first fault found in this rank's share of the files, if any."""
    try:
        manifest = read_manifest(path)
    except ValueError as error:
        return None, str(error)
    share = sorted(manifest.files.items())[rank::world_size]
    faults = (check_file(path / name, record) for name, record in share)
    return manifest, next((fault for fault in faults if fault), None)


class Checkpoint:
    """A verified checkpoint, read without a process group; see `open_checkpoint`."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path, self.manifest = path, manifest

    def names(self) -> list[str]:
        """Names of all tensors, `<group>/<name>`."""
        return sorted(self.manifest.tensors)

    def read(self, name: str) -> torch.Tensor:
        """The whole tensor, assembled from its blocks. Raises UserError where a run that goes on has removed it."""
        record = self.manifest.tensors[name]
        tensor = torch.empty(record.shape, dtype=DTYPES[record.dtype])
        for block in record.blocks:
            cut = tuple(slice(o, o + n) for o, n in zip(block.offset, block.shape, strict=True))
            try:
                with safe_open(self.path / block.file, framework="pt") as file:
                    tensor[cut].copy_(file.get_tensor(block_key(name, block.offset)))
            except OSError:
                raise UserError(
                    f"{self.path}: was removed while it was read: its run keeps checkpoint.keep checkpoints; read again"
                ) from None
        return tensor


def open_checkpoint(directory: str | Path) -> Checkpoint:
    """Open a checkpoint (`.../step-00000100`), or the newest sound one of a directory of checkpoints.

    Raises:
        UserError: when there is none, or all are damaged, naming the damaged files.
    """
    directory = Path(directory)
    paths = [directory] if STEP_NAME.fullmatch(directory.name) else step_directories(directory)
    faults = []
    for path in reversed(paths):
        manifest, fault = check_checkpoint(path)
        if manifest and not fault:
            return Checkpoint(path, manifest)
        logger.warning("checkpoint refused: %s", fault)
        faults.append(str(fault))
    raise UserError(no_checkpoint(directory, faults))


def no_checkpoint(directory: Path, faults: list[str]) -> str:
    """The message for a directory without a sound checkpoint."""
    if faults:
        return f"{directory}: no checkpoint passes its checks: {'; '.join(faults)}"
    return f"{directory}: no checkpoint here (folders step-<number>)"


def as_shards(tensors: Mapping[str, Shards | torch.Tensor]) -> dict[str, Shards]:
    """Plain tensors wrapped as `Shards` held whole; tensors without elements have nothing to save and are left out."""
    shards = {name: t if isinstance(t, Shards) else Shards.whole(name, t) for name, t in tensors.items()}
    return {name: s for name, s in shards.items() if s.nbytes}


def as_user_error(what: str, failure: CheckpointException) -> UserError:
    """One line for what storage refused on the first rank that failed; anything else is a defect and stays as it is."""
    rank, (error, _) = min(failure.failures.items(), key=lambda pair: pair[0])
    if isinstance(error, OSError | SafetensorError):
        return UserError(f"{what}: rank {rank}: {error}")
    raise failure


class CheckpointStore:
    """Saves and loads the checkpoints of a run; every method is called by all ranks together, also from a thread.

    Args:
        directory: where checkpoints live; made when missing. Unfinished work of an earlier process is removed.
        ctx: this rank's place; None for one process. Messages go over a gloo group of the store's own, so that they
            never cross those of training.
        keep: newest checkpoints kept, at least 2: one that goes bad must leave another.
    """

    def __init__(self, directory: str | Path, ctx: ParallelContext | None = None, keep: int = 2) -> None:
        if keep < 2:
            raise ValueError(f"keep={keep}: at least 2 checkpoints are kept")
        self.directory = Path(directory)
        self.rank, self.world_size = (ctx.rank, ctx.world_size) if ctx else (0, 1)
        self.layout = ctx.layout if ctx else {"world_size": 1}
        self.keep = keep
        self.group = dist.new_group(backend="gloo") if self.world_size > 1 else None
        # for good: what `warnings` restores after a block belongs to all threads of the process
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        if fault := self._everyones(self._make_folder() if self.rank == 0 else None)[0]:
            raise UserError(f"{self.directory}: cannot make the checkpoint folder: {fault}")
        if self.world_size > 1:
            check_shared(self.directory, self.rank, self._everyones)

    def save(self, step: int, tensors: Mapping[str, Shards | torch.Tensor], scalars: Mapping[str, Any]) -> Path:
        """Write a checkpoint, whole or not at all; nothing to do when this step is committed already.

        Args:
            tensors: by name; plain tensors must be alike on all ranks that name them.
            scalars: anything JSON holds; rank 0's are stored.

        Raises:
            UserError: the same on every rank, when any of them cannot write.
        """
        final = self.directory / step_name(step)
        if self._everyones(os.path.exists(final))[0]:  # Path.exists may raise, on one rank only
            return final
        folder = self.directory / f".tmp-{final.name}"

        def prepare(needed: int) -> None:
            free = shutil.disk_usage(self.directory).free
            if needed > free:
                raise OSError(f"{self.directory}: the checkpoint needs {needed} bytes, {free} are free")
            folder.mkdir()

        def commit(files: dict[str, FileRecord], records: dict[str, TensorRecord]) -> None:
            manifest = Manifest(
                step=step, layout=self.layout, scalars=json.loads(json.dumps(scalars)), files=files, tensors=records
            )
            with open(folder / MANIFEST, "wb") as file:
                file.write(manifest.encode())
                file.flush()
                os.fsync(file.fileno())
            fsync_directory(folder)
            folder.rename(final)
            fsync_directory(self.directory)

        writer = SafetensorsWriter(folder, self.rank, prepare, commit)
        try:
            dcp.save(
                as_shards(tensors),
                storage_writer=writer,
                planner=ShardsSavePlanner(),
                process_group=self.group,
                no_dist=self.group is None,
            )
        except CheckpointException as failure:
            if self.rank == 0:
                shutil.rmtree(folder, ignore_errors=True)
            raise as_user_error(f"cannot save {final}", failure) from failure
        if self.rank == 0:
            self._prune()
        return final

    def load(self, tensors: Mapping[str, Shards | torch.Tensor]) -> Manifest | None:
        """Fill the tensors from the newest checkpoint that passes its checks, whatever layout wrote it.

        A damaged checkpoint is named in a warning and the one before it is tried; once an older one is loaded, the
        damaged ones are renamed to `refused-*`. Returns None when there is no checkpoint at all.

        Raises:
            UserError: the same on every rank, when none passes its checks (the tensors may hold anything then), or
                when a sound one does not hold the tensors asked for, each with its shape and dtype, and no others.
        """
        shards = as_shards(tensors)
        paths = self._everyones(step_directories(self.directory))[0]
        faults: list[str] = []
        for path in reversed(paths):
            manifest, fault = check_checkpoint(path, self.rank, self.world_size)
            fault = next((f for f in self._everyones(fault) if f), None)
            if manifest and not fault:
                self._check_names(path, manifest, shards)
                fault = self._read(path, manifest, shards)
                if not fault:
                    self._set_aside(paths[paths.index(path) + 1 :])
                    return manifest
            if self.rank == 0:
                logger.warning("checkpoint refused: %s", fault)
            faults.append(str(fault))
        if faults:
            raise UserError(no_checkpoint(self.directory, faults))
        return None

    def _read(self, path: Path, manifest: Manifest, shards: dict[str, Shards]) -> str | None:
        """Load verified files; the fault, alike on all ranks, when the disk fails after all."""
        try:
            dcp.load(
                dict(shards),
                storage_reader=SafetensorsReader(path, manifest),
                planner=ShardsLoadPlanner(),
                process_group=self.group,
                no_dist=self.group is None,
            )
        except CheckpointException as failure:
            return str(as_user_error(f"cannot read {path}", failure))
        return None

    def _check_names(self, path: Path, manifest: Manifest, shards: dict[str, Shards]) -> None:
        """Refuse a sound checkpoint of another model, alike on every rank."""
        mine = {name: (DTYPE_NAMES[s.dtype], s.global_shape) for name, s in shards.items()}
        asked = {name: kind for one in self._everyones(mine) for name, kind in one.items()}
        held = {name: (t.dtype, t.shape) for name, t in manifest.tensors.items()}
        for name in sorted(asked.keys() | held.keys()):
            if asked.get(name) != held.get(name):
                ours, theirs = (f"{d[name][0]} {list(d[name][1])}" if name in d else "none" for d in (asked, held))
                raise UserError(f"{path}: tensor {name} is {theirs} there and {ours} in this run: another model's?")

    def _make_folder(self) -> str | None:
        """Make the folder and clear it of unfinished work; what went wrong, if anything."""
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            return error.strerror
        for stale in self.directory.glob(".tmp-*"):
            shutil.rmtree(stale, ignore_errors=True)
        return None

    def _set_aside(self, refused: list[Path]) -> None:
        """Rename damaged checkpoints, so that they neither count as kept nor stand in a new one's way."""
        for path in refused if self.rank == 0 else []:
            path.rename(path.with_name(f"refused-{path.name}-{os.urandom(2).hex()}"))

    def _prune(self) -> None:
        """Delete all but the newest; renamed first, so that a half deleted one is never taken for whole."""
        try:
            for path in step_directories(self.directory)[: -self.keep]:
                shutil.rmtree(path.rename(path.with_name(f".tmp-pruned-{path.name}")))
        except OSError as error:
            logger.warning("%s: cannot remove an old checkpoint: %s", self.directory, error)

    def _everyones(self, value: T) -> list[T]:
        """The values of all ranks, by rank."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.group)
        return values
