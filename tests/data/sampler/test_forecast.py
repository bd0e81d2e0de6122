from __future__ import annotations

from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megaflow.data.sampler.forecast import forecast
from megaflow.data.sampler.groups import GroupSpec, SourceSpec
from megaflow.data.sampler.ledger import LedgerEntry, build_sampler
from megaflow.data.sampler.schedule import ONE, Knot, compile_knots
from megaflow.errors import UserError


def entry(first_step: int, mixes: list[list[int]], batch_size: int, windows: list[int]) -> LedgerEntry:
    """Two groups, of two sources and one."""
    sources = [SourceSpec(name, n, 2 * n) for name, n in zip("abc", windows, strict=True)]
    groups = (GroupSpec("g", tuple(sources[:2]), (ONE // 4, 3 * ONE // 4)), GroupSpec("h", (sources[2],), (ONE,)))
    schedule = compile_knots("steps", [Knot(100 * x, mix) for x, mix in enumerate(mixes)])
    return LedgerEntry(first_step, schedule, batch_size, 1, 16, groups, dict.fromkeys("abc", "x"), "")


mixes = st.lists(st.lists(st.integers(0, 5), min_size=2, max_size=2).filter(any), min_size=1, max_size=3)
windows = st.lists(st.integers(1, 200), min_size=3, max_size=3)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(mixes, mixes, windows, st.integers(1, 20), st.integers(1, 400), st.decimals(Decimal("0.1"), 9, places=1))
def test_the_forecast_is_what_planning_gives(first, second, windows, batch_size, steps, cap):
    ledger = [entry(1, first, batch_size, windows), entry(150, second, 7, windows)]
    found = forecast(ledger, steps, {"a": cap, "c": cap})
    sampler = build_sampler(ledger, use_native=False)
    owed, worst, reached = [0, 0], [0, 0], {}
    for step in range(1, steps + 1):
        size = sampler.batch_size
        weights = sampler.schedule.weights(sampler.clock_at(step))
        sampler.skip(1)
        owed = [due + size * w for due, w in zip(owed, weights, strict=True)]
        got = [sum(sampler.consumed[:2]), sampler.consumed[2]]
        worst = [max(w, abs(due - have * ONE)) for w, due, have in zip(worst, owed, got, strict=True)]
        for name, k in (("a", 0), ("c", 2)):
            if sampler.consumed[k] >= Fraction(cap) * windows[k]:
                reached.setdefault(name, step)
    assert [source.sequences for source in found.sources] == sampler.consumed
    assert [source.epochs for source in found.sources] == [
        Fraction(n, size) for n, size in zip(sampler.consumed, windows, strict=True)
    ]
    assert [source.capped_at for source in found.sources] == [reached.get("a"), None, reached.get("c")]
    assert [source.tokens for source in found.sources] == [16 * n for n in sampler.consumed]
    assert list(found.deviations.values()) == [w / ONE for w in worst]
    assert sampler.deviations == worst


def test_a_cap_that_would_be_exceeded_is_refused_with_source_step_and_remedy():
    ledger = [entry(1, [[1, 1]], 8, [100, 100, 100])]
    forecast(ledger, 100, {"c": Decimal(4)}).check_caps()
    forecast(ledger, 100, {"c": Decimal("3.98")}).check_caps()  # 400 sequences for 398: rounding
    found = forecast(ledger, 100, {"a": Decimal(50), "c": Decimal("3.5")})
    with pytest.raises(UserError) as caught:
        found.check_caps()
    assert str(caught.value) == (
        "data.groups.h.sources.c: max_epochs 3.5 is reached at step 88 of 100, which read it 4.00 times; lower its "
        "ratio, shorten the run, or raise max_epochs"
    )
    table = found.table()
    assert table[1].split() == ["a", "g", "100", "1,600", "1.000", "50,", "not", "reached"]
    assert table[3].split() == ["c", "h", "400", "6,400", "4.000", "3.5,", "step", "88"]
    assert table[4].startswith("group g: 50.00 % of 800 sequences in 100 steps; never more than 0.00 sequences")


def test_unused_sources_and_groups_are_listed():
    found = forecast([entry(1, [[0, 1]], 8, [5, 5, 5])], 10, {})
    assert [source.sequences for source in found.sources] == [0, 0, 80]
    assert found.summary() == "epochs over 10 steps: a 0, b 0, c 16"
