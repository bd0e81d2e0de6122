"""Triton where it is installed, and nothing in its place where it is not: there plain torch serves."""

from __future__ import annotations

from typing import Any

import torch

from megaflow.kernels.backend import Situation

try:
    import triton
    import triton.language as tl
except ImportError:
    triton, tl = None, None

__all__ = ["arch", "jit", "needs_triton", "next_power_of_2", "programs", "tl", "triton"]


def jit(function: Any) -> Any:
    """`triton.jit`; where there is no Triton the function itself, which nothing calls."""
    return function if triton is None else triton.jit(function)


def needs_triton(situation: Situation) -> str | None:
    """What a Triton kernel lacks; for `Backend.missing`."""
    if triton is None:
        return "needs Triton"
    if situation.device.type != "cuda":
        return "needs CUDA"
    if torch.cuda.get_device_capability(situation.device) < (8, 0):
        return "needs compute capability 8.0"
    return None


def arch() -> int:
    """Compute capability of the current device as Triton writes it, 90 for 9.0; 80 where there is none."""
    try:
        return int(triton.runtime.driver.active.get_current_target().arch)
    except RuntimeError:  # no driver: the interpreter
        return 80


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is not below n, for n of at least 1."""
    return 1 << (n - 1).bit_length()


def programs(device: torch.device, per_multiprocessor: int, most: int) -> int:
    """How many programs share work that each of them takes in turns, at most `most`; few on devices without CUDA."""
    if device.type != "cuda":
        return min(2, most)
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return min(per_multiprocessor * count, most)
