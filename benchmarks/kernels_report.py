"""The results of `kernels.py` as tables and as a picture.

`python benchmarks/kernels_report.py FILE.json` makes those of a run that was stopped, beside the file.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import typer

sys.path.insert(0, str(Path(__file__).parents[1]))  # the folder of benchmarks/, wherever this is started
from benchmarks.kernels_floors import Ceilings, Work

OURS = "megaflow"


class Line(NamedTuple):
    """One phase of one problem."""

    problem: str
    phase: str
    work: Work
    floor_ms: float
    runs: dict[str, dict[str, float]]
    """Times of every contender that was measured, megaflow's first."""

    @property
    def title(self) -> str:
        return f"{self.problem}: {self.phase}"

    def rate(self, ms: float) -> str:
        """What was achieved, in the unit of the floor."""
        if self.work.bound == "bytes":
            return f"{self.work.bytes / ms / 1e9:.2f} TB/s"
        return f"{self.work.flops / ms / 1e9:.0f} TFLOP/s"

    @property
    def peers(self) -> dict[str, float]:
        """Milliseconds of everyone else, the fastest first."""
        found = {name: run["ms"] for name, run in self.runs.items() if not name.startswith(OURS)}
        return dict(sorted(found.items(), key=lambda item: item[1]))


def lines_of(result: dict[str, Any]) -> Iterator[Line]:
    """Every phase of every problem that someone was measured on."""
    ceilings = Ceilings(**result["ceilings"])
    for name, row in result["problems"].items():
        for phase, stated in row.get("works", {}).items():
            work = Work(stated["bytes"], stated["flops"], stated["bound"])
            runs = {contender: phases[phase] for contender, phases in row["runs"].items() if phase in phases}
            if runs:
                yield Line(name, phase, work, work.floor_ms(ceilings), runs)


def amount(work: Work) -> str:
    """What the floor counts."""
    if work.bound == "flops":
        return f"{work.flops / 1e12:.3g} TFLOP"
    return f"{work.bytes / 1e9:.3g} GB" if work.bytes >= 1e10 else f"{work.bytes / 1e6:.0f} MB"


def row_of(line: Line) -> str:
    """Of the table."""
    ours = line.runs.get(OURS)
    if ours is None:
        own, peers = "not measured | |", [f"{name} {ms:.3f}" for name, ms in line.peers.items()]
    else:
        share = 100 * line.floor_ms / ours["ms"]
        own = f"{ours['ms']:.3f} ({ours['low']:.3f} ... {ours['high']:.3f}) | {share:.0f} % | {line.rate(ours['ms'])}"
        others = {name: run["ms"] for name, run in line.runs.items() if name != OURS}
        others = dict(sorted(others.items(), key=lambda item: item[1]))
        peers = [f"{name} {ms:.3f} ({ms / ours['ms']:.2f} x)" for name, ms in others.items()]
    return f"| {line.title} | {amount(line.work)} | {line.floor_ms:.3f} | {own} | {'; '.join(peers) or 'none'} |"


def heading(result: dict[str, Any]) -> list[str]:
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    title = f"# Kernels, {result['date']}"
    if result["rehearsal"]:
        title += ": a rehearsal on a CPU with tiny shapes, no figures"
    lines = [title, "", f"{result['device']}; Python {result['python']}, CUDA {result['cuda']}, {versions}."]
    if "ceilings" in result:
        ceilings = Ceilings(**result["ceilings"])
        lines[-1] += (
            f" Ceilings measured in the same run: copy {ceilings.copy_tb:.2f} TB/s (read and written), 8192^3 bf16 "
            f"product of random numbers {ceilings.matmul_tflops:.0f} TFLOP/s."
        )
    if result.get("backends"):
        chosen = ", ".join(f"{name} {backend}" for name, backend, _ in result["backends"])
        lines.append(f"megaflow's backends here: {chosen}.")
    return lines


def markdown(result: dict[str, Any]) -> str:
    """The result as tables."""
    lines = heading(result)
    lines += [
        "",
        "16,384 tokens in bf16, or an eighth of 6.74e9 parameters. Milliseconds are medians of runs with a cold L2 "
        "cache, in brackets the quartiles; launches are queued ahead, so that the host's time does not count. The "
        "floor is what must be moved or multiplied at the ceilings. What a kernel writes last is still in the cache "
        "when it ends: small rows may be a little faster than their floor. In brackets behind others: their time over "
        "megaflow's.",
        "",
        "| operation | bytes or FLOP | floor ms | megaflow ms | of the floor | achieved | others, ms |",
        "|---|---|---|---|---|---|---|",
    ]
    if "ceilings" in result:
        lines += [row_of(line) for line in lines_of(result)]
    lines += ["", "## Errors", "", "||out - expected|| / ||expected|| against fp64, the worst of all results.", ""]
    lines += ["| operation | errors |", "|---|---|"]
    for name, row in result["problems"].items():
        worst = {who: max(run["error"] for run in phases.values()) for who, phases in row["runs"].items()}
        said = "; ".join(f"{who} {error:.1e}" for who, error in worst.items())
        lines.append(f"| {name} | {said or 'nobody was measured'} |")
    again = noise(result)
    if again:
        lines += ["", "## Noise", "", "megaflow measured twice, minutes apart: the second time over the first."]
        lines += ["", "; ".join(f"{title} {ratio:.3f}" for title, ratio in again.items())]
    lines += ["", "## Not measured", ""]
    reasons: dict[tuple[str, str], list[str]] = {}
    for name, row in result["problems"].items():
        for who, why in row["failed"].items():
            reasons.setdefault((who, why), []).append(name)
    lines += [f"- {who}: {why} ({', '.join(names)})" for (who, why), names in reasons.items()] or ["Everyone was."]
    return "\n".join(lines) + "\n"


