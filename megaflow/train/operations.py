"""What the operations of a run are used on, by which their backends are chosen."""

from __future__ import annotations

from typing import Any

import torch

from megaflow.config import Config
from megaflow.kernels.dispatch import Ops, describe, select_ops

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "remainder": torch.int16}


def model_dtype(config: Config) -> torch.dtype:
    """Of parameters and activations."""
    return DTYPES[config.train.precision]


def operations(config: Config, device: torch.device) -> Ops:
    """The operations of a run on a device.

    Raises:
        ValueError: naming the choices, where `kernels` names an operation or backend that is unknown or cannot run.
    """
    return select_ops(device, model_dtype(config), config.kernels, **_details(config))


def chosen_backends(config: Config, device: torch.device) -> list[tuple[str, str, str]]:
    """Operation, backend and why that one, of every operation; raises as `operations` does."""
    return describe(device, model_dtype(config), config.kernels, **_details(config))


def _details(config: Config) -> dict[str, Any]:
    return {
        "head_dim": config.model.head_dim,
        "seq_length": config.data.seq_length // config.parallel.cp,
        "whole_documents": config.parallel.cp == 1,
        "grads": DTYPES[config.optim.gradients],
        "masters": DTYPES[config.optim.master],
        "moments": DTYPES[config.optim.moments],
    }
