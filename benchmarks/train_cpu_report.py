"""The results of `train_cpu.py` as tables and as a picture."""

from __future__ import annotations

import platform
import statistics
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

CLASSES = ["matmul", "attention", "norm", "rotary", "swiglu", "loss", "optimizer", "other"]
"""Classes of operations of a profile."""


def summarise(runs: dict[str, dict[str, Any]], tokens: int) -> None:
    """Adds median, quartiles, tokens/s and the time as a multiple of megaflow's to each run."""
    ours, ours_cpu = (statistics.median(runs["megaflow"][clock]) for clock in ("seconds", "cpu_seconds"))
    for run in runs.values():
        low, median, high = statistics.quantiles(run["seconds"], n=4, method="inclusive")
        run |= {"median": median, "quartiles": [low, high], "tokens_per_second": tokens / median}
        turns = [a / b for a, b in zip(run["seconds"], runs["megaflow"]["seconds"], strict=True)]
        run |= {"times_megaflow": median / ours, "turns": [min(turns), max(turns)]}
        run["cpu_times_megaflow"] = statistics.median(run["cpu_seconds"]) / ours_cpu


def class_seconds(events: Iterable[Any]) -> dict[str, float]:
    """Seconds of a profiler's events by class of operation.

    What ran under `record_function("scope:CLASS")`, or is its backward, is of that class; products outside attention
    are `matmul`.
    """
    events = sorted(events, key=lambda event: event.time_range.start)

    # a node of the backward pass has the sequence number of the last forward operation that began with it
    classes: dict[int, str | None] = {}
    seconds = defaultdict(float, dict.fromkeys(CLASSES, 0.0))
    for event in events:
        found, node = None, None
        parent = event
        while parent is not None:
            if parent.name.startswith("scope:"):
                found = parent.name.removeprefix("scope:")
            elif parent.name.startswith("autograd::engine::evaluate_function"):
                node = parent
            parent = parent.cpu_parent
        if node is not None:
            found = classes.get(node.sequence_nr)
        elif event.sequence_nr >= 0:
            classes[event.sequence_nr] = found
        if event.name in ("aten::mm", "aten::addmm", "aten::bmm") and found != "attention":
            found = "matmul"
        found = found or "other"
        seconds[found] += event.self_cpu_time_total / 1e6
    return dict(seconds)


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def markdown(result: dict[str, Any]) -> str:
    """The result as tables."""
    lines = [
        f"# Training step on a CPU, {result['date']}",
        "",
        f"{result['cpu']}, {result['threads']} threads; Python {result['python']}, torch {result['torch']}, "
        f"transformers {result['transformers']} (SDPA attention); fp32. A step is forward, backward, clip and AdamW "
        f"over all micro-batches; contenders take turns step by step, {result['steps']} measured steps each. The "
        f"machine's load was {result['load_average']} before the start: where that is not near 0, read the CPU time.",
    ]
    for shape in result["shapes"]:
        tokens = shape["seq_length"] * shape["micro_batch"] * shape["accumulation"]
        settings = ", ".join(f"{name} {1e3 * s:.0f} ms" for name, s in shape["adamw_seconds"].items())
        lines += [
            "",
            f"## {shape['name']}, {shape['parameters'] / 1e6:.1f} M parameters",
            "",
            f"{tokens} tokens a step: {shape['accumulation']} micro-batches of {shape['micro_batch']} x "
            f"{shape['seq_length']}. torch's AdamW: {settings}; transformers runs with the first.",
            "",
            "| layout | contender | median s | quartiles | tokens/s | time / megaflow's | in single turns "
            "| CPU time / megaflow's |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for layout, of_layout in shape["layouts"].items():
            for name, run in of_layout["runs"].items():
                low, high = run["quartiles"]
                least, most = run["turns"]
                lines.append(
                    f"| {layout} ({of_layout['documents']}) | {name} | {run['median']:.3f} | {low:.3f} ... {high:.3f} "
                    f"| {run['tokens_per_second']:.0f} | {run['times_megaflow']:.2f} | {least:.2f} ... {most:.2f} "
                    f"| {run['cpu_times_megaflow']:.2f} |"
                )
        lines += ["", "| megaflow's time, % | " + " | ".join(CLASSES) + " |", "|---" * (len(CLASSES) + 1) + "|"]
        for layout, of_layout in shape["layouts"].items():
            total = sum(of_layout["profile"].values())
            shares = [f"{100 * of_layout['profile'][name] / total:.1f}" for name in CLASSES]
            lines.append(f"| {layout} | " + " | ".join(shares) + " |")
    return "\n".join(lines) + "\n"


def draw(result: dict[str, Any], path: Path) -> None:
    """Stacked bars of megaflow's step by class of operation, as shares."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    bars = {f"{s['name']}\n{layout}": of["profile"] for s in result["shapes"] for layout, of in s["layouts"].items()}
    figure, axis = plt.subplots(figsize=(2 + 2.4 * len(bars), 6))
    heights = dict.fromkeys(bars, 0.0)
    for name in CLASSES:
        shares = {bar: 100 * profile[name] / sum(profile.values()) for bar, profile in bars.items()}
        axis.bar(list(bars), list(shares.values()), bottom=list(heights.values()), width=0.6, label=name)
        heights = {bar: heights[bar] + shares[bar] for bar in bars}
    axis.set(ylabel="% of the step", title=f"megaflow's training step on {result['cpu']}, {result['threads']} threads")
    axis.legend(
        *(reversed(part) for part in axis.get_legend_handles_labels()), loc="center left", bbox_to_anchor=(1, 0.5)
    )
    figure.savefig(path, dpi=120, bbox_inches="tight")
