"""Tiny runs of any layout, and how far they are from the run of one process."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from megaflow.checkpoint.shards import Shards, shards_of
from megaflow.config import OptimConfig
from megaflow.data.loader import Batch, cut_batch
from megaflow.kernels.dispatch import select_ops
from megaflow.model.chunks import chunks_of
from megaflow.model.init import initialise
from megaflow.model.llama import Llama
from megaflow.model.placement import placement
from megaflow.model.recompute import recompute_layers
from megaflow.optim.adamw import AdamW
from megaflow.parallel.gradients import GradientBuffer
from megaflow.parallel.mesh import ParallelContext
from megaflow.parallel.parameters import FlatParameters
from megaflow.parallel.runner import Pipeline
from megaflow.train.step import StepOutcome, train_step
from tests.parallel.layouts import SEQ_LENGTH, Case, Task
from tests.tiny import make_batch

TOLERANCE = 1e-5
ROUNDED = 2e-2
"""Where something is summed or computed in bf16."""
STEPS = 2
SOURCES = 3
OPTIM = OptimConfig(lr=3e-3, eps=1e-6, clip=0.05)
"""With an eps that keeps small the steps of elements whose gradient is rounding alone; clips in every step."""
BUCKET_BYTES = 32 * 2**10
"""So that a model has several buckets."""
DOCUMENTS = {"packed": [[24], [5, 19], [1, 1, 9, 13], [4, 4, 4, 4, 8]], "whole": [[24]]}


@dataclass
class Curve:
    """What a run of one process leaves behind."""

    losses: Tensor
    """`[steps, sources]`, sums over the global batch."""
    grad_norms: Tensor
    """`[steps]`."""
    gradients: dict[str, Tensor]
    """Sums of the first step over all tokens, by canonical name."""
    weights: dict[str, Tensor]
    """After the last step."""


class Trainer:
    """This rank's part of a run, as `train/loop.py` puts it together."""

    def __init__(
        self, case: Case, ctx: ParallelContext, task: Task | None = None, dtype: torch.dtype = torch.float32
    ) -> None:
        self.case, self.task = case, task or case.task
        self.ctx = replace(ctx, sequence_parallel=case.sequence_parallel)
        config, parallel = self.task.config, case.parallel
        chunks = chunks_of(config, parallel, SEQ_LENGTH, ctx.pp_rank)
        self.model = Llama(config, self.ctx, select_ops("cpu", dtype), dtype, chunks)
        kind, _, every = case.recompute.partition(", every ")
        recompute_layers(self.model.layers, kind, int(every[:1] or 1))  # type: ignore[arg-type]
        initialise(self.model, seed=7)
        self.placement = placement(config, self.ctx, chunks)
        self.parameters = FlatParameters(self.model, parallel, BUCKET_BYTES)
        self.gradients = GradientBuffer(self.parameters, self.ctx, parallel)
        self.optimizer = AdamW(OPTIM, self.parameters, self.gradients)
        self.pipeline = Pipeline(self.model, parallel)

    def step(self, number: int) -> StepOutcome:
        batches = self.batches(number)
        return train_step(self.pipeline, self.gradients, self.optimizer, batches, SOURCES, OPTIM.lr, stop=False)

    def batches(self, step: int) -> list[Batch]:
        """This rank's micro-batches."""
        ctx, count = self.ctx, self.case.micro_batches
        mine = global_batch(self.task, step)[ctx.dp_rank :: ctx.dp]
        return [cut_batch(join(mine[i::count]), ctx.cp, ctx.cp_rank) for i in range(count)]

    def whole_weights(self) -> dict[str, Shards]:
        """All of this rank's parameters."""
        self.parameters.wait()
        return shards_of(self.placement, self.parameters.parameters, "weight")

    def own(self, tensors: list[Tensor], group: str) -> dict[str, Shards]:
        """What this rank holds of tensors like the optimizer's."""
        parts = {name: self.parameters.range_of(name, tensors) for name in self.parameters.parameters}
        return shards_of(self.placement, parts, group)


def global_batch(task: Task, step: int) -> list[Batch]:
    """Sequences of a step one by one, each with its own share of tokens without loss, some with none that count."""
    generator = torch.Generator().manual_seed(step)
    documents = itertools.cycle(DOCUMENTS[task.documents])
    rows = []
    for i in range(task.sequences):
        masked = (0.0, 0.3, 0.9, 1.0, 0.6)[(i + step) % 5]
        batch = make_batch([next(documents)], generator, task.config.vocab_size, masked)
        rows.append(replace(batch, sources=torch.tensor([i % SOURCES])))
    return rows


