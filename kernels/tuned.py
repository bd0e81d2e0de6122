"""The block sizes of kernels whose best ones differ between GPUs: a table in `tuned.json`, chosen ahead of time."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch

from megaflow.kernels.jit import arch, next_power_of_2

TABLE = Path(__file__).with_name("tuned.json")
"""Kernel, compute capability (a newer GPU takes the next older one's), shape: what the kernel is launched with."""


@cache
def table() -> dict[str, dict[str, dict[str, dict[str, Any]]]]:
    """The table as it was committed."""
    loaded: dict[str, dict[str, dict[str, dict[str, Any]]]] = json.loads(TABLE.read_text())
    return loaded


def tuned(kernel: str, head_dim: int, dtype: torch.dtype) -> dict[str, Any]:
    """Block sizes, warps and stages of an attention kernel on the current GPU."""
    by_arch = table()[kernel]
    known = max((int(known) for known in by_arch if int(known) <= arch()), default=min(map(int, by_arch)))
    wide = dtype == torch.float32
    size = max(next_power_of_2(head_dim), 128 if wide else 64)
    return by_arch[str(known)][f"fp32-{size}" if wide else str(size)]
