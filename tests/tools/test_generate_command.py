"""`megaflow generate` on a checkpoint written as a run writes it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from typer import Typer
from typer.testing import CliRunner

from megaflow.checkpoint.shards import shards_of
from megaflow.checkpoint.store import CheckpointStore
from megaflow.errors import UserError
from megaflow.model.generate import generate as generate_ids
from megaflow.model.placement import placement
from megaflow.tools.generate import generate, load_run
from tests.tiny import tiny_config, tiny_model

WORDS = ["</s>", "one", "two", "three"]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    vocabulary = {**{word: i for i, word in enumerate(WORDS)}, **{f"w{i}": i for i in range(4, 199)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="one"))
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))

    model = tiny_model()
    tensors = shards_of(placement(model.config, model.ctx), dict(model.named_parameters()), "model")
    config = {"model": tiny_config().model_dump(mode="json"), "train": {"precision": "fp32"}}
    CheckpointStore(tmp_path / "checkpoints").save(3, tensors, {"config": config})
    return tmp_path


def call(run: Path, *options: str) -> str:
    app = Typer()
    app.command()(generate)
    result = CliRunner().invoke(app, [str(run), *options], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_loaded_weights_are_the_saved_ones(run: Path) -> None:
    loaded, _ = load_run(run)
    saved = dict(tiny_model().named_parameters())
    assert all(torch.equal(parameter.cpu(), saved[name]) for name, parameter in loaded.named_parameters())


def test_prompts_are_continued(run: Path) -> None:
    out = call(run, "--prompt", "one two", "--prompt", "three", "--max-tokens", "5", "--temperature", "0")
    _, tokenizer = load_run(run)
    expected = []
    for ids in ([0, 1, 2], [0, 3]):
        expected.append(tokenizer.decode([*ids, *generate_ids(tiny_model(), ids, 5, tokenizer.eos_id)]))
    assert out.splitlines() == expected
    assert expected[0].startswith("one two w")


def test_seed_and_temperature_reach_the_draw(run: Path) -> None:
    options = ("--prompt", "one", "--max-tokens", "12", "--temperature", "2")
    assert call(run, *options, "--seed", "1") == call(run, *options, "--seed", "1")
    assert call(run, *options, "--seed", "1") != call(run, *options, "--seed", "2")


def test_a_folder_that_is_no_run_is_a_users_mistake(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere"):
        load_run(tmp_path / "nowhere")
    (run / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="restore the run's tokenizer"):
        load_run(run)
