"""Cross-entropy over a vocabulary that may be cut into shards, one per rank of a process group.

Every rank reduces its shard of a row to its maximum, the sum of exponentials above it, the logit of the label and,
where labels are smoothed, the sum of logits; one all-gather of them gives the loss, and the gathered logits never exist
(Shoeybi et al., 2019, section 3). The gradient is written over the logits: another tensor of this size costs as much as
the arithmetic.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megaflow.kernels.backend import Backend, row_blocks
from megaflow.kernels.jit import jit, needs_triton, next_power_of_2, tl

IGNORED = -100
"""The label of a token that carries no loss."""

BLOCK = 8192
"""Columns that a program takes at a time, at most."""


class Vocabulary(NamedTuple):
    """Which part of a vocabulary the columns of the logits are."""

    start: int
    """Id of the first column."""
    size: int
    """Ids of the whole vocabulary; columns from this id on are padding and take no part."""
    group: dist.ProcessGroup | None = None
    """The ranks that hold the other columns, in the order of the vocabulary; None where all are here."""

    def width(self, columns: int) -> int:
        """How many of the columns are no padding."""
        return min(max(self.size - self.start, 0), columns)


class Objective(NamedTuple):
    """What is minimised: the loss, smoothed, and a term that keeps logits small."""

    label_smoothing: float = 0.0
    """Share of the target that is spread evenly over the vocabulary (Szegedy et al., 2016)."""
    z_loss: float = 0.0
    """Weight of the squared log of the softmax's denominator (Chowdhery et al., arXiv 2204.02311)."""


class Loss(NamedTuple):
    """Of every token, fp32 `[T]`, 0 where the label is -100."""

    objective: Tensor
    """What the gradient is of."""
    loss: Tensor
    """The cross-entropy alone."""


def reference(logits: Tensor, labels: Tensor, vocabulary: Vocabulary, objective: Objective, gradient: bool) -> Loss:
    """Losses of logits `[T, V_local]` for labels `[T]`, integer ids of the whole vocabulary below its size, or -100.

    gradient: overwrite the logits by that of the sum of the objective.
    """
    width = vocabulary.width(logits.shape[1])
    column = labels - vocabulary.start
    here = (column >= 0) & (column < width)
    column = torch.where(here, column, 0).long()  # scatter_add_ takes no other
    statistics = _empty_statistics(logits, objective)
    for rows in row_blocks(logits):
        statistics[:, rows] = _shard_statistics(logits[rows, :width], column[rows], here[rows], len(statistics))
    log_sum, result = _losses(_merge(statistics, vocabulary.group), labels, vocabulary.size, objective)
    if gradient:
        logits[:, width:] = 0.0
        for rows in row_blocks(logits) if width else ():
            block = logits[rows, :width]
            wide = block.float()  # the block itself where logits are fp32
            wide.sub_(log_sum[rows, None]).exp_()
            if objective.z_loss:
                wide.mul_(1 + 2 * objective.z_loss * log_sum[rows, None])
            wide.scatter_add_(1, column[rows, None], (objective.label_smoothing - 1.0) * here[rows, None].float())
            if objective.label_smoothing:
                wide.sub_(objective.label_smoothing / vocabulary.size)
            wide.mul_(labels[rows, None] != IGNORED)
            if wide is not block:
                block.copy_(wide)
    return result


def _empty_statistics(logits: Tensor, objective: Objective) -> Tensor:
    """Memory for those of a shard, `[3, T]` or, with the sum of logits, `[4, T]`."""
    count = 4 if objective.label_smoothing else 3
    return torch.empty(count, logits.shape[0], dtype=torch.float32, device=logits.device)


