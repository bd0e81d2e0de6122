"""What is checked before a run begins, and what a launch that fails leaves behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megaflow.checkpoint.store import open_checkpoint
from megaflow.config import Config
from megaflow.config_load import parse_config
from megaflow.config_parallel import ParallelConfig
from megaflow.errors import UserError
from megaflow.model.flops import num_parameters
from megaflow.parallel.mesh import ParallelContext, on_main_rank
from megaflow.train.loop import train
from megaflow.train.run import plan_run
from tests.distributed import RankError, run_ranks

CPU = torch.device("cpu")
MakeConfig = Callable[..., Config]


def run(config: Config) -> None:
    run_ranks(1, lambda: train(plan_run(config, CPU), ParallelContext.single()))


def with_changes(config: Config, **changes: Any) -> Config:
    """The config with dotted values replaced, `section__key=value`."""
    tree = config.model_dump(mode="json")
    for key, value in changes.items():
        *sections, leaf = key.split("__")
        place = tree
        for section in sections:
            place = place[section]
        place[leaf] = value
    return parse_config(tree, "changed")


@pytest.fixture
def hf_weights(make_config: MakeConfig, tmp_path: Path) -> Path:
    """A trained model of the tests' shape, exported."""
    from megaflow.tools.export import export

    config = make_config("base", train__steps=2)
    run(config)
    export(Path(config.run_dir), tmp_path / "hf", dtype=None)
    return tmp_path / "hf"


def test_a_launch_that_fails_does_not_lock_its_folder(make_config: MakeConfig, hf_weights: Path) -> None:
    broken = hf_weights.with_name("broken")
    shutil.copytree(hf_weights, broken)
    (broken / "model.safetensors").write_bytes(b"no tensors")
    config = make_config("run", train__steps=2)
    with pytest.raises(RankError, match="not a readable safetensors file"):
        run(with_changes(config, model__weights=str(broken)))
    run(with_changes(config, model__weights=str(hf_weights)))
    assert open_checkpoint(Path(config.run_dir) / "checkpoints").manifest.step == 2


def test_training_from_weights_starts_where_they_are(make_config: MakeConfig, hf_weights: Path) -> None:
    """With bf16 parameters too: the fp32 master starts from the weights, not from their rounding."""
    tiny = {"optim__lr": 1e-30, "train__steps": 2}
    config = with_changes(make_config("run", train__precision="bf16", **tiny), model__weights=str(hf_weights))
    run(config)
    base = open_checkpoint(hf_weights.parent / "base" / "checkpoints")
    ours = open_checkpoint(Path(config.run_dir) / "checkpoints")
    names = [name for name in base.names() if name.startswith("model/")]
    assert num_parameters(config.model.model_copy(update={"vocab_size": 6000})) == sum(
        ours.read(name).numel() for name in names
    )
    for name in names:
        assert torch.equal(ours.read(name), base.read(name)), name
        assert not torch.equal(ours.read(name), ours.read(name).bfloat16().float()) or "norm" in name


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_attention_heads": 8}, ["num_heads is 8", "the model's is 4", "model.num_heads=8"]),
        ({"rms_norm_eps": 1e-6}, ["norm_eps"]),
        ({"rope_theta": 5e5}, ["rope_theta is 500000.0"]),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2}}, ["rope type is 'linear'", "only plain LLaMA-2"]),
        ({"model_type": "mistral"}, ["model_type is 'mistral'"]),
        ({"tie_word_embeddings": True}, ["tie_embeddings"]),
    ],
)
def test_weights_of_another_model_are_refused(
    make_config: MakeConfig, hf_weights: Path, change: dict[str, Any], words: list[str]
) -> None:
    path = hf_weights / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError) as caught:
        plan_run(with_changes(make_config("run"), model__weights=str(hf_weights)), CPU)
    assert [word for word in [str(path), *words] if word not in str(caught.value)] == []


def test_held_out_documents_are_checked_before_the_run(
    make_config: MakeConfig, corpora: dict[str, Path], tmp_path: Path
) -> None:
    for path in corpora["en"].parent.glob("en.*"):
        shutil.copy(path, tmp_path / path.name)
    held = tmp_path / "en.heldout.bin"
    held.write_bytes(held.read_bytes()[:-2])
    config = with_changes(make_config("run"), data__groups__en__sources__en_source__path=str(tmp_path / "en"))
    with pytest.raises(UserError, match=r"en\.heldout\.bin"):
        plan_run(config, CPU)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kernels": {"attention": "flash9"}}, ["kernels", "'flash9'", "sdpa"]),
        ({"kernels": {"atention": "sdpa"}}, ["kernels", "'atention'", "attention"]),
        ({"model__vocab_size": 100}, ["model.vocab_size", "100", "6000"]),
        ({"data__seq_length": 64}, ["packed for sequences of 32, not 64"]),
        ({"data__schedule__initial": {"en": 0.5, "zh": 0.5, "parallel": 0, "instruction": 0}}, []),
    ],
)
def test_what_does_not_fit_is_refused(make_config: MakeConfig, changes: dict[str, Any], words: list[str]) -> None:
    config = with_changes(make_config("run"), **changes)
    if not words:
        plan_run(config, CPU)
        return
    with pytest.raises(UserError) as caught:
        plan_run(config, CPU)
    assert [word for word in words if word not in str(caught.value)] == []
    assert len(str(caught.value).splitlines()) == 1


def test_another_tokenizer_is_refused(make_config: MakeConfig, tmp_path: Path) -> None:
    import sentencepiece

    (tmp_path / "text").write_text("a few words to learn from\n" * 50)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"), model_prefix=str(tmp_path / "other"), vocab_size=18, minloglevel=2, num_threads=1
    )
    with pytest.raises(UserError, match=r"data\.tokenizer: .*other\.model is not the tokenizer that source en_source"):
        plan_run(with_changes(make_config("run"), data__tokenizer=str(tmp_path / "other.model")), CPU)


def test_a_checkpoint_of_another_mix_is_refused(make_config: MakeConfig) -> None:
    config = make_config("run", train__steps=2)
    run(config)
    ledger = Path(config.run_dir) / "ledger.json"
    entries = json.loads(ledger.read_text())
    entries[0]["why"] = "edited by hand"
    ledger.write_text(json.dumps(entries))
    with pytest.raises(RankError, match=r"saved with another ledger\.json"):
        run(with_changes(config, train__steps=3))


def test_a_mistake_on_the_main_rank_is_known_to_all() -> None:
    def rank_main() -> str:
        ctx = ParallelContext.create(ParallelConfig(), "cpu")

        def fail() -> None:
            raise UserError("no room")

        with pytest.raises(UserError) as caught:
            on_main_rank(ctx, fail)
        return str(caught.value)

    assert run_ranks(2, rank_main) == ["no room", "no room"]
