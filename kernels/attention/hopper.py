"""Flash attention for Hopper GPUs as one differentiable operation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megaflow.kernels.attention.flash import flash
from megaflow.kernels.attention.hopper_backward import hopper_backward
from megaflow.kernels.attention.hopper_forward import hopper_forward
from megaflow.kernels.attention.hopper_gluon import DTYPES, HEAD_DIMS, gluon, suits
from megaflow.kernels.attention.segments import Segments, unpack
from megaflow.kernels.backend import Situation
from megaflow.kernels.jit import needs_triton, triton

GLUON = [["3", "6"], ["3", "7"], ["3", "8"]]
"""Versions of Triton that the kernels were compiled with; Gluon is experimental, and 3.9 has other names in it."""


class _Hopper(torch.autograd.Function):
    """Keeps its inputs, its output and a number per query and head."""

    @staticmethod
    def forward(ctx: Any, heads: int, segments: Segments, *tensors: Tensor) -> Tensor:
        ctx.heads, ctx.segments = heads, segments
        out, lse = hopper_forward(segments, *unpack(heads, *tensors))
        ctx.save_for_backward(out, lse, *tensors)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        out, lse, *tensors = ctx.saved_tensors
        results = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device) for x in tensors]
        inputs, outputs = unpack(ctx.heads, *tensors), unpack(ctx.heads, *results)
        hopper_backward(ctx.segments, *inputs, out, lse, grads[0].contiguous(), outputs)
        return None, None, *results


def hopper(heads: int, segments: Segments, *tensors: Tensor) -> Tensor:
    """`flash` by kernels for Hopper GPUs, with the same results up to rounding; the backward pass is deterministic.

    They copy blocks of tokens that lie in one sequence, of heads of 64 or 128 channels in bf16 or fp16. Where there are
    several sequences whose length is no multiple of 128, and wherever else copying by blocks is not possible, this is
    `flash` itself.
    """
    if not suits(*unpack(heads, *tensors)):
        return flash(heads, segments, *tensors)
    return _Hopper.apply(heads, segments, *tensors)


def hopper_missing(situation: Situation) -> str | None:
    """What these kernels lack in a situation; for `Backend.missing`."""
    if missing := needs_triton(situation):
        return missing
    if gluon is None or triton.__version__.split(".")[:2] not in GLUON:
        return "needs Triton 3.6, 3.7 or 3.8, whose Gluon they are written in"
    if torch.cuda.get_device_capability(situation.device) != (9, 0):
        return "needs compute capability 9.0 exactly"
    if situation.dtype not in DTYPES:
        return "needs bf16 or fp16"
    if situation.head_dim is not None and situation.head_dim not in HEAD_DIMS:
        return "needs heads of 64 or 128 channels"
    return None
