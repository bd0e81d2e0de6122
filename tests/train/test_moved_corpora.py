"""A run whose sources are lists of corpora, moved to URLs between two launches."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megaflow.config import Config
from megaflow.config_load import parse_config
from megaflow.tools.plot import unigram_losses
from tests.distributed import run_ranks
from tests.train.runs import planned_samples, run, weights


def moved(config: Config, paths: dict[str, str | list[str]], cache: Path, steps: int) -> Config:
    """The config with other places of its corpora."""
    tree = config.model_dump(mode="json")
    for group, path in paths.items():
        tree["data"]["groups"][group]["sources"][f"{group}_source"]["path"] = path
    tree["data"]["cache_dir"] = str(cache)
    tree["train"]["steps"] = steps
    return parse_config(tree, "moved")


def heldout_losses(config: Config) -> dict[str, float]:
    """Of each source in the last evaluation."""
    lines = (Path(config.run_dir) / "metrics.jsonl").read_text().splitlines()
    last = [record for record in map(json.loads, lines) if record["kind"] == "heldout"][-1]
    return {name: found["loss"] for name, found in last["sources"].items()}


def test_lists_and_urls_give_the_run_of_the_files(
    make_config: Callable[..., Config], corpora: dict[str, Path], tmp_path: Path
) -> None:
    lists: dict[str, str | list[str]] = {"en": [str(corpora["en"]), str(corpora["zh"])]}
    changes = {"train__eval_interval": 2, "checkpoint__interval": 2, "data__verify": "off"}
    config = moved(make_config("straight", **changes), lists, tmp_path / "cache", 4)
    run(config, 2)
    far = tmp_path / "far"
    shutil.copytree(corpora["en"].parent, far)
    begun = make_config("moved", **changes)
    run(moved(begun, lists, tmp_path / "cache", 2))
    urls: dict[str, str | list[str]] = {name: f"file://{far}/{name}" for name in corpora}
    urls["en"] = [f"file://{far}/en", f"file://{far}/zh"]
    begun = moved(begun, urls, tmp_path / "cache", 4)
    run(begun, 2)
    assert list((tmp_path / "cache").iterdir())
    for name, tensor in weights(config).items():
        torch.testing.assert_close(weights(begun)[name], tensor, rtol=1e-4, atol=1e-6)
    assert planned_samples(begun) == planned_samples(config)
    assert heldout_losses(begun) == pytest.approx(heldout_losses(config), rel=1e-4)
    ((ours, theirs),) = run_ranks(1, lambda: tuple(unigram_losses(Path(c.run_dir)) for c in (config, begun)))
    assert ours == theirs
    assert ours
