"""The output projection and its cross-entropy together, over blocks of tokens: the logits of all never exist.

Every block's logits are overwritten by their gradient, which is multiplied with the weight and with the block's input
at once: three products in all, the forward one included, where computing the logits again would take four. So the
gradients are there when the forward pass ends, and the backward pass hands them out. That of the weight is summed over
the blocks in fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from megaflow.kernels import cross_entropy
from megaflow.kernels.backend import Backend
from megaflow.kernels.blocks import block_size
from megaflow.kernels.cross_entropy import Loss, Objective, Vocabulary
from megaflow.kernels.jit import jit, needs_triton, tl

SCALED = 4096
"""Numbers that a program of `scale_kernel` takes."""


class TotalLoss(NamedTuple):
    """What a backward pass starts from, and what is reported."""

    objective: Tensor
    """Sum over the tokens, an fp32 scalar."""
    losses: Tensor
    """Cross-entropy of every token, fp32 `[...]`, without gradient; 0 where the label is -100."""


class Pending(Protocol):
    """A result under way."""

    def wait(self) -> Tensor:
        """The result."""


class Region(Protocol):
    """What must happen to x where other ranks have other columns of the vocabulary."""

    def enter(self, x: Tensor) -> Tensor:
        """What is multiplied: all tokens, where ranks have parts of them."""

    def leave(self, grad: Tensor) -> Pending:
        """Starts the sum over the ranks of its gradient, in the shape of x."""


class Parts(NamedTuple):
    """What a backend does itself; the products are torch's."""

    cross_entropy: Callable[[Tensor, Tensor, Vocabulary, Objective, bool], Loss]
    scale: Callable[[Tensor, Tensor], Tensor]
    """Multiplies a tensor by a scalar tensor, in place."""


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        labels: Tensor,
        vocabulary: Vocabulary,
        objective: Objective,
        take: Callable[[Tensor], Tensor | None] | None,
        region: Region | None,
        parts: Parts,
        enabled: bool,
    ) -> Any:
        whole = x if region is None else region.enter(x)
        rows, targets = whole.flatten(0, -2), labels.flatten()
        needs_x, needs_weight = (enabled and needed for needed in ctx.needs_input_grad[:2])
        grad_x = torch.empty_like(rows) if needs_x else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        ctx.pending, ctx.grad_x, ctx.grad_weight, ctx.handed_out = None, None, grad_weight, False
        total = torch.zeros((), dtype=torch.float32, device=x.device)
        losses = torch.empty(len(rows), dtype=torch.float32, device=x.device)
        size = block_size(len(weight), x.element_size(), x.device.type)
        memory = x.new_empty(min(size, len(rows)), len(weight))
        for start in range(0, len(rows), size):
            block = slice(start, min(start + size, len(rows)))
            logits = torch.mm(rows[block], weight.T, out=memory[: block.stop - start])
            loss = parts.cross_entropy(logits, targets[block], vocabulary, objective, needs_x or needs_weight)
            losses[block] = loss.loss
            total += loss.objective.sum()
            if grad_x is not None:
                torch.mm(logits, weight, out=grad_x[block])
                if block.stop == len(rows):  # its sum over ranks is under the last product
                    ctx.grad_x = grad_x.view(whole.shape)
                    ctx.pending = None if region is None else region.leave(ctx.grad_x)
            if grad_weight is not None:
                _add_product(grad_weight, logits.T, rows[block])
        ctx.take, ctx.scale = take, parts.scale
        losses = losses.view(labels.shape)
        ctx.mark_non_differentiable(losses)
        return total, losses

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        if ctx.handed_out:
            raise RuntimeError("the loss's gradients were handed out: there is no second backward pass through it")
        ctx.handed_out = True
        grad_x = ctx.grad_x if ctx.pending is None else ctx.pending.wait()
        grad_x, grad_weight = (
            None if grad is None else ctx.scale(grad, grads[0]) for grad in (grad_x, ctx.grad_weight)
        )
        ctx.pending = ctx.grad_x = ctx.grad_weight = None
        if grad_weight is not None and ctx.take is not None:
            grad_weight = ctx.take(grad_weight)
        return grad_x, grad_weight, None, None, None, None, None, None, None


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """`total += a @ b` in fp32, whatever the dtype of a and b."""
    if a.device.type == "cuda" and a.dtype != torch.float32:
        torch.addmm(total, a, b, torch.float32, out=total)
    else:
        torch.addmm(total, a.float(), b.float(), out=total)


def _apply(parts: Parts, x: Tensor, weight: Tensor, *arguments: Any) -> TotalLoss:
    # inside the function gradients are always disabled: it has to be told
    return TotalLoss(*_LinearCrossEntropy.apply(x, weight, *arguments, parts, torch.is_grad_enabled()))


def reference(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    vocabulary: Vocabulary,
    objective: Objective,
    take: Callable[[Tensor], Tensor | None] | None = None,
    region: Region | None = None,
) -> TotalLoss:
    """Losses of x `[..., H]` times weight `[V_local, H]` for labels `[...]`, integer ids of the whole vocabulary.

    take: gets the fp32 gradient of the weight in the backward pass and returns what autograd shall have of it; without
    it autograd gets all. region: for shards of a vocabulary; labels are those of the tokens that it enters with.
    A second backward pass through the same graph is not possible.
    """
    parts = Parts(cross_entropy.reference, torch.Tensor.mul_)
    return _apply(parts, x, weight, labels, vocabulary, objective, take, region)


@jit
def scale_kernel(x, factor, count, BLOCK: tl.constexpr):
    """`x *= factor`, a scalar on the device; x is not read where that is 1, as it is in training."""
    by = tl.load(factor)
    if by != 1.0:
        place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(x + place, mask=place < count).to(tl.float32)
        tl.store(x + place, (value * by).to(x.dtype.element_ty), mask=place < count)


def scale(x: Tensor, factor: Tensor) -> Tensor:
    """x times a scalar, in place."""
    scale_kernel[(-(-x.numel() // SCALED),)](x, factor, x.numel(), BLOCK=SCALED, num_warps=4)
    return x


def fused(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    vocabulary: Vocabulary,
    objective: Objective,
    take: Callable[[Tensor], Tensor | None] | None = None,
    region: Region | None = None,
) -> TotalLoss:
    """`reference` with the kernels of `cross_entropy`."""
    return _apply(Parts(cross_entropy.fused, scale), x, weight, labels, vocabulary, objective, take, region)


BACKENDS = (Backend("triton", fused, needs_triton), Backend("reference", reference))
