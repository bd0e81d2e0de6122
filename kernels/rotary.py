"""Rotary position embedding (Su et al., 2021) in the half-rotation layout of Hugging Face checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megaflow.kernels.backend import Backend
from megaflow.kernels.jit import jit, needs_triton, next_power_of_2, tl


def rotary_tables(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position's angles, fp32 `[..., head_dim / 2]` each.

    Channel i turns by `position * theta^(-2 i / head_dim)`. Computed once per micro-batch and shared by all layers.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64, device=positions.device).float() / head_dim
    angles = positions.float().contiguous()[..., None] * (1.0 / theta**exponents)
    return angles.cos(), angles.sin()


def reference_rotate(x: Tensor, heads: int, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    """Turn the rows of x in place, or back; returns x."""
    half = cos.shape[-1]
    first, second = x[..., : 2 * half * heads].unflatten(-1, (heads, 2, half)).unbind(-2)
    cos, sin = cos[..., None, :], (-sin if back else sin)[..., None, :]
    turned = first * cos - second * sin
    second.copy_(second * cos + first * sin)
    first.copy_(turned)
    return x


@jit
def rotate_kernel(
    x,
    cos,
    sin,
    width,
    heads,
    HALF: tl.constexpr,
    BACK: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """HEADS heads of one row, in place. HALF: half of head_dim, at most BLOCK. BACK: turn the other way."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    channel = tl.arange(0, BLOCK)
    mask = (head < heads)[:, None] & (channel < HALF)[None, :]
    at = x + row * width + head[:, None] * (2 * HALF) + channel[None, :]
    first = tl.load(at, mask=mask).to(tl.float32)
    second = tl.load(at + HALF, mask=mask).to(tl.float32)
    c = tl.load(cos + row * HALF + channel, mask=channel < HALF)[None, :]
    s = tl.load(sin + row * HALF + channel, mask=channel < HALF)[None, :]
    if BACK:
        s = -s
    tl.store(at, (first * c - second * s).to(x.dtype.element_ty), mask=mask)
    tl.store(at + HALF, (second * c + first * s).to(x.dtype.element_ty), mask=mask)


class _Rotary(torch.autograd.Function):
    """In place both ways: what the gradient is computed from is needed by nothing else."""

    @staticmethod
    def forward(ctx: Any, rotate: Callable[..., Tensor], x: Tensor, heads: int, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        ctx.rotate, ctx.heads = rotate, heads
        ctx.save_for_backward(cos, sin)
        return rotate(x, heads, cos, sin, back=False)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return None, ctx.rotate(grads[0].contiguous(), ctx.heads, *ctx.saved_tensors, back=True), None, None, None


def rotary(rotate: Callable[..., Tensor], x: Tensor, heads: int, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate channel i of each of the first `heads` heads against channel `i + head_dim / 2`, in fp32 and in place.

    x: contiguous `[..., N head_dim]`, heads side by side: those of queries and of keys, then others, which stay as they
    are. cos, sin: `[..., head_dim / 2]` from `rotary_tables`, for each row of x. x is overwritten, and so is, in the
    backward pass, the gradient of the result.
    """
    return _Rotary.apply(rotate, x, heads, cos, sin)


def triton_rotate(x: Tensor, heads: int, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    """`reference_rotate` in one pass."""
    if not (x.is_contiguous() and cos.is_contiguous() and sin.is_contiguous()):
        raise ValueError("x, cos and sin must be contiguous")
    half, width = cos.shape[-1], x.shape[-1]
    block = next_power_of_2(half)
    at_once = min(next_power_of_2(heads), max(2048 // block, 1))
    grid = (x.numel() // width, -(-heads // at_once))
    rotate_kernel[grid](x, cos, sin, width, heads, HALF=half, BACK=back, HEADS=at_once, BLOCK=block, num_warps=4)
    return x


BACKENDS = (
    Backend("triton", partial(rotary, triton_rotate), needs_triton),
    Backend("reference", partial(rotary, reference_rotate)),
)
