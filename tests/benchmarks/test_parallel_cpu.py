"""The benchmark of layouts on its tiny shape, and that no rank makes a collective more than its layout needs."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
import typer

BENCHMARK = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "parallel_cpu.py"))
LAYOUTS = BENCHMARK["LAYOUTS"]
QUICK = (
    "dp 2, not sharded",
    "tp 2",
    "tp 2 + sp, full",
    "cp 2, full",
    "pp 2, interleaved",
    "dp 2 x cp 2",
    "pp 2 x tp 2 + sp, zb_v",
)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in LAYOUTS]
)
def test_no_collective_more_than_needed(name: str) -> None:
    for rank in BENCHMARK["count"](BENCHMARK["SMOKE"], LAYOUTS[name])["ranks"]:
        assert rank["made"] == rank["needed"]


@pytest.mark.parametrize("name", BENCHMARK["TIED"])
def test_no_collective_more_than_needed_with_tied_embeddings(name: str) -> None:
    for rank in BENCHMARK["count"](BENCHMARK["tied"](BENCHMARK["SMOKE"]), LAYOUTS[name])["ranks"]:
        assert rank["made"] == rank["needed"]


def test_results_stand_in_a_table_and_a_picture(tmp_path: Path) -> None:
    chosen = ["one process", "pp 2, 1f1b"]
    BENCHMARK["main"](steps=2, layout=chosen, out=tmp_path, smoke=True)
    (path,) = tmp_path.glob("parallel_cpu-*.json")
    found = json.loads(path.read_text())["layouts"]
    assert list(found) == chosen
    assert [len(found[name]["turns"]["layout"]) for name in chosen] == [2, 2]
    messages = found["pp 2, 1f1b"]["ranks"][0]["made"]
    assert {name: counts["calls"] for name, counts in messages.items()} == {
        "all-reduce, world": 1,
        "send, forward_up": 4,
        "receive, backward_down": 4,
    }
    table = path.with_suffix(".md").read_text()
    assert "| pp 2, 1f1b | 2 all-reduce 0.00, 8 receive 0.02, 8 send 0.02 | none |" in table
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_a_collective_too_many_is_in_the_table() -> None:
    counts = {"all-reduce, tp": {"calls": 3, "bytes": 12}}
    rank = {"made": counts, "needed": {"all-reduce, tp": {"calls": 1, "bytes": 4}}}
    assert BENCHMARK["markdown"].__globals__["_extra"]({"ranks": [rank]}) == "+2 all-reduce"


def test_an_unknown_layout_is_refused(tmp_path: Path) -> None:
    with pytest.raises(typer.BadParameter, match="'dp 3' is none of one process; "):
        BENCHMARK["main"](layout=["dp 3"], out=tmp_path)
