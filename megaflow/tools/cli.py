"""The `megaflow` program: one module of this folder per sub-command, each importing what it needs when it runs."""

from __future__ import annotations

import sys

import typer

from megaflow.errors import UserError
from megaflow.tools.config import config
from megaflow.tools.data import data
from megaflow.tools.data_inspect import inspect
from megaflow.tools.data_merge import merge
from megaflow.tools.doctor import doctor
from megaflow.tools.export import export
from megaflow.tools.generate import generate
from megaflow.tools.plan import plan
from megaflow.tools.plot import plot
from megaflow.tools.prepare import prepare

app = typer.Typer(
    name="megaflow",
    help="Continue the training of LLaMA-2 models into a new language. Train with: torchrun megaflow/pretrain.py",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for command in (prepare, config, doctor, plan, plot, generate, export):
    app.command()(command)
data.command()(inspect)
data.command()(merge)
app.add_typer(data, name="data")


def main() -> None:
    """Runs the program; a user's mistake is one line and exit code 2."""
    try:
        app()
    except UserError as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:  # a name that is too long, a folder that may not be entered
        if error.filename is None:
            raise
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
