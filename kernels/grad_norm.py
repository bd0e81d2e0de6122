"""The squared Euclidean norm of a list of tensors, for clipping by global norm (Pascanu et al., arXiv 1211.5063).

It is the check for gradients that are not finite too: where an element is not, neither is the result.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megaflow.kernels.adamw import WIDE, csrc_missing
from megaflow.kernels.backend import Backend, Situation


def reference(tensors: list[Tensor]) -> Tensor:
    """The sum of the squares of all elements, an fp64 scalar on the tensors' device.

    tensors: at least one, of any shape, all of one dtype on one device. Nothing waits for the host.

    Raises:
        ValueError: there is no tensor, so no device to be on.
    """
    _check(tensors)
    return torch.stack([tensor.double().square().sum() for tensor in tensors]).sum()


def csrc(tensors: list[Tensor]) -> Tensor:
    """`reference` by the kernels of `csrc/optimizer/`, the same bits in every run; squares and sums of 8 are fp32.

    So an element beyond 1.8e19 makes the result infinite, and elements below 1e-23 do not count.

    Raises:
        RuntimeError: in one line, for tensors that are not contiguous, or of different dtypes or devices.
    """
    _check(tensors)
    result: Tensor = torch.ops.megaflow.squared_norm(tensors)
    return result


def vector_norms(tensors: list[Tensor]) -> Tensor:
    """`reference` by torch's norm of each tensor."""
    _check(tensors)
    return torch.stack([torch.linalg.vector_norm(tensor, dtype=torch.float64) for tensor in tensors]).square().sum()


def _check(tensors: list[Tensor]) -> None:
    if not tensors:
        raise ValueError("squared_norm: there are no tensors")


def _csrc_missing(situation: Situation) -> str | None:
    if situation.grads not in WIDE:
        return "needs fp32 or bf16"
    return csrc_missing("squared_norm", situation.device)


BACKENDS = (
    Backend("csrc", csrc, _csrc_missing),
    Backend("torch", vector_norms),
    Backend("reference", reference),
)
