"""The collectives of ZeRO-1 go on under the backward pass and the next forward pass: proven by their order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megaflow.config_parallel import ParallelConfig
from megaflow.model.chunks import chunks_of
from megaflow.model.llama import Llama
from megaflow.parallel import collectives
from megaflow.parallel.gradients import CASTS_HELD
from megaflow.parallel.mesh import ParallelContext
from megaflow.parallel.parameters import Bucket
from tests.distributed import run_ranks
from tests.parallel.trainer import SMALL, Trainer, micro_batches
from tests.tiny import tiny_config, tiny_model

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
    trainer.model.loss(first).objective.backward()
    assert {kind for kind, _ in events} == {"gradient"}

    events.clear()
    trainer.gradients.final(trainer.parameters.parameters)
    trainer.model.loss(last).objective.backward()
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
    trainer.optimizer.adamw = lambda *_, **__: events.append(("update", 0))
    trainer.optimizer.copy_master_to_params()
    events.clear()
    trainer.optimizer.step(1e-3, torch.ones(()), torch.zeros(()))
    starts = [bucket.start for bucket in trainer.parameters.buckets]
    gathered, gather = ([(kind, start) for start in starts] for kind in ("gathered", "gather"))
    assert events == [*gathered, ("update", 0), ("update", 0), *reversed(gather)]


def reduced_in_a_pipeline() -> dict[str, tuple[list[str], list[str]]]:
    """By schedule: the first names of the buckets reduced before `finish`, in that order, and of all with matrices."""
    found = {}
    for schedule in ("1f1b", "interleaved", "zb_h1", "zb_v"):
        parallel = ParallelConfig(pp=2, schedule=schedule)
        ctx = ParallelContext.create(parallel, "cpu")
        config = tiny_config(num_layers=4)
        model = Llama(config, ctx, tiny_model().ops, chunks=chunks_of(config, parallel, 16, ctx.pp_rank))
        trainer = Trainer(model, parallel, SMALL)
        reduced: list[str] = []
        reduce = trainer.gradients._reduce

        def note(bucket: Bucket, log: list[str] = reduced, then: Callable[[Bucket], None] = reduce) -> None:
            log.append(bucket.names[0])
            then(bucket)

        trainer.gradients._reduce = note  # type: ignore[method-assign]
        trainer.pipeline.train(micro_batches(0, ctx), trainer.gradients)
        early = list(reduced)
        trainer.gradients.finish()
        found[schedule] = (early, [b.names[0] for b in trainer.parameters.buckets if b.kind == "matrices"])
    return found


def test_every_schedule_reduces_all_matrices_under_its_backward_passes() -> None:
    ranks = run_ranks(4, reduced_in_a_pipeline)
    for schedule, (early, matrices) in (item for rank in ranks for item in rank.items()):
        assert sorted(early) == sorted(matrices), schedule
    assert ranks[0] == ranks[1]  # the same order wherever the same weights are
    assert ranks[2] == ranks[3]
