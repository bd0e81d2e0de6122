"""`megaflow plan`: what a run would cost on a cluster, and what a pipeline schedule costs and looks like."""

from __future__ import annotations

import json
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megaflow.errors import UserError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from megaflow.config import Config
    from megaflow.parallel.simulator import Timeline
    from megaflow.planning.cluster import Cluster

MOST_PASSES = 250_000
"""Micro-batches times chunks of all ranks that are still laid out within seconds."""
WIDTH = 140
"""Columns of a table where the output is no terminal."""
OF_A_RUN = ("overrides", "gpus", "gpu", "nodes_of", "network", "matmul", "best", "micro_batch", "recompute", "layout")
OF_A_SCHEDULE = ("schedule", "pp", "micro_batches", "chunks")


def plan(
    context: typer.Context,
    overrides: Annotated[list[str] | None, typer.Argument(help="Run: section.key=value")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML of the run to plan.")] = None,
    gpus: Annotated[int, typer.Option(help="Run: GPUs of the cluster.")] = 8,
    gpu: Annotated[str, typer.Option(help="Run: a100, a100-40, h100, h200, h800, l40s or rtx4090.")] = "h100",
    nodes_of: Annotated[int, typer.Option(help="Run: GPUs per node.")] = 8,
    network: Annotated[float | None, typer.Option(help="Run: Gbit/s between nodes, for each GPU.")] = None,
    matmul: Annotated[float | None, typer.Option(help="Run: share of the peak that matrix products reach.")] = None,
    best: Annotated[int, typer.Option(help="Run: layouts to list.")] = 8,
    micro_batch: Annotated[int | None, typer.Option(help="Run: only this micro-batch size.")] = None,
    recompute: Annotated[str | None, typer.Option(help="Run: only this, none, selective or full.")] = None,
    layout: Annotated[bool, typer.Option("--layout", help="Run: the config's own layout in detail.")] = False,
    published: Annotated[bool, typer.Option("--published", help="Published step times, predicted.")] = False,
    schedule: Annotated[str, typer.Option(help="Schedule: gpipe, 1f1b, interleaved, zb_h1 or zb_v.")] = "1f1b",
    pp: Annotated[int, typer.Option(help="Schedule: pipeline ranks.")] = 4,
    micro_batches: Annotated[int, typer.Option(help="Schedule: micro-batches per step.")] = 8,
    chunks: Annotated[int | None, typer.Option(help="Schedule: chunks per rank; none: as few as it has.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Run or --published: print JSON.")] = False,
    draw: Annotated[Path | None, typer.Option(help="Run or schedule: PNG to write.")] = None,
) -> None:
    """Predict memory, step time and MFU of the layouts of a run, or show what a pipeline schedule costs.

    A run, with --config: the fastest layouts that fit (or --layout: its own, in detail) on --gpus of a --gpu; --draw
    draws memory by pipeline rank and time by part. A schedule, without --config: bubble and peak activations of a
    --schedule, in which forward, input gradient and weight gradient of a chunk take one unit of time each and transfers
    none; --draw draws it.
    """
    _no_others(context, published, config)
    if draw is not None:
        _check_picture(draw)
    if published:
        _published(as_json)
    elif config is not None:
        from megaflow.config_load import load_config

        cluster = _cluster(gpu, gpus, nodes_of, network, matmul)
        _plan_run(
            load_config(config, overrides, files=False), cluster, best, micro_batch, recompute, layout, as_json, draw
        )
    else:
        _schedule(schedule, pp, micro_batches, chunks, draw)


def _no_others(context: typer.Context, published: bool, config: Path | None) -> None:
    """UserError for an option that would be ignored."""
    names: tuple[str, ...]
    if published:
        names, where = ("config", "draw", *OF_A_RUN, *OF_A_SCHEDULE), "not with --published; leave it out"
    elif config is not None:
        names, where = (
            OF_A_SCHEDULE,
            "not with --config, which has its own; set parallel.schedule=... or parallel.pp=...",
        )
    else:
        names, where = ("as_json", *OF_A_RUN), "only with --config; give the run's YAML"
    for name in names:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            option = {"overrides": "section.key=value", "as_json": "--json"}.get(name, "--" + name.replace("_", "-"))
            raise UserError(f"{option}: {where}")


def _check_picture(target: Path) -> None:
    """UserError, before anything is worked out, for a name that no picture can have."""
    if target.is_dir():
        raise UserError(f"--draw {target}: is a folder; name a PNG in it")
    if target.suffix.lower() != ".png":
        raise UserError(f"--draw {target}: pictures are PNGs; give a name that ends in .png")
    if not target.parent.is_dir():
        raise UserError(f"--draw {target}: there is no folder {target.parent}; make it first")


def _plan_run(
    config: Config,
    cluster: Cluster,
    best: int,
    micro_batch: int | None,
    recompute: str | None,
    own: bool,
    as_json: bool,
    draw: Path | None,
) -> None:
    """The search, or the config's own layout."""
    from megaflow.planning.drawing import draw_plans
    from megaflow.planning.layout import Job, Layout
    from megaflow.planning.memory import RESERVED
    from megaflow.planning.report import detail, ranking, values
    from megaflow.planning.search import Wanted, plan_of, search
    from megaflow.planning.step import StepModel
    from megaflow.planning.work import Practice

    job = Job.of(config)
    if job.precision != "bf16":
        raise UserError(f"train.precision {job.precision}: GPUs are known in bf16 here; add train.precision=bf16")
    if own:
        plans = [plan_of(StepModel(job, cluster, Practice()), Layout.of(config, cluster.gpus))]
        lines = detail(plans[0], job, cluster)
        tree: dict[str, Any] = values(plans[0], job, config)
    else:
        if best < 1:
            raise UserError(f"--best {best}: must be at least 1")
        found = search(job, cluster, best, Wanted.parse(micro_batch, recompute, config.parallel.zero))
        plans, lines = found.best, ranking(found, config, cluster)
        tree = {
            "best": [values(plan, job, config) for plan in plans],
            "fitting": found.fitting,
            "too_large": found.too_large,
            "nearest": values(found.nearest, job, config) if found.nearest else None,
        }
        if not plans and found.nearest is None:
            raise UserError(
                f"no layout of {cluster.gpus} GPUs divides train.global_batch_size {job.global_batch} and the model; "
                "take another number of GPUs or another batch"
            )
    _print(lines, tree if as_json else None)
    if draw is not None:
        if plans:
            draw_plans(plans, cluster.gpu.memory - RESERVED, draw)
        typer.echo(draw if plans else f"{draw}: not drawn, for nothing fits", err=as_json)


def _published(as_json: bool) -> None:
    from megaflow.planning.published import rows
    from megaflow.planning.report import published_table

    found = rows()
    tree = [
        {"name": row.name, "source": row.source, "gpu": row.gpu, "gpus": row.layout.gpus, "layout": row.layout.title}
        | {"seconds": row.seconds, "predicted": row.predicted, "miss": row.miss, "fits": row.fits}
        for row in found
    ]
    _print(published_table(found), tree if as_json else None)


def _schedule(name: str, pp: int, micro_batches: int, chunks: int | None, draw: Path | None) -> None:
    from megaflow.parallel.schedule import make_schedule
    from megaflow.parallel.simulator import simulate
    from megaflow.planning.drawing import draw_schedule

    if pp * max(micro_batches, 2 * pp) * (chunks or 2) > MOST_PASSES:
        raise UserError(f"--pp {pp} --micro-batches {micro_batches}: too many actions to lay out; take fewer")
    timeline = simulate(make_schedule(name, pp, micro_batches, chunks))
    for line in summary(timeline):
        typer.echo(line)
    if draw is not None:
        draw_schedule(timeline, draw)
        typer.echo(draw)


def summary(timeline: Timeline) -> list[str]:
    """Bubble and peak activations in words; activations in micro-batches through all the layers of a rank."""
    from megaflow.planning.drawing import schedule_title

    peaks = [peak / timeline.schedule.chunks_per_rank for peak in timeline.peak_activations]
    most, least = (f"{peak(peaks):g} (rank {peaks.index(peak(peaks))})" for peak in (max, min))
    return [
        schedule_title(timeline),
        f"bubble: {timeline.bubble:.1%} of a step at whose end all ranks wait for each other; "
        f"{timeline.inner_bubble:.1%} between a rank's first action and its last",
        f"peak activations, in micro-batches through a rank's layers: most {most}, least {least}",
    ]


def _cluster(gpu: str, gpus: int, node: int, network: float | None, matmul: float | None) -> Cluster:
    """The cluster that the options describe."""
    from dataclasses import replace

    from megaflow.planning.cluster import GPUS, Cluster

    if gpu not in GPUS:
        raise UserError(f"--gpu {gpu!r}: there is no data sheet of it here; choose one of {', '.join(GPUS)}")
    for name, value in (("--gpus", gpus), ("--nodes-of", node), ("--network", network), ("--matmul", matmul)):
        if value is not None and not 0 < value < inf:
            raise UserError(f"{name} {value}: must be above 0")
    if matmul is not None and matmul > 1:
        raise UserError(f"--matmul {matmul}: is a share of the peak; give at most 1")
    if gpus > node and gpus % node:
        raise UserError(f"--gpus {gpus}: is no multiple of --nodes-of {node}; give whole nodes")
    kind = GPUS[gpu]
    if network is not None:
        kind = replace(kind, network=network * 1e9 / 8)
    if matmul is not None:
        kind = replace(kind, efficiency=replace(kind.efficiency, matmul=matmul))
    return Cluster(kind, gpus, min(node, gpus))


def _print(lines: list[RenderableType], tree: Any) -> None:
    """The lines, or the tree as JSON where there is one."""
    from rich.console import Console

    if tree is not None:
        typer.echo(json.dumps(tree, indent=1))
        return
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = WIDTH
    for line in lines:
        console.print(line)
