"""A benchmark in parts: each measured by itself, their results in one dated JSON file."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import typer
from rich.progress import Progress

from benchmarks.train_cpu_report import cpu_name

Measure = Callable[[Callable[[], None]], Any]
"""Measures a part; calls its argument after every turn."""


def measure_parts(
    path: Path, parts: Mapping[str, tuple[int, Measure]], chosen: Sequence[str] | None, packages: Sequence[str]
) -> dict[str, Any]:
    """Measure the `chosen` parts (None: all) and write them to `path`, keeping what it has of others.

    Args:
        parts: turns of each part, for its progress bar, and what measures it.
        packages: those whose versions are noted, where they are installed.
    """
    unknown = sorted(set(chosen or ()) - set(parts))
    if unknown:
        raise typer.BadParameter(f"{unknown[0]!r} is not one of {', '.join(parts)}")
    result: dict[str, Any] = json.loads(path.read_text()) if chosen and path.exists() else {"loads": {}}
    versions = {package: found for package in packages if (found := version(package)) is not None}
    result |= {
        "date": date.today().isoformat(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": result.get("versions", {}) | versions,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with Progress(disable=not sys.stdout.isatty()) as progress:
        for name in chosen or list(parts):
            turns, measure = parts[name]
            task = progress.add_task(name, total=turns)
            result["loads"][name] = round(os.getloadavg()[0], 2)
            result[name] = measure(partial(progress.advance, task))
            path.write_text(json.dumps(result, indent=1) + "\n")
    return result


def version(package: str) -> str | None:
    """The package's version; None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
