"""Tokenising by several libraries with one vocabulary, and whether their ids are sentencepiece's."""

from __future__ import annotations

import importlib
import io
import json
from collections.abc import Callable
from pathlib import Path

import zstandard

from megaflow.checkpoint.tokenizer_export import export_tokenizer
from megaflow.data.tokenizer import load_tokenizer

Encode = Callable[[list[str]], list[list[int]]]


def read_texts(path: Path, limit: int) -> list[str]:
    """The first `limit` texts of a JSON lines file under zstd."""
    with path.open("rb") as raw:
        lines = io.TextIOWrapper(zstandard.ZstdDecompressor().stream_reader(raw), encoding="utf-8")
        return [json.loads(line)["text"] for _, line in zip(range(limit), lines, strict=False)]


def sentencepiece(model: Path, folder: Path) -> Encode:
    return load_tokenizer(model).encode_batch


def tokenizers(model: Path, folder: Path) -> Encode:
    return load_tokenizer(folder / "tokenizer.json").encode_batch


def gigatoken(model: Path, folder: Path) -> Encode:
    tokenizer = importlib.import_module("gigatoken").Tokenizer(folder / "tokenizer.json")
    return lambda texts: tokenizer.encode_batch_list(texts, parallel=False)


LIBRARIES: dict[str, Callable[[Path, Path], Encode]] = {
    "sentencepiece": sentencepiece,
    "tokenizers": tokenizers,
    "gigatoken": gigatoken,
}
"""Makers of a fresh encoder, without anything cached, on one thread."""


def export(model: Path, folder: Path) -> None:
    """Write the tokenizer.json that the others read."""
    export_tokenizer(model, folder)
