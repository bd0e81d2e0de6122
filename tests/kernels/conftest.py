"""Where an operation runs: in plain torch, its Triton kernels in the interpreter or, on a GPU, both for real."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from megaflow.kernels.dispatch import OPERATIONS
from tests.kernels.interpreter import interpreted

PLACES = [
    pytest.param(("reference", "cpu"), id="reference"),
    pytest.param(("triton", "cpu"), id="interpreter"),
    pytest.param(("reference", "cuda"), id="reference-cuda", marks=pytest.mark.gpu),
    pytest.param(("triton", "cuda"), id="triton-cuda", marks=pytest.mark.gpu),
]


@dataclass(frozen=True)
class Place:
    """A backend on a device."""

    backend: str
    device: str

    def op(self, name: str) -> Callable[..., Any]:
        """The backend of an operation."""
        return {backend.name: backend.function for backend in OPERATIONS[name]}[self.backend]

    @property
    def full(self) -> bool:
        """Whether shapes as they are in training are affordable."""
        return self.device == "cuda"


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    """Each of them, with the memory of new tensors full of NaN, and the same random numbers every time."""
    torch.manual_seed(0)
    place = Place(*request.param)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills memory that is not initialised
    try:
        if place == Place("triton", "cpu"):
            with interpreted():
                yield place
        else:
            yield place
    finally:
        torch.use_deterministic_algorithms(before)
