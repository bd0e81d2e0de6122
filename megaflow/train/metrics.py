"""Per-source sums of a step, their one reduction, and where they are written."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megaflow.data.loader import Batch
from megaflow.errors import UserError
from megaflow.parallel.mesh import ParallelContext

LOSS, LOSS_TOKENS, SEQUENCES = range(3)


class SourceTotals:
    """Sums per source over micro-batches: loss (nats), tokens with loss, sequences.

    Their sum over all ranks is that of the global batch: losses that tensor-parallel ranks all have are counted by the
    first of them, and so is a sequence of which context-parallel ranks have a part each. `values` is `[sources, 3]`
    fp64 on the training device, so adding never waits for the host.
    """

    def __init__(self, num_sources: int, ctx: ParallelContext) -> None:
        self.values = torch.zeros(num_sources, 3, dtype=torch.float64, device=ctx.device)
        self.ctx = ctx

    def add(self, losses: Tensor, batch: Batch) -> None:
        """Adds one micro-batch; `losses` are per token `[B, S]`, 0 where there is no loss."""
        if self.ctx.tp_rank > 0:
            return
        rows = torch.stack(
            [
                losses.sum(dim=1, dtype=torch.float64),
                (batch.labels >= 0).sum(dim=1).double(),
                torch.full_like(losses[:, 0], float(self.ctx.cp_rank == 0), dtype=torch.float64),
            ],
            dim=1,
        )
        self.values.index_add_(0, batch.sources, rows)

    def reduce(self) -> None:
        """Sums over all ranks: one all-reduce for every source's loss and counts."""
        if self.ctx.world_size > 1:
            dist.all_reduce(self.values)


def mean_loss(row: list[float]) -> float | None:
    """Nats per token with loss of one row of SourceTotals; None when there is no such token."""
    return row[LOSS] / row[LOSS_TOKENS] if row[LOSS_TOKENS] else None


class MetricsLog:
    """Appends records to `<run>/metrics.jsonl` and TensorBoard; made on the main rank only.

    Records after `resumed_step`, written by a launch that was killed later than its last checkpoint, are dropped.
    """

    def __init__(self, run_dir: Path, resumed_step: int, tensorboard: bool) -> None:
        self.path = run_dir / "metrics.jsonl"
        try:
            if self.path.exists():
                kept = [
                    line
                    for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines()
                    if _step_of(line) <= resumed_step
                ]
                beside = self.path.with_name(".tmp-metrics.jsonl")
                beside.write_text("".join(line + "\n" for line in kept))
                beside.replace(self.path)
            self.file = self.path.open("a", encoding="utf-8")
        except OSError as error:
            raise UserError(
                f"{self.path}: cannot be written ({error.strerror}); mend it or give another run_dir"
            ) from None
        self.writer = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=resumed_step + 1)

    def write(self, record: dict[str, Any]) -> None:
        """Writes one record; nested numbers become TensorBoard scalars `kind/path/to/number`."""
        try:
            self.file.write(json.dumps(_finite(record), ensure_ascii=False, allow_nan=False) + "\n")
            self.file.flush()
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error.strerror}); mend it and resume the run") from None
        if self.writer is not None:
            for tag, value in _scalars(record, record["kind"]):
                self.writer.add_scalar(tag, value, record["step"])

    def close(self) -> None:
        self.file.close()
        if self.writer is not None:
            self.writer.close()


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf  # a line torn by a kill goes too


def _finite(tree: Any) -> Any:
    """The record with null for numbers that JSON cannot hold."""
    if isinstance(tree, dict):
        return {key: _finite(value) for key, value in tree.items()}
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree


def _scalars(tree: dict[str, Any], prefix: str) -> list[tuple[str, float]]:
    found: list[tuple[str, float]] = []
    for key, value in tree.items():
        if isinstance(value, dict):
            found += _scalars(value, f"{prefix}/{key}")
        elif isinstance(value, int | float) and key not in ("step", "time"):
            found.append((f"{prefix}/{key}", value))
    return found
