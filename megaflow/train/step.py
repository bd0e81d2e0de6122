"""One optimizer step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megaflow.data.loader import Batch
from megaflow.optim.adamw import AdamW
from megaflow.optim.clip import clip_scale
from megaflow.parallel.gradients import GradientBuffer
from megaflow.parallel.runner import Pipeline
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
    pipeline: Pipeline,
    gradients: GradientBuffer,
    optimizer: AdamW,
    batches: list[Batch],
    num_sources: int,
    lr: float,
    stop: bool,
) -> StepOutcome:
    """Forward, backward, reduce, clip and update over this rank's micro-batches of one global batch.

    The loss is the sum over all tokens with loss in the global batch divided by their number, whatever rank or
    micro-batch they fell to: gradients are summed undivided, and the division joins the clip factor. What ranks must
    agree on, the totals, the squared norm and the request to stop, travels in one fp64 all-reduce over all of them.

    Args:
        num_sources: of the batches' source indices.
        lr: of this step.
        stop: whether this rank was asked to stop.
    """
    ctx = gradients.ctx
    gradients.zero()
    totals = SourceTotals(num_sources, ctx)
    for index, losses in pipeline.train(batches, gradients).items():
        totals.add(losses, batches[index])
    gradients.finish()

    asked = torch.full((1,), float(stop), dtype=torch.float64, device=ctx.device)
    agreed = torch.cat([totals.values.flatten(), gradients.squared_norm()[None], asked])
    if ctx.world_size > 1:
        dist.all_reduce(agreed)
    values, (squared_norm, stopping) = agreed[:-2].view(num_sources, -1), agreed[-2:]
    loss_tokens = values[:, LOSS_TOKENS].sum().clamp(min=1)
    grad_norm = (squared_norm.sqrt() / loss_tokens).float()
    skipped = (~torch.isfinite(grad_norm)).float()
    scale = clip_scale(grad_norm, optimizer.config.clip) / loss_tokens.float()
    optimizer.step(lr, scale, skipped)
    return StepOutcome(values, grad_norm, skipped, stopping)
