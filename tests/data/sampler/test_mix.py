from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megaflow.data import native
from megaflow.data.sampler.counts import quota
from megaflow.data.sampler.mix import GroupSpec, Sampler, SourceSpec
from megaflow.data.sampler.plan import Deck, count_micro_batches
from megaflow.data.sampler.schedule import CLOCKS, ONE, CompiledSchedule, Knot, compile_knots, weights_from_decimals
from megaflow.errors import UserError
from tests.data.sampler_oracle import OracleSampler, share, weights_at

ALL_GOLDEN = json.loads((Path(__file__).parents[1] / "sampler_golden.json").read_text(encoding="utf-8"))
GOLDEN = ALL_GOLDEN["run"]
both = pytest.mark.parametrize("use_native", [False, True], ids=["numpy", "native"])


def golden_groups() -> list[GroupSpec]:
    return [
        GroupSpec(name, tuple(SourceSpec(source, n, 2 * n) for source, n in sources), tuple(map(int, weights)))
        for name, sources, weights in GOLDEN["groups"]
    ]


def golden_sampler(use_native: bool = True, **changes) -> Sampler:
    knots = tuple((x, tuple(map(int, weights))) for x, weights in GOLDEN["knots"])
    arguments = {
        "seed": GOLDEN["seed"],
        "batch_size": GOLDEN["B"],
        "seq_length": 512,
        "groups": golden_groups(),
        "schedule": CompiledSchedule(GOLDEN["clock"], knots),
        "use_native": use_native,
    }
    return Sampler(**(arguments | changes))


def deck_rows(plan) -> list[list[int]]:
    deck = plan.deck
    return np.stack([deck.group, deck.source_in_group, deck.epoch, deck.window], axis=1).tolist()


@both
def test_the_golden_run(use_native):
    sampler = golden_sampler(use_native)
    first_source = np.cumsum([0] + [len(group.sources) for group in sampler.groups])
    for expected in GOLDEN["steps"]:
        plan = sampler.plan()
        assert plan.step == expected["step"]
        assert plan.clock == GOLDEN["B"] * (plan.step - 1)
        assert plan.counts == expected["counts"]
        assert plan.group_counts == [sum(row) for row in expected["counts"]]
        assert f"{plan.digest:016x}" == expected["digest"]
        assert deck_rows(plan) == expected.get("deck", deck_rows(plan))
        assert np.array_equal(plan.deck.source, first_source[plan.deck.group] + plan.deck.source_in_group)
    assert plan.step == 64


def test_the_plain_integers_reproduce_the_golden_run():
    knots = [(x, list(map(int, weights))) for x, weights in GOLDEN["knots"]]
    groups = [(g.name, [(s.name, s.windows, s.documents) for s in g.sources], g.weights) for g in golden_groups()]
    oracle = OracleSampler(GOLDEN["seed"], GOLDEN["B"], 512, groups, GOLDEN["clock"], knots)
    for expected in GOLDEN["steps"]:
        counts, deck, digest = oracle.plan()
        assert (counts, digest) == (expected["counts"], expected["digest"])
        assert deck == expected.get("deck", deck)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data(), st.sampled_from(CLOCKS), st.integers(1, 300), st.integers(0, 2**64 - 1), st.integers(1, 2**15))
