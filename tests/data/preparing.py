"""Inputs and options of preparations, and what they wrote, for tests."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import zstandard

from megaflow.data.corpus.corpus import Corpus
from megaflow.data.prepare.encode import PrepareOptions
from megaflow.data.prepare.templates import ExampleFormat, Kind, Loss
from megaflow.data.tokenizer import load_tokenizer
from tests.data.corpora import document_starts

TEXT = ExampleFormat("text", ("text",))
WORDS = ["hello", "world", "今天", "天气", "the cat", "sat", "on", "mat 3.14", "公园", "\n"]


def texts(count: int) -> list[str]:
    """Different texts of different lengths."""
    random = np.random.default_rng(5)
    return [f"{i} " + " ".join(random.choice(WORDS, size=random.integers(1, 40))) for i in range(count)]


def write_jsonl(path: Path, records: list[Any]) -> Path:
    data = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()
    path.write_bytes(zstandard.compress(data) if path.suffix == ".zst" else data)
    return path


def documents(prefix: Path, model: Path) -> list[str]:
    """The texts of a corpus; checks that each begins and ends as a document does."""
    tokenizer = load_tokenizer(model)
    corpus = Corpus.open(prefix)
    found = []
    for start, stop in itertools.pairwise(document_starts(corpus)):
        ids = corpus.tokens(start, stop).tolist()
        assert ids[0] == tokenizer.start_id
        assert ids[-1] == tokenizer.eos_id
        found.append(tokenizer.decode(ids))
    return found


def example_options(model: Path, kind: Kind, template: str, loss: Loss = "all", plain: float = 0.0) -> PrepareOptions:
    fields = ("en", "zh") if kind == "parallel" else ("instruction", "input", "output")
    return PrepareOptions(
        ExampleFormat(kind, fields, template, loss, plain), "en-zh", str(model), seq_length=64, heldout=0.1
    )


PAIRS = [{"en": f"the cat {i}", "zh": f"今天{i}"} for i in range(200)]


COMMAND = "import typer; from megaflow.tools.prepare import prepare; a = typer.Typer(); a.command()(prepare); a()"
