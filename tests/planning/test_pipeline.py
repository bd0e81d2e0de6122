"""Closed formulas of the pipeline against the simulator."""

from __future__ import annotations

import pytest

from megaflow.parallel.simulator import Costs, simulate
from megaflow.planning.layout import Layout
from megaflow.planning.pipeline import bubble_seconds, live_activations, simulated

SHAPES = [("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("interleaved", 5), ("zb_h1", 1), ("zb_v", 2)]
COSTS = [Costs(), Costs(1, 1.3, 0.9), Costs(1, 2, 1), Costs(1.5, 1, 1.2)]


def layout(schedule: str, chunks: int, pp: int) -> Layout:
    return Layout(pp, pp=pp, schedule=schedule, chunks=chunks)


@pytest.mark.parametrize(("schedule", "chunks"), SHAPES)
@pytest.mark.parametrize(("pp", "micro_batches"), [(2, 4), (4, 8), (4, 16), (8, 16)])
def test_formula_is_the_simulators_time(schedule: str, chunks: int, pp: int, micro_batches: int) -> None:
    cut = layout(schedule, chunks, pp)
    # ZB-V's order is made for equal costs; for others the formula is a bound
    for costs in COSTS[:1] if schedule == "zb_v" else COSTS:
        busy = micro_batches * chunks * (costs.forward + costs.backward_input + costs.backward_weight)
        bubble = bubble_seconds(cut, micro_batches, costs)
        assert bubble is not None
        assert busy + bubble == pytest.approx(simulate(cut.made(micro_batches), costs).duration)


def test_no_formula_where_a_schedule_is_not_filled() -> None:
    assert bubble_seconds(layout("zb_h1", 1, 4), 3, Costs()) is None
    assert bubble_seconds(layout("zb_v", 2, 4), 7, Costs()) is None


@pytest.mark.parametrize(("schedule", "chunks"), SHAPES)
@pytest.mark.parametrize(("pp", "micro_batches"), [(2, 2), (4, 8), (4, 4), (8, 24)])
def test_live_activations_are_the_simulators_peaks(schedule: str, chunks: int, pp: int, micro_batches: int) -> None:
    cut = layout(schedule, chunks, pp)
    assert live_activations(cut, micro_batches) == list(simulate(cut.made(micro_batches)).peak_activations)


@pytest.mark.parametrize(("schedule", "chunks"), SHAPES)
@pytest.mark.parametrize("message", [0.0, 0.2])
def test_long_steps_repeat_what_short_ones_do(schedule: str, chunks: int, message: float) -> None:
    """With a last chunk that costs more, and messages that take time."""
    pp, micro_batches = 4, 64
    cut = layout(schedule, chunks, pp)
    costs = [Costs(1, 1.2, 0.9, message)] * (pp * chunks - 1) + [Costs(1.3, 1.5, 1.1, message)]
    whole = simulate(cut.made(micro_batches), costs).duration
    assert simulated(cut, micro_batches, costs)[0] == pytest.approx(whole, rel=0.002)
