"""Every operation's kernels on one GPU against the floor that memory and arithmetic set, and against other programs.

    python benchmarks/kernels.py [--budget SECONDS] [--only TEXT] [--quick] [--out DIR]

16,384 tokens at LLaMA-2's shapes in bf16. The ceilings are measured in the same run, and every contender's results are
compared with fp64 before it is timed; one that cannot be imported, fails or is wrong is listed as that. Rows are
measured in the order of their importance until the budget is spent, and written as they come: `kernels-<date>.json`,
`.md` and `.png`. Without a GPU it rehearses on tiny shapes: `kernels-rehearsal-<date>`, whose times mean nothing.
"""

from __future__ import annotations

import gc
import json
import platform
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from datetime import date
from functools import cache
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from rich.progress import Progress

sys.path.insert(0, str(Path(__file__).parents[1]))  # the folder of benchmarks/, wherever this is started
from benchmarks.kernels_problem import OURS, Contender, Problem, distance
from benchmarks.kernels_report import draw, markdown
from benchmarks.kernels_specs import REHEARSAL, Sizes, Spec, specs
from benchmarks.kernels_timing import timer_of
from benchmarks.parts import version
from benchmarks.train_cpu_report import cpu_name
from benchmarks.worker import JobDied, Worker, is_fatal, one_line
from megaflow.kernels.dispatch import describe

PACKAGES = ("torch", "triton", "numpy", "liger-kernel", "quack-kernels", "flash-attn-4", "cut-cross-entropy")
PATIENCE, OVERTIME = 75.0, 15.0
"""Seconds that a contender may compile, and that it may go on when the budget is spent."""


class Job(NamedTuple):
    """For the process that measures: a problem by its number, and which of its contenders."""

    rehearsal: bool
    number: int
    slow: bool
    skip: tuple[str, ...]
    """Contenders that are done with."""
    until: float
    """The time, as `time.time()` tells it, after which no contender is begun."""


