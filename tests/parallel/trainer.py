"""A small model in its buffers, with its optimizer, for tests of both."""

from __future__ import annotations

import torch

from megaflow.config import OptimConfig
from megaflow.config_parallel import ParallelConfig
from megaflow.data.loader import Batch
from megaflow.model.llama import Llama
from megaflow.optim.adamw import AdamW
from megaflow.parallel.gradients import GradientBuffer
from megaflow.parallel.mesh import ParallelContext
from megaflow.parallel.parameters import FlatParameters
from megaflow.parallel.runner import Pipeline
from megaflow.train.step import train_step
from tests.tiny import make_batch

MICRO_BATCHES = 4
SMALL = 12 << 10
"""Bytes of a bucket: the first ones hold one matrix, the smaller matrices share some."""
OPTIM = OptimConfig(lr=3e-3, clip=0.5)


def micro_batches(step: int, ctx: ParallelContext) -> list[Batch]:
    """This rank's of a step: four in one process, two of two ranks, one of four."""
    generator = torch.Generator().manual_seed(step)
    batches = [make_batch([[5, 11], [16]], generator, masked=0.2 * i) for i in range(MICRO_BATCHES)]
    return batches[ctx.dp_rank :: ctx.dp]


class Trainer:
    """A model in its buffers with its optimizer."""

    def __init__(self, model: Llama, parallel: ParallelConfig | None = None, bucket_bytes: int | None = None) -> None:
        parallel = parallel or ParallelConfig()
        self.model, self.ctx = model, model.ctx
        self.pipeline = Pipeline(model, parallel)
        self.parameters = FlatParameters(model, parallel, bucket_bytes)
        self.gradients = GradientBuffer(self.parameters, model.ctx, parallel)
        self.optimizer = AdamW(OPTIM, self.parameters, self.gradients)

    def step(self, batches: list[Batch]) -> tuple[float, float, float]:
        """Loss per token, gradient norm, and whether the step was skipped."""
        outcome = train_step(self.pipeline, self.gradients, self.optimizer, batches, 1, OPTIM.lr, stop=False)
        loss, tokens, _ = outcome.totals[0].tolist()
        return loss / tokens, float(outcome.grad_norm), float(outcome.skipped)

    def backward(self, batches: list[Batch]) -> None:
        """Gradients of the sum of the losses, reduced."""
        self.gradients.zero()
        for number, batch in enumerate(batches, 1):
            if number == len(batches):
                self.gradients.final(self.parameters.parameters)
            self.model.loss(batch).objective.backward()
        self.gradients.finish()
