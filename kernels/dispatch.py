"""Chooses, once, the backend of every operation: the first that can run here, or the one the user names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from megaflow.kernels import adamw, attention, embedding, grad_norm, linear_cross_entropy, norm, rotary, swiglu
from megaflow.kernels.backend import Backend, Situation

OPERATIONS: Mapping[str, tuple[Backend, ...]] = {
    "embedding": embedding.BACKENDS,
    "rms_norm": norm.BACKENDS,
    "rotary": rotary.BACKENDS,
    "attention": attention.BACKENDS,
    "swiglu": swiglu.BACKENDS,
    "linear_cross_entropy": linear_cross_entropy.BACKENDS,
    "squared_norm": grad_norm.BACKENDS,
    "adamw": adamw.BACKENDS,
}
"""Every operation's backends, the preferred one first."""


@dataclass(frozen=True)
class Ops:
    """The operations of the model and of the optimizer; what each is called with, its module says."""

    embedding: Callable[..., Any]
    rms_norm: Callable[..., Any]
    rotary: Callable[..., Any]
    attention: Callable[..., Any]
    swiglu: Callable[..., Any]
    linear_cross_entropy: Callable[..., Any]
    squared_norm: Callable[..., Any]
    adamw: Callable[..., Any]


def select_ops(
    device: torch.device | str, dtype: torch.dtype, overrides: Mapping[str, str] | None = None, **details: Any
) -> Ops:
    """The operations in a `Situation`, whose other fields are the details; `overrides` names backends by operation.

    Raises:
        ValueError: naming the choices, for an unknown operation or backend or one that cannot run here.
    """
    chosen = _choose(Situation(torch.device(device), dtype, **details), overrides or {})
    return Ops(**{name: backend.function for name, (backend, _) in chosen.items()})


def describe(
    device: torch.device | str, dtype: torch.dtype, overrides: Mapping[str, str] | None = None, **details: Any
) -> list[tuple[str, str, str]]:
    """Operation, backend and why that one, of every operation; raises as `select_ops` does."""
    chosen = _choose(Situation(torch.device(device), dtype, **details), overrides or {})
    return [(name, backend.name, reason) for name, (backend, reason) in chosen.items()]


def _choose(situation: Situation, overrides: Mapping[str, str]) -> dict[str, tuple[Backend, str]]:
    for name in overrides:
        if name not in OPERATIONS:
            raise ValueError(f"no operation is called {name!r}; there are {', '.join(OPERATIONS)}")
    return {
        name: _named(name, overrides[name], situation) if name in overrides else _preferred(backends, situation)
        for name, backends in OPERATIONS.items()
    }


def _named(operation: str, wanted: str, situation: Situation) -> tuple[Backend, str]:
    backends = {backend.name: backend for backend in OPERATIONS[operation]}
    if wanted not in backends:
        raise ValueError(f"{operation} has no backend {wanted!r}; there are {', '.join(backends)}")
    if missing := backends[wanted].missing(situation):
        usable = [name for name, backend in backends.items() if backend.missing(situation) is None]
        raise ValueError(f"{operation} cannot use {wanted!r}: it {missing}; here there are {', '.join(usable)}")
    return backends[wanted], "named in the configuration"


def _preferred(backends: tuple[Backend, ...], situation: Situation) -> tuple[Backend, str]:
    passed_over: dict[str, list[str]] = {}
    for backend in backends:
        missing = backend.missing(situation)
        if missing is None:
            break
        passed_over.setdefault(missing, []).append(backend.name)
    reasons = "; ".join(f"{', '.join(names)}: {missing}" for missing, names in passed_over.items())
    if missing is not None:
        raise ValueError(f"no backend runs on {situation.device} in {situation.dtype}: {reasons}")
    return backend, reasons or "preferred"
