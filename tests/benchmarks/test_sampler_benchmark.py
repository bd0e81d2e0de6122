"""The sampler's benchmark at tiny sizes: what it writes, that its rules are the projects' and its checks can fail."""

from __future__ import annotations

import json
import runpy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.sampler_rules import RULES, Layout, error_figures, megatron_stream, step_shares
from benchmarks.sampler_scale import Promises, Scale, make_groups
from megaflow.data.sampler.mix import Sampler
from megaflow.data.sampler.schedule import Knot, chatflow, compile_knots

BENCHMARK = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "sampler.py"))


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("results")
    BENCHMARK["main"](part=None, out=path, smoke=True)
    return path


@pytest.fixture(scope="module")
def result(out: Path) -> dict[str, Any]:
    (path,) = out.glob("sampler-*.json")
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def test_every_part_is_there_with_its_tables_and_picture(out: Path, result: dict[str, Any]) -> None:
    assert set(BENCHMARK["PARTS"]) <= set(result)
    (table,) = out.glob("sampler-*.md")
    for part in ("## A plan", "## Start-up", "## Exactness", "data-parallel ranks"):
        assert part in table.read_text()
    (picture,) = out.glob("sampler-*.png")
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_one_part_measured_again_keeps_the_others(out: Path, result: dict[str, Any]) -> None:
    BENCHMARK["main"](part=["permutation"], out=out, smoke=True)
    (path,) = out.glob("sampler-*.json")
    again = json.loads(path.read_text())
    assert again["rules"] == result["rules"]
    assert [row["windows"] for row in again["permutation"]] == [row["windows"] for row in result["permutation"]]


def test_start_up_measures_or_says_why_not(result: dict[str, Any]) -> None:
    ours = [row for row in result["startup"] if row["kind"] == "megaflow"]
    assert all(row["seconds"] > 0 and "extrapolated_from" not in row for row in ours)
    assert all("missing" in row or row["seconds"] > 0 for row in result["startup"])


def test_megaflow_keeps_its_bounds_where_the_others_do_not(result: dict[str, Any]) -> None:
    rows = {(row["mix"], row["rule"], row["micro_batch_size"]): row for row in result["rules"]}
    assert len({rule for _, rule, _ in rows}) == len(RULES)
    for (_, rule, _), row in rows.items():
        if rule == "megaflow":
            assert row["step"] < 1
            assert row["cumulative"] < 1.2
            assert row["rank"] < 2
            assert row["missing"] == 0
    mix = "constant 45 / 40 / 10 / 5"
    assert rows[mix, "MosaicML stratified", 1]["cumulative"] > 50  # rounds the same way in each of 200 steps
    assert rows[mix, "MosaicML stratified", 1]["missing"] > 50
    assert rows[mix, "independent draws", 1]["step"] > 5
    assert rows["constant 50 / 50", "Megatron-LM", 1]["rank"] == 4  # alternating samples, alternating ranks


def test_trillion_token_run_is_reported(result: dict[str, Any]) -> None:
    run = result["scale"]
    assert run["steps"] == BENCHMARK["SMOKE"].scale.steps
    assert run["drift"] < 1.2
    assert max(run["epochs"]) > 1


def test_rules_are_what_their_projects_do() -> None:
    assert megatron_stream([0.5, 0.5], 6).tolist() == [0, 1, 0, 1, 0, 1]
    schedule = compile_knots("steps", [Knot(0, ("7", "3"))])
    mosaic = RULES["MosaicML stratified"](schedule, Layout(3, 2, 1, 4))
    assert mosaic[2].tolist() == [[[0, 0, 0, 0]], [[0, 0, 1, 1]]]  # 5.6 and 2.4: floors, the rest to the 0.6
    grain = RULES["Grain, mix sliced"](schedule, Layout(2, 1, 5, 1)).reshape(-1)
    assert np.bincount(grain).tolist() == [7, 3]
    assert grain.tolist() == [0, 0, 0, 1, 0, 0, 1, 0, 0, 1]  # 0 has ceil(0.7 k) of the first k
    assert RULES["Grain, mixed per rank"](schedule, Layout(2, 3, 5, 1))[:, 2].reshape(-1).tolist() == grain.tolist()


def test_error_figures_of_a_known_deal() -> None:
    dealt = np.array([[[[0, 0]], [[0, 1]]], [[[1, 1]], [[1, 1]]]], np.int8)  # two steps, two ranks of two
    figures = error_figures(dealt, np.full((2, 2), 0.5))
    assert (figures["step"], figures["cumulative"], figures["rank"], figures["missing"]) == (2, 1, 1, 75)
    assert figures["rank_run"] == 25  # the second rank has 1 of 4


def test_trillion_token_checks_can_fail() -> None:
    scale = Scale(tokens=4096 * 8 * 10, dp=4, windows=500, micro_batches=2, sampled_ranks=4)
    groups = make_groups(scale.windows)
    sampler = Sampler(1, 8, 4096, groups, chatflow("steps", (1, 1, 1, 0), (0, 0, 0, 1), 10))
    plan = sampler.plan()
    Promises(scale, groups).check(plan)
    with pytest.raises(AssertionError, match="not exact"):
        Promises(replace(scale, dp=5), groups).check(plan)
    with pytest.raises(AssertionError, match="floor or ceiling"):
        Promises(scale, groups).check(replace(plan, weights=plan.weights[::-1]))
    again = Promises(scale, groups)
    again.check(plan)
    with pytest.raises(AssertionError, match="skipped or repeated"):
        again.check(plan)
    backwards = replace(plan.deck, source=plan.deck.source[::-1], group=np.zeros_like(plan.deck.group))
    with pytest.raises(AssertionError, match="step's ratios"):
        Promises(scale, groups).check(replace(plan, deck=backwards))


def test_shares_are_the_schedules() -> None:
    shares = step_shares(chatflow("steps", (1, 0), (0, 1), 4), 6)
    assert shares[:, 1].tolist() == [0, 0.25, 0.5, 0.75, 1, 1]
