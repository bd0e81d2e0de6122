"""AdamW over the flat parameter buffer."""

from __future__ import annotations

import torch
from torch import Tensor

from megaflow.config import OptimConfig
from megaflow.kernels.adamw import PIECE, split_master
from megaflow.parallel.gradients import GradientBuffer
from megaflow.parallel.parameters import FlatParameters


class AdamW:
    """AdamW with decoupled weight decay (arXiv 1711.05101) on this rank's part of every bucket.

    `params`, `master`, `exp_avg`, `exp_avg_sq` and `grads` are lists with a tensor `[n]` for each bucket. With fp32
    parameters `master` is `params` itself, which are views of the parameters. With bf16 ones it is an fp32 copy that
    every update rounds into them or, with `optim.master` remainder, the int16 that they lack of it. The other ranks'
    parts are then gathered. What computes the update is the model's op `adamw`.
    """

    def __init__(self, config: OptimConfig, parameters: FlatParameters, gradients: GradientBuffer) -> None:
        self.config = config
        self.parameters = parameters
        self.adamw = parameters.model.ops.adamw
        self.params = parameters.own(parameters.flat)
        self.split = config.master == "remainder" and parameters.flat.dtype != torch.float32
        self.master = self.params
        if self.split:
            self.master = [torch.zeros_like(param, dtype=torch.int16) for param in self.params]
        elif parameters.flat.dtype != torch.float32:
            self.master = [param.float() for param in self.params]
        dtype = torch.bfloat16 if config.moments == "bf16" else torch.float32
        self.exp_avg = [torch.zeros_like(param, dtype=dtype) for param in self.params]
        self.exp_avg_sq = [torch.zeros_like(param, dtype=dtype) for param in self.params]
        self.steps = torch.zeros((), dtype=torch.float32, device=parameters.flat.device)
        self.grads = parameters.own(gradients.flat)
        matrices = sum(bucket.kind != "norms" for bucket in parameters.buckets)
        self.groups = [(slice(0, matrices), config.weight_decay), (slice(matrices, None), 0.0)]

    @torch.no_grad()
    def step(self, lr: float, scale: Tensor, skip: Tensor) -> None:
        """Updates the parameters with gradients `scale * grads`; does nothing where `skip` (a 0/1 fp32 scalar) is 1.

        Both are scalars on the device, so nothing waits for the host. `grads` may hold scaled gradients afterwards.
        """
        self.parameters.wait()
        for part, decay in self.groups:
            if self.params[part]:
                self.adamw(
                    *(tensors[part] for tensors in (self.params, self.master, self.grads)),
                    *(tensors[part] for tensors in (self.exp_avg, self.exp_avg_sq)),
                    *(self.steps, scale, skip),
                    lr=lr,
                    beta1=self.config.beta1,
                    beta2=self.config.beta2,
                    eps=self.config.eps,
                    weight_decay=decay,
                )
        self.steps += 1 - skip
        self.parameters.gather()

    @torch.no_grad()
    def set_master(self, name: str, value: Tensor) -> None:
        """Sets this rank's part of a parameter's master weight, given whole; `copy_master_to_params` once all are."""
        part = self.parameters.range_of(name, self.master)
        own = value.flatten()[part.start : part.start + len(part.values)]
        if self.split:
            _split(own, self.parameters.range_of(name, self.params).values, part.values)
        else:
            part.values.copy_(own)

    def master_to_load(self) -> list[Tensor]:
        """Tensors to load fp32 master weights into: those themselves or, for split ones, as many in host memory.

        `copy_master_to_params` takes them.
        """
        return [torch.empty(x.shape) for x in self.params] if self.split else self.master

    @torch.no_grad()
    def copy_master_to_params(self, master: list[Tensor] | None = None) -> None:
        """Makes the parameters from the master weights, or from those that `master_to_load` gave; collective.

        They are rounded into bf16 parameters, and the other ranks' parts are fetched.
        """
        if self.split:
            for param, remainder, whole in zip(self.params, self.master, master or [], strict=master is not None):
                _split(whole, param, remainder)
        elif self.master is not self.params:
            for param, own in zip(self.params, self.master, strict=True):
                param.copy_(own)
        self.parameters.gather()


def _split(master: Tensor, param: Tensor, remainder: Tensor) -> None:
    for start in range(0, len(param), PIECE):
        part = slice(start, start + PIECE)
        param[part], remainder[part] = split_master(master[part].to(param.device, torch.float32))
