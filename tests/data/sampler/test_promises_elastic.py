"""The sampler's promises over whole ledgers: batch ramps, groups switched on and off, any layout, resumed anywhere."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from itertools import chain
from math import gcd

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megaflow.data.sampler import order
from megaflow.data.sampler.deficit import LossTokens
from megaflow.data.sampler.groups import GroupSpec, SourceSpec
from megaflow.data.sampler.ledger import LedgerEntry, build_sampler
from megaflow.data.sampler.mix import Sampler
from megaflow.data.sampler.plan import StepPlan, count_micro_batches
from megaflow.data.sampler.schedule import CLOCKS, ONE, Knot, compile_knots, weights_from_decimals
from megaflow.errors import UserError
from tests.data.sampler_oracle import entry_at

LAYOUTS = [1, 2, 3, 4, 6, 8]
S = 16
Card = tuple[int, int, int]


def loss_tokens(source: int, epoch: int, window: int) -> int:
    """Few for every third source, none now and then."""
    return order.hash_ints(source, epoch, window) % (3 if source % 3 == 2 else S + 1)


@dataclass(frozen=True)
class Case:
    """A ledger, and what counts its tokens with loss where weights are shares of those."""

    ledger: list[LedgerEntry]
    count: LossTokens | None

    def sampler(self, use_native: bool = True) -> Sampler:
        return build_sampler(self.ledger, use_native, self.count)


def some_weights(size: int) -> st.SearchStrategy[list[int]]:
    """Many of them 0."""
    return st.lists(st.sampled_from([0, 0, 1, 3, 7]), min_size=size, max_size=size).filter(any)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """One to four entries within the first 15 steps, each with batches of its own that all layouts can share out."""
    specs = []
    for g in range(draw(st.integers(1, 5))):
        windows = draw(st.lists(st.integers(1, 400), min_size=1, max_size=3))
        specs.append(tuple(SourceSpec(f"{g}/{s}", n, 3 * n) for s, n in enumerate(windows)))
    names = {source.name: source.windows * 5 for sources in specs for source in sources}
    by_tokens, seed, ledger, first_step = draw(st.booleans()), draw(st.integers(0, 2**63)), [], 1
    for _ in range(draw(st.integers(1, 4))):
        at, knots = 0, []
        for _ in range(draw(st.integers(1, 3))):
            pacing = draw(st.sampled_from(["linear", "const", "step"]))
            knots.append(Knot(at, draw(some_weights(len(specs))), pacing))
            at += draw(st.integers(1, 700))
        groups = tuple(
            GroupSpec(f"g{g}", sources, tuple(weights_from_decimals(draw(some_weights(len(sources))))))
            for g, sources in enumerate(specs)
        )
        entry = LedgerEntry(
            first_step=first_step,
            schedule=compile_knots(draw(st.sampled_from(CLOCKS)), knots),
            batch_size=24 * draw(st.integers(1, 6)),
            seed=seed,
            seq_length=S,
            groups=groups,
            manifests=dict.fromkeys(names, "m"),
            why="",
            loss_tokens=names if by_tokens else None,
        )
        ledger.append(entry)
        first_step += draw(st.integers(0, 5))
    return Case(ledger, loss_tokens if by_tokens else None)


def cards(plan: StepPlan) -> list[Card]:
    deck = plan.deck
    return list(zip(deck.source.tolist(), deck.epoch.tolist(), deck.window.tolist(), strict=True))


def sources_of(sampler: Sampler) -> list[range]:
    """Flat indices of each group's sources."""
    ends = np.cumsum([len(group.sources) for group in sampler.groups]).tolist()
    return [range(end - len(group.sources), end) for end, group in zip(ends, sampler.groups, strict=True)]


