"""Runs whose sequences are cut over ranks: the curve, the samples and the held-out losses of one process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megaflow.config import Config
from megaflow.errors import UserError
from megaflow.train.samples import read_samples
from tests.train.runs import MakeConfig, killed, losses, planned_samples, run

STEPS = {"train__steps": 8, "train__eval_interval": 4, "train__eval_sequences": 5, "checkpoint__interval": 4}


def records(config: Config, kind: str) -> list[dict[str, Any]]:
    lines = (Path(config.run_dir) / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


@pytest.mark.parametrize(("world", "pp"), [(2, 1), (4, 1), (4, 2)])
def test_run_follows_one_process_and_resumes_without_the_cut(make_config: MakeConfig, world: int, pp: int) -> None:
    """cp 2, dp 2 x cp 2 or pp 2 x cp 2, killed; then dp 2 to the end, from the checkpoint of step 4."""
    whole, cut = make_config("whole", **STEPS), make_config("cut", **STEPS, parallel__cp=2, parallel__pp=pp)
    run(whole)
    killed(cut, world, rank=world - 1, step=7)
    resumed = make_config("cut", **STEPS)
    run(resumed, 2)

    for (step, ours), (planned, theirs) in zip(losses(resumed), losses(whole), strict=True):
        assert step == planned
        assert ours == pytest.approx(theirs, rel=1e-5)
    assert read_samples(Path(resumed.run_dir)) == read_samples(Path(whole.run_dir)) == planned_samples(whole)
    for ours, theirs in zip(records(resumed, "train"), records(whole, "train"), strict=True):
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5)
        assert ours["tokens"] == theirs["tokens"]
        for name, source in ours["sources"].items():
            counted = ("sequences", "tokens", "loss_tokens")
            assert [source[key] for key in counted] == [theirs["sources"][name][key] for key in counted]
    ours, theirs = (records(config, "heldout") for config in (resumed, whole))
    assert [record["step"] for record in ours] == [record["step"] for record in theirs] == [4, 8]
    for one, other in zip(ours, theirs, strict=True):
        for name, source in one["sources"].items():
            assert source == pytest.approx(other["sources"][name], rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"parallel__cp": 3}, "data.seq_length 32 is not a multiple of 6, which parallel.cp, tp and"),
        (
            {"parallel__cp": 4, "parallel__tp": 2, "parallel__sequence_parallel": True, "data__seq_length": 24},
            "data.seq_length 24 is not a multiple of 16, which parallel.cp, tp and",
        ),
    ],
)
def test_sequences_that_cannot_be_cut_are_refused(
    make_config: MakeConfig, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        make_config("cut", **settings)
