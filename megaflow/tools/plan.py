"""`megaflow plan`: what a pipeline schedule costs, and how it looks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megaflow.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from megaflow.parallel.schedule import Kind
    from megaflow.parallel.simulator import Timeline

MOST_PASSES = 250_000
"""Micro-batches times chunks of all ranks that are still laid out within seconds."""

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


def plan(
    schedule: Annotated[str, typer.Option(help="gpipe, 1f1b, interleaved, zb_h1 or zb_v.")] = "1f1b",
    pp: Annotated[int, typer.Option(help="Pipeline ranks.")] = 4,
    micro_batches: Annotated[int, typer.Option(help="Micro-batches per step.")] = 8,
    chunks: Annotated[int | None, typer.Option(help="Chunks per rank; none: as few as the schedule has.")] = None,
    draw: Annotated[Path | None, typer.Option(help="PNG to write.")] = None,
) -> None:
    """Print the bubble and the peak activations of a pipeline schedule, and draw it.

    Forward, input gradient and weight gradient of a chunk take one unit of time each; transfers take none.
    """
    from megaflow.parallel.schedule import make_schedule
    from megaflow.parallel.simulator import simulate

    if pp * max(micro_batches, 2 * pp) * (chunks or 2) > MOST_PASSES:
        raise UserError(f"--pp {pp} --micro-batches {micro_batches}: too many actions to lay out; take fewer")
    timeline = simulate(make_schedule(schedule, pp, micro_batches, chunks))
    for line in summary(timeline):
        typer.echo(line)
    if draw is not None:
        write_picture(timeline, draw)
        typer.echo(draw)


def summary(timeline: Timeline) -> list[str]:
    """Bubble and peak activations in words; activations in micro-batches through all the layers of a rank."""
    schedule = timeline.schedule
    peaks = [peak / schedule.chunks_per_rank for peak in timeline.peak_activations]
    most, least = (f"{peak(peaks):g} (rank {peaks.index(peak(peaks))})" for peak in (max, min))
    return [
        _title(timeline),
        f"bubble: {timeline.bubble:.1%} of a step at whose end all ranks wait for each other; "
        f"{timeline.inner_bubble:.1%} between a rank's first action and its last",
        f"peak activations, in micro-batches through a rank's layers: most {most}, least {least}",
    ]


def _title(timeline: Timeline) -> str:
    schedule = timeline.schedule
    sizes = f"pp {schedule.pp}, micro-batches {schedule.micro_batches}, chunks per rank {schedule.chunks_per_rank}"
    return f"{schedule.name}, {sizes}"


def write_picture(timeline: Timeline, target: Path) -> None:
    """Draws a row per rank over time; UserError when the file cannot be written."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    if target.is_dir():
        raise UserError(f"{target}: is a folder; name a PNG in it")
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
    axis.set_title(f"{_title(timeline)}: bubble {timeline.bubble:.1%}{shades}")
    beside = target.with_name(f".tmp-{target.name}")
    try:
        figure.savefig(beside, dpi=120, format="png")
        beside.replace(target)
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error.strerror}); give another --draw") from None


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
