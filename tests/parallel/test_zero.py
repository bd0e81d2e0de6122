"""ZeRO-1: every way to share out the optimizer state gives the run of one process."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megaflow.config import ModelConfig
from megaflow.config_parallel import ParallelConfig
from megaflow.model.chunks import Chunk
from megaflow.model.init import initialise
from megaflow.model.llama import Llama
from megaflow.model.placement import placement
from megaflow.parallel.mesh import ParallelContext
from tests.distributed import run_ranks
from tests.live_bytes import LiveBytes
from tests.parallel.trainer import SMALL, Trainer, micro_batches
from tests.tiny import tiny_config, tiny_model

STEPS = 20


def local_part(whole: dict[str, Tensor], model: Llama) -> dict[str, Tensor]:
    """This rank's parameters, or anything like them, cut from whole canonical tensors."""
    parts = {}
    for name, pieces in placement(model.config, model.ctx, model.chunks).items():
        parts[name] = torch.zeros(model.get_parameter(name).shape)
        for piece in pieces:
            parts[name][piece.local_slices()] = whole[piece.name][piece.global_slices()]
    return parts


def canonical(tensors: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The canonical tensors of one process."""
    whole = {}
    for name, pieces in placement(config, ParallelContext.single()).items():
        for piece in pieces:
            whole[piece.name] = tensors[name][piece.local_slices()].detach().clone()
    return whole


@dataclass
class Reference:
    """The run of one process."""

    gradients: dict[str, Tensor]
    """Of the first step's sum of losses, by canonical name."""
    squared_norm: float
    curve: Tensor
    """`[steps, 2]`: loss and gradient norm."""
    weights: dict[str, Tensor]


@pytest.fixture(scope="module")
def expected() -> dict[bool, Reference]:
    """With untied and with tied embeddings."""
    found = {}
    for tie in (False, True):
        config = tiny_config(tie_embeddings=tie)
        trainer = Trainer(tiny_model(config))
        trainer.backward(micro_batches(0, trainer.ctx))
        gradients = canonical(trainer.parameters.views(trainer.gradients.flat), config)
        squares = sum(float(gradient.double().square().sum()) for gradient in gradients.values())
        curve = torch.tensor([trainer.step(micro_batches(step, trainer.ctx))[:2] for step in range(STEPS)])
        found[tie] = Reference(gradients, squares, curve, canonical(dict(trainer.model.named_parameters()), config))
    return found


def distance(parts: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """The largest relative deviation of any tensor."""
    return max(float((parts[name] - wanted[name]).norm() / wanted[name].norm()) for name in wanted)


def follow(parallel: ParallelConfig, bucket_bytes: int | None, steps: int, wanted: Reference, tie: bool) -> list[float]:
    """Deviations from one process: of the gradients of a step, their squared norm, the curve, the last weights."""
    ctx = ParallelContext.create(parallel, "cpu")
    trainer = Trainer(tiny_model(tiny_config(tie_embeddings=tie), ctx), parallel, bucket_bytes)
    trainer.backward(micro_batches(0, ctx))
    own = trainer.parameters.own(trainer.gradients.flat)
    deviations = []
    for name, whole in local_part(wanted.gradients, trainer.model).items():
        part = trainer.parameters.range_of(name, own)
        there = whole.flatten()[part.start : part.start + len(part.values)]
        deviations.append(float((part.values - there).norm() / whole.norm()))
    squares = trainer.gradients.squared_norm()
    dist.all_reduce(squares)
    curve = torch.tensor([trainer.step(micro_batches(step, ctx))[:2] for step in range(steps)])
    trainer.parameters.wait()
    weights = distance(dict(trainer.model.named_parameters()), local_part(wanted.weights, trainer.model))
    ahead = ((curve - wanted.curve[:steps]) / wanted.curve[:steps]).abs().max()
    return [max(deviations), abs(float(squares) / wanted.squared_norm - 1), float(ahead), weights]


LAYOUTS: dict[str, tuple[int, bool, dict[str, Any], int | None]] = {
    "dp2": (2, False, {}, SMALL),
    "dp2, a bucket for every matrix": (2, True, {}, 1),
    "dp2, not sharded": (2, True, {"zero": False}, SMALL),
    "dp4": (4, True, {}, SMALL),
    "tp2+sp x dp2": (4, False, {"tp": 2, "sequence_parallel": True}, SMALL),
    "tp2+sp x dp2, tied, not sharded": (4, True, {"tp": 2, "sequence_parallel": True, "zero": False}, SMALL),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_follows_one_process(layout: str, expected: dict[bool, Reference]) -> None:
    world, tie, settings, bucket_bytes = LAYOUTS[layout]
    parallel = ParallelConfig(**settings)
    for deviations in run_ranks(world, follow, parallel, bucket_bytes, STEPS, expected[tie], tie):
        assert max(deviations) < 1e-5, deviations


@pytest.mark.parametrize("zero", [True, False])
def test_gradients_reduced_in_bf16_follow_to_its_precision(zero: bool, expected: dict[bool, Reference]) -> None:
    parallel = ParallelConfig(grad_reduce="bf16", zero=zero)
    for deviations in run_ranks(2, follow, parallel, SMALL, 5, expected[False], False):
        gradients, squares, curve, _ = deviations
        assert 1e-4 < gradients < 2e-2
        assert max(squares, curve) < 2e-2


def skip_on_all() -> tuple[list[float], bool]:
    trainer = Trainer(tiny_model(ctx=ParallelContext.create(ParallelConfig(), "cpu")))
    batches = micro_batches(0, trainer.ctx)
    skipped = [trainer.step(batches)[2]]
    trainer.parameters.wait()
    before = trainer.parameters.flat.clone()
    hook = None
    if trainer.ctx.rank == 1:  # one element, of a matrix that lies in one rank's part
        hook = trainer.model.get_parameter("layers.0.mlp.down.weight").register_hook(
            lambda grad: grad.index_fill(0, torch.tensor([3]), torch.nan)
        )
    skipped.append(trainer.step(batches)[2])
    trainer.parameters.wait()
    same = torch.equal(trainer.parameters.flat, before)
    if hook is not None:
        hook.remove()
    skipped.append(trainer.step(batches)[2])
    return skipped, same


def test_a_gradient_that_is_not_finite_on_one_rank_skips_the_step_on_all() -> None:
    assert run_ranks(2, skip_on_all) == [([0, 1, 0], True)] * 2


def tied_apart(zero: bool) -> tuple[float, bool]:
    """Two replicas of a pipeline of two whose ends share an embedding; every element gets 1 from each rank."""
    parallel = ParallelConfig(pp=2, zero=zero)
    ctx = ParallelContext.create(parallel, "cpu")
    chunk = Chunk(True, range(1), False) if ctx.pp_rank == 0 else Chunk(False, range(1, 2), True)
    config = tiny_config(tie_embeddings=True)
    model = Llama(config, ctx, tiny_model().ops, chunks={ctx.pp_rank: chunk})
    trainer = Trainer(model, parallel, SMALL)
    for parameter in trainer.parameters.parameters.values():
        trainer.gradients.add(parameter, torch.ones(parameter.shape))
    trainer.gradients.finish()
    squares = trainer.gradients.squared_norm()
    dist.all_reduce(squares)
    own = trainer.parameters.own(trainer.gradients.flat)
    sums = {
        name: trainer.parameters.range_of(name, own).values.unique().tolist() for name in trainer.parameters.parameters
    }
    ends = {"embed.weight", "head.weight"}
    return float(squares), all(found in ([], [4.0 if name in ends else 2.0]) for name, found in sums.items())


@pytest.mark.parametrize("zero", [True, False])
def test_copies_of_a_tied_embedding_are_summed_and_counted_once(zero: bool) -> None:
    model = tiny_model(tiny_config(tie_embeddings=True))
    embedding = model.embed.weight.numel()
    rest = sum(p.numel() for p in model.parameters()) - embedding
    assert run_ranks(4, tied_apart, zero) == [(rest * 2.0**2 + embedding * 4.0**2, True)] * 4


@pytest.mark.parametrize(
    ("dtype", "zero", "held"),
    [
        (torch.float32, True, 4 + 4 + 8 / 4),
        (torch.float32, False, 4 + 4 + 8),
        (torch.bfloat16, True, 2 + 4 + 12 / 4),
        (torch.bfloat16, False, 2 + 4 + 12),
    ],
)
def test_bytes_per_parameter(dtype: torch.dtype, zero: bool, held: float) -> None:
    """What one of four data ranks holds: parameter, gradient sum, and its part of the moments and of bf16's master."""
    ctx = ParallelContext(torch.device("cpu"), world_size=4, dp=4, dp_rank=1)
    with LiveBytes() as live:
        trainer = Trainer(Llama(tiny_config(), ctx, tiny_model().ops, dtype), ParallelConfig(zero=zero), SMALL)
        gc.collect()
        assert live.now / trainer.parameters.flat.numel() == pytest.approx(held, rel=1e-3)
        assert trainer.parameters.flat.numel() == pytest.approx(trainer.parameters.numel, rel=0.01)
        live.peak = live.now
        initialise(trainer.model, 3, into=trainer.optimizer.set_master)
        drawn = 2 * 4 * trainer.model.embed.weight.numel()  # a canonical tensor, and the parameter it is part of
        assert live.peak - live.now <= 1.1 * drawn < 4 * trainer.parameters.numel  # never a whole copy


def start_in_bf16() -> bool:
    ctx = ParallelContext.create(ParallelConfig(), "cpu")
    model, alone = (
        Llama(tiny_config(), place, tiny_model().ops, torch.bfloat16) for place in (ctx, ParallelContext.single())
    )
    trainer, single = Trainer(model, bucket_bytes=SMALL), Trainer(alone)
    for one in (trainer, single):
        initialise(one.model, 3, into=one.optimizer.set_master)
        one.optimizer.copy_master_to_params()
    trainer.parameters.wait()
    for name, parameter in model.named_parameters():
        part = trainer.parameters.range_of(name, trainer.optimizer.master)
        master = single.parameters.range_of(name, single.optimizer.master).values
        assert part.dtype == torch.float32
        assert torch.equal(part.values, master[part.start : part.start + len(part.values)])
        assert torch.equal(parameter, alone.get_parameter(name))
    held = sum(master.numel() for master in trainer.optimizer.master)
    return held * 2 == trainer.parameters.flat.numel()


def test_sharded_masters_start_alike() -> None:
    assert all(run_ranks(2, start_in_bf16))
