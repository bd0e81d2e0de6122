"""`megaflow data merge`: several corpora made one."""

from __future__ import annotations

import shlex
import sys
from glob import glob
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from megaflow.data.corpus.merge import MergeOptions, MergeReport


def merge(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Prefix of the corpus to write.")],
    prefixes: Annotated[
        list[str],
        typer.Argument(
            metavar="PREFIX...",
            help="Corpora of `megaflow prepare`; or PREFIX.bin/.idx of Megatron-LM or datatrove, or PREFIX.ds of "
            "datatrove. A pattern goes in quotes: 'corpora/zh-*'.",
        ),
    ],
    tokenizer: Annotated[Path | None, typer.Option(help="Of corpora without a manifest: the tokenizer.")] = None,
    language: Annotated[str | None, typer.Option(help="Of corpora without a manifest: the language.")] = None,
    add_special: Annotated[
        bool,
        typer.Option(
            "--add-special", help="Of corpora without a manifest: give documents the begin and end tokens they lack."
        ),
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a corpus of this name.")] = False,
) -> None:
    """Make one corpus of several, in the order given.

    Corpora of `megaflow prepare` must have been prepared alike; packs, masks and held-out documents are kept. Those of
    other tools are taken as running text and none of it is held out: merge a part of them as OUT.heldout.
    """
    from megaflow.data.corpus.merge import MergeOptions

    found = [prefix for pattern in prefixes for prefix in _expand(pattern)]
    options = MergeOptions(
        tokenizer=None if tokenizer is None else str(tokenizer),
        language=language,
        add_special=add_special,
        overwrite=overwrite,
        command=shlex.join(["megaflow", *sys.argv[1:]]),
    )
    report = _merge(out, found, options)
    for what, count in (
        (f"do not start with the begin token{', which was added' if add_special else ''}", report.no_start),
        (f"do not end with the end token{', which was added' if add_special else ''}", report.no_end),
        ("have no tokens and were left out", report.empty),
    ):
        if count:
            print(f"warning: {count:,} of {report.documents + report.empty:,} documents {what}", file=sys.stderr)
    for name, manifest in ((str(out), report.manifest), (f"{out}.heldout", report.heldout)):
        if manifest is not None:
            packs = "" if manifest.packs is None else f", {manifest.packs:,} packs of {manifest.seq_length}"
            print(f"{name}: {manifest.documents:,} documents, {manifest.tokens:,} tokens{packs}")


def _expand(pattern: str) -> list[str]:
    """The prefixes that an argument names, held-out documents apart."""
    from megaflow.data.corpus.prefixes import expand, is_pattern, is_url

    if not is_url(pattern) and is_pattern(pattern):
        foreign = {path.rpartition(".")[0] for suffix in ("idx", "ds") for path in glob(f"{pattern}.{suffix}")}
        if foreign and not glob(f"{pattern}.json"):
            return sorted(foreign)
    return expand(pattern)


def _merge(out: Path, prefixes: list[str], options: MergeOptions) -> MergeReport:
    """Run with a progress bar where there is a terminal to draw it on."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    from megaflow.data.corpus.foreign import tokens_path
    from megaflow.data.corpus.merge import merge_corpora

    console = Console(stderr=True)
    if not console.is_terminal:
        return merge_corpora(out, prefixes, options)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        total = sum(path.stat().st_size for path in map(tokens_path, map(Path, prefixes)) if path.is_file())
        task = bar.add_task(out.name, total=total)
        return merge_corpora(out, prefixes, options, lambda done: bar.update(task, completed=done))
