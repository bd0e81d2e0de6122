"""The sampler: time of a plan, start-up, exactness against other rules, and a trillion tokens over thousands of ranks.

    python benchmarks/sampler.py [--part PART ...] [--out DIR]

Start-up is compared with megatron-core's where it is installed (`pip install --no-deps megatron-core` in a copy of the
environment; it needs no GPU). Writes `sampler-<date>.json`, `.md` and `.png`; with `--part` only those parts are
measured again and the others are kept as the file of that date has them.
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from functools import partial
from importlib import util
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from megaflow.data import native
from megaflow.data.sampler import order
from megaflow.data.sampler.mix import Sampler
from megaflow.data.sampler.plan import StepPlan
from megaflow.data.sampler.schedule import CompiledSchedule, Knot, chatflow, compile_knots

sys.path.insert(0, str(Path(__file__).parents[1]))  # the folder of benchmarks/, wherever this is started
from benchmarks.parts import measure_parts
from benchmarks.sampler_report import draw, markdown
from benchmarks.sampler_rules import RULES, SCHEDULED, Layout, error_figures, step_shares
from benchmarks.sampler_scale import FINAL, INITIAL, Scale, make_groups, simulate

TARGETS_US = {"C++": 100.0, "numpy": 2000.0}
"""Microseconds that a plan of 1024 sequences over 8 sources may take, digest apart."""


TRILLION = Scale(tokens=10**12, dp=16_384, windows=120_000_000)


LARGEST = 10**8
"""Windows up to which what grows with them is measured."""


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    plans: int = 2000
    indices: int = 1_000_000
    repeats: int = 9
    startup: tuple[int, ...] = (10**7, 10**8, 10**9)
    rule_steps: int = 20_000
    scale: Scale = TRILLION


SMOKE = Sizes(
    plans=20,
    indices=2000,
    repeats=2,
    startup=(1000, 10_000),
    rule_steps=200,
    scale=Scale(tokens=4096 * 96 * 300, dp=48, windows=9_000, micro_batches=2, sampled_ranks=8),
)

Tick = Callable[[], None]


def digest_of(before: int, plan: StepPlan) -> int:
    """The digest after `plan`, from its definition: BLAKE2b-64 of the digest before, the step, counts and cards."""
    deck = plan.deck
    counts = [count for group in plan.counts for count in group]
    cards = np.stack([deck.group, deck.source_in_group, deck.epoch, deck.window], axis=1).reshape(-1)
    numbers = np.concatenate([[plan.step], counts, cards]).astype("<i8")
    data = before.to_bytes(8, "big") + numbers.tobytes()
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")


def time_plans(sizes: Sizes, tick: Tick) -> dict[str, Any]:
    """Median microseconds of a plan of 1024 sequences over 8 sources in 4 groups, of its digest, and of a rank's hand.

    Raises AssertionError if the twins' plans or the digest's definition disagree.
    """
    schedule = chatflow("tokens", INITIAL, FINAL, sizes.plans * 1024 * 4096)
    twins = {
        name: Sampler(1, 1024, 4096, make_groups(10**8), schedule, use_native=name == "C++") for name in TARGETS_US
    }
    clocks = {"": time.perf_counter, "cpu_": time.thread_time}
    times: dict[str, dict[str, list[list[float]]]] = {name: {clock: [] for clock in clocks} for name in twins}
    before = twins["C++"].digest
    for _ in range(sizes.plans):
        for name, sampler in twins.items():
            marks = [[clock() for clock in clocks.values()]]
            plan = sampler.plan()
            marks.append([clock() for clock in clocks.values()])
            digest = digest_of(before, plan)
            marks.append([clock() for clock in clocks.values()])
            plan.hand(8, 16, 3)
            marks.append([clock() for clock in clocks.values()])
            for clock, column in zip(clocks, zip(*marks, strict=True), strict=True):
                times[name][clock].append([1e6 * (end - start) for start, end in pairwise(column)])
            assert plan.digest == digest, f"step {plan.step}: {name} has another digest than its definition gives"
        before = digest
        tick()
    figures: dict[str, dict[str, Any]] = {}
    for name, target in TARGETS_US.items():
        figures[name] = {"target_us": target}
        for clock in clocks:
            plans, digests, hands = zip(*times[name][clock], strict=True)
            apart = [whole - digest for whole, digest in zip(plans, digests, strict=True)]
            columns = {"with_digest_us": plans, "digest_us": digests, "without_digest_us": apart, "hand_us": hands}
            figures[name] |= {clock + key: statistics.median(column) for key, column in columns.items()}
            figures[name][clock + "low_us"] = statistics.quantiles(apart, n=20)[0]
        figures[name]["met"] = figures[name]["cpu_without_digest_us"] <= target
    return {"batch": 1024, "sources": 8, "groups": 4, "plans": sizes.plans, "twins": figures}


def time_permutation(sizes: Sizes, tick: Tick) -> list[dict[str, Any]]:
    """Median nanoseconds per index of the permutation of a source's windows."""
    rows = []
    for windows in (10**4, 10**6, 2**27 + 1, 10**9):
        xs = np.random.default_rng(1).integers(windows, size=sizes.indices)
        row: dict[str, Any] = {"windows": windows}
        for name in TARGETS_US:
            times = []
            for _ in range(sizes.repeats):
                start = time.perf_counter()
                order.perm_many(7, windows, xs, use_native=name == "C++")
                times.append(time.perf_counter() - start)
            row[name] = 1e9 * statistics.median(times) / sizes.indices
        rows.append(row)
        tick()
    return rows


