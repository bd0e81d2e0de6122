"""The planner against published step times: how far each prediction is off.

    python benchmarks/plan_published.py [--out DIR]

Nothing is measured here, so that any machine gives the same. Writes `plan_published-<date>.json` and `.md`.
"""

from __future__ import annotations

import json
import sys
from datetime import date
from pathlib import Path
from typing import Annotated

import typer

sys.path.insert(0, str(Path(__file__).parents[1]))  # the folder of benchmarks/, wherever this is started
from megaflow.planning.published import SOURCES, Row, rows
from megaflow.planning.report import summary


def main(
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path(__file__).parent / "results",
) -> None:
    """Predict every published row and write the table."""
    found = rows()
    stem = out / f"plan_published-{date.today()}"
    stem.with_suffix(".json").write_text(json.dumps([values(row) for row in found], indent=1) + "\n")
    stem.with_suffix(".md").write_text(markdown(found))
    typer.echo(stem.with_suffix(".md"))


def values(row: Row) -> dict[str, object]:
    """A row as plain values."""
    return {
        "model": row.name,
        "source": row.source,
        "gpus": row.layout.gpus,
        "gpu": row.gpu,
        "layout": row.layout.title,
        "global_batch": row.job.global_batch,
        "seq_length": row.job.seq_length,
        "seconds": round(row.seconds, 3),
        "predicted": round(row.predicted, 3),
        "miss": round(row.miss, 4),
        "fits": row.fits,
    }


def markdown(found: list[Row]) -> str:
    """The table, its summary and the sources."""
    lines = [
        "# Published step times, predicted",
        "",
        f"{summary(found)}.",
        "",
        "| model | GPUs | batch x length | layout | published s | predicted s | miss | fits | source |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in found:
        batch = f"{row.job.global_batch} x {row.job.seq_length}"
        times = f"{row.seconds:.2f} | {row.predicted:.2f} | {row.miss:+.1%}"
        gpus = f"{row.layout.gpus} {row.gpu}"
        lines.append(
            f"| {row.name} | {gpus} | {batch} | {row.layout.title} | {times} | {row.fits or ''} | {row.source} |"
        )
    return "\n".join([*lines, "", *(f"- {key}: {text}" for key, text in SOURCES.items())]) + "\n"


if __name__ == "__main__":
    typer.run(main)
