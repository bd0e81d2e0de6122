"""`megaflow data`: what a run is and was trained on, and how to change it."""

from __future__ import annotations

import json
from dataclasses import replace
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megaflow.errors import UserError

if TYPE_CHECKING:
    from megaflow.data.sampler.ledger import LedgerEntry

data = typer.Typer(no_args_is_help=True, help="Show or change what a run is trained on.", rich_markup_mode=None)
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")]


@data.command()
def change(
    run: RunFolder,
    at_step: Annotated[int, typer.Option(min=2, max=2**40, help="First step of the new mix, not trained yet.")],
    weights: Annotated[str, typer.Option(help="Ratio of every group from then on: en=0.2,zh=0.8")] = "",
    config: Annotated[
        Path | None, typer.Option(help="YAML file whose schedule, groups and global batch size hold from then on.")
    ] = None,
    why: Annotated[str, typer.Option(help="Reason, for the reader of the history.")] = "changed by hand",
) -> None:
    """Change the mix of RUN from a step on: append an entry to its ledger.

    A run that is going looks at its ledger every data.digest_interval steps and when it saves. A schedule given by
    --config runs on the run's clock, which counts from the first step.
    """
    from megaflow.config_load import read_yaml
    from megaflow.data.sampler.ledger import append_entry, build_sampler, locked, read_ledger

    ledger, began = read_ledger(run / "ledger.json"), read_yaml(run / "config.yaml")
    _check_not_trained(run, at_step)
    if bool(weights) == (config is not None):
        raise UserError("megaflow data change: give either --weights or --config")
    last = ledger[-1]
    entry = _entry_of_config(config, ledger, at_step) if config is not None else _entry_of_weights(weights, last)
    if entry == replace(last, first_step=entry.first_step, why=entry.why):
        raise UserError("megaflow data change: this is the mix that the run has already; nothing to change")
    entry = replace(entry, first_step=at_step, why=why)
    _check_batch(run, began, entry)
    try:
        entry.check_follows(last)
        build_sampler([*ledger, entry])
        _check_caps(config or run / "config.yaml", [*ledger, entry])
        with locked(run / "ledger.json"):
            _check_not_trained(run, at_step)  # again: the run may have gone on meanwhile
            append_entry(run / "ledger.json", ledger, entry)
            if config is not None:
                _replace_mix(run / "config.yaml", began, config)
    except OSError as error:
        raise UserError(f"{run}/ledger.json: cannot be written ({error.strerror})") from None
    except UserError as error:
        raise UserError(f"{run}/ledger.json: {error}") from None
    typer.echo(entry.describe())
    steps = (began.get("train") or {}).get("steps")
    if isinstance(steps, int) and at_step > steps:
        typer.echo(f"the run ends at step {steps}: this takes effect once train.steps is raised")
    added = [name for name in entry.manifests if name not in last.manifests]
    if added:
        typer.echo(f"resume the run with {config}: it names the new source {', '.join(added)}")


@data.command()
def history(run: RunFolder) -> None:
    """Print what RUN is trained on: every entry of its ledger."""
    from megaflow.config_load import read_yaml
    from megaflow.data.sampler import ledger_text
    from megaflow.data.sampler.ledger import read_ledger

    ledger, config = read_ledger(run / "ledger.json"), read_yaml(run / "config.yaml")
    try:
        steps = int(config["train"]["steps"])
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{run}/config.yaml: train.steps is missing; restore the run's own config.yaml") from None
    for line in ledger_text.history(ledger, steps):
        typer.echo(line)


@data.command()
def diff(
    one: Annotated[Path, typer.Argument(metavar="A", help="Folder of a run, or a ledger file.")],
    other: Annotated[Path, typer.Argument(metavar="B", help="Folder of a run, or a ledger file.")],
) -> None:
    """Say what the mixes of two runs differ in, one line each. Exit code 1 where they differ."""
    from megaflow.data.sampler import ledger_text
    from megaflow.data.sampler.ledger import read_ledger

    ledgers = [read_ledger(path / "ledger.json" if path.is_dir() else path) for path in (one, other)]
    lines = list(ledger_text.differences(*ledgers))
    for line in lines or ["identical"]:
        typer.echo(line)
    if lines:
        raise typer.Exit(1)


@data.command()
def plan(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value")] = None,
) -> None:
    """Simulate the whole run of CONFIG, or its rest if run_dir holds it already, and print what it reads.

    Per source: sequences, tokens, epochs, its cap on epochs and the first step at which it is reached.
    """
    from megaflow.config_load import load_config
    from megaflow.data.tokenizer import load_tokenizer
    from megaflow.train.run import open_mix, with_vocabulary

    settings = load_config(config, overrides)
    forecast = open_mix(with_vocabulary(settings, load_tokenizer(settings.data.tokenizer))).forecast
    for line in forecast.table():
        typer.echo(line)
    forecast.check_caps()


