"""One row of an operation's table of implementations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


def always(device: torch.device, dtype: torch.dtype) -> None:
    """No device or dtype is missing anything."""


@dataclass(frozen=True)
class Backend:
    """An implementation of an operation, and where it can run."""

    name: str
    function: Callable[..., Any]
    missing: Callable[[torch.device, torch.dtype], str | None] = always
    """What the device or dtype lacks for this backend, or None where it can run."""
