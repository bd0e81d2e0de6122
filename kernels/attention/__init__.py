"""Causal attention that never crosses a document boundary: its backends, the preferred one first.

`segments.py` says what a query sees, `reference.py` is plain torch, `flash*.py` are the project's Triton kernels,
`hopper*.py` those for one generation of GPUs, and `libraries.py` calls those of torch and flash-attn.
"""

from __future__ import annotations

from functools import partial

from megaflow.kernels.attention import libraries
from megaflow.kernels.attention.flash import flash
from megaflow.kernels.attention.hopper import hopper, hopper_missing
from megaflow.kernels.attention.reference import cached_attention, reference, sdpa
from megaflow.kernels.attention.segments import Segments, unpack
from megaflow.kernels.backend import Backend, Situation
from megaflow.kernels.jit import needs_triton

__all__ = ["BACKENDS", "Segments", "cached_attention", "reference", "sdpa", "unpack"]


def _flash_missing(situation: Situation) -> str | None:
    if missing := needs_triton(situation):
        return missing
    if situation.head_dim is not None and situation.head_dim > 256:
        return "needs heads of at most 256 channels"
    return None


BACKENDS = (
    Backend("triton", flash, _flash_missing),
    # not the preferred one, so only used where it is named: it has not yet run on a GPU
    Backend("hopper", hopper, hopper_missing),
    Backend("varlen", libraries.varlen, partial(libraries.kernel_missing, 256, 80)),
    *(Backend(name, *rest) for name, rest in libraries.FLASH_ATTN_BACKENDS.items()),
    Backend("sdpa_cudnn", libraries.sdpa_cudnn, partial(libraries.sdpa_missing, 128)),
    Backend("sdpa_flash", libraries.sdpa_flash, partial(libraries.sdpa_missing, 256)),
    Backend("sdpa", sdpa),
    Backend("reference", reference),
)