def _check_not_trained(run: Path, at_step: int) -> None:
    """Refuse a step that is part of a checkpoint or of the log.

    Steps after the newest checkpoint that a killed run logged count too: from here a killed run looks like one that is
    going. Who wants the change earlier resumes with an edited config: then the run is known to have stopped.
    """
    from megaflow.checkpoint.store import step_directories

    saved = [int(path.name.removeprefix("step-")) for path in step_directories(run / "checkpoints")]
    trained = max([0, *saved[-1:], *(r["step"] for r in _records(run) if r["kind"] == "train")])
    if at_step <= trained:
        raise UserError(
            f"--at-step {at_step}: {run} has trained step {trained} already; give a step after it, or stop the run and "
            "resume it with an edited config"
        )


def _records(run: Path) -> list[dict[str, Any]]:
    """The run's records but those torn by a kill or half-written."""
    try:
        lines = (run / "metrics.jsonl").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    records = []
    for line in lines:
        try:
            record = json.loads(line)
            records.append({**record, "kind": str(record["kind"]), "step": int(record["step"])})
        except (ValueError, KeyError, TypeError):
            continue
    return records


def _entry_of_weights(text: str, last: LedgerEntry) -> LedgerEntry:
    """The last entry with constant weights, given as `name=number,...`."""
    from megaflow.data.sampler.schedule import Knot, compile_knots

    given: dict[str, Decimal] = {}
    for part in text.split(","):
        name, _, number = part.strip().rpartition("=")
        try:
            value = Decimal(number)
        except InvalidOperation:
            value = Decimal("nan")
        if not name or not value.is_finite() or value < 0 or name in given:
            raise UserError(f"--weights {part!r}: give every group once with its ratio, as in en=0.2,zh=0.8")
        given[name] = value
    groups = [group.name for group in last.groups]
    if set(given) != set(groups):
        raise UserError(f"--weights name {', '.join(given)}; the run's groups are {', '.join(groups)}: name each once")
    if sum(given.values()) != 1:
        raise UserError(f"--weights sum to {sum(given.values())}, not 1; scale them")
    try:
        schedule = compile_knots(last.schedule.clock, [Knot(0, [given[name] for name in groups])])
    except ValueError as error:  # a ratio that is too small
        raise UserError(f"--weights {text!r}: {error}") from None
    return replace(last, schedule=schedule)


def _entry_of_config(file: Path, ledger: list[LedgerEntry], at_step: int) -> LedgerEntry:
    """The entry that a config file describes from a step on; the last one where it describes the same mix."""
    from megaflow.config_load import load_config
    from megaflow.data.sampler.configured import configured_entry, with_unimax
    from megaflow.data.sources import open_sources

    config = load_config(file)
    named = {name: source.path for group in config.data.groups.values() for name, source in group.sources.items()}
    sources = open_sources(named, config.data.seq_length, config.data.seed, config.data.verify, config.data.cache_dir)
    last, entry = ledger[-1], configured_entry(config, sources)
    same = replace(entry, first_step=last.first_step, why=last.why)
    return last if same == last else with_unimax(config, ledger, replace(entry, first_step=at_step))


def _replace_mix(path: Path, began: dict[str, Any], file: Path) -> None:
    """Puts the mix of a config file into the run's config: resumed with either, the run finds no further edit."""
    import yaml

    from megaflow.config_load import load_config

    mix = load_config(file).model_dump(mode="json")
    began["data"] |= {key: mix["data"][key] for key in ("groups", "schedule")}
    began["train"]["global_batch_size"] = mix["train"]["global_batch_size"]
    beside = path.with_name(f".tmp-{path.name}")
    beside.write_text(yaml.safe_dump(began, sort_keys=False, allow_unicode=True), encoding="utf-8")
    beside.replace(path)


def _check_caps(file: Path, ledger: list[LedgerEntry]) -> None:
    """Refuse a mix that would read a source more often, over the run, than the config in a file allows."""
    from megaflow.config_load import read_yaml
    from megaflow.data.sampler.forecast import forecast

    tree = read_yaml(file)
    try:
        caps = {
            name: Decimal(str(cap))
            for group in tree["data"]["groups"].values()
            for name, source in group["sources"].items()
            if (cap := source.get("max_epochs") or group.get("max_epochs")) is not None
        }
        steps = int(tree["train"]["steps"])
    except (KeyError, TypeError, ValueError, AttributeError, InvalidOperation):
        raise UserError(f"{file}: not the config of a run; restore it") from None
    if caps:
        forecast(ledger, steps, caps).check_caps()


def _check_batch(run: Path, began: dict[str, Any], entry: LedgerEntry) -> None:
    """Refuse a batch that the layout of the run's last launch cannot share out."""
    from megaflow.config_parallel import ParallelConfig
    from megaflow.data.sampler.plan import count_micro_batches
    from megaflow.parallel.schedule import make_schedule

    launches = [record for record in _records(run) if record["kind"] == "launch"]
    try:
        dp, micro_batch_size = int(launches[-1]["layout"]["dp"]), int(began["train"]["micro_batch_size"])
        parallel = ParallelConfig.model_validate(began.get("parallel", {}))
    except (IndexError, KeyError, TypeError, ValueError):
        return  # never launched: the launch checks it
    try:
        count = count_micro_batches(entry.batch_size, dp, micro_batch_size)
        make_schedule(parallel.schedule, parallel.pp, count, parallel.chunks_per_rank)
    except UserError as error:
        raise UserError(f"train.global_batch_size: {error}, in the layout of the run's last launch") from None
