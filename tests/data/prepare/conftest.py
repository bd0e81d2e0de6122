"""What tests of preparations share."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from megaflow.data.prepare import readers
from megaflow.data.prepare.encode import PrepareOptions
from tests.data.killing import inputs_of_all_kinds


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a process wrote outlives it without."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Files of every kind, read in small chunks."""
    monkeypatch.setattr(readers, "CHUNK_BYTES", 500)
    monkeypatch.setattr(readers, "READ_BYTES", 100)
    monkeypatch.setattr(readers, "PARQUET_ROWS", 5)
    return inputs_of_all_kinds(tmp_path / "in")


@pytest.fixture
def some_bad(options: PrepareOptions) -> PrepareOptions:
    """Options that let a tenth of the records be bad."""
    return replace(options, max_bad=0.1)
