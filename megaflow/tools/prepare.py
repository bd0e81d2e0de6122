"""`megaflow prepare`: text files to a tokenised corpus."""

from __future__ import annotations

import os
import shlex
import signal
import sys
from enum import StrEnum
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from megaflow.errors import UserError

if TYPE_CHECKING:
    from rich.progress import TaskID

    from megaflow.data.corpus.manifest import Manifest
    from megaflow.data.prepare.encode import PrepareOptions
    from megaflow.data.prepare.prepare import PrepareReport


WORKERS_PER_CPU = 4
"""Processes allowed per CPU."""


class KindChoice(StrEnum):
    """Kinds of corpora."""

    text = "text"
    parallel = "parallel"
    instruction = "instruction"


class LossChoice(StrEnum):
    """What the loss covers."""

    all = "all"
    response = "response"


class EncoderChoice(StrEnum):
    """Libraries that encode."""

    sentencepiece = "sentencepiece"
    tokenizers = "tokenizers"
    gigatoken = "gigatoken"


def prepare(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Prefix of the corpus: OUT.bin, OUT.idx, OUT.json ...")],
    inputs: Annotated[
        list[Path],
        typer.Argument(
            metavar="INPUT...",
            help="JSONL or plain text (each also .zst), Parquet or Arrow, or a folder: of Parquet or JSONL files, or "
            "saved by Hugging Face datasets. A .txt file is one document.",
        ),
    ],
    tokenizer: Annotated[Path, typer.Option(help="SentencePiece .model or Hugging Face tokenizer.json.")],
    language: Annotated[str, typer.Option(help="Language of the corpus, for logs: en, zh, en-zh ...")],
    encoder: Annotated[
        EncoderChoice | None,
        typer.Option(
            help="Library to tokenise with instead of the tokenizer's own, which tokenises the first 1,000 records and "
            "1 % of all others as well: one document with other ids, and the preparation fails."
        ),
    ] = None,
    kind: Annotated[KindChoice, typer.Option(help="What a record is.")] = KindChoice.text,
    seq_length: Annotated[
        int | None, typer.Option(min=8, help="Sequence length to pack examples for (parallel and instruction).")
    ] = None,
    text_field: Annotated[str, typer.Option(help="Field of a text.")] = "text",
    source_field: Annotated[str, typer.Option(help="Field of a pair's first text.")] = "en",
    target_field: Annotated[str, typer.Option(help="Field of a pair's second text.")] = "zh",
    instruction_field: Annotated[str, typer.Option(help="Field of an instruction.")] = "instruction",
    input_field: Annotated[str, typer.Option(help="Field of its input, which may be missing.")] = "input",
    output_field: Annotated[str, typer.Option(help="Field of the response.")] = "output",
    turns_field: Annotated[
        str | None,
        typer.Option(
            help="Instructions that are conversations: the field with the list of turns, each {role, content} or "
            "{from, value}.",
        ),
    ] = None,
    template: Annotated[
        str | None,
        typer.Option(
            help="Pairs: 'tab' (default) or 'labelled', the direction chosen per pair by hash, or a string with "
            "{source} and {target}. Instructions: 'chatflow' (default) or a string with {instruction}, {input} "
            "and {output}; conversations repeat it for each answer, without {input}."
        ),
    ] = None,
    plain_fraction: Annotated[
        float, typer.Option(min=0, max=1, help="Share of instruction examples written without the template.")
    ] = 0.15,
    loss: Annotated[
        LossChoice,
        typer.Option(
            help="Train on everything, or on responses (of pairs: the second text) alone. The text before a "
            "response is then tokenised by itself, as a prompt is at generation."
        ),
    ] = LossChoice.all,
    heldout: Annotated[
        float, typer.Option(min=0, max=0.5, help="Share of documents held out, by hash of their text, to OUT.heldout.")
    ] = 0.01,
    dedup: Annotated[
        bool,
        typer.Option(help="Leave out documents whose text an earlier one has; of pairs and instructions all of it."),
    ] = True,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of the order of documents.")] = 0,
    workers: Annotated[int, typer.Option(min=1, help="Processes that tokenise.")] = os.cpu_count() or 1,
    max_bad: Annotated[
        float, typer.Option(min=0, max=1, help="Share of records that may be unusable before it is an error.")
    ] = 0.01,
    txt_per_line: Annotated[bool, typer.Option("--txt-per-line", help="Each line of a .txt is a document.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a corpus of this name.")] = False,
) -> None:
    """Tokenise text files into a corpus to train on: OUT.bin, OUT.idx, the manifest OUT.json and sidecars."""
    from megaflow.data.corpus.writer import check_name
    from megaflow.data.prepare.encode import PrepareOptions
    from megaflow.data.prepare.templates import DEFAULT_TEMPLATE, ExampleFormat, check_template

    check_name(out)
    template = template if template is not None else DEFAULT_TEMPLATE.get(kind.value, "")
    if turns_field is not None and kind is not KindChoice.instruction:
        raise UserError(f"--turns-field is for --kind instruction, not {kind.value}")
    check_template(kind.value, template, turns_field is not None)
    if (seq_length is None) != (kind is KindChoice.text):
        raise UserError(
            f"--kind {kind.value} {'needs' if seq_length is None else 'takes no'} --seq-length: "
            "examples are packed whole for one sequence length, running text serves every length"
        )
    if kind is KindChoice.text and loss is LossChoice.response:
        raise UserError("--loss response is for --kind parallel and instruction")
    limit = WORKERS_PER_CPU * (os.cpu_count() or 1)
    if workers > limit:
        raise UserError(f"--workers {workers}: at most {limit} on this machine, {WORKERS_PER_CPU} for each of its CPUs")
    fields = {
        KindChoice.text: (text_field,),
        KindChoice.parallel: (source_field, target_field),
        KindChoice.instruction: (turns_field,)
        if turns_field is not None
        else (instruction_field, input_field, output_field),
    }[kind]
    if len(set(fields)) != len(fields):
        raise UserError(f"--kind {kind.value}: the fields {', '.join(fields)} are not all different")
    if kind is not KindChoice.text and any(path.name.lower().endswith((".txt", ".txt.zst")) for path in inputs):
        raise UserError(f"--kind {kind.value}: records have several fields, which .txt has not; give JSONL or Parquet")
    options = PrepareOptions(
        format=ExampleFormat(
            kind=kind.value, fields=fields, template=template, loss=loss.value, plain_fraction=plain_fraction
        ),
        language=language,
        tokenizer=str(tokenizer),
        encoder=None if encoder is None else encoder.value,
        seq_length=seq_length,
        heldout=heldout,
        dedup=dedup,
        seed=seed,
        workers=workers,
        max_bad=max_bad,
        txt_per_line=txt_per_line,
        overwrite=overwrite,
        command=shlex.join(["megaflow", *sys.argv[1:]]),
    )
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        report = _prepare(out, inputs, options)
    finally:
        signal.signal(signal.SIGTERM, before)
    _print_report(out, report)


