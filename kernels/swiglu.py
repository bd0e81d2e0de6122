"""The gated activation of the feed-forward block (Shazeer, 2020)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from megaflow.kernels.backend import Backend


def reference(gate_up: Tensor) -> Tensor:
    """`silu(gate) * up` of `gate_up [..., 2 F]`, whose halves are gate and up; the result is `[..., F]`."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


BACKENDS = (Backend("reference", reference),)
