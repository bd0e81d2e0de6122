"""Shares of tokens with loss: the rule's bounds, and that its plans do not depend on layout, native code or resumes."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from decimal import Decimal
from fractions import Fraction
from itertools import chain

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megaflow.data.sampler import order
from megaflow.data.sampler.deficit import charge, next_giver
from megaflow.data.sampler.estimate import in_sequences
from megaflow.data.sampler.forecast import forecast
from megaflow.data.sampler.groups import GroupSpec, SourceSpec
from megaflow.data.sampler.ledger import LedgerEntry, build_sampler, read_ledger, write_ledger
from megaflow.data.sampler.mix import Sampler
from megaflow.data.sampler.schedule import ONE, CompiledSchedule, Knot, compile_knots, weights_from_decimals
from megaflow.errors import UserError

few = settings(max_examples=25, deadline=None, derandomize=True)
S = 64
Count = Callable[[int, int, int], int]


def counter(salt: int, most: list[int]) -> Count:
    """Between 0 and `most[k]` tokens with loss in each window of source k."""
    return lambda k, epoch, window: order.hash_ints(salt, k, epoch, window) % (most[k] + 1)


def weights(size: int) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(0, 9), min_size=size, max_size=size).filter(any)


def deviations(mixes: list[list[int]], lengths: Callable[[int], int]) -> tuple[int, int]:
    """Lowest and highest credit over a run of one sequence for each mix, in 1 / `ONE` tokens, by exact sums."""
    credits, owed, given = ([0] * len(mixes[0]) for _ in range(3))
    lowest = highest = 0
    for mix in mixes:
        giver = next_giver(mix, credits)
        assert mix[giver] > 0
        tokens = lengths(giver)
        charge(mix, credits, giver, tokens)
        owed = [due + weight * tokens for due, weight in zip(owed, mix, strict=True)]
        given[giver] += tokens
        assert credits == [due - ONE * have for due, have in zip(owed, given, strict=True)]
        lowest, highest = min(lowest, *credits), max(highest, *credits)
    return lowest, highest


@few
@given(st.data(), st.integers(2, 8), st.integers(0, 2**32))
def test_credits_stay_within_the_bounds(data, size, seed):
    rng = random.Random(seed)
    most = [data.draw(st.sampled_from([1, 3, S])) for _ in range(size)]

    def lengths(k: int) -> int:
        return rng.choice([1, most[k], rng.randint(1, most[k])])

    mix = data.draw(weights(size).filter(all))
    other = data.draw(weights(size).filter(all))
    ramp = [weights_from_decimals([a * (400 - t) + b * t for a, b in zip(mix, other, strict=True)]) for t in range(400)]
    harmonic = sum(Fraction(1, k) for k in range(1, size))
    for suite in ([weights_from_decimals(mix)] * 400, ramp):
        lowest, highest = deviations(suite, lengths)
        assert lowest > -S * ONE
        assert highest <= harmonic * S * ONE
    switched: list[list[int]] = []
    while len(switched) < 400:
        on = [weight if rng.random() < 0.5 else 0 for weight in mix]
        if any(on):
            switched += [weights_from_decimals(on)] * rng.randint(1, 30)
    lowest, highest = deviations(switched, lengths)
    assert -(size - 1) * S * ONE <= lowest
    assert highest <= (size - 1) * S * ONE


@pytest.mark.parametrize("size", [2, 3, 4, 6])
def test_an_adversary_stays_within_the_bound(size):
    """Who sees the credits and always switches off what is owed most, with sequences of any length."""
    rng, credits, worst = random.Random(size), [0] * size, 0
    for _ in range(3000):
        by_credit = sorted(range(size), key=lambda k: -credits[k])
        off = set(by_credit[: rng.randint(0, size - 1)])
        mix = weights_from_decimals([0 if k in off else rng.choice([1, 1, 50]) for k in range(size)])
        charge(mix, credits, next_giver(mix, credits), rng.choice([1, S, S]))
        worst = max(worst, *map(abs, credits))
    assert S * ONE // 2 < worst <= (size - 1) * S * ONE


@st.composite
def samplers(draw) -> Sampler:
    groups, most = [], []
    for g in range(draw(st.integers(1, 4))):
        windows = draw(st.lists(st.integers(1, 300), min_size=1, max_size=3))
        most += [draw(st.sampled_from([0, 1, 5, S])) for _ in windows]
        sources = tuple(SourceSpec(f"{g}/{s}", n, 3 * n) for s, n in enumerate(windows))
        groups.append(GroupSpec(f"g{g}", sources, tuple(weights_from_decimals(draw(weights(len(windows)))))))
    clock = draw(st.sampled_from(["steps", "sequences", "tokens", "documents"]))
    at = sorted(draw(st.sets(st.integers(0, 3000), min_size=1, max_size=3)))
    schedule = compile_knots(clock, [Knot(x, draw(weights(len(groups)))) for x in at])
    count = counter(draw(st.integers(0, 99)), most)
    return Sampler(draw(st.integers(0, 2**63)), 48, S, groups, schedule, draw(st.booleans()), count)


def cards(plan) -> list[tuple[int, int, int]]:
    deck = plan.deck
    return list(zip(deck.source.tolist(), deck.epoch.tolist(), deck.window.tolist(), strict=True))


@few
@given(samplers())
def test_a_step_gives_what_the_rule_says(sampler):
    """Every plan against the rule worked out sequence by sequence from the ids of the deck."""
    group_of = [g for g, group in enumerate(sampler.groups) for _ in group.sources]
    first = [group_of.index(g) for g in range(len(sampler.groups))]
    credits = [0] * len(sampler.groups)
    own = [[0] * len(group.sources) for group in sampler.groups]
    for _ in range(4):
        plan = sampler.plan()
        queues: dict[int, list[int]] = {}
        for k, epoch, window in cards(plan):
            queues.setdefault(k, []).append(max(1, sampler.loss_tokens(k, epoch, window)))
        assert plan.total == sum(map(sum, queues.values()))
        for _ in range(48):
            g = next_giver(plan.weights, credits)
            s = next_giver(sampler.groups[g].weights, own[g])
            tokens = queues[first[g] + s].pop(0)
            charge(plan.weights, credits, g, tokens)
            charge(sampler.groups[g].weights, own[g], s, tokens)
        assert not any(queues.values())
        assert sum(plan.group_counts) == 48
        assert [sum(row) for row in plan.counts] == plan.group_counts
    state = sampler.state_dict()
    assert [group["residual"] for group in state["groups"]] == credits
    assert [[source["residual"] for source in group["sources"]] for group in state["groups"]] == own


@few
@given(samplers(), st.data())
def test_resumed_anywhere_on_any_layout_the_order_is_the_same(sampler, data):
    alone = sampler.fork()
    for _ in range(3):
        dp = data.draw(st.sampled_from([1, 2, 3, 4, 6, 8]))
        size = data.draw(st.sampled_from([m for m in (1, 2, 3, 4, 6, 8) if 48 % (dp * m) == 0]))
        state = json.loads(json.dumps(sampler.state_dict()))
        sampler = sampler.fork()
        sampler.load_state_dict(state)
        ahead = sampler.fork()
        for _ in range(data.draw(st.integers(0, 3))):
            expected, plan = alone.plan(), ahead.plan()
            sampler.follow(plan)
            assert (plan.digest, cards(plan)) == (expected.digest, cards(expected))
            hands = [hand.tolist() for rank in range(dp) for hand in plan.hand(dp, 48 // (dp * size), rank)]
            assert sorted(chain.from_iterable(hands)) == list(range(48))
            for g, count in enumerate(plan.group_counts):
                for hand in hands:
                    assert abs(sum(plan.deck.group[card] == g for card in hand) - count * size / 48) < 1
    assert sampler.state_dict() == alone.state_dict()


def test_a_source_without_loss_does_not_take_over_for_ever():
    """Each of its sequences counts as one token, so the other group comes back."""
    groups = [GroupSpec(name, (SourceSpec(name, 50, 50),), (ONE,)) for name in "ab"]
    schedule = compile_knots("steps", [Knot(0, [1, 1])])
    sampler = Sampler(1, 8, S, groups, schedule, loss_tokens=lambda k, epoch, window: 0 if k == 0 else S)
    plans = [sampler.plan() for _ in range(200)]
    given = [sum(plan.group_counts[g] for plan in plans) for g in (0, 1)]
    assert given[0] + given[1] == 1600
    assert abs(given[0] - S * given[1]) <= 2 * S


# ------------------------------------------------------------------ ledgers


def entry(**changes) -> LedgerEntry:
    en = GroupSpec("en", (SourceSpec("x", 40, 40), SourceSpec("y", 70, 7)), tuple(weights_from_decimals([3, 1])))
    zh = GroupSpec("zh", (SourceSpec("z", 1000, 10),), (ONE,))
    schedule = compile_knots("sequences", [Knot(0, [2, 1]), Knot(4000, [1, 3])])
    names = {"x": 40 * 32, "y": 70 * 6, "z": 1000 * 16}
    return replace(LedgerEntry(1, schedule, 16, 5, S, (en, zh), dict.fromkeys(names, "m"), "", names), **changes)


def ledger() -> list[LedgerEntry]:
    """Another batch size and weights from step 9 on, then an appended source and an appended group."""
    schedule = compile_knots("steps", [Knot(0, [1, 1])])
    en, zh = entry().groups
    more = replace(en, sources=(*en.sources, SourceSpec("w", 30, 3)), weights=tuple(weights_from_decimals([1, 1, 2])))
    code = GroupSpec("code", (SourceSpec("c", 25, 3),), (ONE,))
    names = {**entry().loss_tokens, "w": 30 * S, "c": 25}
    third = entry(
        first_step=20,
        batch_size=32,
        schedule=compile_knots("steps", [Knot(0, [1, 1, 2])]),
        groups=(more, zh, code),
        manifests=dict.fromkeys(names, "m"),
        loss_tokens=names,
    )
    return [entry(), entry(first_step=9, batch_size=24, schedule=schedule), third]


def test_the_mix_may_change_and_nothing_is_skipped_or_repeated(tmp_path):
    write_ledger(tmp_path / "ledger.json", ledger())
    assert read_ledger(tmp_path / "ledger.json") == ledger()
    count = counter(3, [S, 12, 40, S, 2])
    whole = build_sampler(ledger(), loss_tokens=count)
    for stop in (0, 5, 8, 19, 25):
        first = build_sampler([e for e in ledger() if e.first_step <= stop + 1], loss_tokens=count)
        for _ in range(stop):
            first.plan()
        resumed = build_sampler(ledger(), loss_tokens=count)
        resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
        for _ in range(40 - stop):
            resumed.plan()
        if stop == 0:
            taken: dict[str, list[tuple[int, int]]] = {}
            for _ in range(40):
                for k, epoch, window in cards(whole.plan()):
                    taken.setdefault(whole.sources[k].name, []).append((epoch, window))
        assert resumed.state_dict() == whole.state_dict()
    assert set(taken) == {"x", "y", "z", "w", "c"}
    for source in whole.sources:
        windows = taken[source.name]
        assert [epoch for epoch, _ in windows] == [i // source.windows for i in range(len(windows))]
        assert len(set(windows)) == len(windows)


def test_a_ledger_by_tokens_is_planned_with_the_sources_only_and_keeps_its_unit():
    with pytest.raises(ValueError, match="needs the run's sources"):
        build_sampler([entry()]).plan()
    with pytest.raises(UserError, match="unit is loss_tokens in this run, not sequences"):
        entry(first_step=5, loss_tokens=None).check_follows(entry())


def test_the_forecast_is_about_what_planning_gives():
    names, windows = "xyzwc", [40, 70, 1000, 30, 25]
    count = counter(8, [S, 12, 32, S, 30])
    epochs = [sum(count(k, 0, window) for window in range(n)) for k, n in enumerate(windows)]
    sizes = dict(zip(names, epochs, strict=True))
    planned = [replace(e, loss_tokens={name: sizes[name] for name in e.manifests}) for e in ledger()]
    sampler = build_sampler(planned, loss_tokens=lambda k, epoch, window: count(k, 0, window))
    for _ in range(400):
        sampler.plan()
    found = forecast(planned, 400, {"x": Decimal(9)})
    assert [source.name for source in found.sources] == ["x", "y", "w", "z", "c"]
    for source in found.sources:
        k = names.index(source.name)
        assert source.sequences == pytest.approx(sampler.consumed[k], rel=0.03, abs=4)
        assert source.loss_tokens == source.sequences * epochs[k] // windows[k]
    assert found.table()[-1].startswith("an estimate")


@few
@given(st.lists(weights(3), min_size=1, max_size=3), weights(2), st.integers(0, 900))
def test_estimated_shares_of_sequences_come_to_the_shares_of_tokens(mixes, shares, x):
    sources = ((SourceSpec("x", 40, 1), SourceSpec("y", 70, 1)), (SourceSpec("z", 9, 1),), (SourceSpec("w", 5, 1),))
    parts = (tuple(weights_from_decimals(shares)), (ONE,), (ONE,))
    groups = tuple(GroupSpec(name, *pair) for name, pair in zip("abc", zip(sources, parts, strict=True), strict=True))
    tokens = {"x": 40 * 7, "y": 70 * 60, "z": 9, "w": 5 * 30}
    schedule = compile_knots("steps", [Knot(400 * i, mix) for i, mix in enumerate(mixes)])
    [found] = in_sequences([entry(schedule=schedule, groups=groups, loss_tokens=tokens)])
    assert isinstance(found.schedule, CompiledSchedule)
    assert found.loss_tokens is None
    averages = [
        sum(w * tokens[s.name] / s.windows for s, w in zip(group.sources, group.weights, strict=True)) / ONE
        for group in found.groups
    ]
    given = [w * average for w, average in zip(found.schedule.weights(x), averages, strict=True)]
    for share, weight in zip(given, schedule.weights(x), strict=True):
        assert share / sum(given) == pytest.approx(weight / ONE, abs=0.01)
