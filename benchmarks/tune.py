"""Chooses the configurations of `kernels/tuned.json` for the GPU that is here, or says which could be chosen.

    python benchmarks/tune.py [--kernel NAME] [--head-dim N] [--budget SECONDS]   on a GPU: times, writes the table
    python benchmarks/tune.py --rank-only [--arch 90] [--kernel NAME]             anywhere: compiles and ranks
    python benchmarks/tune.py --compiled FILE                                     on a GPU, after a ranking elsewhere

All candidates are compiled ahead of time; those that spill registers or need more shared memory than there is are
dropped. The others are timed on causal attention over one document per sequence and over packed documents (bf16, 16,384
tokens, 4096 channels), and must give what the present configuration gives. The winner of each kernel and head size is
written into the table at once, so that a run that is stopped leaves what it has found; all timings are in
`tune-<date>.json`, a ranking in `tune-ranked-<date>.json`.
"""

from __future__ import annotations

import json
import os
import sys
import time
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict
from datetime import date
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.progress import Progress

sys.path.insert(0, str(Path(__file__).parents[1]))  # the folder of benchmarks/, wherever this is started
from benchmarks.tune_candidates import Config, Outcome, candidates, compile_candidate, current, known_arch
from benchmarks.tune_timing import PATIENCE, Group, Job, time_group, time_job
from benchmarks.worker import Worker
from megaflow.kernels.tuned import TABLE, table

HEAD_DIMS = (128, 64, 256)
"""The most important first."""


def groups(kernels: list[str] | None, head_dims: list[int] | None, arch: int) -> list[Group]:
    """Every kernel of the table with every head size that it is for."""
    unknown = set(kernels or ()) - set(table())
    if unknown:
        raise typer.BadParameter(f"{min(unknown)!r} is not in the table; there are {', '.join(table())}")
    found = [Group(kernel, dim) for dim in head_dims or HEAD_DIMS for kernel in kernels or table()]
    return [group for group in found if current(*group, arch) is not None]


def compile_all(pool: ProcessPoolExecutor, found: list[Group], arch: int) -> dict[Group, list[Future[Outcome]]]:
    """Begins to compile every candidate of every group."""
    return {
        group: [pool.submit(compile_candidate, *group, arch, config) for config in candidates(_now(group, arch))]
        for group in found
    }


def _now(group: Group, arch: int) -> Config:
    config = current(*group, arch)
    assert config is not None
    return config


def pool_of(workers: int | None) -> ProcessPoolExecutor:
    """Processes that compile; what the compiler prints about candidates that are none is not shown."""
    return ProcessPoolExecutor(workers, get_context("spawn"), initializer=_silence)


def _silence() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def score(row: dict[str, Any]) -> float:
    """Milliseconds of both layouts together; infinite where it was not timed."""
    return row["causal"]["ms"] + row["packed"]["ms"] if "packed" in row else float("inf")


def format_table(found: dict[str, Any]) -> str:
    """The table as its file is written: a configuration to a line."""
    kernels = []
    for kernel, archs in found.items():
        blocks = []
        for arch, shapes in archs.items():
            lines = [f"   {json.dumps(shape)}: {json.dumps(config)}" for shape, config in shapes.items()]
            blocks.append(f"  {json.dumps(arch)}: {{\n" + ",\n".join(lines) + "\n  }")
        kernels.append(f" {json.dumps(kernel)}: {{\n" + ",\n".join(blocks) + "\n }")
    return "{\n" + ",\n".join(kernels) + "\n}\n"


def write_winner(path: Path, group: Group, arch: int, config: Config) -> None:
    """Puts a configuration into the file, which is read anew: everything else in it stays.

    A GPU that has no entry gets a copy of that of the next older one.
    """
    found = json.loads(path.read_text())
    archs = found[group.kernel]
    if str(arch) not in archs:
        archs[str(arch)] = dict(archs[known_arch(group.kernel, arch)])
    archs[str(arch)][str(group.head_dim)] = config
    beside = path.with_suffix(".part")
    beside.write_text(format_table(found))
    beside.replace(path)


def shown(config: Config) -> str:
    return " ".join(f"{key.removeprefix('num_')} {value}" for key, value in config.items())


def print_ranking(group: Group, outcomes: list[Outcome]) -> None:
    """The survivors in the order of what they use, then how many were dropped for what."""
    survivors = sorted((x for x in outcomes if x.dropped is None), key=Outcome.rank)
    typer.echo(f"\n{group.kernel}, head size {group.head_dim}: {len(survivors)} of {len(outcomes)} survive")
    for x in survivors:
        mark = "  <- present" if x.config == outcomes[0].config else ""
        typer.echo(f"  {x.registers:3} registers {x.shared / 1024:5.0f} KiB  {shown(x.config)}{mark}")
    reasons: dict[str, int] = {}
    for x in outcomes:
        if x.dropped:
            kind = x.dropped.split(":")[0].split(" bytes")[0].rstrip("0123456789 ")
            reasons[kind] = reasons.get(kind, 0) + 1
    typer.echo("  dropped: " + (", ".join(f"{kind} {count}" for kind, count in reasons.items()) or "none"))


