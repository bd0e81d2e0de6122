from __future__ import annotations

import json
import math
from decimal import Decimal
from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megaflow.data.sampler.schedule import (
    MAX_KNOTS,
    ONE,
    PACINGS,
    CompiledSchedule,
    Knot,
    chatflow,
    compile_knots,
    weights_from_decimals,
)
from tests.data.sampler_oracle import weights_at

mixes = st.lists(st.decimals(0, 1000, places=6), min_size=3, max_size=3).filter(any)


def shares(schedule: CompiledSchedule, x: int) -> list[float]:
    return [weight / ONE for weight in schedule.weights(x)]


def test_decimals_are_exact_and_the_rest_goes_to_the_first_largest():
    # the golden vectors' first and last mixes
    assert weights_from_decimals([".45", ".45", ".10", "0"]) == [1932735284, 1932735283, 429496729, 0]
    assert weights_from_decimals([0.1, 0.05, 0.6, 0.25]) == [429496729, 214748364, 2576980379, 1073741824]
    assert weights_from_decimals([7, 3]) == weights_from_decimals([Decimal("0.7"), "0.30"])
    assert weights_from_decimals([1]) == [ONE]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.decimals(0, 10**9, allow_nan=False), min_size=1, max_size=12).filter(any))
def test_weights_sum_to_one_and_are_floors_but_for_the_largest(values):
    weights = weights_from_decimals(values)
    total = sum(map(Fraction, values))
    largest = values.index(max(values))
    assert sum(weights) == ONE
    for k, (value, weight) in enumerate(zip(values, weights, strict=True)):
        floor = math.floor(Fraction(value) * ONE / total)
        assert weight == floor or (k == largest and floor < weight < floor + len(values))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["0.5", "-0.1"], "must not be negative, got -0.1"),
        ([float("nan"), 1], "nan is not a number"),
        (["inf", 1], "'inf' is not a number"),
        (["half", 1], "'half' is not a number"),
        (["1e999999999", 1], "not a number from"),
        ([True, 1], "True is not a number"),
        ([0, 0], "at least one weight must be above 0"),
        ([], "at least one weight must be above 0"),
    ],
)
def test_values_that_are_no_weights_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        weights_from_decimals(values)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(mixes, min_size=1, max_size=4), st.data())
def test_interpolation_equals_the_plain_integers(weights, data):
    at = sorted(data.draw(st.sets(st.integers(0, 2**50), min_size=len(weights), max_size=len(weights))))
    schedule = compile_knots("tokens", [Knot(x, w) for x, w in zip(at, weights, strict=True)])
    knots = [(x, weights_from_decimals(w)) for x, w in zip(at, weights, strict=True)]
    near = [x + d for x in at for d in (-1, 0, 1)]
    for x in [*near, *data.draw(st.lists(st.integers(0, 2**51), max_size=10))]:
        assert schedule.weights(x) == weights_at(knots, x)
        assert sum(schedule.weights(x)) == ONE


@pytest.mark.parametrize("pacing", PACINGS)
def test_every_pacing_starts_and_ends_at_its_knots_and_goes_one_way(pacing):
    start, end = ["0.8", "0.2"], ["0.3", "0.7"]
    schedule = compile_knots("steps", [Knot(100, start), Knot(1100, end, pacing)])
    assert len(schedule.knots) <= MAX_KNOTS
    assert schedule.weights(0) == schedule.weights(100) == weights_from_decimals(start)
    assert schedule.weights(1100) == schedule.weights(10**9) == weights_from_decimals(end)
    path = [schedule.weights(x)[1] for x in range(100, 1101)]
    assert path == sorted(path)


@pytest.mark.parametrize(
    ("pacing", "covered"),
    [
        ("linear", lambda u: u),
        ("cosine", lambda u: (1 - math.cos(math.pi * u)) / 2),
        ("root", math.sqrt),
        ("const", lambda u: float(u >= 1)),
        ("step", lambda u: 0 if 3 * u < 1 else 0.5 if 3 * u < 2 else 1),
    ],
)
def test_pacings_follow_their_curves(pacing, covered):
    schedule = compile_knots("steps", [Knot(7, ["1", "0"]), Knot(7 + 999, ["0", "1"], pacing)])
    for x in range(1000):
        assert shares(schedule, 7 + x)[1] == pytest.approx(covered(x / 999), abs=2e-3), x


