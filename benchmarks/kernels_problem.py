"""What a problem of `kernels.py` is: inputs, results computed in fp64, and contenders whose results are compared.

Every problem is solved by megaflow, whose operations `dispatch` chooses, and by others, each on the layout it is meant
for. A contender that cannot be imported or run raises, and that is recorded.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

OURS = "megaflow"
IGNORED = -100
"""The label of a token that carries no loss."""
LIMIT = 1e-2
"""Of ||out - expected|| / ||expected|| in bf16: far above rounding, far below what another formula gives."""


class Run(NamedTuple):
    """One phase of one contender."""

    call: Callable[[], Any]
    """What is timed."""
    results: Callable[[Any], Sequence[Tensor]]
    """What it returned, in the order and layout of the problem's expected results."""
    prepare: Callable[[], Any] | None = None
    """Makes anew what the call overwrites."""


class Contender(NamedTuple):
    """Someone who solves a problem."""

    name: str
    make: Callable[[], dict[str, Run]]
    """Its phases; raises where it is not installed or cannot solve the problem."""
    slow: bool = False
    """It compiles for many seconds."""


@dataclass(frozen=True)
class Model:
    """Shapes of a model and of the micro-batch that it sees."""

    name: str
    hidden: int
    heads: int
    intermediate: int
    sequences: int = 4
    seq_length: int = 4096

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def tokens(self) -> int:
        return self.sequences * self.seq_length


@dataclass
class Problem:
    """Inputs, results computed in fp64, and contenders, megaflow first."""

    expected: dict[str, list[Tensor]]
    contenders: list[Contender]
    limit: float = LIMIT
    meta: dict[str, Any] = field(default_factory=dict)
    """What is worth to be noted about the inputs."""


def tensor(device: torch.device, *shape: int, scale: float = 1.0) -> Tensor:
    """Random bf16 numbers."""
    return (torch.randn(*shape, device=device) * scale).bfloat16()


def tuple_of(value: Any) -> tuple[Tensor, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def same(results: Any) -> Sequence[Tensor]:
    """The results as they are."""
    return tuple_of(results)


def differentiable(
    function: Callable[..., Any],
    inputs: Sequence[Tensor],
    grads: Sequence[Tensor],
    outputs: Callable[[Any], Sequence[Tensor]] = same,
    gradients: Callable[[Any], Sequence[Tensor]] = same,
    prepare: Callable[[], Any] | None = None,
) -> dict[str, Run]:
    """Forward and backward pass of a function of tensors, timed apart; the graph is kept between backward passes.

    outputs, gradients: bring the results into the problem's order and layout. prepare: for the backward pass.
    """
    leaves = [x.detach().requires_grad_() for x in inputs]

    def forward() -> tuple[Tensor, ...]:
        return tuple_of(function(*leaves))

    outs = forward()

    def backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(outs, leaves, grads, retain_graph=True)

    return {"forward": Run(forward, outputs), "backward": Run(backward, gradients, prepare)}


def expect(function: Callable[..., Any], inputs: Sequence[Tensor], grads: Sequence[Tensor]) -> dict[str, list[Tensor]]:
    """Results and gradients in fp64, kept in fp32."""
    wide = [x.detach().double().requires_grad_() for x in inputs]
    outs = tuple_of(function(*wide))
    found = torch.autograd.grad(outs, wide, [grad.double() for grad in grads])
    return {"forward": [x.detach().float() for x in outs], "backward": [x.float() for x in found]}


def distance(out: Tensor, expected: Tensor) -> float:
    """The relative error; infinite where something is no number."""
    if out.shape != expected.shape:
        raise AssertionError(f"the result is {tuple(out.shape)} and not {tuple(expected.shape)}")
    above, below = 0.0, 0.0
    pieces = out.detach().reshape(-1).split(2**26), expected.detach().reshape(-1).split(2**26)
    for piece, wanted in zip(*pieces, strict=True):
        above += float((piece.double() - wanted).square().sum())
        below += float(wanted.double().square().sum())
    error = (above / below) ** 0.5 if below else above**0.5
    return error if error == error else float("inf")  # NaN


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """By torch.compile, for these shapes alone and with a graph that can be gone through twice."""
    torch._functorch.config.donated_buffer = False
    torch._dynamo.reset()
    result: Callable[..., Any] = torch.compile(function, dynamic=False)
    return result


def liger(name: str) -> Any:
    """A function of Liger's autograd kernels."""
    return getattr(importlib.import_module("liger_kernel.ops"), name)
