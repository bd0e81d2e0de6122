"""AdamW over the flat parameter buffer."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from megaflow.config import OptimConfig
from megaflow.parallel.gradients import GradientBuffer
from megaflow.parallel.parameters import FlatParameters


class AdamW:
    """AdamW with decoupled weight decay (arXiv 1711.05101), fused, on this rank's part of every bucket.

    `params`, `master`, `exp_avg`, `exp_avg_sq` and `grads` are lists with a tensor `[n]` for each bucket. With fp32
    parameters `master` is `params` itself, which are views of the parameters; with bf16 it is an fp32 copy that is
    rounded into them after every update. The other ranks' parts are then gathered.
    """

    def __init__(self, config: OptimConfig, parameters: FlatParameters, gradients: GradientBuffer) -> None:
        self.config = config
        self.parameters = parameters
        self.params = parameters.own(parameters.flat)
        self.master = self.params if parameters.flat.dtype == torch.float32 else [p.float() for p in self.params]
        self.exp_avg = [torch.zeros_like(master) for master in self.master]
        self.exp_avg_sq = [torch.zeros_like(master) for master in self.master]
        self.steps = torch.zeros((), dtype=torch.float32, device=parameters.flat.device)
        self.grads = parameters.own(gradients.flat)
        matrices = sum(bucket.kind != "norms" for bucket in parameters.buckets)
        self.groups = [(slice(0, matrices), config.weight_decay), (slice(matrices, None), 0.0)]

    @torch.no_grad()
    def step(self, lr: float, scale: Tensor, skip: Tensor) -> None:
        """Updates the parameters with gradients `scale * grads`; does nothing where `skip` (a 0/1 fp32 scalar) is 1.

        Both are scalars on the device, so nothing waits for the host. `grads` holds scaled gradients afterwards.
        """
        self.parameters.wait()
        for part, decay in self.groups:
            if not self.master[part]:
                continue
            adamw(
                self.master[part],
                self.grads[part],
                self.exp_avg[part],
                self.exp_avg_sq[part],
                [],
                list(self.steps.repeat(len(self.master[part])).unbind()),
                fused=True,
                grad_scale=scale.reciprocal(),
                found_inf=skip,
                amsgrad=False,
                beta1=self.config.beta1,
                beta2=self.config.beta2,
                lr=lr,
                weight_decay=decay,
                eps=self.config.eps,
                maximize=False,
            )
        self.steps += 1 - skip
        self.copy_master_to_params()

    @torch.no_grad()
    def set_master(self, name: str, value: Tensor) -> None:
        """Sets this rank's part of a parameter's master weight, given whole; `copy_master_to_params` once all are."""
        part = self.parameters.range_of(name, self.master)
        part.values.copy_(value.flatten()[part.start : part.start + len(part.values)])

    @torch.no_grad()
    def copy_master_to_params(self) -> None:
        """Makes the parameters from the master weights: rounds them into bf16 ones, and starts `gather`; collective."""
        if self.master is not self.params:
            for param, master in zip(self.params, self.master, strict=True):
                param.copy_(master)
        self.parameters.gather()
