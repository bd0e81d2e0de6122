"""AdamW over the flat parameter buffer."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from megaflow.config import OptimConfig


class AdamW:
    """AdamW with decoupled weight decay (arXiv 1711.05101) on flat tensors, one fused update a step.

    `params` is `[N]` in the model's dtype, the first `decay_numel` elements decayed and the rest (norm weights) not;
    `grads` is `[N]` fp32. With fp32 parameters `master` is `params` itself; with bf16 it is an fp32 copy that is
    rounded into `params` after every update.
    """

    def __init__(self, config: OptimConfig, params: Tensor, grads: Tensor, decay_numel: int) -> None:
        self.config = config
        self.params = params
        self.master = params if params.dtype == torch.float32 else params.float()
        self.exp_avg = torch.zeros_like(self.master)
        self.exp_avg_sq = torch.zeros_like(self.master)
        self.steps = torch.zeros((), dtype=torch.float32, device=params.device)
        self.grads = grads
        self.slices = [(slice(0, decay_numel), config.weight_decay), (slice(decay_numel, None), 0.0)]

    def step(self, lr: float, scale: Tensor, skip: Tensor) -> None:
        """Updates the parameters with gradients `scale * grads`; does nothing where `skip` (a 0/1 fp32 scalar) is 1.

        Both are scalars on the device, so nothing waits for the host. `grads` holds scaled gradients afterwards.
        """
        with torch.no_grad():
            counts = [self.steps.clone(), self.steps.clone()]
            for (part, decay), count in zip(self.slices, counts, strict=True):
                if self.master[part].numel() == 0:
                    continue
                adamw(
                    [self.master[part]],
                    [self.grads[part]],
                    [self.exp_avg[part]],
                    [self.exp_avg_sq[part]],
                    [],
                    [count],
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
            self.steps.copy_(counts[0])
            self.copy_master_to_params()

    def copy_master_to_params(self) -> None:
        """Rounds the master weights into bf16 parameters; nothing to do for fp32 ones."""
        if self.master is not self.params:
            self.params.copy_(self.master)
