"""Every layout follows the run of one process, and no collective can be taken out unnoticed."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megaflow.config import ModelConfig, OptimConfig
from megaflow.config_parallel import ParallelConfig
from megaflow.data.loader import Batch
from megaflow.model.placement import placement
from megaflow.optim.adamw import AdamW
from megaflow.parallel import collectives
from megaflow.parallel.gradients import GradientBuffer
from megaflow.parallel.mesh import ParallelContext
from megaflow.parallel.parameters import FlatParameters
from megaflow.parallel.runner import Pipeline
from megaflow.train.step import train_step
from tests.distributed import run_ranks
from tests.tiny import make_batch, tiny_config, tiny_model

TOLERANCE = 1e-5
STEPS = 20
SEQUENCES, MICRO_BATCHES = 8, 2
DOCUMENTS = [[16], [5, 11], [1, 1, 6, 8], [4, 4, 4, 4]]
LAYOUTS = {
    "tp2": (2, 2, False),
    "tp2+sp": (2, 2, True),
    "tp4": (4, 4, False),
    "tp4+sp": (4, 4, True),
    "dp2": (2, 1, False),
    "dp4": (4, 1, False),
    "dp2 x tp2": (4, 2, False),
    "dp2 x tp2+sp": (4, 2, True),
}
"""Ranks, tp, sequence parallelism."""


@dataclass
class Curve:
    """What a run leaves behind."""

    losses: Tensor
    """`[steps, sources]`, sums over the global batch."""
    grad_norms: Tensor
    """`[steps]`."""
    weights: dict[str, Tensor]
    """Whole tensors by canonical name; from one rank of several, NaN where others have the parts."""


def global_batch(step: int) -> list[Batch]:
    """Sequences of a step one by one, each with its own share of tokens without loss, some with none that count."""
    generator = torch.Generator().manual_seed(step)
    rows = []
    for i in range(SEQUENCES):
        batch = make_batch([DOCUMENTS[i % 4]], generator, masked=(0.0, 0.3, 0.9, 1.0, 0.6)[(i + step) % 5])
        rows.append(replace(batch, sources=torch.tensor([i % 3])))
    return rows


def micro_batches(rows: list[Batch], ctx: ParallelContext) -> list[Batch]:
    mine = rows[ctx.dp_rank :: ctx.dp]
    return [join(mine[i::MICRO_BATCHES]) for i in range(MICRO_BATCHES)]


def join(rows: list[Batch]) -> Batch:
    first, *others = rows
    edges = [first.cu_seqlens]
    edges += [row.cu_seqlens[1:] + 16 * i for i, row in enumerate(others, 1)]
    names = ("tokens", "labels", "positions", "sources")
    joined = {name: torch.cat([getattr(row, name) for row in rows]) for name in names}
    return replace(first, **joined, cu_seqlens=torch.cat(edges), max_seqlen=max(row.max_seqlen for row in rows))


def train(ctx: ParallelContext, config: ModelConfig, steps: int = STEPS) -> Curve:
    """A run with clipping that acts in every step."""
    model = tiny_model(config, ctx)
    parameters = FlatParameters(model, ParallelConfig())
    gradients = GradientBuffer(parameters, ctx, ParallelConfig())
    optim = OptimConfig(lr=3e-3)
    optimizer = AdamW(optim, parameters, gradients)
    pipeline = Pipeline(model, ParallelConfig())
    losses, norms = [], []
    for step in range(steps):
        batches = micro_batches(global_batch(step), ctx)
        outcome = train_step(pipeline, gradients, optimizer, batches, 3, optim.lr, 0.05, ctx, stop=False)
        losses.append(outcome.totals[:, 0].clone())
        norms.append(outcome.grad_norm.double())
    assert float(torch.stack(norms).min()) > 0.05
    parameters.wait()
    weights = {}
    for name, pieces in placement(config, ctx).items():
        for piece in pieces:
            whole = weights.setdefault(piece.name, torch.full(piece.global_shape, torch.nan))
            whole[piece.global_slices()] = parameters.parameters[name].detach()[piece.local_slices()]
    return Curve(torch.stack(losses), torch.stack(norms), weights)


def train_on_rank(tp: int, sequence_parallel: bool, config: ModelConfig, steps: int, without: str | None) -> Curve:
    ctx = ParallelContext.create(ParallelConfig(tp=tp, sequence_parallel=sequence_parallel), "cpu")
    if without is not None:
        take_out(without)
    return train(ctx, config, steps)


def deviation(curve: Curve, expected: Curve) -> float:
    """The largest relative deviation of any step's losses or gradient norm, or of any final weight tensor."""
    steps = len(curve.losses)
    deviations = [
        ((curve.losses - expected.losses[:steps]).abs() / expected.losses[:steps]).max(),
        ((curve.grad_norms - expected.grad_norms[:steps]).abs() / expected.grad_norms[:steps]).max(),
    ]
    if steps == len(expected.losses):
        for name, weight in curve.weights.items():
            here = ~weight.isnan()
            if here.any():
                want = expected.weights[name][here]
                deviations.append((weight[here] - want).norm().double() / want.norm())
    worst = torch.stack(deviations)
    return float(worst.max()) if worst.isfinite().all() else float("inf")


