"""What the sampler promises, one test per promise, and the failures that other trainers show.

G0 the batch is exact                    G4 so does every micro-batch
G1 a step follows the schedule           G5 the order does not depend on the layout
G2 nothing drifts                        G6 the mix may change at any step
G3 every rank sees the step's ratios     G7 a digest proves it     G8 exact once per epoch
"""

from __future__ import annotations

import json
import random
from dataclasses import replace
from itertools import chain

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megaflow.data import native
from megaflow.data.sampler.counts import quota
from megaflow.data.sampler.mix import GroupSpec, Sampler, SourceSpec
from megaflow.data.sampler.plan import count_micro_batches
from megaflow.data.sampler.schedule import ONE, CompiledSchedule, Knot, chatflow, compile_knots, weights_from_decimals
from tests.data import sampler_oracle as oracle

few = settings(max_examples=40, deadline=None, derandomize=True)
LAYOUTS = [1, 2, 3, 4, 6, 8]


def some_weights(size: int) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(0, 20), min_size=size, max_size=size).filter(any)


@st.composite
def samplers(draw: st.DrawFn, batch: st.SearchStrategy[int] = st.integers(1, 200)) -> Sampler:
    groups = []
    for g in range(draw(st.integers(1, 5))):
        windows = draw(st.lists(st.integers(1, 3000), min_size=1, max_size=3))
        sources = tuple(SourceSpec(f"{g}/{s}", n, 3 * n) for s, n in enumerate(windows))
        groups.append(GroupSpec(f"g{g}", sources, tuple(weights_from_decimals(draw(some_weights(len(windows)))))))
    clock = draw(st.sampled_from(["steps", "sequences", "tokens", "documents"]))
    knots, at = [], 0
    for _ in range(draw(st.integers(1, 3))):
        pacing = draw(st.sampled_from(["linear", "const", "step", "cosine", "root"]))
        knots.append(Knot(at, draw(some_weights(len(groups))), pacing))
        at += draw(st.integers(1, 1500))
    seed = draw(st.integers(0, 2**63 - 1))
    return Sampler(seed, draw(batch), 16, groups, compile_knots(clock, knots), draw(st.booleans()))


def two_groups(batch: int, weights: list[str], windows: int = 10**6, seed: int = 1) -> Sampler:
    groups = [GroupSpec(name, (SourceSpec(name, windows, windows),), (ONE,)) for name in ("a", "b")]
    return Sampler(seed, batch, 64, groups, compile_knots("steps", [Knot(0, weights)]))


def continued(old: Sampler, **changes: object) -> Sampler:
    """A sampler with another schedule, batch size or groups that carries on from the state of `old`, through JSON."""
    arguments: dict[str, object] = {
        "seed": old.seed,
        "batch_size": old.batch_size,
        "seq_length": old.seq_length,
        "groups": old.groups,
        "schedule": old.schedule,
    }
    new = Sampler(**(arguments | changes))  # type: ignore[arg-type]
    new.load_state_dict(json.loads(json.dumps(old.state_dict())))
    return new


def cards(plan) -> list[tuple[int, int, int]]:
    deck = plan.deck
    return list(zip(deck.source.tolist(), deck.epoch.tolist(), deck.window.tolist(), strict=True))


@few
@given(samplers())
def test_g0_the_batch_is_exact(sampler):
    for _ in range(6):
        plan = sampler.plan()
        assert sum(plan.group_counts) == sum(map(sum, plan.counts)) == len(plan.deck.window) == sampler.batch_size
        assert [sum(row) for row in plan.counts] == plan.group_counts
        assert np.bincount(plan.deck.source, minlength=len(sampler.sources)).tolist() == list(
            chain.from_iterable(plan.counts)
        )
        assert min(min(row) for row in plan.counts) >= 0


@few
@given(samplers())
def test_g1_each_step_follows_the_schedule(sampler):
    for _ in range(10):
        plan = sampler.plan()
        assert plan.weights == sampler.schedule.weights(plan.clock)
        levels = [(sampler.batch_size, plan.weights, plan.group_counts)]
        levels += [(sum(row), group.weights, row) for group, row in zip(sampler.groups, plan.counts, strict=True)]
        for total, weights, counts in levels:
            for weight, count in zip(weights, counts, strict=True):
                floor, ceiling = total * weight // ONE, -(-total * weight // ONE)
                assert floor - plan.corrections <= count <= ceiling + plan.corrections
                assert weight > 0 or count == 0