def _terminate(number: int, _: FrameType | None) -> NoReturn:
    """End as from an exception, so that files are closed and it is said what is kept."""
    sys.exit(128 + number)


def _prepare(out: Path, inputs: list[Path], options: PrepareOptions) -> PrepareReport:
    """Run with a progress bar where there is a terminal to draw it on."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    from megaflow.data.prepare.prepare import prepare_corpus

    console = Console(stderr=True)
    if not console.is_terminal:
        return prepare_corpus(out, inputs, options)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        tasks: dict[str, TaskID] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:  # what an earlier run kept says nothing about this one's speed
                tasks[what] = bar.add_task(f"{out.name}: {what}", total=total, completed=done)
            bar.update(tasks[what], completed=done)

        return prepare_corpus(out, inputs, options, show)


def _print_report(out: Path, report: PrepareReport) -> None:
    for what, count, shown in (
        ("records cannot be used", report.num_bad, report.bad),
        ("examples are longer than --seq-length and were left out", report.num_too_long, report.too_long),
    ):
        if count:
            print(f"warning: {count} of {report.records} {what}:", file=sys.stderr)
            for line in shown:
                print(f"  {line}", file=sys.stderr)
            if count > len(shown):
                print(f"  ... and {count - len(shown)} more", file=sys.stderr)
    if report.num_duplicates:
        print(
            f"warning: {report.num_duplicates} of {report.records} records have the text of an earlier one and were "
            "left out; --no-dedup keeps them",
            file=sys.stderr,
        )
    if report.manifest is not None:
        print(f"{out}: {_summary(report.manifest)}")
    if report.heldout is not None:
        print(f"{out}.heldout: {_summary(report.heldout)}")


def _summary(manifest: Manifest) -> str:
    packs = ""
    if manifest.packs is not None and manifest.seq_length is not None:
        full = manifest.tokens / (manifest.packs * manifest.seq_length)
        packs = f", {manifest.packs:,} packs of {manifest.seq_length} ({full:.1%} full)"
    per_token = manifest.bytes / manifest.tokens
    return f"{manifest.documents:,} documents, {manifest.tokens:,} tokens, {per_token:.2f} bytes per token{packs}"