@pytest.fixture(scope="module")
def expected() -> dict[bool, Curve]:
    """The run of one process, with untied and with tied embeddings."""
    return {tie: train(ParallelContext.single(), tiny_config(tie_embeddings=tie)) for tie in (False, True)}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_follows_one_process(layout: str, expected: dict[bool, Curve]) -> None:
    world, tp, sequence_parallel = LAYOUTS[layout]
    curves = run_ranks(world, train_on_rank, tp, sequence_parallel, tiny_config(), STEPS, None)
    assert max(deviation(curve, expected[False]) for curve in curves) < TOLERANCE
    for name in expected[False].weights:
        assert not torch.stack([curve.weights[name] for curve in curves]).isnan().all(0).any(), name


def test_tied_embeddings_follow_one_process(expected: dict[bool, Curve]) -> None:
    curves = run_ranks(4, train_on_rank, 2, True, tiny_config(tie_embeddings=True), STEPS, None)
    assert max(deviation(curve, expected[True]) for curve in curves) < TOLERANCE


TAKEN_OUT = [
    ("tp2", "_ReduceFromTensorRegion.forward"),
    ("tp2", "VocabParallelEmbedding.forward"),
    ("tp2", "RowParallelLinear.forward"),
    ("tp2", "_ColumnParallel.backward"),
    ("tp2", "_CrossEntropy.forward"),
    ("tp2", "train_step"),
    ("tp2+sp", "_ReduceScatterToSequenceRegion.forward"),
    ("tp2+sp", "_ReduceScatterToSequenceRegion.backward"),
    ("tp2+sp", "VocabParallelEmbedding.forward"),
    ("tp2+sp", "RowParallelLinear.forward"),
    ("tp2+sp", "_ColumnParallel.forward"),
    ("tp2+sp", "_ColumnParallel.backward/all_gather_single"),
    ("tp2+sp", "_ColumnParallel.backward/reduce_scatter_single"),
    ("tp2+sp", "_CrossEntropy.forward"),
    ("tp2+sp", "GradientBuffer.finish"),
    ("tp2+sp", "train_step"),
    ("dp2", "GradientBuffer._reduce"),
    ("dp2", "FlatParameters.gather"),
    ("dp2", "train_step"),
]
"""Layout and the function whose collectives (or the one collective) each rank then skips."""


@pytest.mark.parametrize(("layout", "without"), TAKEN_OUT)
def test_no_collective_can_be_taken_out(layout: str, without: str, expected: dict[bool, Curve]) -> None:
    world, tp, sequence_parallel = LAYOUTS[layout]
    curves = run_ranks(world, train_on_rank, tp, sequence_parallel, tiny_config(), 2, without)
    assert max(deviation(curve, expected[False]) for curve in curves) > 10 * TOLERANCE


def take_out(target: str) -> None:
    """Make collectives called (at any depth) by the function `target` keep this rank's own values, in this process."""
    caller, _, collective = target.partition("/")

    def only_local(name: str, original: Callable[..., Any], local: Callable[..., None]) -> Callable[..., Any]:
        def patched(*args: Any, **kwargs: Any) -> Any:
            frame = inspect.currentframe()
            while frame is not None and frame.f_code.co_qualname != caller:
                frame = frame.f_back
            if frame is None or collective not in ("", name):
                return original(*args, **kwargs)
            return local(*args)

        return patched

    def gather(out: Tensor, x: Tensor) -> None:
        out.view(-1, *x.shape).copy_(x.expand(out.shape[0] // x.shape[0], *x.shape))

    def scatter(out: Tensor, x: Tensor) -> None:
        out.copy_(x.view(-1, *out.shape)[dist.get_rank()])

    def gather_list(outs: list[Tensor], x: Tensor) -> None:
        for rank, out in enumerate(outs):
            out.copy_(x) if rank == dist.get_rank() else out.copy_(torch.tensor([-torch.inf, 0.0, 0.0])[:, None])

    dist.all_reduce = only_local("all_reduce", dist.all_reduce, lambda x: None)
    dist.all_gather = only_local("all_gather", dist.all_gather, gather_list)
    collectives.all_gather = only_local("all_gather_single", collectives.all_gather, gather)
    collectives.reduce_scatter = only_local("reduce_scatter_single", collectives.reduce_scatter, scatter)
