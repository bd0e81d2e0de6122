"""The benchmark of background saves: what it makes of its measurements, and a run of a moment."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.checkpoint_stall import summary

ROOT = Path(__file__).parents[2]


def test_stalls_are_counted_from_a_plain_step() -> None:
    groups = [[0.9, 0.3, 0.3, 0.3, 0.2, 0.1, 0.1, 0.1], [0.5, 0.3, 0.3, 0.3, 0.2, 0.1, 0.1, 0.1]]
    wanted = {"step_ms": 100, "first_stall_ms": 800, "stall_ms": 400, "later_ms": 200}
    assert summary(groups) == pytest.approx(wanted)


def test_a_short_run_writes_its_results(tmp_path: Path) -> None:
    options = ["--mib", "1", "--saves", "2", "--steps", "8", "--folder", str(tmp_path), "--out", str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "benchmarks/checkpoint_stall.py", *options], cwd=ROOT, capture_output=True)
    assert done.returncode == 0, done.stderr
    (found,) = (json.loads(path.read_text()) for path in (tmp_path / "out").glob("*.json"))
    assert found["waiting"].keys() == found["background"].keys() == summary([[1.0] * 8] * 2).keys()
