"""Gradient clipping by global norm, folded into the optimizer's gradient scale."""

from __future__ import annotations

import torch
from torch import Tensor


def clip_scale(norm: Tensor, limit: float) -> Tensor:
    """The factor that brings a gradient of global norm `norm` (a scalar) down to `limit`; 1 when limit is 0."""
    if limit == 0:
        return torch.ones_like(norm)
    return (limit / norm).clamp(max=1.0)
