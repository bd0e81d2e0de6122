"""Pictures of a schedule, of the memory of pipeline ranks, and of where a step's time goes."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from megaflow.errors import UserError
from megaflow.planning.search import Plan

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from megaflow.parallel.schedule import Kind
    from megaflow.parallel.simulator import Timeline

COLOURS: dict[Kind, str] = {
    "forward": "#5b8def",
    "backward": "#2fa37c",
    "backward_input": "#f0a63c",
    "backward_weight": "#c65b7c",
}
NAMES: dict[Kind, str] = {
    "forward": "forward",
    "backward": "backward (both gradients)",
    "backward_input": "input gradient",
    "backward_weight": "weight gradient",
}
DIGIT_INCHES = 0.065
FEWEST_BARS = 4
"""There is room for as many, so that one alone is no wall."""
MOST_NAMED = 10
"""Bars that have room for their layouts' names; more are numbered as in the table."""
PALETTE = ("#5b8def", "#2fa37c", "#f0a63c", "#c65b7c", "#8d6cc9", "#6b7785", "#3fb6c4", "#b5a642", "#d98c5f")
"""Of stacked bars, from the bottom."""


def schedule_title(timeline: Timeline) -> str:
    """Name and sizes of a schedule."""
    schedule = timeline.schedule
    sizes = f"pp {schedule.pp}, micro-batches {schedule.micro_batches}, chunks per rank {schedule.chunks_per_rank}"
    return f"{schedule.name}, {sizes}"


def draw_schedule(timeline: Timeline, target: Path) -> None:
    """A row per rank over time; UserError when the file cannot be written."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    schedule = timeline.schedule
    size = min(max(0.2 * timeline.duration, 9), 40), min(0.3 * schedule.pp, 24) + 1.6
    figure = Figure(figsize=size, layout="constrained")
    axis = figure.subplots()
    _draw_ranks(axis, timeline, inches_per_unit=0.9 * size[0] / timeline.duration)
    kinds = {action.kind for actions in schedule.ranks for action in actions}
    figure.legend(
        handles=[Patch(color=COLOURS[kind], label=NAMES[kind]) for kind in COLOURS if kind in kinds],
        loc="outside lower center",
        ncols=3,
        frameon=False,
    )
    shades = " (the lighter, the later the chunk)" if schedule.chunks_per_rank > 1 else ""
    axis.set_title(f"{schedule_title(timeline)}: bubble {timeline.bubble:.1%}{shades}")
    _write(figure, target)


def draw_plans(plans: list[Plan], room: float, target: Path) -> None:
    """Memory of the first plan's pipeline ranks against `room` bytes, and time of all of them, as stacked bars."""
    from matplotlib.figure import Figure

    first = plans[0]
    figure = Figure(figsize=(13, 5.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    items = {item: [asdict(rank)[item] / 2**30 for rank in first.ranks] for item in asdict(first.ranks[0])}
    left.axhline(room / 2**30, color="black", linestyle="--", linewidth=1, label=f"room: {room / 2**30:.1f}")
    _stack(left, [str(rank) for rank in range(len(first.ranks))], items)
    left.set(xlabel="pipeline rank", ylabel="GiB", title=f"memory of {first.layout.brief}")
    left.set_ylim(top=1.06 * max(room, first.memory) / 2**30)
    parts = {part: [plan.step.parts[part] for plan in plans] for part in first.step.parts}
    crowded = len(plans) > MOST_NAMED
    names = [str(number) if crowded else plan.layout.brief.replace(" ", "\n") for number, plan in enumerate(plans, 1)]
    _stack(right, names, parts)
    right.set(xlabel="layout" if crowded else "", ylabel="seconds", title="time of a step")
    right.tick_params(axis="x", labelsize=7 if len(plans) > 4 else 9)
    _write(figure, target)


def _stack(axis: Axes, labels: list[str], items: dict[str, list[float]]) -> None:
    bottom = [0.0] * len(labels)
    for (item, heights), colour in zip(items.items(), PALETTE, strict=False):
        if any(heights):
            axis.bar(range(len(labels)), heights, bottom=bottom, label=item, color=colour, width=0.7)
            bottom = [below + height for below, height in zip(bottom, heights, strict=True)]
    axis.set_xticks(range(len(labels)), labels)
    middle, half = (len(labels) - 1) / 2, max(len(labels), FEWEST_BARS) / 2
    axis.set_xlim(middle - half - 0.1, middle + half + 0.1)
    axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), reverse=True)


def _draw_ranks(axis: Axes, timeline: Timeline, inches_per_unit: float) -> None:
    """The actions as bars, with the number of the micro-batch where there is room for it."""
    from matplotlib.colors import to_rgb

    schedule = timeline.schedule
    line = 0.3 if inches_per_unit > 0.05 else 0  # thin bars would be all edge
    digits = len(str(schedule.micro_batches - 1))
    for rank, actions in enumerate(schedule.ranks):
        held = sorted({action.chunk for action in actions})
        bars: dict[tuple[Kind, int], list[tuple[float, float]]] = {}
        for action, start, end in zip(actions, timeline.starts[rank], timeline.ends[rank], strict=True):
            bars.setdefault((action.kind, action.chunk), []).append((start, end - start))
            if (end - start) * inches_per_unit > DIGIT_INCHES * digits + 0.03:
                middle = (start + end) / 2
                axis.text(middle, rank, str(action.micro_batch), ha="center", va="center", fontsize=6.5)
        for (kind, chunk), spans in bars.items():
            lighter = 0.6 * held.index(chunk) / len(held)
            colour = [part + (1 - part) * lighter for part in to_rgb(COLOURS[kind])]
            axis.broken_barh(spans, (rank - 0.45, 0.9), color=colour, edgecolor="white", linewidth=line)
    axis.set(xlim=(0, timeline.duration), ylim=(schedule.pp - 0.5, -0.5), ylabel="rank")
    axis.set_xlabel("time (forward of a chunk = input gradient = weight gradient = 1)")
    axis.set_yticks(range(0, schedule.pp, -(-schedule.pp // 20)))


def _write(figure: Figure, target: Path) -> None:
    if target.is_dir():
        raise UserError(f"{target}: is a folder; name a PNG in it")
    beside = target.with_name(f".tmp-{target.name}")
    try:
        figure.savefig(beside, dpi=120, format="png")
        beside.replace(target)
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error.strerror}); give another --draw") from None