def noise(result: dict[str, Any]) -> dict[str, float]:
    """How much slower megaflow was the second time, where it was measured twice."""
    found = {}
    for name, row in result["problems"].items():
        for phase, run in row.get("again", {}).items():
            found[f"{name}: {phase}"] = run["ms"] / row["runs"][OURS][phase]["ms"]
    return found


def draw(result: dict[str, Any], path: Path) -> None:
    """A roofline with every row of megaflow and its fastest peer, and how near to the floor each comes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = [line for line in lines_of(result) if OURS in line.runs]
    height = max(8.0, 1.5 + 0.27 * len(lines))
    figure, places = plt.subplot_mosaic(
        [["flops", "bars"], ["bytes", "bars"]], figsize=(19, height), width_ratios=(5, 4)
    )
    for bound in ("flops", "bytes"):
        _draw_roof(places[bound], Ceilings(**result["ceilings"]), lines, bound)
    _draw_bars(places["bars"], lines)
    kind = "REHEARSAL on a CPU, times mean nothing" if result["rehearsal"] else result["device"]
    figure.suptitle(f"Kernels against floors, {result['date']}: {kind}")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_roof(axis: Any, ceilings: Ceilings, lines: list[Line], bound: str) -> None:
    """The part of the roofline where the rows of one bound are."""
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.work.bound == bound]
    if not numbered:
        return
    found = [line.work.intensity for _, line in numbered]
    low, high = min(found) / 1.7, max(found) * 1.7
    ridge = min(max(ceilings.matmul_tflops / ceilings.copy_tb, low), high)
    roof = [min(x * ceilings.copy_tb, ceilings.matmul_tflops) for x in (low, ridge, high)]
    axis.plot([low, ridge, high], roof, color="0.4")
    for number, line in numbered:
        color, x = _color(number), line.work.intensity
        peer = next(iter(line.peers.values()), None)
        if peer is not None:
            axis.plot(x, line.work.flops / peer / 1e9, "o", mfc="none", color=color, ms=9)
        y = line.work.flops / line.runs[OURS]["ms"] / 1e9
        axis.plot(x, y, "o", color=color, ms=5)
        step = 9 + 13 * (number // 2 % 3)
        offset, align = ((step, -3), "left") if number % 2 else ((-step, -3), "right")
        axis.annotate(str(number), (x, y), offset, textcoords="offset points", color=color, fontsize=8, ha=align)
    said = f"copy {ceilings.copy_tb:.2f} TB/s, bf16 product {ceilings.matmul_tflops:.0f} TFLOP/s"
    axis.set(xscale="log", yscale="log", xlabel="arithmetic intensity, FLOP per byte", ylabel="TFLOP/s")
    kind = "Products" if bound == "flops" else "Memory"
    axis.set_title(f"{kind}: line {said}; dots megaflow, rings the fastest peer", fontsize=10)


def _draw_bars(axis: Any, lines: list[Line]) -> None:
    names = [f"{number}  {line.title}" for number, line in enumerate(lines, 1)]
    ours = [100 * line.floor_ms / line.runs[OURS]["ms"] for line in lines]
    axis.barh(names, ours, color=[_color(number) for number in range(1, len(lines) + 1)], height=0.6)
    for place, (line, share) in enumerate(zip(lines, ours, strict=True)):
        axis.annotate(f"{share:.0f}", (0, place), (3, -3), textcoords="offset points", fontsize=8, color="white")
        for position, ms in enumerate(line.peers.values()):
            axis.plot(100 * line.floor_ms / ms, place, "k|" if position else "kd", ms=9 if position else 5)
    axis.axvline(100, color="0.4")
    axis.invert_yaxis()
    axis.margins(y=0.01)
    axis.tick_params(axis="y", labelsize=8)
    axis.set(xlabel="% of the floor", title="Bars: megaflow; diamonds: the fastest peer; strokes: the others")


def _color(number: int) -> str:
    return f"C{number % 10}"


def main(path: Path) -> None:
    """Write the tables and the picture of a result again."""
    result = json.loads(path.read_text())
    path.with_suffix(".md").write_text(markdown(result))
    draw(result, path.with_suffix(".png"))


if __name__ == "__main__":
    typer.run(main)