def tune(
    found: dict[Group, list[Future[Outcome]] | list[Outcome]], arch: int, until: float, path: Path, save: Any
) -> None:
    """Times every group's survivors and writes its winner."""
    worker = Worker(time_job, PATIENCE)
    with Progress(disable=not sys.stdout.isatty()) as progress:
        task = progress.add_task("tune", total=len(found))
        for group, pending in found.items():
            if time.time() > until:
                save(group, {"left out": "no time was left"})
                continue
            outcomes = [x.result() if isinstance(x, Future) else x for x in pending]
            before = outcomes[0].config
            timed = [before, *(x.config for x in outcomes[1:] if x.dropped is None)]
            rows = time_group(worker, Job(group, arch, before, timed), until)
            best = min(range(len(rows)), key=lambda number: score(rows[number]))
            said = {shown(config): row for config, row in zip(timed, rows, strict=True)}
            entry: dict[str, Any] = {"before": before, "timed": said, "compiled": [asdict(x) for x in outcomes]}
            if score(rows[best]) < float("inf"):
                write_winner(path, group, arch, timed[best])
                entry["winner"] = timed[best]
                typer.echo(
                    f"{group.kernel}, head size {group.head_dim}: {shown(timed[best])}, {score(rows[best]):.3f} ms "
                    f"instead of {score(rows[0]):.3f}"
                )
            save(group, entry)
            progress.advance(task)
    worker.close()


def main(
    kernel: Annotated[list[str] | None, typer.Option(help="only this kernel of the table")] = None,
    head_dim: Annotated[list[int] | None, typer.Option(help="only this head size")] = None,
    rank_only: Annotated[bool, typer.Option(help="compile and rank, time nothing")] = False,
    arch: Annotated[int | None, typer.Option(help="compute capability to rank for, 90 for 9.0")] = None,
    compiled: Annotated[Path | None, typer.Option(help="a ranking made before, instead of compiling all")] = None,
    budget: Annotated[float, typer.Option(help="seconds after which nothing is begun")] = 420.0,
    workers: Annotated[int | None, typer.Option(help="processes that compile; default: all cores")] = None,
    out: Annotated[Path, typer.Option(help="folder of the timings")] = Path("benchmarks/results"),
    path: Annotated[Path, typer.Option("--table", help="the table that winners are written into")] = TABLE,
) -> None:
    """Tune the attention kernels for this GPU."""
    until, here = time.time() + budget, torch.cuda.is_available()
    if not here and not rank_only:
        raise typer.BadParameter("there is no GPU to time on; --rank-only says which candidates there are")
    major, minor = torch.cuda.get_device_capability() if here else (9, 0)
    arch = arch or 10 * major + minor
    stem = "tune-ranked" if rank_only else "tune"
    result_path = out / f"{stem}-{date.today().isoformat()}.json"
    result: dict[str, Any] = {"date": date.today().isoformat(), "arch": arch, "groups": {}}
    result["device"] = torch.cuda.get_device_name() if here else "none"
    out.mkdir(parents=True, exist_ok=True)

    def save(group: Group, entry: dict[str, Any]) -> None:
        result["groups"][f"{group.kernel}/{group.head_dim}"] = entry
        beside = result_path.with_suffix(".part")
        beside.write_text(json.dumps(result, indent=1) + "\n")
        beside.replace(result_path)

    chosen = groups(kernel, head_dim, arch)
    with pool_of(workers) as pool:
        if compiled is not None:
            found: dict[Group, Any] = read_ranking(compiled, chosen, arch)
        else:
            found = compile_all(pool, chosen, arch)
        if rank_only:
            for group, pending in found.items():
                outcomes = [x.result() if isinstance(x, Future) else x for x in pending]
                print_ranking(group, outcomes)
                save(group, {"compiled": [asdict(x) for x in outcomes]})
        else:
            tune(found, arch, until, path, save)
        pool.shutdown(cancel_futures=True)
    typer.echo(result_path)


def read_ranking(path: Path, chosen: list[Group], arch: int) -> dict[Group, list[Outcome]]:
    """The outcomes of a ranking for the chosen groups that it has; the present configuration comes first.

    Raises typer.BadParameter for a ranking for another GPU.
    """
    ranking = json.loads(path.read_text())
    if ranking["arch"] != arch:
        raise typer.BadParameter(f"{path} was made for compute capability {ranking['arch']}, this is {arch}")
    found = {}
    for group in chosen:
        entry = ranking["groups"].get(f"{group.kernel}/{group.head_dim}")
        if entry is not None:
            outcomes, now = [Outcome(**x) for x in entry["compiled"]], _now(group, arch)
            present = next((x for x in outcomes if x.config == now), Outcome(now))
            found[group] = [present, *(x for x in outcomes if x.config != now)]
    return found


if __name__ == "__main__":
    typer.run(main)