def test_numpy_and_native_equal_the_plain_integers(data, clock, batch, seed, seq_length):
    windows = st.one_of(st.integers(1, 50), st.integers(1, 2**40))
    source = st.tuples(windows, st.integers(0, 2**45))
    groups = []
    for g, sources in enumerate(data.draw(st.lists(st.lists(source, min_size=1, max_size=3), min_size=1, max_size=4))):
        weights = data.draw(st.lists(st.integers(0, 9), min_size=len(sources), max_size=len(sources)).filter(any))
        specs = tuple(SourceSpec(f"{g}-{s}", n, d) for s, (n, d) in enumerate(sources))
        groups.append(GroupSpec(f"{g}", specs, tuple(weights_from_decimals(weights))))
    mix = st.lists(st.integers(0, 9), min_size=len(groups), max_size=len(groups)).filter(any)
    at = sorted(data.draw(st.sets(st.integers(0, batch * seq_length * 8), min_size=1, max_size=4)))
    schedule = compile_knots(clock, [Knot(x, data.draw(mix)) for x in at])
    plain = [(g.name, [(s.name, s.windows, s.documents) for s in g.sources], g.weights) for g in groups]
    knots = [(x, list(weights)) for x, weights in schedule.knots]
    oracle = OracleSampler(seed, batch, seq_length, plain, clock, knots)
    twins = [Sampler(seed, batch, seq_length, groups, schedule, use_native) for use_native in (False, True)]
    for _ in range(6):
        now = oracle.read_clock()
        counts, deck, digest = oracle.plan()
        for twin in twins:
            plan = twin.plan()
            assert (plan.clock, plan.counts, f"{plan.digest:016x}") == (now, counts, digest)
            assert deck_rows(plan) == deck
    assert twins[0].state_dict() == twins[1].state_dict()
    assert [g["residual"] for g in twins[0].state_dict()["groups"]] == oracle.r


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.integers(2, 8), st.data())
def test_quota_equals_the_plain_integers_under_abrupt_switches(size, data):
    mine, oracle = [0] * size, [0] * size
    switched = st.lists(st.sampled_from([0, 0, 1, 3, 7]), min_size=size, max_size=size).filter(any)
    for weights in data.draw(st.lists(switched, min_size=1, max_size=30)):
        batch = data.draw(st.integers(0, 9))
        integer = weights_from_decimals(weights)
        counts, _ = quota(batch, integer, mine)
        assert counts == share(batch, integer, oracle)
        assert mine == oracle
        assert sum(mine) == 0


