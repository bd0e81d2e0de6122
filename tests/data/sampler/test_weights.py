from __future__ import annotations

from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megaflow.data.sampler.schedule import ONE
from megaflow.data.sampler.weights import temperature, unimax

sizes = st.lists(st.integers(0, 10**12), min_size=1, max_size=6).filter(any)
many = settings(max_examples=100, deadline=None, derandomize=True)


@many
@given(sizes, st.decimals(Decimal("0.1"), 100, places=2))
def test_temperature_flattens_and_keeps_zero(sizes, tau):
    weights = temperature(sizes, tau)
    assert sum(weights) == ONE
    powers = [n ** (1 / float(tau)) if n else 0.0 for n in sizes]
    for weight, n, power in zip(weights, sizes, powers, strict=True):
        assert weight / ONE == pytest.approx(power / sum(powers), abs=1e-8)
        assert n > 0 or weight == 0


def test_temperature_one_is_proportional():
    assert temperature([3, 1, 0, 4], Decimal(1)) == [3 * ONE // 8, ONE // 8, 0, ONE // 2]


@many
@given(sizes, st.integers(1, 4 * 10**12))
def test_unimax_shares_alike_up_to_the_limits(limits, budget):
    """Every source has its limit, or as much as any other source: what maximises the smallest share."""
    weights = unimax([Fraction(limit) for limit in limits], budget)
    assert sum(weights) == ONE
    given_out = min(budget, sum(limits))
    shares = [Fraction(weight, ONE) * given_out for weight in weights]
    slack = Fraction(given_out * len(limits), ONE) + 1
    largest = max(shares)
    for share, limit in zip(shares, limits, strict=True):
        assert share <= limit + slack
        assert abs(share - limit) <= slack or abs(share - largest) <= slack


def test_unimax_by_hand():
    """100 sequences for three sources: the smallest takes its 10, the others 45 each; or one of those is capped too."""
    assert [w / ONE for w in unimax([Fraction(200), Fraction(10), Fraction(60)], 100)] == pytest.approx(
        [0.45, 0.1, 0.45]
    )
    assert [w / ONE for w in unimax([Fraction(200), Fraction(10), Fraction(30)], 100)] == pytest.approx([0.6, 0.1, 0.3])
    assert [w / ONE for w in unimax([Fraction(30), Fraction(10), Fraction(0)], 100)] == pytest.approx([0.75, 0.25, 0])
