"""`megaflow plan`: what it prints, draws and refuses."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from megaflow.parallel.schedule import Kind
from megaflow.planning.drawing import COLOURS
from megaflow.planning.published import Row
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


CHATFLOW = ["--config", str(Path(__file__).parents[2] / "configs" / "chatflow-7b.yaml")]
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
        (["--draw", "{tmp}/none/x.png"], "there is no folder"),
        (["--draw", "{tmp}/x.jpg"], "ends in .png"),
        ([*CHATFLOW, "--draw", "{tmp}/none/x.png"], "there is no folder"),
        (["--config", "{tmp}/none.yaml"], "none.yaml: cannot be read"),
        ([*CHATFLOW, "--gpu", "h1000"], "choose one of a100"),
        ([*CHATFLOW, "--gpus", "12"], "--gpus 12: is no multiple of --nodes-of 8"),
        ([*CHATFLOW, "--gpus", "0"], "--gpus 0: must be above 0"),
        ([*CHATFLOW, "--best", "0"], "--best 0"),
        ([*CHATFLOW, "--recompute", "some"], "choose one of none, selective, full"),
        ([*CHATFLOW, "--micro-batch", "3"], "no layout of 8 GPUs divides"),
        ([*CHATFLOW, "--layout", "parallel.pp=3"], "does not divide the 8 processes"),
        ([*CHATFLOW, "model.vocab_size=0"], "give model.vocab_size=32000"),
        ([*CHATFLOW, "train.precision=fp32"], "add train.precision=bf16"),
        ([*CHATFLOW, "--micro-batch", "1", "--draw", "{tmp}"], "is a folder"),
        ([*CHATFLOW, "--network", "nan"], "--network nan: must be above 0"),
        ([*CHATFLOW, "--matmul", "5"], "give at most 1"),
        ([*CHATFLOW, "--pp", "2"], "--pp: not with --config"),
        (["parallel.pp=2"], "only with --config"),
        (["--gpus", "64"], "--gpus: only with --config"),
        (["--json"], "--json: only with --config"),
        (["--published", "--draw", "{tmp}/x.png"], "--draw: not with --published"),
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


def test_layouts_of_a_run_are_ranked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """On a machine that has neither its corpora nor its weights."""
    target = tmp_path / "plan.png"
    options = [*CHATFLOW, "--gpus", "16", "--best", "3", "--micro-batch", "1", "--draw", str(target)]
    code, out, _ = call(monkeypatch, capsys, *options)
    assert code == 0
    lines = out.splitlines()
    assert all(word in lines[1] for word in ("schedule", "GiB", "s/step", "tokens/s/GPU", "MFU", "bubble", "exposed"))
    assert sum(line.rstrip().endswith("%") for line in lines) == 3
    assert any(line.startswith("the first: parallel.") for line in lines)
    assert any("layouts fit into 75.6 GiB" in line for line in lines)
    assert lines[-1] == str(target)
    assert imread(target).shape[:2] == (660, 1560)


def test_a_layout_in_detail(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    options = [*CHATFLOW, "--gpus", "16", "--layout", "parallel.tp=4", "parallel.pp=2", "parallel.schedule=zb_v"]
    code, out, _ = call(monkeypatch, capsys, *options)
    assert code == 0
    assert out.startswith("tp 4, pp 2 zb_v, dp 2, micro-batch 2, recompute none\n")
    assert all(word in out for word in ("moments", "loss", "fullest: pipeline rank 0", "gradients", "bubble"))


def test_published_rows_take_a_line_each(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(Row, "predicted", property(lambda row: row.seconds * (1.1 if row.fits else 0.9)))
    code, out, _ = call(monkeypatch, capsys, "--published")
    assert code == 0
    table, summary = out.split("59 rows; 4 fit a parameter each, 55 are held out: mean miss ")
    assert len(table.strip().splitlines()) == 2 + 59
    assert all(len(line) <= 140 for line in out.splitlines())
    assert "tp4 cp2 pp4x5 dp2 " in table
    assert summary.startswith("10.0%, largest -10.0% ")
    assert "dgxc: NVIDIA/dgxc-benchmarking" in summary


def test_nothing_fits(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    target = tmp_path / "plan.png"
    options = [*CHATFLOW, "--gpus", "1", "--gpu", "rtx4090", "--draw", str(target)]
    code, out, _ = call(monkeypatch, capsys, *options)
    assert code == 0
    assert "\nthe least: " in out
    assert out.endswith("not drawn, for nothing fits\n")
    assert not target.exists()


def test_json_adds_up(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(monkeypatch, capsys, *CHATFLOW, "--gpus", "16", "--layout", "--json", "parallel.tp=4")
    assert code == 0
    tree = json.loads(out)
    assert tree["layout"]["dp"] == 4
    assert tree["step"]["seconds"] == pytest.approx(sum(tree["step"]["parts"].values()))
    for rank in tree["memory"]:
        assert rank["total"] == 2 * rank["total"] - sum(size for item, size in rank.items() if item != "total")
    _, out, _ = call(monkeypatch, capsys, *CHATFLOW, "--best", "2", "--micro-batch", "1", "--json")
    assert len(json.loads(out)["best"]) == 2


def test_faster_links_are_faster(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    options = [*CHATFLOW, "--gpus", "64", "--layout", "--json", "parallel.tp=1", "train.micro_batch_size=1"]
    seconds = []
    for more in (["--network", "10"], ["--network", "400"], ["--network", "400", "--matmul", "0.9"]):
        _, out, _ = call(monkeypatch, capsys, *options, *more)
        seconds.append(json.loads(out)["step"]["seconds"])
    assert seconds[0] > 1.2 * seconds[1]
    assert seconds[1] > 1.05 * seconds[2]
