"""The results of `sampler.py` as tables and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

KINDS = {
    "megaflow": "megaflow: open the corpus, build the sampler, plan a step",
    "megatron": "megatron-core: document, sample and shuffle index, blend",
    "permutation": "numpy: a stored permutation alone (lower bound)",
}


def duration(seconds: float) -> str:
    """Seconds in a unit that fits."""
    for unit, size in (("us", 1e-6), ("ms", 1e-3)):
        if seconds < 1000 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s" if seconds < 1000 else f"{seconds:,.0f} s"


def count(number: int) -> str:
    """Windows, short."""
    exponent = len(str(number)) - 1
    return f"1e{exponent}" if number == 10**exponent else f"{number:,}"


def plan_lines(plan: dict[str, Any], permutation: list[dict[str, Any]] | None) -> list[str]:
    lines = [
        "",
        f"## A plan of {plan['batch']} sequences over {plan['sources']} sources in {plan['groups']} groups",
        "",
        f"Medians of {plan['plans']} plans of a run on a ramp, in microseconds; one rank's hand is of 8 ranks and 16 "
        "micro-batches. The target is for the digest apart, by CPU time.",
        "",
        "| twin | time | with digest | digest | digest apart | 5 % below | one rank's hand | target |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, twin in plan["twins"].items():
        for clock, time in (("", "clock"), ("cpu_", "CPU")):
            keys = ("with_digest_us", "digest_us", "without_digest_us", "low_us", "hand_us")
            figures = " | ".join(f"{twin[clock + key]:.0f}" for key in keys)
            target = f"{twin['target_us']:.0f}: {'met' if twin['met'] else 'missed'}" if clock else ""
            lines.append(f"| {name} | {time} | {figures} | {target} |")
    if permutation:
        twins = [key for key in permutation[0] if key != "windows"]
        lines += ["", "| permutation of windows | " + " | ".join(f"{twin}, ns per index" for twin in twins) + " |"]
        lines += ["|---" * (len(twins) + 1) + "|"]
        for row in permutation:
            lines.append(f"| {count(row['windows'])} | " + " | ".join(f"{row[twin]:.1f}" for twin in twins) + " |")
    return lines


def startup_lines(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "",
        "## Start-up",
        "",
        "Each in a process of its own. Peak is what building added to the process at most. A corpus of megaflow's is "
        "sparse files here: nothing but headers is read, as with full ones. megatron-core's functions run on lengths "
        "already in memory, one document to a window.",
        "",
        "| windows | | seconds | CPU seconds | peak, MB |",
        "|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: row["windows"]):
        name = KINDS[row["kind"]]
        if "seconds" not in row:
            lines.append(f"| {count(row['windows'])} | {name} | {row['missing']} | | |")
            continue
        note = f" (extrapolated, linear, from {count(row['extrapolated_from'])})" if "extrapolated_from" in row else ""
        times = " | ".join(duration(row[key]) for key in ("seconds", "cpu_seconds"))
        lines.append(f"| {count(row['windows'])} | {name}{note} | {times} | {row['peak_mb']:,.1f} |")
    return lines


def rule_lines(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "",
        "## Exactness of the mix",
        "",
        "Steps of 64 sequences on 8 data-parallel ranks. Errors are in sequences, the largest of any group and step: "
        "of a step's count, of the count since the start, of a rank's 8 sequences, of a micro-batch; then the worst "
        "rank's share over the whole run, in percentage points, and the per cent of ranks' steps that miss a group "
        "of which they should have one sequence or more. The rules are re-expressed from: Megatron-LM "
        "`build_blending_indices` and `MegatronPretrainingSampler`; streaming `generate_work_stratified_batching`; "
        "Grain `MapDataset.mix` (`_counts_per_dataset`), ranks slicing the mixed dataset or mixing slices; "
        "independent draws as in Energon's `BlendDataset`, lingua and Hugging Face `interleave_datasets`. Of these "
        "only megaflow has schedules: on the ramp independent draws were given each step's weights, the others cannot "
        "run it. Grain and streaming also refuse a weight of 0.",
        "",
        "| mix | rule | micro-batch | step | cumulative | rank | rank, whole run | in a micro-batch | missing |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        micro_batch = f"{row['micro_batch']:.2f}" if row["micro_batch_size"] > 1 else ""
        lines.append(
            f"| {row['mix']} | {row['rule']} | {row['micro_batch_size']} | {row['step']:.2f} "
            f"| {row['cumulative']:,.2f} | {row['rank']:.2f} | {row['rank_run']:.3f} pp | {micro_batch} "
            f"| {row['missing']:.1f} % |"
        )
    return lines


def scale_lines(run: dict[str, Any]) -> list[str]:
    epochs = ", ".join(f"{epoch:g}" for epoch in run["epochs"])
    return [
        "",
        f"## {run['tokens']:,} tokens over {run['dp']:,} data-parallel ranks",
        "",
        f"{run['steps']:,} steps of {run['batch']:,} sequences on ChatFlow's ramp, 8 sources of {run['windows']:,} "
        f"windows ({epochs} epochs). Checked at every step: the batch is exact, each group's count is the floor or the "
        f"ceiling of its share but for the safety valve's moves, each window comes once in every epoch, and on "
        f"{run['sampled_ranks']} sampled ranks each source's and group's count is the floor or the ceiling of its "
        "part. All hold.",
        "",
        "| figure | |",
        "|---|---|",
        f"| one rank's time for a step: plan and hand, with digest | {duration(run['seconds_per_step'])} |",
        f"| the same for the whole run | {duration(run['seconds_of_run'])} |",
        f"| memory of a plan and a hand at its peak | {run['plan_bytes'] / 2**20:.2f} MiB |",
        f"| state in a checkpoint | {run['state_bytes']:,} bytes |",
        f"| counts of the whole run replayed from the start, equal to the state | {duration(run['replay_seconds'])} |",
        f"| largest cumulative deviation of a group | {run['drift']:.3f} sequences |",
        f"| sequences moved by the safety valve | {run['corrections']} |",
        f"| worst sampled rank's share of a group over the whole run | {run['rank_share_error']:.3f} pp off |",
        f"| digest of the last step | `{run['digest']}` |",
    ]


def markdown(result: dict[str, Any]) -> str:
    """The result as tables."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    loads = ", ".join(f"{part} {load}" for part, load in result["loads"].items())
    lines = [
        f"# The sampler, {result['date']}",
        "",
        f"{result['cpu']}, {result['cores']} cores, one used; Python {result['python']}, {versions}; "
        f"{result['host_library']}. Load average before each part: {loads}; well above 0 means times are too long.",
    ]
    if "plan" in result:
        lines += plan_lines(result["plan"], result.get("permutation"))
    for part, section in (("startup", startup_lines), ("rules", rule_lines), ("scale", scale_lines)):
        if part in result:
            lines += section(result[part])
    return "\n".join(lines) + "\n"


def draw(result: dict[str, Any], path: Path) -> None:
    """Cumulative drift of each rule on the first mix, and the error of a single rank in its worst step."""
    rows = result.get("rules")
    if not rows:
        return
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(14, 5))
    mix = rows[0]["mix"]
    chosen = [row for row in rows if row["mix"] == mix]
    rules = list(dict.fromkeys(row["rule"] for row in chosen))
    for row in chosen:
        if row["micro_batch_size"] == 1:
            left.plot(*zip(*row["drift"], strict=True), label=row["rule"])
    left.set(xlabel="step", ylabel="sequences, largest so far", yscale="log", title=f"Cumulative drift, {mix}")
    left.legend()
    for offset, size in ((-0.2, 1), (0.2, 4)):
        heights = [row["rank"] for row in chosen if row["micro_batch_size"] == size]
        places = [i + offset for i in range(len(rules))]
        bars = right.bar(places, heights, width=0.38, label=f"micro-batches of {size}")
        right.bar_label(bars, fmt="%.1f")
    right.set_xticks(range(len(rules)), [rule.replace(" ", "\n") for rule in rules])
    right.set(ylabel="sequences of 8", title="Worst rank's error of a group in a step")
    right.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
