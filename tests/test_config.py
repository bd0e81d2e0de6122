"""The config tree: defaults, overrides, and one clear line for every mistake."""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from megaflow.config import Config
from megaflow.config_load import describe, dump_config, load_config, parse_config
from megaflow.errors import UserError

ROOT = Path(__file__).parents[1]


@pytest.fixture
def tree(tmp_path: Path) -> dict[str, Any]:
    """A valid config with two groups and three sources whose files exist."""
    for name in ("en", "zh", "web"):
        for suffix in (".bin", ".idx", ".json"):
            (tmp_path / f"{name}{suffix}").touch()
    (tmp_path / "tokenizer.model").touch()
    return {
        "run_dir": str(tmp_path / "run"),
        "model": {"hidden_size": 64, "intermediate_size": 96, "num_layers": 2, "num_heads": 8, "num_kv_heads": 4},
        "data": {
            "tokenizer": str(tmp_path / "tokenizer.model"),
            "seq_length": 32,
            "groups": {
                "en": {"sources": {"wiki_en": {"path": str(tmp_path / "en")}}},
                "zh": {"sources": {n: {"path": str(tmp_path / n), "weight": w} for n, w in (("zh", 2), ("web", 0.5))}},
            },
            "schedule": {"initial": {"en": 0.9, "zh": 0.1}, "final": {"en": 0.3, "zh": 0.7}},
        },
        "train": {"steps": 10, "global_batch_size": 8, "micro_batch_size": 2},
        "optim": {"lr": 1e-3, "warmup_steps": 2},
    }


def load(tree: dict[str, Any], tmp_path: Path, *overrides: str) -> Config:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return load_config(path, list(overrides))


def test_resolved_config_reads_back_equal(tree: dict[str, Any], tmp_path: Path) -> None:
    config = load(tree, tmp_path, "optim.lr=3e-4", "parallel={tp: 2}")
    assert config.optim.lr == 3e-4
    assert config.parallel.tp == 2
    assert list(config.data.groups["zh"].sources) == ["zh", "web"]
    (tmp_path / "resolved.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "resolved.yaml") == config


def test_every_setting_has_help() -> None:
    rows = list(describe())
    assert len(rows) > 50
    assert [key for key, _, _, text in rows if len(text) < 8] == []
    assert any(key == "data.groups.<name>.sources.<name>.path" for key, *_ in rows)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.stpes=5", ["train.stpes", "unknown key", "'steps'"]),
        ("trian.steps=5", ["trian", "unknown key", "'train'"]),
        ("data.groups.en.sources.wiki_en.pth=x", ["pth", "unknown key", "'path'"]),
        (
            "data.schedule={knots: [{at: 0, weights: {en: 1, zh: 0}, pacng: step}]}",
            ["pacng", "unknown key", "'pacing'"],
        ),
        ("train.steps=0", ["train.steps", "0", "greater than or equal to 1"]),
        ("train.steps=many", ["train.steps", "'many'", "valid integer"]),
        ("train.steps=true", ["train.steps", "True"]),
        ("train.steps=null", ["train.steps", "None", "valid integer"]),
        ("optim.lr=-1", ["optim.lr", "-1", "greater than 0"]),
        ("optim.lr=.nan", ["optim.lr", "nan", "finite"]),
        ("optim.min_lr=1", ["min_lr 1.0", "lr 0.001"]),
        ("optim.schedule=cosin", ["optim.schedule", "'cosin'", "nearest: cosine"]),
        ("optim.schedule=wsd", ["wsd", "decay_steps"]),
        ("optim.decay_steps=3", ["decay_steps", "wsd"]),
        ("optim.warmup_steps=11", ["warmup_steps 11", "train.steps 10"]),
        ("model.num_heads=7", ["hidden_size 64", "num_heads 7", "4 or 8"]),
        ("model.num_kv_heads=3", ["num_heads 8", "num_kv_heads 3", "2 or 4"]),
        ("parallel.tp=3", ["parallel.tp 3", "num_heads 8", "2 or 4"]),
        ("parallel.tp=8", ["parallel.tp 8", "num_kv_heads 4", "nearest tp: 4"]),
        ("data.seq_length=31 parallel.tp=2 parallel.sequence_parallel=true", ["seq_length 31", "30"]),
        ("data.schedule.initial.en=0.8", ["initial", "0.9", "not 1", "0.1"]),
        ("data.schedule.initial.fr=0", ["initial", "'fr'", "groups"]),
        ("data.schedule.knots=[{at: 0, weights: {en: 1, zh: 0}}]", ["either", "knots"]),
        ("data.schedule={knots: [{at: 5, weights: {en: 1, zh: 0}}]}", ["knots", "[5]", "ascend from 0"]),
        ("data.schedule.clock=documents", ["documents", "grow"]),
        ("data.groups.en.sources.wiki_en.path=nowhere", ["nowhere.bin", "megaflow prepare"]),
        ("data.groups.en.sources.wiki_en.weight=0", ["data.groups.en", "weight"]),
        ("data.groups.en.sources={}", ["data.groups.en.sources", "at least 1"]),
        ("data.groups.en.sources.zh.path=x", ["x.bin"]),
        ("data.tokenizer=nowhere.model", ["nowhere.model", "SentencePiece"]),
        ("model.weights=nowhere", ["nowhere", "folder"]),
        ("data.seq_length=30 parallel.cp=2", ["seq_length 30", "multiple of 4", "28"]),
        ("parallel.pp=4", ["4 chunks", "num_layers 2"]),
        ("parallel.chunks=2", ["chunks 2", "1f1b"]),
        ("parallel.schedule=interleaved parallel.chunks=1", ["chunks 1", "at least 2"]),
        ("parallel.layers_per_chunk=[1, 1]", ["layers_per_chunk has 2 numbers for 1 chunks"]),
        ("parallel.layers_per_chunk=[3]", ["layers_per_chunk adds up to 3", "num_layers is 2"]),
        ("parallel.layers_per_chunk=[true]", ["layers_per_chunk", "true or false"]),
        ("parallel.symmetric_memory=true", ["symmetric_memory", "sequence_parallel"]),
        ("parallel.timeout=10000000", ["parallel.timeout", "10000000", "less than"]),
        ("train.recompute=some", ["train.recompute", "'some'", "selective"]),
        ("checkpoint.keep=1", ["checkpoint.keep", "1", "2"]),
        ("nonsense", ["'nonsense'", "section.key=value"]),
        ("run_dir.x=1", ["run_dir", "value, not a section"]),
        ("train.steps={a", ["train.steps", "valid YAML"]),
    ],
)
def test_each_mistake_is_one_line_with_key_value_and_remedy(
    tree: dict[str, Any], tmp_path: Path, override: str, words: list[str]
) -> None:
    with pytest.raises(UserError) as caught:
        load(tree, tmp_path, *override.split(" ") if "[" not in override and "{" not in override else [override])
    lines = str(caught.value).splitlines()
    assert len(lines) == 1
    assert [word for word in words if word not in lines[0]] == []
    assert ";" in lines[0] or "should" in lines[0]


