"""The results of `parallel_cpu.py` as tables and as a picture."""

from __future__ import annotations

import statistics
from collections import Counter
from pathlib import Path
from typing import Any


def summarise(turns: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians of a layout's steps, and of their multiples of the steps of one process beside them."""
    layout, one = turns["layout"], turns["one process"]
    found: dict[str, Any] = {"turns": turns}
    for clock in ("seconds", "cpu_seconds"):
        ratios = [ours[clock] / theirs[clock] for ours, theirs in zip(layout, one, strict=True)]
        low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
        found[clock] = statistics.median(turn[clock] for turn in layout)
        found[f"times_{clock}"] = {"median": median, "quartiles": [low, high]}
    return found


def totals(of_layout: dict[str, Any], which: str) -> dict[str, tuple[int, int]]:
    """Calls and bytes of all ranks by kind of collective; `which`: those made or those needed."""
    calls: Counter[str] = Counter()
    size: Counter[str] = Counter()
    for rank in of_layout["ranks"]:
        for name, counts in rank[which].items():
            kind = name.partition(",")[0]
            calls[kind] += counts["calls"]
            size[kind] += counts["bytes"]
    return {kind: (calls[kind], size[kind]) for kind in sorted(calls)}


def _counts(of_layout: dict[str, Any]) -> str:
    parts = [f"{calls} {kind} {size / 2**20:.2f}" for kind, (calls, size) in totals(of_layout, "made").items()]
    return ", ".join(parts) or "none"


def _extra(of_layout: dict[str, Any]) -> str:
    made, needed = (totals(of_layout, which) for which in ("made", "needed"))
    if all(rank["made"] == rank["needed"] for rank in of_layout["ranks"]):
        return "none"
    kinds = sorted(made.keys() | needed.keys())
    calls = {kind: made.get(kind, (0, 0))[0] - needed.get(kind, (0, 0))[0] for kind in kinds}
    return ", ".join(f"{count:+d} {kind}" for kind, count in calls.items() if count) or "other sizes"


def markdown(result: dict[str, Any]) -> str:
    """The results as Markdown."""
    model = result["model"]
    lines = [
        f"# A training step cut over processes, {result['date']}",
        "",
        f"{result['cpu']}, {result['cores']} cores, one thread for each rank; Python {result['python']}, torch "
        f"{result['torch']}, gloo; fp32. hidden {model['hidden_size']}, {model['num_layers']} layers, vocabulary "
        f"{model['vocab_size']}; a step is {result['sequences']} sequences of {result['seq_length']} tokens, one to a "
        f"micro-batch. {result['steps']} steps of each layout and of one process take turns. The ranks share the "
        f"{result['cores']} cores. CPU time is that of all ranks together: what it has above 1 is what cutting costs "
        "here, where every collective passes through the kernel. The time by the clock is at best that over the number "
        f"of cores in use. The machine's load was {result['load_average']} before and {result['load_average_after']} "
        "after; where it is far above the ranks' own, read the CPU time.",
        "",
        "| layout | ranks | step, s | time / one process | quartiles | CPU time / one process | quartiles |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, of_layout in result["layouts"].items():
        clocks = [of_layout["times_seconds"], of_layout["times_cpu_seconds"]]
        ratios = [f"{c['median']:.2f} | {c['quartiles'][0]:.2f} ... {c['quartiles'][1]:.2f}" for c in clocks]
        lines.append(f"| {name} | {of_layout['world']} | {of_layout['seconds']:.3f} | {' | '.join(ratios)} |")
    lines += [
        "",
        "Collectives of one step on all ranks together, with MiB of whole tensors (an all-gather's result, a "
        "reduce-scatter's input), and those beyond the fewest that `benchmarks/collective_counts.py` says the layout "
        "needs:",
        "",
        "| layout | collectives, MiB | beyond the fewest |",
        "|---|---|---|",
    ]
    of_tied = {f"{name}, tied embeddings": found for name, found in result["tied"].items()}
    for name, of_layout in (result["layouts"] | of_tied).items():
        lines.append(f"| {name} | {_counts(of_layout)} | {_extra(of_layout)} |")
    return "\n".join(lines) + "\n"


def draw(result: dict[str, Any], path: Path) -> None:
    """Bars of every layout's time and CPU time as multiples of one process."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(result["layouts"])[::-1]
    figure, axis = plt.subplots(figsize=(9, 1 + 0.32 * len(names)))
    for shift, clock, label in ((0.2, "times_seconds", "time"), (-0.2, "times_cpu_seconds", "CPU time of all ranks")):
        ratios = [result["layouts"][name][clock]["median"] for name in names]
        axis.barh([place + shift for place in range(len(names))], ratios, height=0.4, label=label)
    axis.set_yticks(range(len(names)), names)
    axis.margins(y=0.01)
    axis.axvline(1, color="black", linewidth=0.8)
    axis.set(xlabel="multiple of one process", title=f"A training step on {result['cores']} cores of {result['cpu']}")
    axis.legend()
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)
