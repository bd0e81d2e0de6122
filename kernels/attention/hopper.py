"""Flash attention for Hopper GPUs as one differentiable operation."""

from __future__ import annotations

import torch
from torch import Tensor

from megaflow.kernels.attention.flash import Passes, attend, flash
from megaflow.kernels.attention.hopper_backward import hopper_backward
from megaflow.kernels.attention.hopper_forward import hopper_forward
from megaflow.kernels.attention.hopper_gluon import DTYPES, HEAD_DIMS, LARGEST, gluon, suits
from megaflow.kernels.attention.segments import Segments, unpack
from megaflow.kernels.backend import Situation
from megaflow.kernels.jit import needs_triton, triton

GLUON = [["3", "6"], ["3", "7"], ["3", "8"]]
"""Versions of Triton that the kernels were compiled with; Gluon is experimental, and 3.9 has other names in it."""


def hopper(heads: int, segments: Segments, *tensors: Tensor) -> Tensor:
    """`flash` by kernels for Hopper GPUs, with the same results up to rounding; the backward pass is deterministic.

    They copy blocks of tokens that lie in one sequence, of heads of 64 or 128 channels in bf16 or fp16. Where there are
    several sequences whose length is no multiple of 128, and wherever else copying by blocks is not possible, this is
    `flash` itself.
    """
    if not suits(*unpack(heads, *tensors)):
        return flash(heads, segments, *tensors)
    return attend(Passes(hopper_forward, hopper_backward), heads, segments, *tensors)


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
    if situation.seq_length is not None and situation.seq_length % LARGEST:
        return f"needs sequences whose length on a rank is a multiple of {LARGEST}"
    return None