def test_several_mistakes_are_all_named(tree: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        load(tree, tmp_path, "optim.lr=-1", "train.steps=0", "modle=1")
    assert len(str(caught.value).splitlines()) == 3


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train: {steps: 1, steps: 2}", ["line 1", "'steps' stands twice"]),
        ("data:\n  groups:\n    no: {}", ["line 3", "'no'", "False", "quotes"]),
        ("a: [", ["line 1", "not valid YAML"]),
        ("- a", ["list"]),
        ("a: !!python/object/apply:os.system ['true']", ["not valid YAML"]),
        ("", ["NoneType"]),
    ],
)
def test_yaml_mistakes_name_file_and_line(tmp_path: Path, text: str, words: list[str]) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        load_config(path)
    assert str(caught.value).startswith(str(path))
    assert len(str(caught.value).splitlines()) == 1
    assert [word for word in words if word not in str(caught.value)] == []


def test_missing_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.yaml: cannot be read"):
        load_config(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("world", "words"),
    [(3, ["parallel.tp: 2", "3 processes", "1 or 3"]), (6, ["global_batch_size: 8", "3 x 2", "6 or 12"])],
)
def test_layout_is_checked_against_the_processes(
    tree: dict[str, Any], tmp_path: Path, world: int, words: list[str]
) -> None:
    config = load(tree, tmp_path, "parallel.tp=2")
    assert config.check_world(4) == 2
    with pytest.raises(UserError) as caught:
        config.check_world(world)
    assert [word for word in words if word not in str(caught.value)] == []


def test_micro_batches_that_the_schedule_cannot_take_are_refused(tree: dict[str, Any], tmp_path: Path) -> None:
    config = load(tree, tmp_path, "parallel.pp=2", "parallel.schedule=interleaved", "model.num_layers=4")
    assert config.check_world(4) == 2
    with pytest.raises(UserError) as caught:
        config.check_world(8)
    words = ["train.global_batch_size: 8", "4 x 2", "1 micro-batches", "2 pipeline ranks", "take 2"]
    assert [word for word in words if word not in str(caught.value)] == []


@pytest.mark.parametrize(
    ("name", "parameters", "world"),
    [("chatflow-7b", 6_738_415_616, 8), ("chatflow-13b", 13_015_864_320, 16), ("chatflow-70b", 68_976_648_192, 64)],
)
def test_real_configs_are_valid(tmp_path: Path, name: str, parameters: int, world: int) -> None:
    from megaflow.data.sampler.configured import compile_schedule
    from megaflow.model.flops import num_parameters

    tree = yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text())
    (tmp_path / "tokenizer.model").touch()
    tree["data"]["tokenizer"] = str(tmp_path / "tokenizer.model")
    tree["model"]["weights"] = str(tmp_path)
    for group in tree["data"]["groups"].values():
        for source in group["sources"].values():
            source["path"] = str(tmp_path / Path(source["path"]).name)
            for suffix in (".bin", ".idx", ".json"):
                Path(source["path"] + suffix).touch()
    config = parse_config(tree, name)
    assert config.model.vocab_size == 32000
    assert num_parameters(config.model) == parameters
    assert config.check_world(world) >= 1
    schedule = compile_schedule(config)
    assert [weight / 2**32 for weight in schedule.weights(0)] == pytest.approx([0.45, 0.45, 0.1, 0.0])
    end = config.train.steps * config.train.global_batch_size * config.data.seq_length
    assert [weight / 2**32 for weight in schedule.weights(end)] == pytest.approx([0.1, 0.05, 0.6, 0.25])


def test_no_module_shadows_another_package() -> None:
    """`torchrun megaflow/pretrain.py` puts megaflow/ first on sys.path."""
    ours = {path.stem for path in (ROOT / "megaflow").iterdir() if not path.name.startswith((".", "_"))}
    assert {"pretrain", "config", "data"} <= ours
    others = set(sys.stdlib_module_names) | (set(importlib.metadata.packages_distributions()) - {"megaflow"})
    assert ours & others == set()
