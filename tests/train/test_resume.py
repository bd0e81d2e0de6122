"""Runs that are killed, stopped, resumed and moved to another layout are the runs they would have been."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from megaflow.checkpoint.store import open_checkpoint
from megaflow.config import Config
from megaflow.errors import UserError
from megaflow.train.run import plan_run
from megaflow.train.samples import read_samples
from tests.train.runs import MakeConfig, assert_bitwise_equal, killed, losses, planned_samples, run


@pytest.mark.parametrize(("world", "tp", "precision"), [(1, 1, "fp32"), (2, 2, "fp32"), (2, 1, "bf16")])
def test_killed_twice_and_resumed_is_bit_identical(
    make_config: MakeConfig, world: int, tp: int, precision: str
) -> None:
    """Across an epoch's edge: the packed sources last a few steps only."""
    settings = {"parallel__tp": tp, "train__precision": precision, "parallel__sequence_parallel": tp > 1}
    whole, broken = make_config("whole", **settings), make_config("broken", **settings)
    run(whole, world)
    killed(broken, world, rank=world - 1, step=7)
    assert [path.name for path in sorted(Path(broken.run_dir).glob("checkpoints/*"))] == ["step-00000004"]
    killed(broken, world, rank=0, step=11)
    run(broken, world)
    assert_bitwise_equal(whole, broken)
    assert losses(broken) == losses(whole)
    assert [step for step, _ in losses(broken)] == list(range(1, 13))
    samples = read_samples(Path(broken.run_dir))
    assert samples == read_samples(Path(whole.run_dir)) == planned_samples(whole)
    assert max(epoch for ids in samples.values() for _, epoch, _ in ids) >= 1


def test_resumed_on_other_layouts_consumes_the_same_order(make_config: MakeConfig) -> None:
    """tp 2 x dp 2 with a sharded optimizer, killed; dp 4 without, with another micro-batch, killed; one process."""
    whole = make_config("whole")
    run(whole)
    layouts = [
        (4, {"parallel__tp": 2, "parallel__sequence_parallel": True}, 6),
        (4, {"train__micro_batch_size": 1, "parallel__zero": False}, 11),
        (1, {"train__micro_batch_size": 4}, None),
    ]
    for world, changes, kill_step in layouts:
        config = make_config("moved", **changes)
        if kill_step:
            killed(config, world, rank=1, step=kill_step)
        else:
            run(config, world)
    assert read_samples(Path(config.run_dir)) == read_samples(Path(whole.run_dir)) == planned_samples(whole)
    for (_, ours), (_, theirs) in zip(losses(config), losses(whole), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_one_rank_saves_and_stops_all(make_config: MakeConfig, number: signal.Signals) -> None:
    whole, stopped = make_config("whole"), make_config("stopped")
    run(whole, 2)
    run(stopped, 2, (1, 6, number))
    last = losses(stopped)[-1][0]
    assert 6 <= last < 12
    assert open_checkpoint(Path(stopped.run_dir) / "checkpoints").manifest.step == last
    run(stopped, 2)
    assert_bitwise_equal(whole, stopped)


def test_lengthening_a_run_does_not_reshuffle(make_config: MakeConfig) -> None:
    whole = make_config("whole")
    run(whole)
    run(make_config("longer", train__steps=5))
    longer = make_config("longer")
    run(longer)
    assert read_samples(Path(longer.run_dir)) == read_samples(Path(whole.run_dir))


def test_a_finished_run_does_nothing_more(make_config: MakeConfig) -> None:
    config = make_config("short", train__steps=2)
    run(config)
    before = (Path(config.run_dir) / "metrics.jsonl").read_bytes()
    run(config)
    assert (Path(config.run_dir) / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"data__seed": 1}, ["data.seed", "1 differs from 0"]),
        ({"data__document_boundaries": False}, ["data.document_boundaries", "False differs from True"]),
        (
            {"model": {"hidden_size": 64, "intermediate_size": 48, "num_layers": 2, "num_heads": 4}},
            ["model.hidden_size", "64 differs from 32"],
        ),
    ],
)
def test_a_run_is_not_resumed_as_another(make_config: MakeConfig, change: dict[str, Any], words: list[str]) -> None:
    run(make_config("first", train__steps=2))
    if "model" in change:
        tree = make_config("first").model_dump()
        changed = Config.model_validate(tree | change)
    else:
        changed = make_config("first", **change)
    with pytest.raises(UserError) as caught:
        plan_run(changed, torch.device("cpu"))
    assert [word for word in [*words, "new run_dir"] if word not in str(caught.value)] == []


def test_a_damaged_checkpoint_falls_back_to_the_one_before(make_config: MakeConfig) -> None:
    whole, damaged = make_config("whole"), make_config("damaged")
    run(whole)
    killed(damaged, 1, rank=0, step=10)
    newest = Path(damaged.run_dir) / "checkpoints" / "step-00000008"
    file = next(newest.glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    run(damaged)
    assert_bitwise_equal(whole, damaged)
    assert read_samples(Path(damaged.run_dir)) == read_samples(Path(whole.run_dir))
