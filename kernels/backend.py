"""One row of an operation's table of implementations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Situation:
    """What an operation will be used on."""

    device: torch.device
    dtype: torch.dtype
    """Of activations and parameters."""
    head_dim: int | None = None
    """Channels of an attention head, where it is known."""
    seq_length: int | None = None
    """Tokens of a sequence on one rank, where it is known."""
    whole_documents: bool = True
    """Whether all of a document's tokens are on one rank."""
    grads: torch.dtype = torch.float32
    """Of the sums of gradients that the optimizer reads."""
    masters: torch.dtype = torch.float32
    """Of the optimizer's weights; int16: remainders of bf16 parameters."""
    moments: torch.dtype = torch.float32


def always(situation: Situation) -> None:
    """Nothing is missing anywhere."""


@dataclass(frozen=True)
class Backend:
    """An implementation of an operation, and where it can run."""

    name: str
    function: Callable[..., Any]
    missing: Callable[[Situation], str | None] = always
    """What this backend lacks in a situation, or None where it can run."""


CACHED_NUMBERS = 2**18
"""Numbers that a CPU takes at a time, so that the passes over them find them in its cache."""


def row_blocks(x: torch.Tensor) -> list[slice]:
    """The rows of x `[rows, columns]` in blocks that fit a CPU's cache; in one on other devices."""
    rows, columns = x.shape
    size = max(CACHED_NUMBERS // max(columns, 1), 1) if x.device.type == "cpu" else max(rows, 1)
    return [slice(start, start + size) for start in range(0, rows, size)]
