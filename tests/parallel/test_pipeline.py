"""The runner on forked ranks: losses and gradients of one process, nothing computed twice or held too long."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import Schedule1F1B, ScheduleInterleaved1F1B

from megaflow.config import ModelConfig
from megaflow.config_parallel import ParallelConfig
from megaflow.data.loader import Batch
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
from tests.distributed import run_ranks
from tests.live_bytes import LiveBytes
from tests.tiny import make_batch, tiny_config

TOLERANCE = 1e-5
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

        def counted_forward(step: runner._Step, *args: int) -> None:
            forward(step, *args)
            self.peak = max(self.peak, len(step.passed) + len(step.jobs))

        def counted_add(parameter: nn.Parameter, grad: Tensor) -> None:
            self.put_off[self.gradients.names[parameter]] += 1
            add(parameter, grad)

        def counted_outer(grad: Tensor, x: Tensor) -> Tensor:
            self.computed += 1
            return outer(grad, x)

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


def step_on_rank(cases: list[Case]) -> list[Outcome]:
    return [Rank(case).step() for case in cases]


def schedule_cases() -> list[Case]:
    cases = []
    for name in ("gpipe", "1f1b", "interleaved", "zb_h1", "zb_v"):
        cases += [Case({"pp": 2, "schedule": name}), Case({"pp": 2, "schedule": name}, tie=True)]
        fewest = 2 if name == "interleaved" else 1  # interleaved takes multiples of pp
        cases.append(Case({"pp": 2, "schedule": name}, micro_batches=fewest))
    uneven = {"1f1b": [1, 3], "interleaved": [2, 1, 0, 1], "zb_v": [1, 0, 3, 0], "zb_h1": [4, 0]}
    return cases + [Case({"pp": 2, "schedule": name, "layers_per_chunk": cut}) for name, cut in uneven.items()]


WORLDS = {
    1: [
        Case({"schedule": name}, tie=tie) for name in ("gpipe", "interleaved", "zb_h1", "zb_v") for tie in (True, False)
    ],
    2: schedule_cases(),
    4: [
        Case({"pp": 4}, micro_batches=3),
        Case({"pp": 4, "schedule": "zb_h1"}, tie=True),
        Case({"pp": 2, "tp": 2, "schedule": "zb_v", "sequence_parallel": True}, tie=True),
        Case({"pp": 2, "tp": 2, "schedule": "interleaved"}),
        Case({"pp": 2, "schedule": "1f1b"}, micro_batches=2, tie=True),
    ],
}
"""By number of processes; dp takes what pp and tp leave."""


@pytest.fixture(scope="module")
def expected() -> Callable[[Case, int], Outcome]:
    """What one process makes of a case that dp ranks share."""
    known: dict[tuple[int, bool], Outcome] = {}

    def outcome(case: Case, dp: int) -> Outcome:
        key = case.micro_batches * dp, case.tie
        if key not in known:
            known[key] = Rank(Case({}, *key)).step()
        return known[key]

    return outcome


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


@pytest.mark.parametrize("world", WORLDS)
def test_every_schedule_follows_one_process(world: int, expected: Callable[[Case, int], Outcome]) -> None:
    by_rank = run_ranks(world, step_on_rank, WORLDS[world])
    for case, outcomes in zip(WORLDS[world], zip(*by_rank, strict=True), strict=True):
        parallel = case.parallel
        dp = world // parallel.replica
        whole = expected(case, dp)
        assert deviation(list(outcomes), whole) < TOLERANCE, case
        for rank, outcome in enumerate(outcomes):
            assert outcome.peak == case.peaks[rank // (dp * parallel.tp)], case
            assert set(outcome.put_off.values()) <= {case.micro_batches}, case
        assert sum(outcome.computed for outcome in outcomes) == case.micro_batches * case.matrices * parallel.tp * dp
        put_off = case.matrices if parallel.schedule in ("zb_h1", "zb_v") else 0
        assert sum(len(outcome.put_off) for outcome in outcomes) == put_off * parallel.tp * dp


def step_without(case: Case, what: str) -> Outcome:
    """A step whose messages of a phase do not arrive, or whose tied embeddings are not summed."""
    rank, receive = Rank(case), dist.irecv
    lost = [rank.ctx.groups[name] for name in rank.ctx.groups if name.startswith(what)]

    def into_nothing(buffer: Tensor, group: dist.ProcessGroup, group_src: int) -> dist.Work | None:
        if group not in lost:
            return receive(buffer, group=group, group_src=group_src)
        return receive(torch.empty_like(buffer.zero_()), group=group, group_src=group_src)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "irecv", into_nothing)
        if what == "embedding":
            patch.setattr(dist, "all_reduce", lambda *args, **kwargs: None)
        return rank.step()


@pytest.mark.parametrize("what", ["forward", "backward", "embedding"])
def test_nothing_between_ranks_can_be_left_out(what: str, expected: Callable[[Case, int], Outcome]) -> None:
    case = Case({"pp": 2}, tie=True)
    assert deviation(run_ranks(2, step_without, case, what), expected(case, 1)) > 100 * TOLERANCE


class Stage(nn.Module):
    """A chunk as `torch.distributed.pipelining` takes it; tokens are `[B, S]`, and every micro-batch has one layout."""

    def __init__(self, model: Llama, number: int, batch: Batch) -> None:
        super().__init__()
        self.model, self.number, self.layout = model, number, model.layout(batch)

    def forward(self, x: Tensor) -> Tensor:
        return self.model.run_chunk(self.number, x.T if self.number == 0 else x, self.layout)


def like_first(batches: list[Batch]) -> list[Batch]:
    """The batches with the documents of the first."""
    same = {name: getattr(batches[0], name) for name in ("positions", "cu_seqlens", "max_seqlen")}
    return [replace(batch, **same) for batch in batches]


def deviation_from_torch(case: Case) -> float:
    """How far our gradients and losses are from those of torch's schedule of the same name."""
    ours, theirs = Rank(case), Rank(case)
    batches, model, ctx = like_first(ours.batches()), theirs.model, theirs.ctx
    losses = ours.pipeline.train(batches, ours.gradients)
    stages = [
        PipelineStage(
            Stage(model, number, batches[0]), number, case.parallel.num_chunks, ctx.device, group=ctx.group("pp")
        )
        for number in model.chunks
    ]

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return model.losses(logits, labels).sum()

    settings: dict[str, Any] = {"n_microbatches": len(batches), "loss_fn": loss, "scale_grads": False}
    schedule = Schedule1F1B(stages[0], **settings) if len(stages) == 1 else ScheduleInterleaved1F1B(stages, **settings)
    tokens = [torch.cat([batch.tokens for batch in batches])] if 0 in model.chunks else []
    labels = torch.cat([batch.labels for batch in batches])
    found: list[Tensor] = []
    schedule.step(*tokens, **({"target": labels, "losses": found} if stages[-1].is_last else {}))
    deviations = [relative(losses[index].sum(), loss) for index, loss in enumerate(found)]
    sums = zip(ours.gradients.sums.values(), theirs.gradients.sums.values(), strict=True)
    return max(deviations + [relative(mine, other) for mine, other in sums])


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved"])
def test_torch_pipelines_agree(schedule: str) -> None:
    case = Case({"pp": 2, "schedule": schedule})
    assert max(run_ranks(2, deviation_from_torch, case)) < TOLERANCE


