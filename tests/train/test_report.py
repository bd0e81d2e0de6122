"""What a run writes about itself: records, TensorBoard, held-out figures, plots."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.axes import Axes

from megaflow.config import Config
from megaflow.data.corpus.corpus import Corpus
from megaflow.data.loader import heldout_batches
from megaflow.data.sources import open_heldout
from megaflow.data.unigram import unigram_loss
from megaflow.errors import UserError
from megaflow.kernels.dispatch import OPERATIONS
from megaflow.parallel.mesh import ParallelContext
from megaflow.tools.plot import plot
from megaflow.train.loop import train
from megaflow.train.metrics import MetricsLog
from megaflow.train.run import plan_run
from tests.distributed import run_ranks


def run(config: Config, world: int) -> str:
    def rank_main() -> None:
        planned = plan_run(config, torch.device("cpu"))
        ctx = ParallelContext.single() if world == 1 else ParallelContext.create(config.parallel, "cpu")
        train(planned, ctx)

    run_ranks(world, rank_main)
    return config.run_dir


def records(run_dir: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]


def test_records_hold_ratios_losses_tokens_epochs_and_speed(make_config: Callable[..., Config]) -> None:
    config = make_config("run", train__log_interval=3, train__tensorboard=True, train__eval_interval=6)
    found = records(run(config, 2))
    (launch,) = (record for record in found if record["kind"] == "launch")
    assert launch["layout"]["dp"] == 2
    assert launch["kernels"].keys() == OPERATIONS.keys()
    assert (launch["kernels"]["attention"], launch["kernels"]["rms_norm"]) == ("sdpa", "reference")
    train_records = [record for record in found if record["kind"] == "train"]
    # every third step, and at 4 and 8 because checkpoints are saved there
    steps = [record["step"] for record in train_records]
    assert steps == [3, 4, 6, 8, 9, 12]
    last = train_records[-1]
    assert last["tokens"] == 12 * 8 * 32 == sum(source["tokens"] for source in last["sources"].values())
    assert sum(source["sequences"] for r in train_records for source in r["sources"].values()) == 12 * 8
    for record, before in zip(train_records, [0, *steps], strict=False):
        for group in record["groups"].values():
            assert abs(group["planned"] - group["achieved"]) * (record["step"] - before) * 8 <= 2
        sources = [source for source in record["sources"].values() if source["loss"] is not None]
        assert min(s["loss"] for s in sources) <= record["loss"] <= max(s["loss"] for s in sources)
    masked = last["sources"]["instruction_source"]
    assert 0 < masked["loss_tokens"] < masked["tokens"] / 2
    packs = json.loads(Path(f"{config.data.groups['parallel'].sources['parallel_source'].path}.json").read_text())[
        "packs"
    ]
    parallel = last["sources"]["parallel_source"]
    assert parallel["epochs"] == pytest.approx(parallel["tokens"] / 32 / packs)
    speed = last["speed"]
    assert speed["tflops"] == pytest.approx(speed["mfu"])  # the peak given is 1 TFLOP/s
    assert speed["mfu_full_attention"] > speed["mfu"]
    assert list(Path(config.run_dir, "tensorboard").glob("events.*"))
    assert (Path(config.run_dir) / "config.yaml").is_file()


def test_heldout_loss_is_the_same_on_every_layout_and_bits_per_byte_follow(make_config: Callable[..., Config]) -> None:
    def heldout(name: str, world: int, tp: int) -> dict[str, Any]:
        config = make_config(name, train__steps=2, train__eval_interval=2, parallel__tp=tp)
        return next(r for r in records(run(config, world)) if r["kind"] == "heldout")["sources"]

    single, spread = heldout("single", 1, 1), heldout("spread", 4, 2)
    assert set(single) == {"en_source", "zh_source", "parallel_source", "instruction_source"}
    for name, figures in single.items():
        assert spread[name]["loss"] == pytest.approx(figures["loss"], rel=1e-5)
        assert spread[name]["sequences"] == figures["sequences"]
    config = make_config("x")
    held = Corpus.open(config.data.groups["en"].sources["en_source"].path + ".heldout").manifest
    bits = single["en_source"]["loss"] * held.loss_tokens / math.log(2) / held.loss_bytes
    assert single["en_source"]["bits_per_byte"] == pytest.approx(bits)


def test_unigram_loss_by_hand(corpora: dict[str, Path]) -> None:
    prefix = corpora["instruction"]
    held = open_heldout("instruction", prefix, 32)
    assert held is not None
    corpus = Corpus.open(prefix)
    tokens = torch.from_numpy(corpus.tokens(0, corpus.num_tokens).astype("int64"))
    counts = torch.bincount(tokens, minlength=6000).double() + 1
    log_probabilities = (counts / counts.sum()).log()
    labels = torch.cat([batch.labels.flatten() for batch in heldout_batches(held, 2)])
    expected = -log_probabilities[labels[labels >= 0]].mean()
    assert unigram_loss(prefix, 32) == pytest.approx(float(expected))


def test_plot_is_a_picture_and_needs_a_run(make_config: Callable[..., Config], tmp_path: Path) -> None:
    run_dir = Path(run(make_config("run", train__eval_interval=6), 1))
    plot(run_dir, None)
    assert (run_dir / "run.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    with pytest.raises(UserError, match=r"metrics\.jsonl"):
        plot(tmp_path / "nowhere", None)


def test_plot_draws_groups_and_sources_appended_to_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def record(kind: str, step: int, names: str) -> str:
        ratio = {"planned": 1 / len(names), "achieved": 1 / len(names)}
        source = {"loss": 2.0 + step / 10, "bits_per_byte": 1.0}
        sums = {"tokens": 100, "loss": 2.0, "groups": dict.fromkeys(names, ratio)}
        return json.dumps({"kind": kind, "step": step, "sources": {f"{n}1": source for n in names}} | sums)

    steps = [(step, "ab" if step < 5 else "abc") for step in range(1, 9)]
    lines = [record(kind, step, names) for step, names in steps for kind in ("train", "heldout")]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    drawn: dict[str, list[float]] = {}
    line = Axes.plot
    monkeypatch.setattr("megaflow.tools.plot.unigram_losses", lambda run: {})
    monkeypatch.setattr(
        Axes,
        "plot",
        lambda axis, x, *rest, **how: drawn.update({str(how.get("label")): list(x)}) or line(axis, x, *rest, **how),
    )
    plot(tmp_path, None)
    assert {name: drawn[name] for name in ("a", "c", "a1", "c1")} == {
        "a": list(range(1, 9)),
        "c": [5, 6, 7, 8],
        "a1": list(range(1, 9)),
        "c1": [5, 6, 7, 8],
    }


def test_records_after_the_resumed_step_are_dropped(tmp_path: Path) -> None:
    lines = [json.dumps({"kind": "train", "step": step}) for step in (1, 2, 3, 4)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"kind": "tr')
    log = MetricsLog(tmp_path, resumed_step=2, tensorboard=False)
    log.write({"kind": "train", "step": 3})
    log.close()
    assert [record["step"] for record in records(str(tmp_path))] == [1, 2, 3]
