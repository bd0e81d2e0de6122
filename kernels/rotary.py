"""Rotary position embedding (Su et al., 2021) in the half-rotation layout of Hugging Face checkpoints."""

from __future__ import annotations

import torch
from torch import Tensor

from megaflow.kernels.backend import Backend


def rotary_tables(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position's angles, fp32 `[T, head_dim / 2]` each, for positions `[T]`.

    Channel i turns by `position * theta^(-2 i / head_dim)`. Computed once per micro-batch and shared by all layers.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64, device=positions.device).float() / head_dim
    angles = positions.float()[:, None] * (1.0 / theta**exponents)
    return angles.cos(), angles.sin()


def reference(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate channel i of every head against channel `i + head_dim / 2`, computed in fp32.

    q: `[T, heads, head_dim]`, k: `[T, kv_heads, head_dim]`, cos and sin: `[T, head_dim / 2]` from `rotary_tables`.
    """
    cos, sin = cos[:, None], sin[:, None]

    def rotate(x: Tensor) -> Tensor:
        first, second = x.float().chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)

    return rotate(q), rotate(k)


BACKENDS = (Backend("reference", reference),)
