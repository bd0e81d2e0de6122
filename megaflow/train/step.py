"""One optimizer step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megaflow.data.loader import Batch
from megaflow.model.llama import Llama
from megaflow.optim.adamw import AdamW
from megaflow.optim.clip import clip_scale
from megaflow.parallel.gradients import GradientBuffer
from megaflow.parallel.mesh import ParallelContext
from megaflow.train.metrics import LOSS_TOKENS, SourceTotals


@dataclass
class StepOutcome:
    """Results of a step, equal on every rank and still on the device."""

    totals: Tensor
    """`[sources, 3]`: loss, tokens with loss and sequences of the global batch."""
    grad_norm: Tensor
    """Global gradient norm before clipping."""
    skipped: Tensor
    """1 when the norm was not finite and no parameter changed, else 0."""
    stop: Tensor
    """Positive when some rank was asked to stop."""


def train_step(
    model: Llama,
    gradients: GradientBuffer,
    optimizer: AdamW,
    batches: list[Batch],
    num_sources: int,
    lr: float,
    clip: float,
    ctx: ParallelContext,
    stop: bool,
) -> StepOutcome:
    """Forward, backward, reduce, clip and update over this rank's micro-batches of one global batch.

    The loss is the sum over all tokens with loss in the global batch divided by their number, whatever rank or
    micro-batch they fell to: gradients are summed undivided, and the division joins the clip factor.
    """
    gradients.zero()
    totals = SourceTotals(num_sources, ctx)
    for number, batch in enumerate(batches, 1):
        losses = model.loss(batch)
        if number == len(batches):
            gradients.final(gradients.parameters.parameters)
        losses.sum().backward()
        totals.add(losses.detach(), batch)

    gradients.finish()
    totals.reduce(ctx)

    # fp64 sum of squares over all ranks; the request to stop travels with it
    agreed = torch.stack([gradients.squared_norm().double(), torch.tensor(float(stop)).double().to(ctx.device)])
    if ctx.world_size > 1:
        dist.all_reduce(agreed)
    loss_tokens = totals.values[:, LOSS_TOKENS].sum().clamp(min=1)
    grad_norm = (agreed[0].sqrt() / loss_tokens).float()
    skipped = (~torch.isfinite(grad_norm)).float()
    scale = clip_scale(grad_norm, clip) / loss_tokens.float()
    optimizer.step(lr, scale, skipped)
    return StepOutcome(totals.values, grad_norm, skipped, agreed[1])
