"""A step of a pipeline on forked ranks, and what it computed and held."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from megaflow.config import ModelConfig
from megaflow.config_parallel import ParallelConfig
from megaflow.data.loader import Batch
from megaflow.kernels import linear_cross_entropy
from megaflow.kernels.dispatch import select_ops
from megaflow.model.chunks import chunks_of
from megaflow.model.init import initialise
from megaflow.model.llama import Llama
from megaflow.model.placement import placement
from megaflow.parallel import layers, runner
from megaflow.parallel.gradients import GradientBuffer
from megaflow.parallel.mesh import ParallelContext
from megaflow.parallel.parameters import FlatParameters
from megaflow.parallel.runner import Pipeline
from megaflow.parallel.schedule import make_schedule
from megaflow.parallel.simulator import simulate
from tests.tiny import make_batch, tiny_config

SEQ_LENGTH = 16


class Case(NamedTuple):
    settings: dict[str, Any]
    """Of the `parallel` section."""
    micro_batches: int = 4
    tie: bool = False

    @property
    def parallel(self) -> ParallelConfig:
        return ParallelConfig.model_validate(self.settings)

    @property
    def config(self) -> ModelConfig:
        return tiny_config(num_layers=4, tie_embeddings=self.tie)

    @property
    def matrices(self) -> int:
        """Weights of linear layers: four to a layer, and the head."""
        return 4 * self.config.num_layers + 1

    @property
    def peaks(self) -> tuple[int, ...]:
        """The simulator's peak activations of each rank."""
        parallel = self.parallel
        schedule = make_schedule(parallel.schedule, parallel.pp, self.micro_batches, parallel.chunks_per_rank)
        return simulate(schedule).peak_activations


class Outcome(NamedTuple):
    """What a rank, or one process, is left with after a step."""

    losses: dict[int, Tensor]
    gradients: dict[str, Tensor]
    """Whole tensors by canonical name, NaN where others have the parts."""
    computed: int
    """Weight gradients of linear layers, over all micro-batches."""
    peak: int
    """The most passed forwards that waited for the last of their backward at once."""
    put_off: Counter[str]
    """How many gradients came that had been put off, by parameter."""


class Rank:
    """This rank's part of a case."""

    def __init__(self, case: Case) -> None:
        self.case, parallel, config = case, case.parallel, case.config
        self.ctx = ParallelContext.create(parallel, "cpu") if dist.is_initialized() else ParallelContext.single()
        chunks = chunks_of(config, parallel, SEQ_LENGTH, self.ctx.pp_rank)
        self.model = Llama(config, self.ctx, select_ops("cpu", torch.float32), chunks=chunks)
        initialise(self.model, seed=7)
        plain = parallel.model_copy(update={"zero": False})  # so that every rank ends with whole sums
        self.gradients = GradientBuffer(FlatParameters(self.model, plain), self.ctx, plain)
        self.pipeline = Pipeline(self.model, parallel)

    def batches(self) -> list[Batch]:
        """Every second one on each of two data-parallel ranks."""
        return all_batches(self.case.micro_batches * self.ctx.dp)[self.ctx.dp_rank :: self.ctx.dp]

    def step(self) -> Outcome:
        with Watch(self.model, self.gradients) as watch:
            losses = self.pipeline.train(self.batches(), self.gradients)
        self.gradients.finish()
        gradients: dict[str, Tensor] = {}
        for name, pieces in placement(self.model.config, self.ctx, self.model.chunks).items():
            for piece in pieces:
                whole = gradients.setdefault(piece.name, torch.full(piece.global_shape, torch.nan))
                whole[piece.global_slices()] = self.gradients.sums[name][piece.local_slices()]
        losses = {index * self.ctx.dp + self.ctx.dp_rank: loss for index, loss in losses.items()}
        return Outcome(losses, gradients, watch.computed, watch.peak, watch.put_off)


class Watch:
    """Counts, while it is entered, what the runner holds and what it puts off."""

    def __init__(self, model: Llama, gradients: GradientBuffer) -> None:
        self.model, self.gradients, self.peak, self.computed = model, gradients, 0, 0
        self.put_off: Counter[str] = Counter()

    def __enter__(self) -> Watch:
        self.patch = pytest.MonkeyPatch()
        forward, add, outer = runner._Step._forward, self.gradients.add, layers._outer
        add_product = linear_cross_entropy._add_product

        def counted_forward(step: runner._Step, *args: int) -> None:
            forward(step, *args)
            self.peak = max(self.peak, len(step.passed) + len(step.jobs))

        def counted_add(parameter: nn.Parameter, grad: Tensor) -> None:
            self.put_off[self.gradients.names[parameter]] += 1
            add(parameter, grad)

        def counted_outer(grad: Tensor, x: Tensor) -> Tensor:
            self.computed += 1
            return outer(grad, x)

        def counted_product(*tensors: Tensor) -> None:
            self.computed += 1
            add_product(*tensors)

        self.patch.setattr(linear_cross_entropy, "_add_product", counted_product)
        self.patch.setattr(runner._Step, "_forward", counted_forward)
        self.patch.setattr(layers, "_outer", counted_outer)
        self.patch.setattr(self.model.deferred, "add", counted_add)
        return self

    def __exit__(self, *_: object) -> None:
        self.patch.undo()


def all_batches(count: int) -> list[Batch]:
    """Micro-batches of two sequences, each with other documents."""
    generator = torch.Generator().manual_seed(3)
    rows = [[16], [5, 11], [1, 1, 14], [8, 8]]
    return [make_batch([rows[i % 4], rows[(i + 1) % 4]], generator) for i in range(count)]


def deviation(outcomes: list[Outcome], expected: Outcome) -> float:
    """The largest relative deviation of a micro-batch's losses or a gradient; infinite where something is missing."""
    found = [0.0]
    for index, losses in expected.losses.items():
        ours = [outcome.losses[index] for outcome in outcomes if index in outcome.losses]
        found += [relative(loss, losses) for loss in ours] or [math.inf]
    for name, gradient in expected.gradients.items():
        parts = [outcome.gradients[name] for outcome in outcomes if name in outcome.gradients]
        if not parts or bool(torch.stack(parts).isnan().all(0).any()):
            return math.inf
        found += [relative(part.where(~part.isnan(), gradient), gradient) for part in parts]
    return max(found)


def relative(ours: Tensor, expected: Tensor) -> float:
    found = float((ours - expected).norm() / expected.norm())
    return found if math.isfinite(found) else math.inf
