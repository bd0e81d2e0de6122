"""Flash attention in Triton as one differentiable operation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megaflow.kernels.attention.flash_backward import flash_backward
from megaflow.kernels.attention.flash_forward import flash_forward
from megaflow.kernels.attention.segments import Segments, unpack


class _Flash(torch.autograd.Function):
    """Keeps its inputs, its output and a number per query and head."""

    @staticmethod
    def forward(ctx: Any, heads: int, segments: Segments, *tensors: Tensor) -> Tensor:
        ctx.heads, ctx.segments = heads, segments
        out, lse = flash_forward(segments, *unpack(heads, *tensors))
        ctx.save_for_backward(out, lse, *tensors)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        out, lse, *tensors = ctx.saved_tensors
        results = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device) for x in tensors]
        inputs, outputs = unpack(ctx.heads, *tensors), unpack(ctx.heads, *results)
        flash_backward(ctx.segments, *inputs, out, lse, grads[0].contiguous(), outputs)
        return None, None, *results


def flash(heads: int, segments: Segments, *tensors: Tensor) -> Tensor:
    """`reference` without copies of the inputs and without scores in memory; the backward pass is deterministic."""
    return _Flash.apply(heads, segments, *(x if x.stride(-1) == 1 else x.contiguous() for x in tensors))