def clock_before(name: str, sampler: Sampler, step: int, taken: list[int]) -> int:
    if name == "steps":
        return step - 1
    if name == "documents":
        return sum(n * s.documents // s.windows for n, s in zip(taken, sampler.sources, strict=True))
    return sum(taken) * (S if name == "tokens" else 1)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(cases(), st.booleans())
def test_every_step_follows_the_entry_that_holds(case: Case, use_native: bool) -> None:
    """G0, G1, G2, G6 and G8 over ramps: batch, weights, drift, and each source's own order, unbroken by any change."""
    sampler = case.sampler(use_native)
    groups, taken = len(sampler.groups), [0] * len(sampler.sources)
    owed, got = [0] * groups, [0] * groups
    for step in range(1, 21):
        entry, plan = entry_at(case.ledger, step), sampler.plan()
        assert plan.clock == clock_before(entry.schedule.clock, sampler, step, taken)
        assert plan.weights == entry.schedule.weights(plan.clock)
        assert sum(plan.group_counts) == len(plan.deck.window) == entry.batch_size
        assert plan.group_counts == [sum(row) for row in plan.counts]
        levels = [(plan.weights, plan.group_counts)]
        levels += [(group.weights, row) for group, row in zip(entry.groups, plan.counts, strict=True)]
        for weights, counts in levels:
            for weight, count in zip(weights, counts, strict=True):
                assert weight > 0 or count == 0
                if case.count is None:
                    assert abs(count * ONE - sum(counts) * weight) < (1 + plan.corrections) * ONE
        amounts = [0] * groups
        for k, epoch, window in cards(plan):
            source = sampler.sources[k]
            key = order.hash_ints(sampler.seed, order.name_key(source.name), taken[k] // source.windows)
            assert (epoch, window) == (
                taken[k] // source.windows,
                order.perm(key, source.windows, taken[k] % source.windows),
            )
            taken[k] += 1
            [group] = [g for g, members in enumerate(sources_of(sampler)) if k in members]
            amounts[group] += 1 if case.count is None else max(1, case.count(k, epoch, window))
        owed = [due + sum(amounts) * weight for due, weight in zip(owed, plan.weights, strict=True)]
        got = [have + amount for have, amount in zip(got, amounts, strict=True)]
        most = max(abs(due - have * ONE) for due, have in zip(owed, got, strict=True)) / ONE
        harmonic = sum(1 / k for k in range(2, groups + 1))
        assert most <= (max(1.2, harmonic) if case.count is None else (groups - 1) * S)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(cases(), st.data())
def test_any_layout_resumed_anywhere_consumes_one_order(case: Case, data: st.DataObject) -> None:
    """G3, G4, G5 and G7 over ramps: launches on other layouts, from a saved state or a fork, planned ahead or not."""
    alone, now, first = case.sampler(), case.sampler(), data.draw(st.integers(0, 3), label="launches")
    unit = gcd(*(entry.batch_size for entry in case.ledger))
    for _ in range(1 + first):
        dp = data.draw(st.sampled_from(LAYOUTS), label="dp")
        size = data.draw(st.sampled_from([m for m in range(1, unit + 1) if unit % (dp * m) == 0]), label="micro batch")
        steps, ahead = data.draw(st.integers(0, 6), label="steps"), data.draw(st.booleans(), label="plan ahead")
        ranks = []
        for rank in range(dp):
            own = case.sampler(use_native=rank % 2 == 0)
            own.load_state_dict(json.loads(json.dumps(now.state_dict())))
            ranks.append(own)
        planners = [own.fork() if ahead else own for own in ranks]
        for _ in range(steps):
            expected = alone.plan()
            micro_batches = count_micro_batches(len(expected.deck.window), dp, size)
            dealt: list[np.ndarray] = []
            for rank, (own, planner) in enumerate(zip(ranks, planners, strict=True)):
                plan = planner.plan()
                if ahead:
                    own.follow(plan)
                assert (plan.step, plan.digest, cards(plan)) == (expected.step, expected.digest, cards(expected))
                hands = plan.hand(dp, micro_batches, rank)
                assert [len(hand) for hand in hands] == [size] * micro_batches
                dealt += hands
            assert sorted(chain.from_iterable(hand.tolist() for hand in dealt)) == list(range(len(cards(expected))))
            for column in (expected.deck.group, expected.deck.source):
                for value in np.unique(column):
                    total = int((column == value).sum())
                    of_hands = [int((column[hand] == value).sum()) for hand in dealt]
                    of_ranks = [sum(of_hands[r * micro_batches : (r + 1) * micro_batches]) for r in range(dp)]
                    assert all(abs(count - total / len(dealt)) < 1 for count in of_hands)
                    assert all(abs(count - total / dp) < 1 for count in of_ranks)
        now = ranks[-1]
        assert all(own.state_dict() == alone.state_dict() for own in ranks)


def test_a_batch_ramp_takes_each_size_from_its_step_on() -> None:
    groups = tuple(GroupSpec(name, (SourceSpec(name, 10**6, 10**6),), (ONE,)) for name in "ab")
    first = LedgerEntry(1, compile_knots("steps", [Knot(0, [1, 3])]), 16, 1, S, groups, dict.fromkeys("ab", "m"), "")
    ramp = [replace(first, first_step=1 + 10 * i, batch_size=16 * 2**i) for i in range(4)]
    sampler = build_sampler(ramp)
    plans = [sampler.plan() for _ in range(40)]
    assert [plan.group_counts for plan in plans] == [[4 * 2**i, 12 * 2**i] for i in range(4) for _ in range(10)]
    with pytest.raises(UserError, match="batch size 16 is not a multiple of 24"):
        count_micro_batches(len(plans[0].deck.window), 8, 3)
