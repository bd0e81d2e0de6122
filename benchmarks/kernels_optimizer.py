"""AdamW and the gradient norm on a fair share of a model's parameters, for `kernels.py`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels_problem import OURS, Contender, Problem, Run
from megaflow.kernels import adamw as kernels
from megaflow.kernels.adamw import join_master, split_master
from megaflow.kernels.dispatch import select_ops

HYPER = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
STEPS = 10.0
"""Taken before."""


class State:
    """bf16 parameters and gradients, fp32 moments, and fp32 masters or int16 remainders, in tensors of one length."""

    def __init__(self, count: int, length: int, remainder: bool, device: torch.device) -> None:
        weights = (torch.randn(length, device=device) for _ in range(count))
        split = (split_master(weight) if remainder else (weight.bfloat16(), weight) for weight in weights)
        self.params, self.masters = (list(part) for part in zip(*split, strict=True))
        self.grads = [(torch.randn(length, device=device) * 1e-2).bfloat16() for _ in range(count)]
        self.exp_avg = [torch.randn(length, device=device) * 1e-3 for _ in range(count)]
        self.exp_avg_sq = [torch.randn(length, device=device).square() * 1e-4 for _ in range(count)]
        self.remainder = remainder
        self.scalars = [torch.tensor(value, device=device) for value in (STEPS, 1.0, 0.0)]
        ends = (self.params, self.masters, self.exp_avg, self.exp_avg_sq)
        self.begin = [[tensors[place].clone() for tensors in ends] for place in (0, -1)]

    def restore(self) -> None:
        """The first and the last tensors as they began: those that are checked."""
        ends = (self.params, self.masters, self.exp_avg, self.exp_avg_sq)
        for place, kept in zip((0, -1), self.begin, strict=True):
            for tensors, copy in zip(ends, kept, strict=True):
                tensors[place].copy_(copy)

    def master(self, param: Tensor, master: Tensor) -> Tensor:
        return join_master(param, master) if self.remainder else master

    def results(self, _: Any = None) -> list[Tensor]:
        """Masters and moments of the first and the last tensors."""
        found = []
        for place in (0, -1):
            found += [self.master(self.params[place], self.masters[place])]
            found += [self.exp_avg[place], self.exp_avg_sq[place]]
        return found

    def expected(self) -> list[Tensor]:
        """These after a step, by the formula, in fp64."""
        found = []
        for place, (param, master, m, v) in zip((0, -1), self.begin, strict=True):
            weight, g = self.master(param, master).double(), self.grads[place].double()
            m = HYPER["beta1"] * m.double() + (1 - HYPER["beta1"]) * g
            v = HYPER["beta2"] * v.double() + (1 - HYPER["beta2"]) * g.square()
            corrected = m / (1 - HYPER["beta1"] ** (STEPS + 1))
            root = (v / (1 - HYPER["beta2"] ** (STEPS + 1))).sqrt() + HYPER["eps"]
            found += [weight * (1 - HYPER["lr"] * HYPER["weight_decay"]) - HYPER["lr"] * corrected / root, m, v]
        return found


def adamw(count: int, length: int, remainder: bool, device: torch.device) -> Problem:
    """A step on `count` tensors of `length` parameters each."""
    masters = torch.int16 if remainder else torch.float32
    function = select_ops(device, torch.bfloat16, grads=torch.bfloat16, masters=masters).adamw
    state = State(count, length, remainder, device)

    def by(step: Any) -> dict[str, Run]:
        lists = state.params, state.masters, state.grads, state.exp_avg, state.exp_avg_sq
        return {"step": Run(lambda: step(*lists, *state.scalars, **HYPER), state.results, state.restore)}

    def by_optim() -> dict[str, Run]:
        names = {"lr": HYPER["lr"], "betas": (HYPER["beta1"], HYPER["beta2"]), "weight_decay": HYPER["weight_decay"]}
        optimizer = torch.optim.AdamW(state.masters, eps=HYPER["eps"], fused=device.type == "cuda", **names)  # type: ignore[arg-type]
        steps = [torch.tensor(STEPS, device=device) for _ in state.masters]
        states = zip(state.masters, state.grads, state.exp_avg, state.exp_avg_sq, steps, strict=True)
        for weight, grad, m, v, taken in states:
            weight.grad = grad.float()
            optimizer.state[weight] = {"step": taken, "exp_avg": m, "exp_avg_sq": v}

        def call() -> None:
            optimizer.step()
            torch._foreach_copy_(state.params, state.masters)

        def prepare() -> None:
            state.restore()
            for taken in steps:
                taken.fill_(STEPS)

        return {"step": Run(call, state.results, prepare)}

    contenders = [Contender(OURS, lambda: by(function))]
    if not remainder:
        contenders += [
            Contender("torch AdamW(fused), fp32 gradients, bf16 copies", by_optim),
            Contender("torch fused, bf16 gradients made fp32", lambda: by(kernels.fused_torch)),
        ]
    return Problem({"step": state.expected()}, contenders, limit=1e-5, meta={"tensors": count, "length": length})


def squared_norm(count: int, length: int, dtype: torch.dtype, device: torch.device) -> Problem:
    """The squared norm of `count` gradients of one length."""
    function = select_ops(device, torch.bfloat16, grads=dtype).squared_norm
    grads = [(torch.randn(length, device=device) * 1e-2).to(dtype) for _ in range(count)]

    def run(call: Any) -> dict[str, Run]:
        return {"norm": Run(lambda: call(grads), lambda found: (found.double(),))}

    def total_norm(tensors: list[Tensor]) -> Tensor:
        return torch.nn.utils.get_total_norm(tensors, foreach=device.type == "cuda").square()

    expected = torch.stack([grad.double().square().sum() for grad in grads]).sum()
    return Problem(
        {"norm": [expected]},
        [Contender(OURS, lambda: run(function)), Contender("torch get_total_norm", lambda: run(total_norm))],
        limit=1e-2,
        meta={"tensors": count, "length": length},
    )