@both
def test_the_safety_valve_repays_an_abrupt_switch(use_native):
    """A group owed more than a sequence gets it from one that is owed nothing, and the plan counts the move."""
    groups = [GroupSpec(name, (SourceSpec(name, 100, 100),), (ONE,)) for name in "abc"]
    sampler = Sampler(1, 4, 8, groups, compile_knots("steps", [Knot(0, [2, 1, 1])]), use_native)
    state = sampler.state_dict()
    for group, residual in zip(state["groups"], (-ONE // 2, -ONE, 3 * ONE // 2), strict=True):
        group["residual"] = residual
    sampler.load_state_dict(state)
    plan = sampler.plan()
    assert plan.group_counts == [2, 0, 2]
    assert plan.corrections == 1
    assert [group["residual"] for group in sampler.state_dict()["groups"]] == [-ONE // 2, 0, ONE // 2]


@both
def test_the_safety_valve_ends_where_two_groups_would_only_change_places(use_native):
    """One is owed a sequence exactly, the other nothing; the third, which had too much, is off."""
    groups = [GroupSpec(name, (SourceSpec(name, 100, 100),), (ONE,)) for name in "abc"]
    sampler = Sampler(1, 2, 8, groups, compile_knots("steps", [Knot(0, [1, 1, 0])]), use_native)
    state = sampler.state_dict()
    for group, residual in zip(state["groups"], (ONE, 0, -ONE), strict=True):
        group["residual"] = residual
    sampler.load_state_dict(state)
    plan = sampler.plan()
    assert (plan.group_counts, plan.corrections) == ([1, 1, 0], 0)


@both
def test_a_group_that_is_off_is_owed_until_it_returns(use_native):
    groups = [GroupSpec(name, (SourceSpec(name, 100, 100),), (ONE,)) for name in "abc"]
    schedule = compile_knots("steps", [Knot(0, [1, 1, 0]), Knot(2, [1, 1, 2], "const")])
    sampler = Sampler(1, 4, 8, groups, schedule, use_native)
    state = sampler.state_dict()
    for group, residual in zip(state["groups"], (-ONE // 2, -ONE, 3 * ONE // 2), strict=True):
        group["residual"] = residual
    sampler.load_state_dict(state)
    plans = [sampler.plan() for _ in range(3)]
    assert [plan.group_counts[2] for plan in plans] == [0, 0, 3]
    assert [plan.corrections for plan in plans] == [0, 0, 1]


@both
@pytest.mark.parametrize("clock", CLOCKS)
def test_replay_equals_planning(use_native, clock):
    sampler = golden_sampler(
        use_native, schedule=compile_knots(clock, [Knot(0, [1, 2, 3, 0]), Knot(900, [3, 1, 1, 2])])
    )
    sampler.plan()
    start = sampler.state_dict()
    replayed = sampler.replay(37)
    assert sampler.state_dict() == start
    for _ in range(37):
        sampler.plan()
    assert {**replayed, "digest": sampler.state_dict()["digest"]} == sampler.state_dict()
    assert sampler.replay(0) == {k: v for k, v in sampler.state_dict().items() if k != "digest"}


def test_a_long_replay_stays_exact():
    if native.library() is None:
        pytest.skip(native.status())
    state = golden_sampler().replay(300_000)
    assert sum(s["consumed"] for g in state["groups"] for s in g["sources"]) == 300_000 * GOLDEN["B"]
    assert sum(group["residual"] for group in state["groups"]) == 0


@pytest.mark.parametrize("clock", ["tokens", "documents"])
def test_clocks_far_beyond_64_bits_times_weights_are_exact(clock):
    """10**15 on the clock times a weight of 2**32, and sequences times documents, both overflow 64 bits."""
    schedule = compile_knots(clock, [Knot(10**9, [1, 2, 3, 1]), Knot(10**16, [30, 1, 2, 5])])
    plans = []
    for use_native in (False, True):
        groups = golden_groups()
        groups[2] = GroupSpec(
            "zh", tuple(SourceSpec(s.name, 2**33, 2**40) for s in groups[2].sources), groups[2].weights
        )
        sampler = golden_sampler(use_native, groups=groups, schedule=schedule, seq_length=4096)
        state = sampler.state_dict()
        state["groups"][2]["sources"][0]["consumed"] = 10**12
        sampler.load_state_dict(state)
        plan = sampler.plan()
        assert plan.clock == (10**12 * 4096 if clock == "tokens" else 10**12 * 2**40 // 2**33)
        knots = [(x, list(weights)) for x, weights in schedule.knots]
        assert plan.weights == weights_at(knots, plan.clock)
        plans.append((plan.weights, plan.counts, plan.digest, deck_rows(plan)))
    assert plans[0] == plans[1]


@both
def test_a_state_restores_the_run_through_json(use_native):
    sampler = golden_sampler(use_native)
    for _ in range(20):
        sampler.plan()
    restored = golden_sampler(not use_native)
    restored.load_state_dict(json.loads(json.dumps(sampler.state_dict(), sort_keys=True)))
    assert restored.step == 20
    assert restored.consumed == sampler.consumed
    for expected in GOLDEN["steps"][20:]:
        assert f"{restored.plan().digest:016x}" == expected["digest"]


def test_a_loaded_state_is_not_shared():
    state = golden_sampler().state_dict()
    first, second = golden_sampler(), golden_sampler()
    first.load_state_dict(state)
    second.load_state_dict(state)
    first.plan()
    assert second.step == 0
    assert second.consumed == [0] * 6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 5}, "started with seed 20240517, not 5"),
        ({"groups": [1, 0, 2, 3]}, "group 'en' was number 1"),
        ({"groups": [0, 1, 2]}, "group 'instruction' is in the run but not in the config"),
    ],
)
def test_a_state_of_another_run_is_refused(changes, message):
    if "groups" in changes:
        groups = golden_groups()
        changes = {"groups": [groups[i] for i in changes["groups"]]}
        changes["schedule"] = compile_knots("steps", [Knot(0, [1] * len(changes["groups"]))])
    with pytest.raises(UserError, match=message) as caught:
        golden_sampler(**changes).load_state_dict(golden_sampler().state_dict())
    assert "\n" not in str(caught.value)


def test_a_source_of_another_size_or_name_is_refused():
    state = golden_sampler().state_dict()
    for name, windows, message in [
        ("wikipedia_en", 999, "999 windows of 2000 documents, but the run was started with 1000"),
        ("wiki", 1000, "'wikipedia_en' is in the run but not in the config"),
    ]:
        en, *others = golden_groups()
        en = GroupSpec("en", (SourceSpec(name, windows, 2000), en.sources[1]), en.weights)
        with pytest.raises(UserError, match=message):
            golden_sampler(groups=[en, *others]).load_state_dict(state)


@pytest.mark.parametrize("damage", [{}, {"digest": "xyz"}, {"step": None}, {"groups": [{"name": "en"}]}])
def test_a_damaged_state_is_refused_and_changes_nothing(damage):
    sampler = golden_sampler()
    before = sampler.state_dict()
    with pytest.raises(UserError, match="sampler state: not readable"):
        sampler.load_state_dict(damage and before | damage)
    assert sampler.state_dict() == before


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"seed": -1}, UserError, "seed -1"),
        ({"batch_size": 0}, UserError, "batch size 0 is outside 1 to 1048576"),
        ({"batch_size": 2**20 + 1}, UserError, "outside"),
        ({"groups": golden_groups()[:3]}, ValueError, "weighs 4 groups, but there are 3"),
        ({"groups": [*golden_groups()[:3], golden_groups()[0]]}, UserError, "'wikipedia_en' is listed twice"),
        ({"groups": [*golden_groups()[:3], GroupSpec("x", (SourceSpec("x", 0, 0),), (ONE,))]}, UserError, "0 windows"),
        ({"groups": [*golden_groups()[:3], GroupSpec("x", (SourceSpec("x", 1, 1),), (1,))]}, ValueError, "group x"),
    ],
)
def test_an_impossible_sampler_is_refused(changes, error, message):
    with pytest.raises(error, match=message):
        golden_sampler(**changes)


