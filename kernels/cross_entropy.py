"""Cross-entropy over a vocabulary that may be cut into shards, one per rank of a process group.

Every rank reduces its shard of a row to three numbers (maximum, sum of exponentials, logit of the label); one
all-gather of them gives the loss, and the gathered logits never exist (Shoeybi et al., 2019, section 3).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megaflow.kernels.backend import Backend

IGNORED = -100
"""The label of a token that carries no loss."""

CACHED_LOGITS = 2**18
"""Logits that a CPU takes at a time, so that the passes over them find them in its cache."""


def reference(
    logits: Tensor, labels: Tensor, vocab_start: int, valid_vocab: int, group: dist.ProcessGroup | None = None
) -> Tensor:
    """Loss of every token, fp32 `[T]`, 0 where the label is -100.

    logits: `[T, V_local]`, the columns `vocab_start ...` of the whole vocabulary; columns from `valid_vocab` on are
    padding and take no part. labels: integers `[T]`, ids of the whole vocabulary. group: the ranks that hold the other
    columns, in the order of the vocabulary; None where this rank has all of them.

    The backward pass overwrites logits by their gradient: another tensor of this size costs as much as the arithmetic.
    """
    return _CrossEntropy.apply(logits, labels, vocab_start, valid_vocab, group)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        vocab_start: int,
        valid_vocab: int,
        group: dist.ProcessGroup | None,
    ) -> Tensor:
        width = min(max(valid_vocab - vocab_start, 0), logits.shape[1])
        column = labels - vocab_start
        here = (column >= 0) & (column < width)
        column = torch.where(here, column, 0).long()  # scatter_add_ takes no other
        statistics = torch.empty(3, logits.shape[0], dtype=torch.float32, device=logits.device)
        for rows in _row_blocks(logits):
            statistics[:, rows] = _shard_statistics(logits[rows, :width], column[rows], here[rows])
        maximum, total, target = _merge(statistics, group)
        logsumexp = maximum + total.log()
        ctx.save_for_backward(logits, logsumexp, column, here, labels != IGNORED)
        ctx.width = width
        return torch.where(labels != IGNORED, logsumexp - target, 0.0)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        logits, logsumexp, column, here, counted = ctx.saved_tensors
        grad_logits = logits.detach()
        grad_loss = torch.where(counted, grads[0], 0.0)
        grad_logits[:, ctx.width :] = 0.0
        for rows in _row_blocks(grad_logits) if ctx.width else ():
            block = grad_logits[rows, : ctx.width]
            wide = block.float()  # the block itself where logits are fp32
            wide.sub_(logsumexp[rows, None]).exp_()
            wide.scatter_add_(1, column[rows, None], -here[rows, None].float())
            wide.mul_(grad_loss[rows, None])
            if wide is not block:
                block.copy_(wide)
        return grad_logits, None, None, None, None


def _row_blocks(logits: Tensor) -> list[slice]:
    """The rows in blocks that fit a CPU's cache; in one on other devices."""
    rows, width = logits.shape
    size = max(CACHED_LOGITS // width, 1) if logits.device.type == "cpu" else max(rows, 1)
    return [slice(start, start + size) for start in range(0, rows, size)]


def _shard_statistics(logits: Tensor, column: Tensor, here: Tensor) -> Tensor:
    """Maximum, sum of exponentials above it and logit of the label (0 where another shard has it), `[3, T]`."""
    if logits.shape[1] == 0:
        empty = logits.new_zeros(3, logits.shape[0], dtype=torch.float32)
        empty[0] = float("-inf")
        return empty
    wide = logits.float()
    maximum = wide.amax(1)
    total = (wide - maximum[:, None]).exp_().sum(1)
    target = torch.where(here, wide.gather(1, column[:, None])[:, 0], 0.0)
    return torch.stack((maximum, total, target))


def _merge(statistics: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor, Tensor]:
    """The statistics of whole rows from those of all shards."""
    if group is None:
        maximum, total, target = statistics
        return maximum, total, target
    shards = [torch.empty_like(statistics) for _ in range(group.size())]
    dist.all_gather(shards, statistics, group=group)
    maxima, totals, targets = torch.stack(shards, dim=1)
    maximum = maxima.amax(0)
    return maximum, (totals * (maxima - maximum).exp()).sum(0), targets.sum(0)


BACKENDS = (Backend("reference", reference),)