def test_geometric_pacing_changes_each_weight_by_a_constant_ratio():
    schedule = compile_knots("steps", [Knot(0, ["0.9", "0.1", 0]), Knot(1000, ["0.1", "0.9", 0], "geometric")])
    ratios = [a / b for a, b, _ in (shares(schedule, x) for x in range(0, 1001, 100))]
    for before, after in pairwise(ratios):
        assert after / before == pytest.approx(81**-0.1, rel=1e-3)
    assert shares(schedule, 500)[2] == 0


def test_short_and_adjacent_knots_compile_with_every_pacing():
    for pacing in PACINGS:
        for span in (1, 2, 3, 5):
            schedule = compile_knots("steps", [Knot(4, [3, 1]), Knot(4 + span, [1, 3], pacing)])
            assert shares(schedule, 4) == [0.75, 0.25]
            assert shares(schedule, 4 + span) == [0.25, 0.75]


@pytest.mark.parametrize(
    ("knots", "message"),
    [
        ([], "at least one knot"),
        ([Knot(0, [1, 1]), Knot(0, [1, 1])], "ascend"),
        ([Knot(5, [1, 1]), Knot(4, [1, 1])], "ascend"),
        ([Knot(0, [1, 1]), Knot(4, [1, 1, 1])], "has 3 weights"),
        ([Knot(Decimal("0.5"), [1])], "whole numbers"),
        ([Knot(-1, [1])], "whole numbers"),
        ([Knot(0, [1], "sine")], "'sine' is not one of const, linear"),
        ([Knot(0, [1, 0]), Knot(9, [1, 1], "geometric")], "small weight"),
        ([Knot(17 * i, [i + 1, 1], "cosine") for i in range(400)], "1 to 4096 knots"),
    ],
)
def test_impossible_knots_are_refused(knots, message):
    with pytest.raises(ValueError, match=message):
        compile_knots("steps", knots)


def test_an_unknown_clock_is_refused():
    with pytest.raises(ValueError, match="'hours' is not one of steps"):
        compile_knots("hours", [Knot(0, [1])])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(mixes, mixes, st.integers(1, 10**12), st.decimals(0, 1, places=3), st.integers(0, 2 * 10**12))
def test_chatflow_is_its_formula(initial, final, t_grow, lambda0, t):
    schedule = chatflow("tokens", initial, final, t_grow, lambda0)
    progress = min(Fraction(1), Fraction(lambda0) + (1 - Fraction(lambda0)) * Fraction(t, t_grow))
    for a, b, weight in zip(initial, final, schedule.weights(t), strict=True):
        exact = (1 - progress) * Fraction(a) / sum(map(Fraction, initial)) + progress * Fraction(b) / sum(
            map(Fraction, final)
        )
        assert abs(weight - exact * ONE) <= 4  # one rounding per weight at the knots, one between them, and the rest


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"final": ["1"]}, "2 initial weights but 1 final"),
        ({"t_grow": 0}, "t_grow must be at least 1"),
        ({"lambda0": "1.5"}, "lambda0 must be from 0 to 1"),
    ],
)
def test_an_impossible_chatflow_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        chatflow(**{"clock": "tokens", "initial": ["1", "0"], "final": ["0", "1"], "t_grow": 5} | arguments)


def test_a_schedule_survives_json():
    schedule = compile_knots("documents", [Knot(0, [1, 2]), Knot(10**15, [5, 2], "root")])
    assert CompiledSchedule.from_json(json.loads(json.dumps(schedule.to_json()))) == schedule


@pytest.mark.parametrize(
    "knots", [(), ((0, (ONE - 1,)),), ((0, (ONE + 1, -1)),), ((5, (ONE,)), (5, (ONE,))), ((0, (ONE,)), (1, (0, ONE)))]
)
def test_damaged_schedules_are_refused(knots):
    with pytest.raises(ValueError, match="knot"):
        CompiledSchedule("steps", knots)
