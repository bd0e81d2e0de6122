"""The benchmark of the training step on its tiny shape: what it writes, and that both sides compute the same."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

from benchmarks.train_cpu_report import CLASSES

BENCHMARK = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "train_cpu.py"))


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("results")
    BENCHMARK["main"](steps=2, threads=1, out=path, smoke=True)
    return path


def test_result_holds_every_contender_and_equal_losses(out: Path) -> None:
    (path,) = out.glob("train_cpu-*.json")
    (shape,) = json.loads(path.read_text())["shapes"]
    for layout, rivals in BENCHMARK["RIVALS"].items():
        found = shape["layouts"][layout]
        assert list(found["runs"]) == ["megaflow", *rivals]
        ours = found["runs"]["megaflow"]
        for name, run in found["runs"].items():
            assert len(run["seconds"]) == len(run["cpu_seconds"]) == 2
            assert min(run["seconds"]) > 0
            if "no boundaries" in name:
                assert run["losses"][0] != pytest.approx(ours["losses"][0], rel=1e-5)
            else:
                assert run["losses"] == pytest.approx(ours["losses"], rel=1e-5)
    assert shape["layouts"]["packed documents"]["documents"] > shape["layouts"]["causal"]["documents"]


def test_profile_finds_time_in_every_class(out: Path) -> None:
    (path,) = out.glob("train_cpu-*.json")
    for layout in json.loads(path.read_text())["shapes"][0]["layouts"].values():
        assert sorted(layout["profile"]) == sorted(CLASSES)
        assert all(seconds > 0 for seconds in layout["profile"].values())


def test_tables_and_picture_stand_beside(out: Path) -> None:
    (table,) = out.glob("train_cpu-*.md")
    assert "transformers, boundaries" in table.read_text()
    (picture,) = out.glob("train_cpu-*.png")
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_another_first_loss_is_refused() -> None:
    contenders = {"megaflow": lambda batches: 1.0, "transformers": lambda batches: 1.001}
    with pytest.raises(AssertionError, match="transformers: first loss differs"):
        BENCHMARK["measure"](contenders, [], 2, lambda: None)
