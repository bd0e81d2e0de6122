"""The results of `data.py` as tables and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def window_lines(windows: dict[str, Any]) -> list[str]:
    lines = [
        "",
        f"## Windows of {windows['seq_length']} tokens on one core",
        "",
        f"From {windows['megabytes']:.0f} MB of uint16 tokens in two corpora (70 to 30), documents of log-normal "
        f"lengths of 1000 tokens in the mean; micro-batches of {windows['micro_batch']}, no worker processes; medians "
        f"of {windows['turns']} turns. megaflow's Loader plans the step, reads the windows and makes labels, positions "
        "and document boundaries. megatron-core's boundaries are `reset_position_ids` and `eod_mask_loss`; it makes no "
        "list of boundaries. datasets reads windows that were cut and stored beforehand, positions with them.",
        "",
        "| contender | windows/s | quartiles | windows per CPU second | million tokens/s |",
        "|---|---|---|---|---|",
    ]
    for name, run in windows["runs"].items():
        low, high = run["quartiles"]
        tokens = windows["seq_length"] * run["per_second"] / 1e6
        lines.append(
            f"| {name} | {run['per_second']:,.0f} | {low:,.0f} ... {high:,.0f} | {run['per_cpu_second']:,.0f} "
            f"| {tokens:,.0f} |"
        )
    lines += [f"| {name} | {why} | | | |" for name, why in windows["missing"].items()]
    lines += ["", f"Target: {windows['target']:,} windows per second and core with boundaries."]
    for name, run in windows["runs"].items():
        if name.startswith("megaflow"):
            met = "met" if run["per_cpu_second"] >= windows["target"] else "missed"
            lines.append(f"{name}: {met}, by CPU time.")
    return lines


def tokenizer_lines(rows: list[dict[str, Any]], versions: dict[str, str]) -> list[str]:
    missing = "" if "gigatoken" in versions else " gigatoken is not installed."
    lines = [
        "",
        "## Tokenising on one core",
        "",
        "The demo's texts and tokenizer (6,000 pieces); sentencepiece is the reference, the others read the "
        "tokenizer.json exported from it. Each encoding starts with a fresh tokenizer; medians, lists of ids "
        f"included.{missing}",
        "",
        "| texts | library | MB/s | MB per CPU second | documents with sentencepiece's ids |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['language']}, {row['megabytes']:.1f} MB | {row['library']} | {row['mb_per_second']:.1f} "
            f"| {row['mb_per_cpu_second']:.1f} | {row['same_documents']:.2f} % of {row['documents']:,} |"
        )
    return lines


def markdown(result: dict[str, Any]) -> str:
    """The result as tables."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    loads = ", ".join(f"{part} {load}" for part, load in result["loads"].items())
    lines = [
        f"# The data path, {result['date']}",
        "",
        f"{result['cpu']}, {result['cores']} cores, one used; Python {result['python']}, {versions}. Load average "
        f"before each part: {loads}; where that is well above 0, read the CPU time.",
    ]
    if "windows" in result:
        lines += window_lines(result["windows"])
    if "tokenizers" in result:
        lines += tokenizer_lines(result["tokenizers"], result["versions"])
    return "\n".join(lines) + "\n"


def draw(result: dict[str, Any], path: Path) -> None:
    """Windows per CPU second, and MB of text per second."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(15, 4.5), width_ratios=(3, 2))
    runs = result.get("windows", {}).get("runs", {})
    bars = left.barh(list(runs), [run["per_cpu_second"] for run in runs.values()])
    left.bar_label(bars, fmt="{:,.0f}", padding=3)
    left.invert_yaxis()
    left.set(xlabel="per CPU second", title="Windows fetched")
    left.margins(x=0.2)
    rows = result.get("tokenizers", [])
    bars = right.barh(
        [f"{row['library']}, {row['language']}" for row in rows], [row["mb_per_cpu_second"] for row in rows], color="C1"
    )
    right.bar_label(bars, fmt="{:,.1f}", padding=3)
    right.invert_yaxis()
    right.set(xlabel="MB per CPU second", title="Text tokenised on one core")
    right.margins(x=0.2)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
