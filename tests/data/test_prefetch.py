"""Steps prepared ahead are the steps that a sampler and its sources give without, whatever threads prepare them."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megaflow.data.corpus.blocks import Verify
from megaflow.data.loader import Batch, Loader, make_batch
from megaflow.data.prefetch import Prefetcher
from megaflow.data.sampler.mix import GroupSpec, Sampler, SourceSpec
from megaflow.data.sampler.plan import StepPlan, count_micro_batches
from megaflow.data.sampler.schedule import ONE, CompiledSchedule, Knot, compile_knots
from megaflow.data.sources import Source, open_sources
from megaflow.errors import UserError
from tests.data.corpora import write_corpus
from tests.distributed import run_ranks

THREADED = [(2, 1), (2, 3), (5, 1), (5, 3)]
STEPS = 12


@pytest.fixture(autouse=True)
def no_thread_stays() -> Iterator[None]:
    before = threading.active_count()
    yield
    assert threading.active_count() == before


@pytest.fixture
def sources(tmp_path: Path) -> list[Source]:
    """Running text, packed examples, masked text in two shards, and masked packs that a run takes up later.

    An epoch of each lasts a few steps only.
    """
    write_corpus(tmp_path / "text", [7, 5, 12, 8] * 6)
    write_corpus(tmp_path / "packed", [3, 4, 5, 6] * 5, seq_length=10)
    for shard in (0, 1):
        write_corpus(tmp_path / f"masked-{shard}", [9, 14, 3 + shard] * 3, masked=True)
    write_corpus(tmp_path / "more", [2, 7, 4] * 4, seq_length=10, masked=True)
    return open_all(tmp_path)


def open_all(folder: Path, verify: Verify = "lazy") -> list[Source]:
    paths = {name: str(folder / name) for name in ("text", "packed", "masked-*", "more")}
    return open_sources(paths, 10, 5, verify)


def mix(sources: Sequence[Source], weights: list[str]) -> tuple[list[GroupSpec], CompiledSchedule]:
    """The first source, the second, and the others as groups of their own or, from the third on, of one."""
    specs = [SourceSpec(source.name, source.num_windows, source.documents) for source in sources]
    members = [(specs[0],), (specs[1],), tuple(specs[2:])]
    shares = [(ONE // len(group),) * len(group) for group in members]
    groups = [GroupSpec(f"g{i}", group, share) for i, (group, share) in enumerate(zip(members, shares, strict=True))]
    knots = [Knot(0, weights), Knot(20, weights[::-1])]
    return groups, compile_knots("steps", knots)


class Mixed(Sampler):
    """A sampler of the first three sources, whose weights are shares of sequences or of tokens with loss."""

    def __init__(self, sources: Sequence[Source], of_tokens: bool = False) -> None:
        groups, schedule = mix(sources[:3], ["0.5", "0.3", "0.2"])
        count = (lambda k, epoch, index: sources[k].loss_tokens(epoch, index)) if of_tokens else None
        super().__init__(3, 8, 10, groups, schedule, loss_tokens=count)
        self.all = sources

    def change_after(self, step: int) -> None:
        """What the run is changed to once `step` is taken, from a step on that is long prepared, or the next one."""
        if step == 3:
            self.change(5, 16, *mix(self.all[:3], ["0.2", "0.7", "0.1"]))
        elif step == 6:
            self.change(7, 4, *mix(self.all, ["0.1", "0.2", "0.7"]))
        elif step == 7:
            self.change(10, 12, *mix(self.all, ["0.4", "0.4", "0.2"]))


Taken = tuple[StepPlan, list[Batch], dict[str, Any], list[int], int]


def expected(sampler: Mixed, dp: int, dp_rank: int) -> list[Taken]:
    """Every step by the sampler alone, and its windows read one batch at a time."""
    taken: list[Taken] = []
    while sampler.step < STEPS:
        plan = sampler.plan()
        state = sampler.state_dict(), sampler.consumed
        sampler.change_after(plan.step)
        micro_batches = count_micro_batches(len(plan.deck.window), dp, 2)
        batches = []
        for hand in plan.hand(dp, micro_batches, dp_rank):
            flat = plan.deck.source[hand].tolist()
            columns = (hand, plan.deck.epoch[hand], plan.deck.window[hand])
            cards = list(zip(*(column.tolist() for column in columns), strict=True))
            batches.append(make_batch(sampler.all, flat, cards, document_boundaries=True))
        taken.append((plan, batches, *state, sampler.batch_size))
    return taken


def loaded(loader: Loader, sampler: Mixed) -> list[Taken]:
    taken: list[Taken] = []
    while sampler.step < STEPS:
        plan, batches = loader.next_step()
        state = sampler.state_dict(), sampler.consumed
        sampler.change_after(plan.step)
        taken.append((plan, batches, *state, sampler.batch_size))
    return taken


def same(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return bool(np.array_equal(a, b))
    if type(a) is type(b) and hasattr(a, "__dataclass_fields__"):
        names = [f.name for f in fields(a) if f.name != "worst"]  # type: ignore[arg-type]  # not part of the state
        return all(same(getattr(a, name), getattr(b, name)) for name in names)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.mark.parametrize("of_tokens", [False, True])
@pytest.mark.parametrize(("workers", "prefetch"), [(0, 2), *THREADED])
def test_prepared_steps_are_the_sampler_s_own(
    sources: list[Source], workers: int, prefetch: int, of_tokens: bool
) -> None:
    """Batches, plans, digests and states after each step, over changes of mix and batch size and an appended source."""
    alone = Mixed(sources, of_tokens)
    whole = expected(alone, dp=2, dp_rank=1)
    assert {int(s) for _, batches, *_ in whole for batch in batches for s in batch.sources} == {0, 1, 2, 3}
    assert [len(plan.deck.window) for plan, *_ in whole] == [8] * 4 + [16] * 2 + [4] * 3 + [12] * 3
    sampler = Mixed(sources, of_tokens)
    with Loader(sampler, sources, 2, 1, 2, workers=workers, prefetch=prefetch, last_step=STEPS) as loader:
        taken = loaded(loader, sampler)
    assert [step for step, pair in enumerate(zip(taken, whole, strict=True), start=1) if not same(*pair)] == []
    assert sampler.deviations == alone.deviations


@pytest.mark.parametrize("step", [2, 6, 8])
def test_a_resumed_loader_goes_on_where_the_sampler_stands(sources: list[Source], step: int) -> None:
    """Another process's sampler, loaded with the state saved while later steps were prepared already."""
    whole = expected(Mixed(sources), dp=1, dp_rank=0)
    first, second = Mixed(sources), Mixed(sources)
    with Loader(first, sources, 1, 0, 2, workers=2, prefetch=3) as loader:
        while first.step < step:
            loader.next_step()
            first.change_after(first.step)
        saved = first.state_dict()
    for past in range(1, step + 1):
        second.change_after(past)
    second.load_state_dict(saved)
    with Loader(second, sources, 1, 0, 2, workers=5, prefetch=1) as loader:
        taken = loaded(loader, second)
    assert same(taken, whole[step:])


