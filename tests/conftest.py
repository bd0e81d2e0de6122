"""Shared by all tests: one thread, so that ranks can be forked, and GPU tests only where there is a GPU."""

from __future__ import annotations

import pytest
import torch
import tqdm

torch.set_num_threads(1)
tqdm.tqdm.monitor_interval = 0  # of the bars that transformers draws: their monitor is a thread


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))
