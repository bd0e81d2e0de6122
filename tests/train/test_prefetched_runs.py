"""Runs whose data are prepared ahead are the runs they are without, killed, changed or stopped by damaged data."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from megaflow.config import Config
from megaflow.config_load import parse_config
from megaflow.data.sampler.ledger import append_entry, read_ledger
from megaflow.data.sampler.schedule import Knot, compile_knots
from megaflow.train.run import Run, plan_run
from megaflow.train.samples import read_samples
from tests.data.corpora import read_window
from tests.distributed import RankError
from tests.train.runs import MakeConfig, assert_bitwise_equal, killed, losses, planned_samples, run


def with_data(config: Config, **changes: object) -> Config:
    tree = config.model_dump(mode="json")
    return parse_config(tree | {"data": tree["data"] | changes}, "changed")


def test_killed_and_resumed_with_workers_is_the_run_without(make_config: MakeConfig) -> None:
    """Two ranks; the saves and kills find later steps prepared, by another number of workers each time."""
    whole, ahead = with_data(make_config("whole"), workers=0), make_config("ahead")
    run(whole, 2)
    killed(with_data(ahead, workers=2, prefetch=3), 2, rank=1, step=7)
    killed(with_data(ahead, workers=5, prefetch=1), 2, rank=0, step=11)
    run(with_data(ahead, workers=2, prefetch=4), 2)
    assert_bitwise_equal(whole, ahead)
    assert losses(ahead) == losses(whole)
    assert [step for step, _ in losses(ahead)] == list(range(1, 13))
    assert read_samples(Path(ahead.run_dir)) == read_samples(Path(whole.run_dir)) == planned_samples(whole)


def test_a_change_of_mix_drops_what_was_prepared(make_config: MakeConfig) -> None:
    """It is found after step 6, asked for by then for step 6, when steps 7 to 10 are prepared in the old mix."""

    def during(rank: int, planned: Run) -> None:
        if rank == 0 and planned.sampler.step == 5:
            schedule = compile_knots("steps", [Knot(0, ["0.1", "0.4", "0.2", "0.3"])])
            entry = replace(planned.ledger[-1], first_step=6, batch_size=4, schedule=schedule, why="live")
            append_entry(planned.dir / "ledger.json", planned.ledger, entry)

    whole, ahead = (
        with_data(make_config(name), workers=workers, prefetch=4, digest_interval=2)
        for name, workers in (("whole", 0), ("ahead", 2))
    )
    for config in (whole, ahead):
        run(config, 2, during=during)
    assert [entry.first_step for entry in read_ledger(Path(ahead.run_dir) / "ledger.json")] == [1, 7]
    assert_bitwise_equal(whole, ahead)
    assert losses(ahead) == losses(whole)
    samples = read_samples(Path(ahead.run_dir))
    assert samples == read_samples(Path(whole.run_dir)) == planned_samples(whole)
    assert [len(samples[step]) for step in range(1, 13)] == [8] * 6 + [4] * 6


@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_data_stop_a_run_at_their_step(
    make_config: MakeConfig, corpora: dict[str, Path], tmp_path: Path, workers: int
) -> None:
    """All steps before are trained and logged, though their successors were prepared; a repaired run goes on."""
    for file in corpora["zh"].parent.glob("zh.*"):
        shutil.copy(file, tmp_path / file.name)
    config = make_config("run", checkpoint__interval=1)
    tree = config.model_dump(mode="json")
    tree["data"] |= {"workers": workers, "prefetch": 3, "verify": "off"}
    tree["data"]["groups"]["zh"]["sources"]["zh_source"]["path"] = str(tmp_path / "zh")
    config = parse_config(tree, "damaged")
    path = tmp_path / "zh.bin"
    sound = path.read_bytes()
    source = plan_run(config, torch.device("cpu")).sources[1]
    window = 5
    tokens = read_window(source, 0, window).tokens
    ids = np.frombuffer(sound, "<u2").copy()
    [at] = [i for i in range(len(ids) - len(tokens)) if (ids[i : i + len(tokens)] == tokens).all()]
    ids[at + len(tokens) // 2] = 60_000
    path.write_bytes(ids.tobytes())

    with pytest.raises(RankError, match="is id 60000, outside the vocabulary"):
        run(config)
    bad = min(step for step, ids in planned_samples(config).items() if (1, 0, window) in ids)
    assert bad > 1
    assert [step for step, _ in losses(config)] == list(range(1, bad))
    path.write_bytes(sound)
    run(config)
    assert read_samples(Path(config.run_dir)) == planned_samples(config)