def work(job: Job | str) -> Iterator[dict[str, Any]]:
    """Measures a problem, or the ceilings: a message before and after every contender."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not isinstance(job, Job):
        yield {"ceilings": asdict(_timer(device.type).ceilings()), "backends": _backends(device)}
        return
    sizes = REHEARSAL if job.rehearsal else Sizes()
    torch.manual_seed(job.number)
    problem = specs(sizes)[job.number].build(device)
    yield {"meta": problem.meta}
    for contender in problem.contenders:
        if contender.name in job.skip or (contender.slow != job.slow and contender.name != OURS):
            continue
        if time.time() > job.until:
            yield {"contender": contender.name, "failed": "no time was left"}
            continue
        yield {"contender": contender.name}
        start = time.perf_counter()
        try:
            runs = {"runs": measure(problem, contender, device, sizes.seconds)}
        except Exception as error:
            yield {"contender": contender.name, "failed": one_line(error)}
            if is_fatal(error):
                raise
        else:
            yield {"contender": contender.name, **runs, "seconds": round(time.perf_counter() - start, 2)}
        if device.type == "cuda":  # graphs hold their tensors in cycles
            gc.collect()
            torch.cuda.empty_cache()


def measure(problem: Problem, contender: Contender, device: torch.device, seconds: float) -> dict[str, Any]:
    """Error and times of every phase of a contender.

    Raises AssertionError where its results are not the expected ones.
    """
    found = {}
    for phase, run in contender.make().items():
        if run.prepare is not None:
            run.prepare()
        results = run.results(run.call())
        pairs = zip(results, problem.expected[phase], strict=True)
        error = max(distance(out, expected.to(out.device)) for out, expected in pairs)
        if not error < problem.limit:
            raise AssertionError(f"{phase}: error {error:.1e} is beyond {problem.limit:.0e}")
        del results
        times = _timer(device.type).measure(run.call, run.prepare, seconds)
        found[phase] = {**times.as_dict(), "error": error}
    return found


@cache
def _timer(device: str) -> Any:
    return timer_of(torch.device(device))


def _backends(device: torch.device) -> list[list[str]]:
    return [list(row) for row in describe(device, torch.bfloat16, head_dim=128, grads=torch.bfloat16)]


class Options(NamedTuple):
    """How a run is made."""

    rehearsal: bool
    inline: bool
    until: float


def measure_all(
    chosen: dict[int, Spec], rounds: list[bool], result: dict[str, Any], options: Options, save: Callable[[], None]
) -> None:
    """Every problem in every round, the quick contenders in the first one."""
    worker = Worker(work, PATIENCE, options.inline)
    later = [number for number, spec in chosen.items() if spec.name.endswith(", 13B")]
    parts = [number for number in chosen if number not in later], later
    order = [(n, slow) for part in parts for slow in rounds for n in part if chosen[n].slow_peers or not slow]
    with Progress(disable=not sys.stdout.isatty()) as progress:
        task = progress.add_task("kernels", total=len(order))
        (told,) = worker.run("ceilings")
        result |= told
        for number, slow in order:
            job = Job(options.rehearsal, number, slow, (), options.until)
            _measure_problem(worker, job, result, chosen[number], save)
            progress.advance(task)
            save()
    worker.close()


def _measure_problem(worker: Worker, job: Job, result: dict[str, Any], spec: Spec, save: Callable[[], None]) -> None:
    """Keeps what the process says, and goes on in another one where it dies.

    megaflow is measured again beside the slow contenders: what the two differ by is noise.
    """
    row = result["problems"].setdefault(spec.name, {"runs": {}, "failed": {}, "seconds": {}})
    row["works"] = {phase: {**asdict(work), "intensity": work.intensity} for phase, work in spec.works.items()}
    done = {*row["runs"], *row["failed"]} - {OURS}
    while time.time() < job.until:
        current = None
        try:
            for message in worker.run(job._replace(skip=tuple(done)), job.until + OVERTIME):
                current = message.get("contender", current)
                _keep(row, message)
                save()
                if len(message) > 1:
                    done.add(message["contender"])
            return
        except JobDied as died:
            if current is None:
                row["failed"]["inputs"] = str(died)
                return
            row["failed"].setdefault(current, str(died))
            done.add(current)
    row["failed"].setdefault("slow peers" if job.slow else "everyone", "no time was left")


def _keep(row: dict[str, Any], message: dict[str, Any]) -> None:
    name = message.get("contender")
    if name is None:
        row["inputs"] = message["meta"]
    elif "failed" in message:
        row["failed"].setdefault(name, message["failed"])
    elif "runs" in message:
        if name in row["runs"]:
            row["again"] = message["runs"]
        else:
            row["runs"][name], row["seconds"][name] = message["runs"], message["seconds"]


def main(
    budget: Annotated[float, typer.Option(help="seconds after which nothing is begun")] = 210.0,
    only: Annotated[list[str] | None, typer.Option(help="measure only problems whose names contain this")] = None,
    quick: Annotated[bool, typer.Option(help="without contenders that compile for many seconds")] = False,
    out: Annotated[Path, typer.Option(help="folder of the results")] = Path("benchmarks/results"),
    inline: Annotated[bool, typer.Option(help="in this process: a crash ends everything")] = False,
    name: Annotated[str | None, typer.Option(help="of the files, instead of the dated one")] = None,
) -> None:
    """Measure megaflow's kernels and their peers on this GPU."""
    rehearsal = not torch.cuda.is_available()
    until = time.time() + budget
    numbered = enumerate(specs(REHEARSAL if rehearsal else Sizes()))
    chosen = {number: spec for number, spec in numbered if not only or any(text in spec.name for text in only)}
    if not chosen:
        raise typer.BadParameter(f"no problem is called {only}")
    dated = f"kernels-{'rehearsal-' if rehearsal else ''}{date.today().isoformat()}"
    path = (out / (name or dated)).with_suffix(".json")
    path.parent.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {
        "date": date.today().isoformat(),
        "rehearsal": rehearsal,
        "device": cpu_name() if rehearsal else torch.cuda.get_device_name(),
        "python": platform.python_version(),
        "versions": {package: found for package in PACKAGES if (found := version(package)) is not None},
        "cuda": torch.version.cuda,
        "problems": {},
    }

    def save() -> None:
        beside = path.with_suffix(".part")
        beside.write_text(json.dumps(result, indent=1) + "\n")
        beside.replace(path)
        path.with_suffix(".md").write_text(markdown(result))

    measure_all(chosen, [False] if quick else [False, True], result, Options(rehearsal, inline, until), save)
    draw(result, path.with_suffix(".png"))
    typer.echo(markdown(result))
    typer.echo(path)


if __name__ == "__main__":
    typer.run(main)