def hands(seed: int, step: int, batch: int, dp: int, micro_batches: int) -> np.ndarray:
    """[batch, 2] micro-batch and rank of each card of a step's plan."""
    deck = Deck(*np.zeros((5, batch), np.int64))
    plan = replace(golden_sampler().plan(), seed=seed, step=step, deck=deck)
    found = np.full((batch, 2), -1)
    for rank in range(dp):
        for m, hand in enumerate(plan.hand(dp, micro_batches, rank)):
            assert (found[hand] == -1).all()
            found[hand] = m, rank
    return found


def test_hands_match_the_golden_vectors():
    case = dict(ALL_GOLDEN["deal"])
    expected = case.pop("micro_batch_and_rank_of_card")
    found = hands(case["seed"], case["step"], case["B"], case["dp"], case["micro_batches"])
    assert found.tolist() == expected


def test_hands_differ_in_size_by_at_most_one_and_rotate():
    starts = set()
    for step in range(1, 200):
        found = hands(7, step, 30, 4, 3)
        sizes = np.bincount(found[:, 0] * 4 + found[:, 1], minlength=12)
        assert sizes.max() - sizes.min() <= 1
        starts.add(tuple(found[0].tolist()))
    assert len(starts) == 12


def test_batch_sizes_that_cannot_be_dealt_name_the_nearest_that_can():
    assert count_micro_batches(48, 4, 3) == 4
    with pytest.raises(UserError, match=r"batch size 50 is not a multiple of 12 .* nearest that fit: 48 or 60"):
        count_micro_batches(50, 4, 3)
    with pytest.raises(UserError, match=r"nearest that fit: 12$"):
        count_micro_batches(5, 4, 3)
