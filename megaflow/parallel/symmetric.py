"""Matrix products fused with their collective: parts travel over NVLink while others are multiplied.

The ops are torch's (`torch.ops.symm_mem`, experimental there). Sums of a fused product are rounded as the plain path's
are, in the dtype of the activations, but in another order.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

OPS = ("fused_all_gather_matmul", "fused_matmul_reduce_scatter")


def missing(devices: int) -> str | None:
    """What this machine lacks for fused products over that many of its GPUs, or None where they can be used."""
    if not torch.cuda.is_available():
        return "needs CUDA"
    if absent := [name for name in OPS if not hasattr(_ops(), name)]:
        return f"needs symm_mem.{absent[0]}, which torch {torch.__version__} has not"
    there = torch.cuda.device_count()
    if there < max(devices, 2):
        return f"needs {max(devices, 2)} GPUs on one machine, {there} seen"
    for one, other in itertools.permutations(range(there), 2):
        if not torch.cuda.can_device_access_peer(one, other):
            return f"needs NVLink between all GPUs, and GPU {one} cannot reach the memory of GPU {other}"
    return None


def enable(group: dist.ProcessGroup) -> None:
    """Lets the ranks of a group use fused products; collective."""
    from torch.distributed._symmetric_memory import enable_symm_mem_for_group

    enable_symm_mem_for_group(group.group_name)


def gathered_product(x: Tensor, weight: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The ranks' parts x `[S / tp, B, H]` put together, times weight `[rows, H]`: `[S, B, rows]`."""
    _, (product,) = _ops().fused_all_gather_matmul(x.contiguous(), [weight.T], 0, group.group_name, return_A=False)
    # the op gives a view, and autograd lets nobody write over a view that a custom function returns: rotary does
    return product.new_empty(0).set_(product)


def scattered_product(x: Tensor, weight: Tensor, group: dist.ProcessGroup) -> Tensor:
    """x `[S, B, columns]` times weight `[rows, columns]` summed over the ranks: this one's part `[S / tp, B, rows]`."""
    return _ops().fused_matmul_reduce_scatter(x, weight.T, "sum", 0, group.group_name)


def _ops() -> Any:
    import torch.distributed._symmetric_memory  # defines them

    return torch.ops.symm_mem
