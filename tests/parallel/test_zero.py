"""ZeRO-1: every way to share out the optimizer state gives the run of one process, and its collectives overlap."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megaflow.config import ModelConfig, OptimConfig
from megaflow.config_parallel import ParallelConfig
from megaflow.data.loader import Batch
from megaflow.model.chunks import Chunk
from megaflow.model.init import initialise
from megaflow.model.llama import Llama
from megaflow.model.placement import placement
from megaflow.optim.adamw import AdamW
from megaflow.parallel import collectives
from megaflow.parallel.gradients import CASTS_HELD, GradientBuffer
from megaflow.parallel.mesh import ParallelContext
from megaflow.parallel.parameters import FlatParameters
from megaflow.parallel.runner import Pipeline
from megaflow.train.step import train_step
from tests.distributed import run_ranks
from tests.live_bytes import LiveBytes
from tests.tiny import make_batch, tiny_config, tiny_model

STEPS, MICRO_BATCHES = 20, 4
SMALL = 12 << 10
"""Bytes of a bucket: the first ones hold one matrix, the smaller matrices share some."""
OPTIM = OptimConfig(lr=3e-3)


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
        outcome = train_step(
            self.pipeline, self.gradients, self.optimizer, batches, 1, OPTIM.lr, 0.5, self.ctx, stop=False
        )
        loss, tokens, _ = outcome.totals[0].tolist()
        return loss / tokens, float(outcome.grad_norm), float(outcome.skipped)

    def backward(self, batches: list[Batch]) -> None:
        """Gradients of the sum of the losses, reduced."""
        self.gradients.zero()
        for number, batch in enumerate(batches, 1):
            if number == len(batches):
                self.gradients.final(self.parameters.parameters)
            self.model.loss(batch).sum().backward()
        self.gradients.finish()


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


Event = tuple[str, int | str]


class Work:
    """A collective under way that does nothing but tell when it is waited for."""

    def __init__(self, done: Callable[[], None]) -> None:
        self.wait = done


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[Event]:
    """What happens in a process that believes to be one of two: collectives begun and waited for, by bucket's start."""
    log: list[Event] = []

    def collective(begun: str, done: str, whole: int) -> Callable[..., Work]:
        def begin(*tensors: Tensor, group: object, async_op: bool) -> Work:
            start = int(tensors[whole].storage_offset())
            assert (group, async_op) == ("the data group", True)
            log.append((begun, start))
            return Work(lambda: log.append((done, start)))

        return begin

    monkeypatch.setattr(collectives, "reduce_scatter", collective("reduce", "reduced", 1))
    monkeypatch.setattr(collectives, "all_gather", collective("gather", "gathered", 0))
    monkeypatch.setattr(dist, "all_reduce", collective("reduce", "reduced", 0))
    return log


def one_of_two(bucket_bytes: int | None = SMALL, **settings: Any) -> Trainer:
    groups: dict = {"data": "the data group"}
    ctx = ParallelContext(torch.device("cpu"), world_size=2, dp=2, groups=groups)
    return Trainer(tiny_model(ctx=ctx), ParallelConfig(**settings), bucket_bytes)


@pytest.mark.parametrize("zero", [True, False])
@pytest.mark.parametrize("bucket_bytes", [1, SMALL, None])
def test_buckets_are_reduced_once_each_as_soon_as_they_are_whole(
    zero: bool, bucket_bytes: int | None, events: list[Event]
) -> None:
    trainer = one_of_two(bucket_bytes, zero=zero)
    buckets = trainer.parameters.buckets
    assert len(buckets) == {1: 11, SMALL: 9, None: 2}[bucket_bytes]
    for name, parameter in trainer.parameters.parameters.items():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: events.append(("gradient", name)))
    first, last = micro_batches(0, trainer.ctx)[:2]
    trainer.model.loss(first).sum().backward()
    assert {kind for kind, _ in events} == {"gradient"}

    events.clear()
    trainer.gradients.final(trainer.parameters.parameters)
    trainer.model.loss(last).sum().backward()
    assert events[-1][0] == "gradient"
    come: set[int | str] = set()
    begun: list[int | str] = []
    for kind, what in events:
        if kind == "gradient":
            come.add(what)
            whole = {b.start for b in buckets if b.kind == "matrices" and come.issuperset(b.names)}
            assert set(begun) == whole
        else:
            assert kind == "reduce"  # nothing is waited for
            begun.append(what)
    assert begun == [bucket.start for bucket in buckets[:-1]]

    trainer.gradients.finish()
    assert [what for kind, what in events if kind == "reduce"] == [bucket.start for bucket in buckets]
    assert [what for kind, what in events if kind == "reduced"] == [bucket.start for bucket in buckets]


def test_few_casts_are_held_at_a_time(events: list[Event]) -> None:
    trainer = one_of_two(grad_reduce="bf16")
    trainer.backward(micro_batches(0, trainer.ctx)[:1])
    under_way = [0]
    for kind, _ in events:
        under_way.append(under_way[-1] + (1 if kind == "reduce" else -1))
    assert max(under_way) == CASTS_HELD
    assert under_way[-1] == 0
    assert len(events) == 2 * len(trainer.parameters.buckets)


def test_a_module_waits_for_its_own_parameters_alone(events: list[Event]) -> None:
    trainer = one_of_two()
    parameters = trainer.parameters
    trainer.optimizer.copy_master_to_params()
    assert events == [("gather", bucket.start) for bucket in reversed(parameters.buckets)]

    for name, module in trainer.model.named_modules():
        module.register_forward_pre_hook(lambda *_, name=name: events.append(("module", name)))
    trainer.model.loss(micro_batches(0, trainer.ctx)[0])
    needed: set[int] = set()
    arrived: set[int | str] = set()
    modules = 0
    for kind, what in events:
        if kind == "gathered":
            arrived.add(what)
        if kind == "module":
            modules += 1
            module = trainer.model.get_submodule(str(what))
            held = {id(parameter) for parameter in module.parameters(recurse=False)}
            needed |= {parameters.bucket_of[n].start for n, p in parameters.parameters.items() if id(p) in held}
            assert arrived == needed, what
    assert modules > 10
    assert arrived == {bucket.start for bucket in parameters.buckets}
    assert len([kind for kind, _ in events if kind == "gathered"]) == len(parameters.buckets)


def test_what_nobody_needed_is_there_before_the_next_update(events: list[Event]) -> None:
    trainer = one_of_two()
    trainer.optimizer.copy_master_to_params()
    events.clear()
    trainer.optimizer.step(1e-3, torch.ones(()), torch.zeros(()))
    starts = [bucket.start for bucket in trainer.parameters.buckets]
    assert events == [("gathered", start) for start in starts] + [("gather", start) for start in reversed(starts)]