def _shard_statistics(logits: Tensor, column: Tensor, here: Tensor, count: int) -> Tensor:
    """Maximum, sum of exponentials above it, logit of the label (0 if another shard has it), sum; the first `count`."""
    if logits.shape[1] == 0:
        empty = logits.new_zeros(count, logits.shape[0], dtype=torch.float32)
        empty[0] = float("-inf")
        return empty
    wide = logits.float()
    maximum = wide.amax(1)
    total = (wide - maximum[:, None]).exp_().sum(1)
    target = torch.where(here, wide.gather(1, column[:, None])[:, 0], 0.0)
    return torch.stack((maximum, total, target, *([wide.sum(1)] if count == 4 else [])))


def _merge(statistics: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The statistics of whole rows from those of all shards."""
    if group is None:
        return statistics
    shards = [torch.empty_like(statistics) for _ in range(group.size())]
    dist.all_gather(shards, statistics, group=group)
    maxima, sums, *others = torch.stack(shards, dim=1)
    maximum = maxima.amax(0)
    return torch.stack((maximum, (sums * (maxima - maximum).exp()).sum(0), *(other.sum(0) for other in others)))


def _losses(statistics: Tensor, labels: Tensor, size: int, objective: Objective) -> tuple[Tensor, Loss]:
    """The log of the softmax's denominator and the losses of whole rows."""
    maximum, total, target, *sum_logits = statistics
    log_sum = maximum + total.log()
    loss = torch.where(labels != IGNORED, log_sum - target, 0.0)
    smoothing, z_loss = objective
    aim = loss
    if smoothing:
        aim = (1 - smoothing) * loss + smoothing * (log_sum - sum_logits[0] / size)
    if z_loss:
        aim = aim + z_loss * log_sum.square()
    return log_sum, Loss(torch.where(labels != IGNORED, aim, 0.0), loss)


@jit
def row_statistics(logits, width, SUM: tl.constexpr, BLOCK: tl.constexpr):
    """Maximum of a row, sum of exponentials above it and, with SUM, the sum."""
    maximum = float("-inf")
    exponentials = 0.0
    total = 0.0
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        mask = column < width
        value = tl.load(logits + column, mask=mask, other=float("-inf")).to(tl.float32)
        above = tl.maximum(maximum, tl.max(value, 0))
        exponentials = exponentials * tl.exp2((maximum - above) * 1.4426950408889634)
        exponentials += tl.sum(tl.exp2((value - above) * 1.4426950408889634), 0)
        if SUM:
            total += tl.sum(tl.where(mask, value, 0.0), 0)
        maximum = above
    return maximum, exponentials, total


@jit
def write_gradient(logits, column, target, log_sum, weight, width, columns, z_loss, label_smoothing, even):
    """Overwrites columns of a row; weight: 0 of an ignored token, else 1. even: the smoothed target of every column."""
    value = tl.load(logits + column, mask=column < width, other=float("-inf")).to(tl.float32)
    grad = tl.exp2((value - log_sum) * 1.4426950408889634) * (1.0 + 2.0 * z_loss * log_sum) - even
    grad -= tl.where(column == target, 1.0 - label_smoothing, 0.0)
    grad = tl.where(column < width, grad, 0.0) * weight
    tl.store(logits + column, grad.to(logits.dtype.element_ty), mask=column < columns)


@jit
def loss_kernel(
    logits,
    labels,
    objective,
    loss,
    width,
    columns,
    start,
    z_loss,
    label_smoothing,
    even,
    SUM: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row of a vocabulary that is all here: read, and read again out of the L2 cache where it is overwritten."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * columns
    label = tl.load(labels + row)
    weight = tl.where(label == -100, 0.0, 1.0)
    target = label - start
    maximum, exponentials, total = row_statistics(logits, width, SUM, BLOCK)
    at_target = tl.load(logits + target, mask=(target >= 0) & (target < width), other=0.0).to(tl.float32)
    if GRADIENT:
        tl.debug_barrier()  # every warp has read the label's logit before one of them writes over it
    log_sum = maximum + tl.log2(exponentials) * 0.6931471805599453
    nats = log_sum - at_target
    tl.store(loss + row, nats * weight)
    aim = nats + label_smoothing * at_target - even * total + z_loss * log_sum * log_sum
    tl.store(objective + row, aim * weight)
    if GRADIENT:
        for first in range(0, columns, BLOCK):
            column = first + tl.arange(0, BLOCK)
            write_gradient(logits, column, target, log_sum, weight, width, columns, z_loss, label_smoothing, even)


@jit
def statistics_kernel(logits, labels, statistics, rows, width, columns, start, SUM: tl.constexpr, BLOCK: tl.constexpr):
    """One row of a shard, to `statistics [3, rows]` or, with SUM, `[4, rows]`."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * columns
    target = tl.load(labels + row) - start
    maximum, exponentials, total = row_statistics(logits, width, SUM, BLOCK)
    at_target = tl.load(logits + target, mask=(target >= 0) & (target < width), other=0.0).to(tl.float32)
    tl.store(statistics + row, maximum)
    tl.store(statistics + rows + row, exponentials)
    tl.store(statistics + 2 * rows + row, at_target)
    if SUM:
        tl.store(statistics + 3 * rows + row, total)


@jit
def gradient_kernel(
    logits, labels, log_sums, width, columns, start, z_loss, label_smoothing, even, BLOCK: tl.constexpr
):
    """BLOCK columns of one row of a shard, overwritten."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    label = tl.load(labels + row)
    weight = tl.where(label == -100, 0.0, 1.0)
    log_sum = tl.load(log_sums + row)
    target = label - start
    write_gradient(
        logits + row * columns, column, target, log_sum, weight, width, columns, z_loss, label_smoothing, even
    )


def fused(logits: Tensor, labels: Tensor, vocabulary: Vocabulary, objective: Objective, gradient: bool) -> Loss:
    """`reference` in one kernel, or over shards in one before and one after the exchange of statistics."""
    rows, columns = logits.shape
    smoothing, z_loss = objective
    if vocabulary.group is None:
        loss = Loss(*(torch.empty(rows, dtype=torch.float32, device=logits.device) for _ in range(2)))
        numbers = vocabulary.width(columns), columns, vocabulary.start, z_loss, smoothing, smoothing / vocabulary.size
        loss_kernel[(rows,)](logits, labels, *loss, *numbers, SUM=smoothing > 0, GRADIENT=gradient, **_options(columns))
        return loss
    statistics = shard_statistics(logits, labels, vocabulary, objective)
    log_sum, loss = _losses(_merge(statistics, vocabulary.group), labels, vocabulary.size, objective)
    if gradient:
        shard_gradient(logits, labels, log_sum, vocabulary, objective)
    return loss


def shard_statistics(logits: Tensor, labels: Tensor, vocabulary: Vocabulary, objective: Objective) -> Tensor:
    """Of every row of a shard: maximum, sum of exponentials above it, logit of the label and, smoothed, the sum."""
    rows, columns = logits.shape
    statistics = _empty_statistics(logits, objective)
    width, smoothed = vocabulary.width(columns), objective.label_smoothing > 0
    statistics_kernel[(rows,)](
        logits, labels, statistics, rows, width, columns, vocabulary.start, SUM=smoothed, **_options(columns)
    )
    return statistics


def shard_gradient(
    logits: Tensor, labels: Tensor, log_sum: Tensor, vocabulary: Vocabulary, objective: Objective
) -> None:
    """Overwrites a shard's logits by their gradient; log_sum `[T]`: of the whole rows' softmax."""
    rows, columns = logits.shape
    smoothing, z_loss = objective
    numbers = vocabulary.width(columns), columns, vocabulary.start, z_loss, smoothing, smoothing / vocabulary.size
    options = _options(columns)
    gradient_kernel[(rows, -(-columns // options["BLOCK"]))](logits, labels, log_sum, *numbers, **options)


def _options(columns: int) -> dict[str, int]:
    block = min(BLOCK, next_power_of_2(columns))
    return {"BLOCK": block, "num_warps": max(block // 1024, 4)}


BACKENDS = (Backend("triton", fused, needs_triton), Backend("reference", reference))
