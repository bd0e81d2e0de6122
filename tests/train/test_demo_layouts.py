"""The demo's model as a pipeline of cut layers, killed, and resumed on another layout: the run of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megaflow.checkpoint.store import open_checkpoint
from megaflow.config_load import read_yaml
from megaflow.train.samples import read_samples
from tests.train.conftest import ROOT
from tests.train.runs import MakeConfig, killed, losses, planned_samples, run, weights

PIPELINE = {"parallel__pp": 2, "parallel__tp": 2, "parallel__schedule": "zb_v"}


def demo(section: str) -> dict[str, Any]:
    return {f"{section}__{key}": value for key, value in read_yaml(ROOT / "configs" / "demo.yaml")[section].items()}


def test_pipeline_killed_and_resumed_as_replicas_follows_one_process(make_config: MakeConfig) -> None:
    settings = demo("model") | {"train__steps": 5, "checkpoint__interval": 2}
    whole, cut = make_config("whole", **settings), make_config("cut", **settings, **PIPELINE)
    run(whole)
    killed(cut, 4, rank=2, step=5)
    checkpoint = open_checkpoint(Path(cut.run_dir) / "checkpoints")
    assert checkpoint.manifest.layout == {"world_size": 4, "pp": 2, "dp": 1, "cp": 1, "tp": 2}
    resumed = make_config("cut", **settings)
    run(resumed, 4)

    assert [step for step, _ in losses(resumed)] == list(range(1, 6))
    assert [loss for _, loss in losses(resumed)] == pytest.approx([loss for _, loss in losses(whole)], rel=1e-5)
    assert read_samples(Path(resumed.run_dir)) == read_samples(Path(whole.run_dir)) == planned_samples(whole)
    ours, theirs = weights(resumed), weights(whole)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        if name.startswith("model/"):
            # where a gradient is nearly nothing, AdamW makes a whole step of its rounding
            assert float((ours[name] - tensor).norm() / tensor.norm()) < 3e-5, name
