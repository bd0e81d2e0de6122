"""A plan in words: tables for a terminal, plain values for programs."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

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


def ranking(found: Found, cluster: Cluster) -> list[RenderableType]:
    """The best layouts, and what did not fit."""
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
            f"{step.seconds:.3g}",
            f"{step.tokens:,.0f}",
            f"{step.mfu:.1%}",
            f"{step.bubble:.1%}",
            f"{step.exposed:.1%}",
        )
    lines: list[RenderableType] = [table] if found.best else []
    room = (cluster.gpu.memory - RESERVED) / GIB
    lines.append(f"{found.fitting} layouts fit into {room:.1f} GiB, {found.too_large} do not")
    if found.nearest is not None:
        lines.append(f"nearest of those: {found.nearest.layout.title} needs {found.nearest.memory / GIB:.1f} GiB")
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
        f"{step.seconds:.3g} s a step, {step.tokens:,.0f} tokens/s/GPU, MFU {step.mfu:.1%}",
        f"fullest: pipeline rank {plan.fullest}, {plan.memory / GIB:.1f} GiB; {verdict} {room:.1f} GiB; "
        f"{parameters:.2f} B parameters on a rank at most",
        memory,
        sent,
        time,
    ]


def published_table(rows: list[Row]) -> list[RenderableType]:
    """Published rows beside what the planner says."""
    table = _table(["model", "GPUs", "layout", "published s", "predicted s", "miss", "fitted"])
    for row in rows:
        gpus = f"{row.layout.gpus} {row.gpu}"
        times = f"{row.seconds:.2f}", f"{row.predicted:.2f}", f"{row.miss:+.1%}"
        table.add_row(row.name, gpus, row.layout.title, *times, row.fits or "")
    worst = max(rows, key=lambda row: abs(row.miss))
    mean = sum(abs(row.miss) for row in rows) / len(rows)
    held_out = sum(row.fits is None for row in rows)
    summary = f"{len(rows)} rows, {held_out} held out; mean miss {mean:.1%}, largest {worst.miss:+.1%} ({worst.name})"
    return [table, summary, *(f"{key}: {text}" for key, text in SOURCES.items())]


def values(plan: Plan, job: Job) -> dict[str, Any]:
    """A plan as plain values, in bytes and seconds."""
    layout = asdict(plan.layout) | {"dp": plan.layout.dp}
    return {
        "layout": layout,
        "step": asdict(plan.step) | {"bubble": plan.step.bubble, "exposed": plan.step.exposed},
        "memory": [asdict(rank) | {"total": rank.total} for rank in plan.ranks],
        "fullest_rank": plan.fullest,
        "sent": volumes(job, plan.layout),
    }


def _table(columns: list[str]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right", overflow="fold")
    return table
