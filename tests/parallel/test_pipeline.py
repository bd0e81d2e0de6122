"""The runner on forked ranks: losses and gradients of one process, nothing computed twice or held too long."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import Schedule1F1B, ScheduleInterleaved1F1B

from megaflow.data.loader import Batch
from megaflow.model.llama import Llama
from megaflow.parallel import runner
from tests.distributed import run_ranks
from tests.live_bytes import LiveBytes
from tests.parallel.pipelines import SEQ_LENGTH, Case, Outcome, Rank, deviation, relative
from tests.tiny import make_batch

TOLERANCE = 1e-5


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
        put_off = case.matrices - 1 if parallel.schedule in ("zb_h1", "zb_v") else 0  # all but the head
        assert sum(len(outcome.put_off) for outcome in outcomes) == put_off * parallel.tp * dp


def run_of_changes(case: Case, counts: list[int], of_replica: list[list[list[list[int]]]]) -> tuple[list[Outcome], Any]:
    """Steps with these numbers of micro-batches, then the losses alone of the replica's own batches."""
    rank = Rank(case)
    outcomes = []
    for count in counts:
        rank.case = case._replace(micro_batches=count)
        rank.gradients.zero()
        outcomes.append(rank.step())
    return outcomes, rank.pipeline.losses(of_lengths(of_replica[rank.ctx.dp_rank]))


def of_lengths(rows: list[list[list[int]]]) -> list[Batch]:
    """Batches of documents of these lengths, always the same."""
    return [make_batch(lengths, torch.Generator().manual_seed(5)) for lengths in rows]


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved", "zb_v"])
def test_micro_batches_change_in_number_and_evaluated_ones_in_size(
    schedule: str, expected: Callable[[Case, int], Outcome]
) -> None:
    """Replicas may evaluate batches of other numbers too, or none."""
    case, counts = Case({"pp": 2, "schedule": schedule}), [4, 2, 4]
    of_replica = [[[[16], [5, 11]], [[7, 9]], [[16], [16], [8, 8]]], []]
    by_rank = run_ranks(4, run_of_changes, case, counts, of_replica)
    for number, count in enumerate(counts):
        outcomes = [steps[number] for steps, _ in by_rank]
        assert deviation(outcomes, expected(case._replace(micro_batches=count), 2)) < TOLERANCE
    model = Rank(Case({})).model
    whole = [model.loss(batch).losses for batch in of_lengths(of_replica[0])]
    found = {index: losses for _, of_rank in by_rank for index, losses in of_rank.items()}
    assert [relative(found[index], losses) < TOLERANCE for index, losses in enumerate(whole)] == [True] * 3
    assert sum(bool(of_rank) for _, of_rank in by_rank) == 1


Way = tuple[dist.ProcessGroup | None, bool, int]
"""Of a message: the group, whether this rank sends it, the other rank."""


def ways(case: Case) -> tuple[set[str], set[str]]:
    """Ways that this rank's messages take where a pipeline is made, all of a group at once, and in a step or losses."""
    connected: set[Way] = set()
    used: set[Way] = set()
    batch, send, receive = dist.batch_isend_irecv, dist.isend, dist.irecv

    def connect(messages: list[dist.P2POp]) -> list[dist.Work]:
        connected.update((message.group, message.op is send, message.group_peer) for message in messages)
        assert len({message.group for message in messages}) == 1
        return batch(messages)

    def isend(tensor: Tensor, group: dist.ProcessGroup, group_dst: int) -> dist.Work | None:
        used.add((group, True, group_dst))
        return send(tensor, group=group, group_dst=group_dst)

    def irecv(tensor: Tensor, group: dist.ProcessGroup, group_src: int) -> dist.Work | None:
        used.add((group, False, group_src))
        return receive(tensor, group=group, group_src=group_src)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "batch_isend_irecv", connect)
        rank = Rank(case)
        patch.setattr(dist, "isend", isend)
        patch.setattr(dist, "irecv", irecv)
        rank.step()
        rank.pipeline.losses(rank.batches())
    return {str(way) for way in connected}, {str(way) for way in used}


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved", "zb_v"])
def test_ranks_are_connected_before_a_receive_is_posted_early(schedule: str) -> None:
    """NCCL would wait with a first receive, and all that comes after it, until the other rank sends."""
    for connected, used in run_ranks(3, ways, Case({"pp": 3, "schedule": schedule}, micro_batches=3)):
        assert connected == used


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
    theirs.model.deferred.accumulate = None  # torch also calls for gradients that it only wants the shapes of
    batches, model, ctx = like_first(ours.batches()), theirs.model, theirs.ctx
    losses = ours.pipeline.train(batches, ours.gradients)
    stages = [
        PipelineStage(
            Stage(model, number, batches[0]),
            number,
            case.parallel.num_chunks,
            ctx.device,
            group=ctx.group("forward_up"),
        )
        for number in model.chunks
    ]

    def loss(hidden: Tensor, labels: Tensor) -> Tensor:
        return model.losses(hidden, labels).objective

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
                assert not step.layouts  # this rank's one chunk was the last to need it
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
