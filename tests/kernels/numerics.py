"""How far an operation may be from what fp64 gives for the same, already rounded inputs."""

from __future__ import annotations

import torch
from torch import Tensor

LIMITS = {torch.float32: 2e-6, torch.float16: 3e-4, torch.bfloat16: 2.5e-3}
"""Of `||out - expected|| / ||expected||`: near what rounding the result costs."""
ATTENTION_LIMITS = {torch.float32: 2e-6, torch.float16: 4.2e-4, torch.bfloat16: 3.5e-3}
"""Of attention, whose weights are rounded too before they are multiplied."""


def distance(out: Tensor, expected: Tensor) -> float:
    """The relative error; infinite where something is no number."""
    out, expected = out.detach().double(), expected.detach().to(out.device)
    if not bool(out.isfinite().all()):
        return float("inf")
    norm = float(expected.norm())
    return float((out - expected).norm()) / (norm or 1.0)


def assert_close(out: Tensor, expected: Tensor, limits: dict[torch.dtype, float] = LIMITS) -> None:
    """Within the limit of the result's dtype."""
    assert out.shape == expected.shape
    assert distance(out, expected) < limits[out.dtype]


def inputs(shape: tuple[int, ...], dtype: torch.dtype, device: str, scale: float = 1.0) -> Tensor:
    """Random numbers that want a gradient; the same on every device."""
    return (torch.randn(shape) * scale).to(device, dtype).requires_grad_()


def wide(x: Tensor) -> Tensor:
    """The same numbers in fp64, on the same device: for a GPU's shapes a CPU would take minutes."""
    return x.detach().double().requires_grad_(x.requires_grad)
