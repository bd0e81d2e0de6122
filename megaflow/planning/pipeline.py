"""How long a pipeline takes: closed formulas, and the simulator where there is none."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from megaflow.parallel.schedule import Schedule
from megaflow.parallel.simulator import Costs, Timeline, simulate
from megaflow.planning.layout import Layout

PERIODS = 3
"""Multiples of pp micro-batches after which a schedule repeats itself."""


def bubble_seconds(layout: Layout, micro_batches: int, costs: Costs) -> float | None:
    """Seconds that every rank idles when all chunks cost the same and messages nothing; None where none is known.

    1F1B and GPipe: (p - 1) (F + B + W) (Narayanan et al., arXiv 2104.04473; interleaving divides it by the chunks, here
    in the cost of one). ZB-H1: (p - 1) (F + B - W) (Qi et al., arXiv 2401.10241), as long as that is more than F and B.
    ZB-V: (p - 1) F with F = B = W, and about the larger of F and B otherwise.
    """
    pp, forward, backward_input, backward_weight = (
        layout.pp,
        costs.forward,
        costs.backward_input,
        costs.backward_weight,
    )
    if layout.schedule == "zb_h1":
        wait = max(forward + backward_input - backward_weight, forward, backward_input)
        return (pp - 1) * wait if micro_batches >= pp else None
    if layout.schedule == "zb_v":
        return (pp - 1) * max(forward, backward_input) if micro_batches >= 2 * pp else None
    return (pp - 1) * (forward + backward_input + backward_weight)


def live_activations(layout: Layout, micro_batches: int) -> list[int]:
    """The most activations of a chunk for a micro-batch that each pipeline rank holds at once."""
    pp, chunks = layout.pp, layout.chunks
    if layout.schedule == "gpipe":
        return [micro_batches] * pp
    if layout.schedule == "zb_h1":
        return [min(pp, micro_batches)] * pp
    if layout.schedule == "zb_v":
        return [2 * pp] * pp if micro_batches >= 2 * pp else _peaks(layout.made(micro_batches))
    warmup = [(pp - 1 - r) if chunks == 1 else 2 * (pp - 1 - r) + (chunks - 1) * pp for r in range(pp)]
    return [min(wait + 1, micro_batches * chunks) for wait in warmup]


@lru_cache(maxsize=32)
def _peaks(schedule: Schedule) -> list[int]:
    return list(simulate(schedule).peak_activations)


def simulated(layout: Layout, micro_batches: int, costs: Sequence[Costs]) -> tuple[float, Timeline]:
    """Seconds of all micro-batches by the simulator, and the timeline of as many as it takes to see the rest repeat."""
    few = PERIODS * layout.pp + micro_batches % layout.pp
    if micro_batches <= few + layout.pp:
        timeline = simulate(layout.made(micro_batches), costs)
        return timeline.duration, timeline
    timeline = simulate(layout.made(few), costs)
    more = simulate(layout.made(few + layout.pp), costs)
    period = more.duration - timeline.duration
    return more.duration + (micro_batches - few - layout.pp) / layout.pp * period, more
