"""The data path's benchmark at tiny sizes: what it writes, that all fetch what they should, and its checks can fail."""

from __future__ import annotations

import json
import os
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.data_windows import (
    CONTENDERS,
    EOS,
    Fetched,
    check,
    expected_positions,
    make_corpora,
    megaflow_loader,
    megaflow_source,
)
from megaflow.data.corpus.corpus import Corpus


@pytest.fixture(scope="module")
def benchmark() -> Iterator[dict[str, Any]]:
    environment, threads = dict(os.environ), torch.get_num_threads()
    yield runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "data.py"))
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory, benchmark: dict[str, Any]) -> Path:
    path: Path = tmp_path_factory.mktemp("results")
    benchmark["main"](part=None, out=path, smoke=True)
    return path


@pytest.fixture(scope="module")
def result(out: Path) -> dict[str, Any]:
    (path,) = out.glob("data-*.json")
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def test_every_contender_is_measured_or_said_to_be_missing(result: dict[str, Any]) -> None:
    windows = result["windows"]
    assert sorted([*windows["runs"], *windows["missing"]]) == sorted(CONTENDERS)
    assert all(run["per_second"] > 0 and run["per_cpu_second"] > 0 for run in windows["runs"].values())
    assert all(name.startswith("megaflow") <= (name in windows["runs"]) for name in CONTENDERS)


def test_libraries_give_sentencepieces_ids(result: dict[str, Any]) -> None:
    rows = result["tokenizers"]
    assert {row["language"] for row in rows} == {"en", "zh"}
    assert {"sentencepiece", "tokenizers"} <= {row["library"] for row in rows}
    assert all(row["same_documents"] == 100 for row in rows)
    assert all(row["mb_per_second"] > 0 and row["mb_per_cpu_second"] > 0 for row in rows)


def test_tables_and_picture_stand_beside(out: Path) -> None:
    (table,) = out.glob("data-*.md")
    assert "## Windows of 64 tokens" in table.read_text()
    assert "## Tokenising" in table.read_text()
    (picture,) = out.glob("data-*.png")
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_one_part_measured_again_keeps_the_other(benchmark: dict[str, Any], out: Path, result: dict[str, Any]) -> None:
    benchmark["main"](part=["tokenizers"], out=out, smoke=True)
    (path,) = out.glob("data-*.json")
    assert json.loads(path.read_text())["windows"] == result["windows"]


def test_corpora_have_the_documents_that_are_wanted(tmp_path: Path) -> None:
    make_corpora(tmp_path, 50_000, mean_length=100)
    corpus = Corpus.open(tmp_path / "first", verify="full")
    tokens = corpus.tokens(0, corpus.num_tokens)
    assert 45_000 < corpus.num_tokens <= 50_000
    assert 60 < corpus.num_tokens / corpus.num_documents < 140
    assert (np.flatnonzero(tokens == EOS) + 1).tolist()[:-1] == corpus.starts_within(0, corpus.num_tokens - 1).tolist()


def test_megaflow_fetches_are_right(tmp_path: Path) -> None:
    make_corpora(tmp_path, 5000, mean_length=20)
    for make in (megaflow_source, megaflow_loader):
        fetch = make(tmp_path, 64, 2)
        for _ in range(40):
            check("megaflow", fetch())
    assert fetch().positions is not None


def test_wrong_fetches_are_refused() -> None:
    tokens = np.array([[5, EOS, 6, 7]])
    positions = expected_positions(tokens)
    assert positions.tolist() == [[0, 1, 0, 1]]
    labels = np.array([[EOS, -100, 7, 8]])
    check("right", Fetched(tokens, labels, positions))
    with pytest.raises(AssertionError, match="next token"):
        check("wrong", Fetched(tokens, tokens, positions))
    with pytest.raises(AssertionError, match="restart"):
        check("wrong", Fetched(tokens, labels, np.arange(4)[None]))