def worst_drift(batch: int, steps: list[list[int]]) -> float:
    """Largest distance, in sequences, between what a group got and what its weights sum to, over all steps."""
    residuals = [0] * len(steps[0])
    owed, got, worst = [0] * len(residuals), [0] * len(residuals), 0
    for weights in steps:
        counts, _ = quota(batch, weights, residuals)
        owed = [total + batch * weight for total, weight in zip(owed, weights, strict=True)]
        got = [total + count for total, count in zip(got, counts, strict=True)]
        worst = max(worst, *(abs(due - have * ONE) for due, have in zip(owed, got, strict=True)))
        assert residuals == [due - have * ONE for due, have in zip(owed, got, strict=True)]
    return worst / ONE


@pytest.mark.parametrize("batch", [1, 5, 64, 1024])
@pytest.mark.parametrize("groups", [2, 4, 8])
def test_g2_nothing_drifts(batch, groups):
    for seed in range(4):
        rng = random.Random(seed)
        first, last = ([rng.random() for _ in range(groups)] for _ in range(2))
        constant = [weights_from_decimals(first)] * 400
        ramp = [
            weights_from_decimals([a + (b - a) * t / 400 for a, b in zip(first, last, strict=True)]) for t in range(400)
        ]
        redrawn = [weights_from_decimals([rng.random() for _ in range(groups)]) for _ in range(400)]
        switched = []
        while len(switched) < 400:
            on = [weight if rng.random() < 0.6 else 0 for weight in first]
            if any(on):
                switched += [weights_from_decimals(on)] * rng.randint(1, 30)
        for suite, bound in ((constant, 1.1), (ramp, 1.1), (redrawn, 1.1), (switched, 1.2)):
            assert worst_drift(batch, suite) <= bound


@pytest.mark.parametrize("groups", [2, 3, 4, 8, 16])
def test_g2_an_adversary_forces_no_more_than_it_can_from_any_rule(groups):
    """Switching off, one after another, the group owed least: 1/2 + 1/3 + ... + 1/K, whatever the rule; and no more."""
    bound = sum(1 / k for k in range(2, groups + 1))
    residuals, worst = [0] * groups, 0.0
    for _ in range(20):
        active = set(range(groups))
        while len(active) > 1:
            quota(1, weights_from_decimals([int(k in active) for k in range(groups)]), residuals)
            worst = max(worst, max(map(abs, residuals)) / ONE)
            active.remove(min(active, key=lambda k: (residuals[k], k)))
    assert worst == pytest.approx(bound, abs=1e-6)


def assert_even(plan, hands: list[np.ndarray]) -> None:
    """Every hand has within 1 of its share of each group and each source."""
    for column in (plan.deck.group, plan.deck.source):
        for value in np.unique(column):
            total = int((column == value).sum())
            for hand in hands:
                assert abs(int((column[hand] == value).sum()) - total / len(hands)) < 1


