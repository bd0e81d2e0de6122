"""Small corpora of every kind, made once, and configs over them."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megaflow.config import Config
from megaflow.config_load import parse_config
from megaflow.data.prepare.encode import PrepareOptions
from megaflow.data.prepare.prepare import prepare_corpus
from megaflow.data.prepare.templates import DEFAULT_TEMPLATE, ExampleFormat

ROOT = Path(__file__).parents[2]
TOKENIZER = ROOT / "configs" / "demo" / "tokenizer.model"
SEQ_LENGTH = 32
WORDS = {
    "en": ["the", "a", "dog", "cat", "sat", "on", "mat", "and", "ran", "far", "home", "sun", "sea", "old", "man"],
    "zh": list("我你他们今天去公园看书学习中国人很好大小"),
}


def text(rng: random.Random, language: str, words: int) -> str:
    return (" " if language == "en" else "").join(rng.choices(WORDS[language], k=words))


@pytest.fixture(scope="session")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Prefixes of an English, a Chinese, a parallel and an instruction corpus; the last two last a few steps only."""
    folder, rng = tmp_path_factory.mktemp("corpora"), random.Random(3)
    records = {
        "en": [{"text": text(rng, "en", 40)} for _ in range(60)],
        "zh": [{"text": text(rng, "zh", 30)} for _ in range(60)],
        "parallel": [{"en": text(rng, "en", 5), "zh": text(rng, "zh", 5)} for _ in range(40)],
        "instruction": [
            {"instruction": text(rng, "en", 3), "input": "", "output": text(rng, "zh", 6)} for _ in range(40)
        ],
    }
    fields = {"text": ("text",), "parallel": ("en", "zh"), "instruction": ("instruction", "input", "output")}
    for name, rows in records.items():
        kind: Any = name if name in fields else "text"
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        loss: Any = "response" if kind == "instruction" else "all"
        template = DEFAULT_TEMPLATE.get(kind, "")
        options = PrepareOptions(
            format=ExampleFormat(kind=kind, fields=fields[kind], template=template, loss=loss, plain_fraction=0.15),
            language=name,
            tokenizer=str(TOKENIZER),
            seq_length=None if kind == "text" else SEQ_LENGTH,
            heldout=0.1,
        )
        prepare_corpus(folder / name, [folder / f"{name}.jsonl"], options)
    return {name: folder / name for name in records}


def tiny_config(corpora: dict[str, Path], run_dir: Path, **changes: Any) -> Config:
    """A config over the corpora with dotted changes, as `train__steps=5`."""
    groups = {key: {"sources": {f"{key}_source": {"path": str(path)}}} for key, path in corpora.items()}
    mixes = ([0.5, 0.1, 0.4, 0.0], [0.1, 0.4, 0.2, 0.3])
    initial, final = (dict(zip(groups, mix, strict=True)) for mix in mixes)
    schedule = {"clock": "steps", "initial": initial, "final": final, "grow": 8}
    tree: dict[str, Any] = {
        "run_dir": str(run_dir),
        "model": {"hidden_size": 32, "intermediate_size": 48, "num_layers": 2, "num_heads": 4},
        "data": {"tokenizer": str(TOKENIZER), "seq_length": SEQ_LENGTH, "groups": groups, "schedule": schedule},
        "train": {"steps": 12, "global_batch_size": 8, "micro_batch_size": 2, "log_samples": True},
        "optim": {"lr": 3e-3, "warmup_steps": 2},
        "checkpoint": {"interval": 4},
    }
    tree["train"]["tensorboard"] = False
    tree["train"]["peak_tflops"] = 1.0
    for key, value in changes.items():
        section, _, leaf = key.partition("__")
        tree.setdefault(section, {})[leaf] = value
    return parse_config(tree, run_dir.name)


@pytest.fixture
def make_config(corpora: dict[str, Path], tmp_path: Path) -> Callable[..., Config]:
    """A function from a run's name and dotted changes to its config."""
    return lambda name, **changes: tiny_config(corpora, tmp_path / name, **changes)
