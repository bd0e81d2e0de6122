"""Published step times, and what they are compared with."""

from __future__ import annotations

from collections import Counter

import pytest

from megaflow.model.flops import num_parameters
from megaflow.planning.cluster import GPUS
from megaflow.planning.published import SOURCES, Row, rows
from megaflow.train.hardware import DATA_SHEET_TFLOPS

ROWS = rows()


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.name}, {row.layout.gpus} {row.gpu}, {row.layout.schedule}")
def test_row_is_reproduced(row: Row) -> None:
    assert abs(row.miss) < 0.15


def test_few_parameters_are_fitted_and_most_rows_are_held_out() -> None:
    fitted = Counter(row.fits for row in ROWS if row.fits)
    assert set(fitted) == {"matmul of H100", "matmul of A100", "linear_speed of fp8", "traffic"}
    assert max(fitted.values()) == 1
    assert sum(row.fits is None for row in ROWS) >= 50
    assert {row.source for row in ROWS} == set(SOURCES)


@pytest.mark.parametrize(("name", "billions"), [("LLaMA-2 7B", 6.74), ("LLaMA-2 13B", 13.02), ("LLaMA-2 70B", 68.98)])
def test_models_have_the_published_size(name: str, billions: float) -> None:
    for row in ROWS:
        if row.name.startswith(name):
            assert num_parameters(row.job.model) / 1e9 == pytest.approx(billions, rel=0.001)


def test_gpt_models_have_the_published_size() -> None:
    for size, billions in (("22B", 22), ("175B", 175), ("530B", 530), ("1T", 1008)):
        model = next(row.job.model for row in ROWS if row.name == f"GPT {size}")
        shared = num_parameters(model) - model.vocab_size * model.hidden_size  # GPT ties its embeddings
        assert shared / 1e9 == pytest.approx(billions, rel=0.02)


def test_peaks_are_those_of_the_training_loop() -> None:
    known = {"a100": "A100", "h100": "H100", "h200": "H200", "l40s": "L40S", "rtx4090": "RTX 4090"}
    loop = dict(DATA_SHEET_TFLOPS)
    assert {key: GPUS[key].tflops for key in known} == {key: loop[name] for key, name in known.items()}