def test_a_sampler_moved_by_another_hand_is_followed(sources: list[Source]) -> None:
    sampler, other = Mixed(sources), Mixed(sources)
    with Loader(sampler, sources, 1, 0, 2, workers=2) as loader:
        loader.next_step()
        state = sampler.state_dict()
        loader.next_step()
        sampler.load_state_dict(state)
        other.plan()
        assert same(loader.next_step()[0], other.plan())


def test_a_fork_plans_the_sampler_s_steps_and_leaves_it(sources: list[Source]) -> None:
    sampler, other = Mixed(sources), Mixed(sources)
    sampler.change_after(3)
    other.change_after(3)
    before, fork = sampler.state_dict(), sampler.fork()
    sampler.change(6, 12, *mix(sources[:3], ["0.4", "0.4", "0.2"]))
    plans = [fork.plan() for _ in range(7)]
    assert sampler.state_dict() == before
    assert same(plans, [other.plan() for _ in range(7)])  # the fork knows nothing of the later change
    for plan in plans[:5]:
        sampler.follow(plan)
    after = sampler.state_dict()
    sampler.plan()
    fork = other.fork()
    fork.load_state_dict(before)
    for plan in plans[:5]:
        fork.follow(plan)  # a plan does not move with the sampler that followed it
    assert fork.state_dict() == after
    with pytest.raises(ValueError, match="step 6 does not follow step 6"):
        sampler.follow(plans[5])


@pytest.mark.parametrize(("workers", "prefetch"), [(0, 2), *THREADED])
def test_damaged_data_stop_the_step_they_belong_to(
    sources: list[Source], tmp_path: Path, workers: int, prefetch: int
) -> None:
    """Steps before it are given out, the sampler stays where they end, no thread is left."""
    path = tmp_path / "packed.bin"
    ids = np.fromfile(path, "<u2")
    ids[-1] = 5000
    ids.tofile(path)
    damaged = open_all(tmp_path, "off")
    alone, bad = Mixed(sources), sources[1].num_windows - 1
    while True:
        plan = alone.plan()
        alone.change_after(plan.step)
        if any((plan.deck.source == 1) & (plan.deck.window == bad)):
            break
    assert plan.step > 3
    sampler, taken = Mixed(damaged), []
    loader = Loader(sampler, damaged, 1, 0, 2, workers=workers, prefetch=prefetch)
    with pytest.raises(UserError, match="id 5000, outside the vocabulary"):  # noqa: PT012
        while True:
            taken.append(loader.next_step())
            sampler.change_after(taken[-1][0].step)
    assert [plan.step for plan, _ in taken] == list(range(1, plan.step))
    assert sampler.step == plan.step - 1
    assert threading.active_count() == 1
    with pytest.raises(UserError, match="id 5000"):
        loader.next_step()


