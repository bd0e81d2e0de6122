"""`megaflow plot`: a run as a picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megaflow.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot(
    run: Annotated[Path, typer.Argument(help="run directory")],
    out: Annotated[Path | None, typer.Option(help="PNG to write; none: <run>/run.png")] = None,
) -> None:
    """Draw planned against achieved ratios, per-source training loss, and held-out loss against a unigram model."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    records = read_metrics(run)
    train = [record for record in records if record["kind"] == "train"]
    heldout = [record for record in records if record["kind"] == "heldout"]
    if not train:
        raise UserError(f"{run}/metrics.jsonl: no training steps yet; train first")
    colours = _colours(train[-1])
    figure, axes = plt.subplots(2, 2 if heldout else 1, figsize=(13 if heldout else 8, 8), squeeze=False)
    _draw_ratios(axes[0][0], train, colours)
    _draw_losses(axes[1][0], train, colours)
    if heldout:
        _draw_heldout(axes[0][1], heldout, colours, "loss", "nats per token", unigram_losses(run))
        _draw_heldout(axes[1][1], heldout, colours, "bits_per_byte", "bits per byte", {})
    last = train[-1]
    figure.suptitle(f"{run.name}: {last['step']} steps, {last['tokens'] / 1e6:,.1f} M tokens, loss {last['loss']:.3f}")
    handles, names = axes[1][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="lower center", ncols=len(names))
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    target = out or run / "run.png"
    beside = target.with_name(f".tmp-{target.name}")
    try:
        figure.savefig(beside, dpi=120, format="png")
        beside.replace(target)
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error.strerror}); give another --out") from None
    typer.echo(target)


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The records of a run. Raises UserError when the folder is not a run's."""
    path = run / "metrics.jsonl"
    try:
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        kinds = [record["kind"] for record in records]
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give the run_dir of a run") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"{path}: holds a line that is not a record; the run that writes it may still be going"
        ) from None
    return [record for record, kind in zip(records, kinds, strict=True) if kind in ("train", "heldout")]


def unigram_losses(run: Path) -> dict[str, float]:
    """Held-out loss of a unigram model of each source's training text, over the windows the run evaluates."""
    from megaflow.config_load import load_config
    from megaflow.data.unigram import unigram_loss

    config = load_config(run / "config.yaml")
    named = [(name, source.path) for group in config.data.groups.values() for name, source in group.sources.items()]
    limits = config.data.seq_length, config.train.eval_sequences, config.data.cache_dir
    found = {name: unigram_loss(path, *limits) for name, path in named}
    return {name: loss for name, loss in found.items() if loss is not None}


def _colours(record: dict[str, Any]) -> dict[str, Any]:
    import matplotlib.pyplot as plt

    names = [*record["groups"], *record["sources"]]
    palette = plt.get_cmap("tab10").colors  # type: ignore[attr-defined]
    groups = {name: palette[i % 10] for i, name in enumerate(record["groups"])}
    return {name: groups.get(name, palette[(i - len(groups)) % 10]) for i, name in enumerate(names)}


def _draw_ratios(axis: Axes, train: list[dict[str, Any]], colours: dict[str, Any]) -> None:
    """Planned ratios record by record; achieved ones as means over at most 60 bins, for a batch shows few ratios.

    A group appended to the run begins with the first record that has it.
    """
    width = -(-len(train) // 60)
    for name in train[-1]["groups"]:
        known = [record for record in train if name in record["groups"]]
        bins = [known[i : i + width] for i in range(0, len(known), width)]
        planned = [record["groups"][name]["planned"] for record in known]
        axis.plot([record["step"] for record in known], planned, color=colours[name], label=name)
        achieved = [sum(record["groups"][name]["achieved"] for record in part) / len(part) for part in bins]
        middles = [(part[0]["step"] + part[-1]["step"]) / 2 for part in bins]
        axis.plot(middles, achieved, ".", color=colours[name], markersize=5)
    each = "each record" if width == 1 else f"means of {width} records"
    what = "tokens with loss" if train[-1].get("unit") == "loss_tokens" else "the batch"
    axis.set(title=f"share of {what}: planned (line), achieved (dots, {each})", xlabel="step")
    axis.set_ylim(0, 1.2 * axis.get_ylim()[1])
    axis.legend(loc="upper center", ncols=4)


def _draw_losses(axis: Axes, train: list[dict[str, Any]], colours: dict[str, Any]) -> None:
    for name in train[-1]["sources"]:
        known = [record for record in train if name in record["sources"]]
        points = [(r["step"], r["sources"][name]["loss"]) for r in known if r["sources"][name]["loss"] is not None]
        if points:
            steps, losses = zip(*points, strict=True)
            axis.plot(steps, losses, color=colours[name], alpha=0.25, linewidth=0.8)
            axis.plot(steps, smooth(losses), color=colours[name], label=name)
    axis.set(title="training loss by source (thick: smoothed)", xlabel="step", ylabel="nats per token")


def smooth(values: tuple[float, ...], weight: float = 0.9) -> list[float]:
    """Exponential moving average, unbiased at its start."""
    smoothed, average, mass = [], 0.0, 0.0
    for value in values:
        average = weight * average + (1 - weight) * value
        mass = weight * mass + (1 - weight)
        smoothed.append(average / mass)
    return smoothed


def _draw_heldout(
    axis: Axes, heldout: list[dict[str, Any]], colours: dict[str, Any], key: str, unit: str, marks: dict[str, float]
) -> None:
    for name in heldout[-1]["sources"]:
        known = [record for record in heldout if name in record["sources"]]
        values = [record["sources"][name][key] for record in known]
        axis.plot([record["step"] for record in known], values, ".-", color=colours[name], label=name)
        if name in marks:
            axis.axhline(marks[name], color=colours[name], linestyle=":", linewidth=1)
    axis.set(title=f"held-out{' (dotted: unigram model of the source)' if marks else ''}", xlabel="step", ylabel=unit)
