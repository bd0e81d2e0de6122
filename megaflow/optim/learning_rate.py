"""Learning-rate schedules."""

from __future__ import annotations

import math

from megaflow.config import OptimConfig


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """The learning rate of optimizer step `step` (from 1) in a run of `steps`.

    Linear warm-up from 0 that reaches `lr` at step `warmup_steps`, then cosine or linear decay to `min_lr` at the last
    step, or wsd (warm-up, stable, decay; arXiv 2404.06395): `lr` held until `decay_steps` before the end.
    """
    if step <= config.warmup_steps:
        return config.lr * step / config.warmup_steps
    decay_start = steps - config.decay_steps if config.schedule == "wsd" else config.warmup_steps
    if config.schedule == "constant" or step <= decay_start:
        return config.lr
    progress = min(1.0, (step - decay_start) / max(1, steps - decay_start))
    left = (1 + math.cos(math.pi * progress)) / 2 if config.schedule == "cosine" else 1 - progress
    return config.min_lr + (config.lr - config.min_lr) * left
