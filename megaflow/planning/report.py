"""A plan in words: tables for a terminal, plain values for programs."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from megaflow.config import Config
from megaflow.planning.cluster import Cluster
from megaflow.planning.layout import Job
from megaflow.planning.memory import RESERVED, rank_parameters
from megaflow.planning.published import SOURCES, Row
from megaflow.planning.search import Found, Plan
from megaflow.planning.volumes import volumes

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

GIB = 2**30
WORDS = ("layout", "fitted", "source")
"""Columns that are no numbers."""


def ranking(found: Found, config: Config, cluster: Cluster) -> list[RenderableType]:
    """The best layouts, what to add to the config's command line for the first, and what did not fit."""
    columns = ["tp", "sp", "cp", "pp", "schedule", "dp", "micro", "recompute", "GiB", "s/step", "tokens/s/GPU"]
    table = _table([*columns, "MFU", "bubble", "exposed"])
    for plan in found.best:
        layout, step = plan.layout, plan.step
        chunks = f" x {layout.chunks}" if layout.schedule == "interleaved" else ""
        table.add_row(
            str(layout.tp),
            "yes" if layout.sequence_parallel else "-",
            str(layout.cp),
            str(layout.pp),
            layout.schedule + chunks if layout.pp > 1 else "-",
            str(layout.dp),
            str(layout.micro_batch),
            layout.recompute,
            f"{plan.memory / GIB:.1f}",
            _seconds(step.seconds),
            f"{step.tokens:,.0f}",
            f"{step.mfu:.1%}",
            f"{step.bubble:.1%}",
            f"{step.exposed:.1%}",
        )
    lines: list[RenderableType] = [table] if found.best else []
    if found.best:
        lines.append(f"the first: {' '.join(found.best[0].layout.overrides(config)) or 'as the config has it'}")
    room = (cluster.gpu.memory - RESERVED) / GIB
    lines.append(f"{found.fitting} layouts fit into {room:.1f} GiB, {found.too_large} do not")
    if found.nearest is not None:
        lines.append(f"the least: {found.nearest.layout.title}, needs {found.nearest.memory / GIB:.1f} GiB")
    return lines


def detail(plan: Plan, job: Job, cluster: Cluster) -> list[RenderableType]:
    """One layout: memory of every pipeline rank by item, messages, time by part."""
    memory = _table(["GiB on pipeline rank", *(str(rank) for rank in range(len(plan.ranks)))])
    for item in asdict(plan.ranks[0]):
        memory.add_row(item, *(f"{getattr(rank, item) / GIB:.2f}" for rank in plan.ranks))
    memory.add_row("total", *(f"{rank.total / GIB:.2f}" for rank in plan.ranks))
    sent = _table(["a rank sends per step", "GiB"])
    for kind, size in volumes(job, plan.layout).items():
        sent.add_row(kind, f"{size / GIB:.2f}")
    time = _table(["time", "s", "share"])
    for part, seconds in plan.step.parts.items():
        time.add_row(part, f"{seconds:.3f}", f"{seconds / plan.step.seconds:.1%}")
    step = plan.step
    room = (cluster.gpu.memory - RESERVED) / GIB
    verdict = "fits into" if plan.memory <= room * GIB else "does not fit into"
    parameters = max(rank_parameters(job, plan.layout)) / 1e9
    return [
        plan.layout.title,
        f"{_seconds(step.seconds)} s a step, {step.tokens:,.0f} tokens/s/GPU, MFU {step.mfu:.1%}",
        f"fullest: pipeline rank {plan.fullest}, {plan.memory / GIB:.1f} GiB; {verdict} {room:.1f} GiB; "
        f"{parameters:.2f} B parameters on a rank at most",
        memory,
        sent,
        time,
    ]


def published_table(rows: list[Row]) -> list[RenderableType]:
    """Published rows beside what the planner says."""
    table = _table(["model", "GPUs", "layout", "published s", "predicted s", "miss", "fitted", "source"])
    for row in rows:
        gpus = f"{row.layout.gpus} {row.gpu}"
        times = f"{row.seconds:.2f}", f"{row.predicted:.2f}", f"{row.miss:+.1%}"
        table.add_row(row.name, gpus, row.layout.brief, *times, row.fits or "", row.source)
    return [table, summary(rows), *(f"{key}: {text}" for key, text in SOURCES.items())]


def summary(rows: list[Row]) -> str:
    """How far off the rows are that nothing was fitted to."""
    held_out = [row for row in rows if row.fits is None]
    worst = max(held_out, key=lambda row: abs(row.miss))
    mean = sum(abs(row.miss) for row in held_out) / len(held_out)
    return (
        f"{len(rows)} rows; {len(rows) - len(held_out)} fit a parameter each, {len(held_out)} are held out: mean miss "
        f"{mean:.1%}, largest {worst.miss:+.1%} ({worst.name}, {worst.layout.schedule})"
    )


def values(plan: Plan, job: Job, config: Config) -> dict[str, Any]:
    """A plan as plain values, in bytes and seconds."""
    layout = asdict(plan.layout) | {"dp": plan.layout.dp}
    return {
        "layout": layout,
        "overrides": plan.layout.overrides(config),
        "step": asdict(plan.step) | {"bubble": plan.step.bubble, "exposed": plan.step.exposed},
        "memory": [asdict(rank) | {"total": rank.total} for rank in plan.ranks],
        "fullest_rank": plan.fullest,
        "sent": volumes(job, plan.layout),
    }


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f}" if seconds >= 10 else f"{seconds:.3f}"


def _table(columns: list[str]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 or column in WORDS else "right", no_wrap=True)
    return table