def startup(kind: str, windows: int) -> dict[str, Any]:
    """One measurement of `startup.py`, or why there is none."""
    if kind == "megatron" and util.find_spec("megatron") is None:
        return {"missing": "megatron-core is not installed"}
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if kind != "megaflow" and (windows > LARGEST or 30 * windows > free):
        return {"missing": "too large to measure here"}
    command = [sys.executable, str(Path(__file__).with_name("startup.py")), kind, str(windows)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"missing": f"failed: {done.stderr.strip().splitlines()[-1]}"}
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


def time_startups(sizes: Sizes, tick: Tick) -> list[dict[str, Any]]:
    """Start-up of each kind at each size; where it was not measured, extrapolated from the largest that was."""
    rows: list[dict[str, Any]] = []
    for kind in ("megaflow", "megatron", "permutation"):
        measured: dict[str, Any] | None = None
        for windows in sizes.startup:
            row = {"kind": kind, "windows": windows} | startup(kind, windows)
            if "missing" not in row:
                measured = row
            elif measured:
                times = windows / measured["windows"]
                row |= {key: measured[key] * times for key in ("seconds", "cpu_seconds", "peak_mb")}
                row["extrapolated_from"] = measured["windows"]
            rows.append(row)
            tick()
    return rows


def rule_mixes(steps: int) -> dict[str, CompiledSchedule]:
    """The mixes that the rules are tried on."""
    return {
        "constant 45 / 40 / 10 / 5": compile_knots("steps", [Knot(0, (".45", ".40", ".10", ".05"))]),
        "constant 50 / 50": compile_knots("steps", [Knot(0, ("1", "1"))]),
        "ChatFlow's ramp": chatflow("steps", INITIAL, FINAL, steps * 3 // 5),
    }


def compare_rules(sizes: Sizes, tick: Tick) -> list[dict[str, Any]]:
    """Errors of each rule on each mix: steps of 64 sequences on 8 ranks in micro-batches of 1 and of 4."""
    rows = []
    for mix, schedule in rule_mixes(sizes.rule_steps).items():
        shares = step_shares(schedule, sizes.rule_steps)
        for name, rule in RULES.items():
            for size in (1, 4):
                if len(schedule.knots) == 1 or name in SCHEDULED:
                    dealt = rule(schedule, Layout(sizes.rule_steps, 8, 8 // size, size))
                    rows.append({"mix": mix, "rule": name, "micro_batch_size": size} | error_figures(dealt, shares))
                tick()
    return rows


PARTS: dict[str, Callable[[Sizes, Tick], Any]] = {
    "plan": time_plans,
    "permutation": time_permutation,
    "startup": time_startups,
    "rules": compare_rules,
    "scale": lambda sizes, tick: simulate(sizes.scale, tick),
}


def turns(part: str, sizes: Sizes) -> int:
    """Ticks that a part gives."""
    counts = {"plan": sizes.plans, "permutation": 4, "startup": 3 * len(sizes.startup), "scale": sizes.scale.steps}
    return counts.get(part, 3 * 2 * len(RULES))


def main(
    part: Annotated[list[str] | None, typer.Option(help=f"measure only this ({', '.join(PARTS)}); repeatable")] = None,
    out: Annotated[Path, typer.Option(help="folder of the results")] = Path("benchmarks/results"),
    smoke: Annotated[bool, typer.Option(help="tiny sizes, to see that it runs")] = False,
) -> None:
    """Measure megaflow's sampler on this CPU."""
    sizes = SMOKE if smoke else Sizes()
    path = out / f"sampler-{date.today().isoformat()}.json"
    parts = {name: (turns(name, sizes), partial(measure, sizes)) for name, measure in PARTS.items()}
    result = measure_parts(path, parts, part, ("numpy", "megatron-core")) | {"host_library": native.status()}
    path.write_text(json.dumps(result, indent=1) + "\n")
    path.with_suffix(".md").write_text(markdown(result))
    draw(result, path.with_suffix(".png"))
    typer.echo(markdown(result))
    typer.echo(path)


if __name__ == "__main__":
    typer.run(main)
