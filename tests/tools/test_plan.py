"""`megaflow plan`: what it prints, draws and refuses."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from megaflow.parallel.schedule import Kind
from megaflow.planning.drawing import COLOURS
from megaflow.tools.cli import main


def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["megaflow", "plan", *options])
    with pytest.raises(SystemExit) as end:
        main()
    code = end.value.code
    return int(code or 0), *capsys.readouterr()


@pytest.mark.parametrize(
    ("schedule", "bubble", "inner", "most", "least"),
    [
        ("gpipe", "27.3%", "27.3%", "most 8 (rank 0)", "least 8 "),
        ("1f1b", "27.3%", "27.3%", "most 4 (rank 0)", "least 1 (rank 3)"),
        ("interleaved", "15.8%", "15.8%", "most 5.5 (rank 0)", "least 2.5 (rank 3)"),
        ("zb_h1", "11.1%", "11.1%", "most 4 ", "least 4 "),
        ("zb_v", "5.9%", "0.0%", "most 4 ", "least 4 "),
    ],
)
def test_bubble_and_peaks_are_printed(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    schedule: str,
    bubble: str,
    inner: str,
    most: str,
    least: str,
) -> None:
    code, out, _ = call(monkeypatch, capsys, "--schedule", schedule, "--pp", "4", "--micro-batches", "8")
    assert code == 0
    title, bubbles, peaks = out.splitlines()
    assert title.startswith(f"{schedule}, pp 4, micro-batches 8, chunks per rank ")
    assert f"bubble: {bubble} " in bubbles
    assert f"; {inner} " in bubbles
    assert most in peaks
    assert least in peaks


SPLIT: tuple[Kind, ...] = ("forward", "backward_input", "backward_weight")


@pytest.mark.parametrize(
    ("schedule", "pp", "shown"),
    [("zb_v", 4, SPLIT), ("interleaved", 2, ("forward", "backward")), ("1f1b", 1, ("backward",)), ("zb_h1", 20, SPLIT)],
)
def test_picture(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    schedule: str,
    pp: int,
    shown: tuple[Kind, ...],
) -> None:
    target = tmp_path / "picture.png"
    code, out, _ = call(monkeypatch, capsys, "--schedule", schedule, "--pp", str(pp), "--draw", str(target))
    assert code == 0
    assert out.splitlines()[-1] == str(target)
    assert [path.name for path in tmp_path.iterdir()] == ["picture.png"]
    pixels = imread(target)[..., :3]
    assert pixels.shape[0] == pytest.approx(120 * (0.3 * pp + 1.6), abs=1)
    for kind in shown:  # more than its mark in the legend
        assert (abs(pixels - to_rgb(COLOURS[kind])).max(axis=-1) < 0.004).sum() > 2000


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (["--schedule", "best"], "choose one of gpipe, 1f1b, interleaved, zb_h1, zb_v"),
        (["--pp", "0"], "0 pipeline ranks: must be at least 1"),
        (["--micro-batches", "-1"], "-1 micro-batches: must be at least 1"),
        (["--schedule", "interleaved", "--micro-batches", "6"], "take 8"),
        (["--schedule", "zb_v", "--chunks", "4"], "has 2 chunks per rank, got 4"),
        (["--pp", "100000"], "--pp 100000 --micro-batches 8: too many actions"),
        (["--draw", "{tmp}"], "is a folder"),
        (["--draw", "{tmp}/none/x.png"], "cannot be written"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    options: list[str],
    what: str,
) -> None:
    code, _, err = call(monkeypatch, capsys, *(option.format(tmp=tmp_path) for option in options))
    assert code == 2
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1
    assert what in err