def test_a_batch_that_does_not_fit_stops_the_step_it_belongs_to(sources: list[Source]) -> None:
    sampler = Mixed(sources)
    sampler.change(3, 6, *mix(sources[:3], ["0.5", "0.3", "0.2"]))
    with Loader(sampler, sources, 4, 0, 2, workers=2, prefetch=3) as loader:
        assert [loader.next_step()[0].step for _ in range(2)] == [1, 2]
        with pytest.raises(UserError, match="batch size 6 is not a multiple of 8"):
            loader.next_step()
    assert sampler.step == 2


def test_what_a_later_step_would_have_raised_is_dropped_with_it(sources: list[Source]) -> None:
    sampler = Mixed(sources)
    sampler.change(3, 6, *mix(sources[:3], ["0.5", "0.3", "0.2"]))
    with Loader(sampler, sources, 4, 0, 2, workers=2, prefetch=3) as loader:
        for _ in range(2):
            loader.next_step()
        sampler.change(3, 16, *mix(sources[:3], ["0.5", "0.3", "0.2"]))
        plan, batches = loader.next_step()
    assert (plan.step, len(plan.deck.window), len(batches)) == (3, 16, 2)


class Counted:
    """Plans are numbers from 1, with two parts each; `wait` until so many were asked for."""

    def __init__(self) -> None:
        self.plans = 0
        self.changed = threading.Condition()

    def plan(self) -> int:
        with self.changed:
            self.plans += 1
            self.changed.notify_all()
            return self.plans

    def parts(self, plan: int) -> list[Any]:
        return [lambda: (plan, 0, threading.get_ident()), lambda: (plan, 1, threading.get_ident())]

    def wait(self, plans: int) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: self.plans >= plans, timeout=30)


@pytest.mark.parametrize(("ahead", "planned"), [(3, 4), (0, 1), (-2, 1)])
def test_as_many_steps_are_prepared_as_asked_for(ahead: int, planned: int) -> None:
    counted = Counted()
    prefetcher = Prefetcher(counted.plan, counted.parts, 2)
    plan, parts = prefetcher.next(ahead)
    assert (plan, [part[:2] for part in parts]) == (1, [(1, 0), (1, 1)])
    assert threading.get_ident() not in {ident for *_, ident in parts}
    counted.wait(planned)
    prefetcher.close()
    assert counted.plans == planned


def test_nothing_is_prepared_beyond_the_last_step(sources: list[Source]) -> None:
    planned: list[int] = []

    class Noted(Mixed):
        def plan(self) -> StepPlan:
            planned.append(self.step + 1)
            return super().plan()

    sampler = Noted(sources)
    with Loader(sampler, sources, 1, 0, 2, workers=2, prefetch=3, last_step=5) as loader:
        for _ in range(5):
            loader.next_step()
    assert planned == [1, 2, 3, 4, 5]


def test_without_workers_there_are_no_threads(sources: list[Source]) -> None:
    counted = Counted()
    prefetcher = Prefetcher(counted.plan, counted.parts, 0)
    for number in (1, 2):
        plan, parts = prefetcher.next(3)
        assert (plan, parts) == (number, [(number, part, threading.get_ident()) for part in (0, 1)])
    assert (counted.plans, threading.active_count()) == (2, 1)
    prefetcher.close()


def interrupted() -> tuple[int, int]:
    """A Ctrl-C while a step is waited for, in a process of its own; threads before and after."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    before = threading.active_count()

    def part() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)

    prefetcher = Prefetcher(lambda: 1, lambda _: [part], 2)
    with pytest.raises(KeyboardInterrupt):  # noqa: PT012
        try:
            prefetcher.next(0)
        finally:
            prefetcher.close()
    return before, threading.active_count()


def test_an_interrupt_leaves_no_thread() -> None:
    [(before, after)] = run_ranks(1, interrupted, timeout=30)
    assert before == after


@pytest.mark.gpu
def test_pinned_steps_reach_the_device_unchanged(sources: list[Source]) -> None:
    pinned = Loader(Mixed(sources), sources, 1, 0, 2, workers=2, pinned=True)
    with pinned, Loader(Mixed(sources), sources, 1, 0, 2) as plain:
        for _ in range(4):
            (_, ours), (_, theirs) = pinned.next_step(), plain.next_step()
            for batch in ours:
                tensors = [value for value in vars(batch).values() if isinstance(value, torch.Tensor)]
                assert [tensor.is_pinned() for tensor in tensors] == [True] * 5
            assert same([batch.to("cuda").to("cpu") for batch in ours], theirs)