def join(rows: list[Batch]) -> Batch:
    """Sequences as one micro-batch."""
    first, *others = rows
    edges = [first.cu_seqlens]
    edges += [row.cu_seqlens[1:] + SEQ_LENGTH * i for i, row in enumerate(others, 1)]
    names = ("tokens", "labels", "positions", "sources")
    joined = {name: torch.cat([getattr(row, name) for row in rows]) for name in names}
    return replace(first, **joined, cu_seqlens=torch.cat(edges), max_seqlen=max(row.max_seqlen for row in rows))


def one_process(task: Task, steps: int = STEPS) -> Curve:
    """The run that all layouts follow: fp32, one micro-batch."""
    trainer = Trainer(Case(micro_batches=1), ParallelContext.single(), task)
    losses, norms, gradients = run(trainer, steps)
    assert float(norms.min()) > OPTIM.clip
    return Curve(losses, norms, whole(gradients), whole(trainer.whole_weights()))


def run(trainer: Trainer, steps: int) -> tuple[Tensor, Tensor, dict[str, Shards]]:
    """Losses and gradient norms of the steps, and this rank's gradients of the first one, before they are scaled."""
    taken: list[list[Tensor]] = []
    finish = trainer.gradients.finish

    def finish_and_take() -> None:
        finish()
        if not taken:
            taken.append([part.clone() for part in trainer.parameters.own(trainer.gradients.flat)])

    trainer.gradients.finish = finish_and_take  # type: ignore[method-assign]
    outcomes = [trainer.step(step) for step in range(steps)]
    norms = torch.stack([outcome.grad_norm.double() for outcome in outcomes])
    losses = torch.stack([outcome.totals[:, 0].clone() for outcome in outcomes])
    return losses, norms, trainer.own(taken[0], "gradient")


def whole(shards: dict[str, Shards]) -> dict[str, Tensor]:
    """Tensors that one rank has all of, by canonical name."""
    tensors = {}
    for key, shard in shards.items():
        tensor = tensors[key.partition("/")[2]] = torch.full(shard.global_shape, torch.nan)
        for offset, block in shard.blocks:
            tensor[region(offset, block)] = block
    return tensors


def region(offset: tuple[int, ...], block: Tensor) -> tuple[slice, ...]:
    return tuple(slice(start, start + size) for start, size in zip(offset, block.shape, strict=True))


def deviations(trainer: Trainer, expected: Curve, steps: int = STEPS) -> dict[str, float]:
    """The largest relative deviations of this rank's figures and tensors from the run of one process.

    Weights only after as many steps as that has.
    """
    losses, norms, gradients = run(trainer, steps)
    found = {
        "losses": float(((losses - expected.losses[:steps]) / expected.losses[:steps]).abs().max()),
        "gradient norm": float((norms / expected.grad_norms[:steps] - 1).abs().max()),
    }
    compared = [(gradients, expected.gradients)]
    if steps == len(expected.losses):
        compared.append((trainer.whole_weights(), expected.weights))
    for shards, tensors in compared:
        for key, shard in shards.items():
            found[key] = relative(shard, tensors[key.partition("/")[2]])
    return {key: value if value == value else float("inf") for key, value in found.items()}


def relative(shard: Shards, tensor: Tensor) -> float:
    """Deviation of what a rank holds of a tensor, relative to all of it."""
    squares = [(block - tensor[region(offset, block)]).double().square().sum() for offset, block in shard.blocks]
    return float(sum(squares, torch.zeros(())).sqrt() / tensor.double().norm())


def missing(trainer: Trainer) -> list[str]:
    """Tensors of the model whose gradients the ranks together have not got everywhere; collective."""
    alone = replace(trainer.ctx, tp=1, tp_rank=0)
    table = placement(trainer.task.config, alone)
    shapes = {piece.name: piece.global_shape for pieces in table.values() for piece in pieces}
    flat = torch.zeros(sum(math.prod(shape) for shape in shapes.values()), dtype=torch.uint8)
    masks = dict(zip(shapes, flat.split([math.prod(shape) for shape in shapes.values()]), strict=True))
    for shard in trainer.own(trainer.optimizer.grads, "held").values():
        name = shard.name.removeprefix("held/")
        for offset, block in shard.blocks:
            masks[name].view(shapes[name])[region(offset, block)] = 1
    if trainer.ctx.world_size > 1:
        dist.all_reduce(flat, op=dist.ReduceOp.MAX)
    return [name for name, mask in masks.items() if not mask.all()]
