"""How long a step that saves waits, with background saves and without.

    python benchmarks/checkpoint_stall.py [--mib N] [--saves N] [--steps N] [--folder DIR] [--out DIR]

One process multiplies matrices, as a step would, and saves a state of fp32 tensors every few steps. Both ways take
turns, so that a busy machine slows both alike. Writes `checkpoint_stall-<date>.json` and `.md`.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer

from megaflow.checkpoint.background import CheckpointSaver
from megaflow.checkpoint.store import CheckpointStore

sys.path.insert(0, str(Path(__file__).parents[1]))  # the folder of benchmarks/, wherever this is started
from benchmarks.train_cpu_report import cpu_name

TENSORS = 32
WAYS = {"waiting": False, "background": True}


def work(products: int) -> float:
    """Seconds that so many products of matrices take."""
    matrix, start = torch.ones(512, 512), time.perf_counter()
    for _ in range(products):
        matrix @ matrix
    return time.perf_counter() - start


def measure(
    saver: CheckpointSaver, tensors: dict[str, torch.Tensor], number: int, steps: int, products: int
) -> list[float]:
    """Seconds of each step, the first of which saves; begins and ends when nothing is written."""
    seconds = []
    for step in range(steps):
        start = time.perf_counter()
        work(products)
        if step == 0:
            saver.save(number, tensors, {})
        seconds.append(time.perf_counter() - start)
    saver.wait()
    return seconds


def summary(groups: list[list[float]]) -> dict[str, float]:
    """Milliseconds that steps take longer which save, the first and the others, and the three after them."""
    plain = median(seconds for group in groups for seconds in group[-3:])
    return {
        "step_ms": 1000 * plain,
        "first_stall_ms": 1000 * (groups[0][0] - plain),
        "stall_ms": 1000 * (median(group[0] for group in groups[1:]) - plain),
        "later_ms": 1000 * (median(seconds for group in groups for seconds in group[1:4]) - plain),
    }


def main(
    mib: Annotated[int, typer.Option(help="MiB of the state.")] = 100,
    saves: Annotated[int, typer.Option(help="Saves of each way.")] = 8,
    steps: Annotated[int, typer.Option(help="Steps from one save to the next, at least 8.")] = 20,
    folder: Annotated[Path | None, typer.Option(help="Where to save; default: a temporary folder.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("benchmarks/results"),
) -> None:
    torch.set_num_threads(1)
    tensors = {f"t{i}": torch.rand(mib * 2**18 // TENSORS) for i in range(TENSORS)}
    products = round(100 * 0.1 / work(100))  # a tenth of a second
    groups: dict[str, list[list[float]]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory(prefix="stall-", dir=folder) as place:
        savers = {
            way: CheckpointSaver(CheckpointStore(Path(place) / way), asynchronous, lambda _: None, 60)
            for way, asynchronous in WAYS.items()
        }
        for number in range(saves):
            for way, saver in savers.items():
                groups[way].append(measure(saver, tensors, number, steps, products))
    found: dict[str, Any] = {"date": str(date.today()), "cpu": cpu_name(), "torch": torch.__version__}
    found |= {"mib": mib, "saves": saves, "steps": steps}
    found |= {way: summary(rows) for way, rows in groups.items()}
    out.mkdir(parents=True, exist_ok=True)
    stem = out / f"checkpoint_stall-{found['date']}"
    stem.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    lines = [f"| {way} | " + " | ".join(f"{value:.0f}" for value in found[way].values()) + " |" for way in WAYS]
    text = (
        f"# Stall of a step that saves {mib} MiB\n\n{found['cpu']}, torch {found['torch']}, {saves} saves each way in "
        "turns, one thread computes; medians in ms. Longer than a plain step are:\n\n"
        "| way | plain step | first that saves | others that save | while it writes |\n|---|---|---|---|---|\n"
        + "\n".join(lines)
        + "\n"
    )
    stem.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    typer.run(main)