def kept_by_autograd(model: Llama, batch: Batch) -> int:
    """Bytes that the first chunk's forward leaves where only the output's place in the graph is held."""
    with LiveBytes() as live:
        edge = get_gradient_edge(model.run_chunk(0, batch.tokens.T, model.layout(batch)))
        kept = live.now
    del edge
    return kept


def held_bytes(case: Case) -> tuple[int, list[tuple[int, int]]]:
    """`kept_by_autograd` on the first rank; after every pass, how many wait for a backward and all bytes held."""
    rank = Rank(case)
    batches = rank.batches()
    kept = kept_by_autograd(rank.model, batches[0]) if 0 in rank.model.chunks else 0
    history: list[tuple[int, int]] = []
    with pytest.MonkeyPatch.context() as patch, LiveBytes() as live:
        for name in ("_forward", "_backward"):

            def noted(step: runner._Step, *args: Any, run: Any = getattr(runner._Step, name), **kwargs: Any) -> None:
                run(step, *args, **kwargs)
                history.append((len(step.passed), live.now))

            patch.setattr(runner._Step, name, noted)
        rank.pipeline.train(batches, rank.gradients)
    return kept, history


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_what_a_forward_leaves_is_what_autograd_keeps(schedule: str) -> None:
    """Besides that, there are few tensors of the size of a chunk's output: those under way."""
    case = Case({"pp": 2, "schedule": schedule, "layers_per_chunk": [4, 0]}, micro_batches=6)
    (kept, history), _ = run_ranks(2, held_bytes, case)
    output = 2 * SEQ_LENGTH * case.config.hidden_size * 4
    assert max(waiting for waiting, _ in history) == case.peaks[0] == (6 if schedule == "gpipe" else 2)
    for waiting, held in history:
        assert 0 <= held - waiting * kept <= 4.5 * output, (waiting, held - waiting * kept)
