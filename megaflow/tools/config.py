"""`megaflow config`: check a config and show it resolved, or list every setting."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def config(
    file: Annotated[Path | None, typer.Argument(help="YAML file; none: list every setting with its help")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value")] = None,
    processes: Annotated[int | None, typer.Option(help="check the layout against this many processes")] = None,
) -> None:
    """Check a config and print it resolved; without a file, list every setting."""
    from megaflow.config_load import describe, dump_config, load_config

    if file is None:
        for key, kind, default, text in describe():
            typer.echo(f"{key}  ({'; '.join(part for part in (kind, default) if part)})\n    {text}")
        return
    resolved = load_config(file, overrides)
    if processes is not None:
        resolved.check_world(processes)
    typer.echo(dump_config(resolved), nl=False)