@few
@given(samplers(batch=st.integers(1, 8).map(lambda n: 48 * n)), st.sampled_from(LAYOUTS), st.sampled_from([1, 2, 4, 8]))
def test_g3_every_rank_sees_the_ratios(sampler, dp, micro_batch_size):
    micro_batches = max(1, sampler.batch_size // (dp * micro_batch_size))
    for _ in range(4):
        plan = sampler.plan()
        assert_even(plan, [np.concatenate(plan.hand(dp, micro_batches, rank)) for rank in range(dp)])


@few
@given(samplers(batch=st.integers(1, 4).map(lambda n: 48 * n)), st.sampled_from(LAYOUTS), st.sampled_from([1, 2, 4]))
def test_g4_every_micro_batch_sees_the_ratios(sampler, dp, micro_batch_size):
    micro_batches = max(1, sampler.batch_size // (dp * micro_batch_size))
    for _ in range(3):
        plan = sampler.plan()
        assert_even(plan, [hand for rank in range(dp) for hand in plan.hand(dp, micro_batches, rank)])


@few
@given(samplers(batch=st.integers(1, 4).map(lambda n: 48 * n)), st.data())
def test_g5_the_order_does_not_depend_on_the_layout(sampler, data):
    """Stopped anywhere and resumed on any layout, the ranks together consume exactly the undisturbed order."""
    alone = continued(sampler)
    for _ in range(data.draw(st.integers(2, 4), label="launches")):
        dp = data.draw(st.sampled_from(LAYOUTS), label="dp")
        micro_batch_size = data.draw(st.sampled_from([m for m in (1, 2, 3, 4, 8, 16) if 48 % (dp * m) == 0]))
        micro_batches = count_micro_batches(sampler.batch_size, dp, micro_batch_size)
        ranks = [continued(sampler) for _ in range(dp)]
        for _ in range(data.draw(st.integers(0, 4), label="steps")):
            expected = alone.plan()
            seen: dict[int, tuple[int, int, int]] = {}
            for rank, own in enumerate(ranks):
                plan = own.plan()
                assert plan.digest == expected.digest
                for hand in plan.hand(dp, micro_batches, rank):
                    assert len(hand) == micro_batch_size
                    assert sorted(hand.tolist()) == hand.tolist()
                    rows = cards(plan)
                    for card in hand.tolist():
                        assert card not in seen
                        seen[card] = rows[card]
            assert [seen[card] for card in range(sampler.batch_size)] == cards(expected)
        sampler = ranks[0]


@few
@given(samplers(), st.data())
def test_g6_the_mix_may_change_at_any_step(sampler, data):
    """New weights, a new batch size, added sources and groups: no source skips or repeats a sequence."""
    taken: dict[str, list[tuple[int, int]]] = {}
    for change in range(4):
        for _ in range(data.draw(st.integers(0, 3), label="steps")):
            for source, epoch, window in cards(sampler.plan()):
                taken.setdefault(sampler.sources[source].name, []).append((epoch, window))
        groups = list(sampler.groups)
        if data.draw(st.booleans(), label="add a source"):
            old = groups[0]
            weights = tuple(weights_from_decimals(data.draw(some_weights(len(old.sources) + 1))))
            groups[0] = replace(old, sources=(*old.sources, SourceSpec(f"new{change}", 70, 5)), weights=weights)
        if data.draw(st.booleans(), label="add a group"):
            groups.append(GroupSpec(f"newgroup{change}", (SourceSpec(f"only{change}", 9, 9),), (ONE,)))
        schedule = compile_knots("steps", [Knot(0, data.draw(some_weights(len(groups))))])
        batch_size = data.draw(st.integers(1, 150), label="batch size")
        sampler = continued(sampler, groups=groups, schedule=schedule, batch_size=batch_size)
    for source in sampler.sources:
        keys = [
            oracle.chain(sampler.seed, oracle.key_of(source.name), epoch) for epoch in range(1 + 2000 // source.windows)
        ]
        got = taken.get(source.name, [])
        places = [divmod(i, source.windows) for i in range(len(got))]
        assert got == [(epoch, oracle.permuted(keys[epoch], source.windows, x)) for epoch, x in places]


@few
@given(samplers(), st.integers(0, 6), st.integers(0, 1000))
def test_g7_the_digest_shows_the_first_step_that_differs(sampler, same, pick):
    other = continued(sampler)
    for _ in range(same):
        assert sampler.plan().digest == other.plan().digest
    state = other.state_dict()
    sources = [source for group in state["groups"] for source in group["sources"]]
    skipped = pick % len(sources)
    sources[skipped]["consumed"] += 1
    other.load_state_dict(state)
    for _ in range(4):
        mine, theirs = sampler.plan(), other.plan()
        if cards(mine) != cards(theirs):
            assert mine.digest != theirs.digest
            break
        assert mine.digest == theirs.digest


@few
@given(st.integers(1, 400), st.integers(1, 400), st.integers(1, 90), st.integers(0, 2**63), st.booleans())
def test_g8_once_per_epoch(first, second, batch, seed, use_native):
    sources = (SourceSpec("x", first, first), SourceSpec("y", second, second))
    groups = [GroupSpec("g", sources, tuple(weights_from_decimals([2, 1])))]
    sampler = Sampler(seed, batch, 8, groups, CompiledSchedule("steps", ((0, (ONE,)),)), use_native)
    seen: dict[tuple[int, int], list[int]] = {}
    while min(c // source.windows for c, source in zip(sampler.consumed, sources, strict=True)) < 2:
        for source, epoch, window in cards(sampler.plan()):
            seen.setdefault((source, epoch), []).append(window)
    for (source, epoch), windows in seen.items():
        assert len(set(windows)) == len(windows)
        if epoch < 2:
            assert sorted(windows) == list(range(sources[source].windows))


# ------------------------------------------------------------------ what other trainers get wrong


def test_a_50_50_blend_at_micro_batch_1_on_8_ranks_gives_every_rank_both():
    sampler = two_groups(batch=16, weights=["0.5", "0.5"])
    for _ in range(50):
        plan = sampler.plan()
        assert plan.group_counts == [8, 8]
        for rank in range(8):
            hand = np.concatenate(plan.hand(8, 2, rank))
            assert sorted(plan.deck.group[hand].tolist()) == [0, 1]


def test_a_70_30_batch_leaves_no_rank_with_a_single_stream():
    plan = two_groups(batch=64, weights=["0.7", "0.3"]).plan()
    for rank in range(8):
        assert set(plan.deck.group[np.concatenate(plan.hand(8, 8, rank))].tolist()) == {0, 1}


def test_rounding_does_not_accumulate_over_ten_million_sequences():
    sampler = two_groups(batch=64, weights=["0.7", "0.3"])
    state = sampler.replay(10_000_000 // 64 if native.library() else 20_000)
    total = state["step"] * 64
    weights = weights_from_decimals(["0.7", "0.3"])
    for group, weight in zip(state["groups"], weights, strict=True):
        assert abs(group["sources"][0]["consumed"] - total * weight / ONE) <= 1


def test_changing_the_mix_at_sample_one_million_skips_and_repeats_nothing():
    windows = 600_011
    before = two_groups(batch=1000, weights=["0.5", "0.5"], windows=windows)
    taken: list[list[int]] = [[], []]
    for _ in range(1000):
        for source, _, window in cards(before.plan()):
            taken[source].append(window)
    assert sum(before.consumed) == 1_000_000
    after = continued(before, schedule=compile_knots("steps", [Knot(0, ["0.7", "0.3"])]))
    for _ in range(100):
        plan = after.plan()
        assert plan.group_counts == [700, 300]
        for source, epoch, window in cards(plan):
            assert epoch == 0
            taken[source].append(window)
    assert [len(windows_taken) for windows_taken in taken] == [570_000, 530_000]
    for windows_taken in taken:
        assert len(set(windows_taken)) == len(windows_taken)


@pytest.mark.parametrize("k", [1, 2, 6, 9])
def test_a_source_of_2_to_the_k_plus_1_windows_is_seen_whole(k):
    n = 2**k + 1
    sampler = two_groups(batch=10, weights=["1", "0"], windows=n)
    seen = [window for _ in range(-(-n // 10)) for _, epoch, window in cards(sampler.plan()) if epoch == 0]
    assert sorted(seen) == list(range(n))


def test_the_chatflow_ramp_is_followed_step_by_step_to_supervised_fine_tuning():
    initial, final = [".45", ".45", ".10", "0"], [".10", ".05", ".60", ".25"]
    names = ["en", "parallel", "zh", "instruction"]
    groups = [GroupSpec(name, (SourceSpec(name, 900, 900),), (ONE,)) for name in names]
    sampler = Sampler(3, 100, 16, groups, chatflow("sequences", initial, final, 20_000))
    for step in range(300):
        plan = sampler.plan()
        progress = min(1.0, step / 200)
        for start, end, count in zip(map(float, initial), map(float, final), plan.group_counts, strict=True):
            assert abs(count - 100 * ((1 - progress) * start + progress * end)) < 1.001
    assert plan.group_counts == [10, 5, 60, 25]
