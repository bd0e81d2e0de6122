"""The two collectives that torch 2.13 renames, deprecating the names that 2.11 has."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

all_gather: Any = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
"""`all_gather(out, x, group=..., async_op=...)`: every rank's x `[n, ...]` one after the other, `[ranks * n, ...]`."""
reduce_scatter: Any = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)
"""`reduce_scatter(out, x, group=..., async_op=...)`: this rank's part `[n, ...]` of the sum of x `[ranks * n, ...]`."""
