"""Cross-entropy, over a whole vocabulary and over a rank's shard of it, and with the projection before it."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernels_problem import IGNORED, OURS, Contender, Model, Problem, Run, compiled, liger, same, tensor
from megaflow.kernels import cross_entropy as kernels
from megaflow.kernels.backend import Situation
from megaflow.kernels.cross_entropy import Objective, Vocabulary
from megaflow.kernels.dispatch import select_ops

PIECE = 1024
"""Tokens whose expected results are computed at a time."""
UNLABELLED = 0.02
"""Share of tokens without a label."""


def labels_of(tokens: int, vocabulary: int, device: torch.device) -> Tensor:
    """Random labels `[T]`, some of them ignored."""
    labels = torch.randint(vocabulary, (tokens,), device=device)
    return torch.where(torch.rand(tokens, device=device) < UNLABELLED, IGNORED, labels)


def softmax_minus_target(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Losses `[T]` and the gradient of their sum for fp64 logits `[T, V]`."""
    used = labels != IGNORED
    target = torch.where(used, labels, 0)[:, None]
    loss = torch.where(used, logits.logsumexp(1) - logits.gather(1, target)[:, 0], 0.0)
    grad = logits.softmax(1)
    grad.scatter_add_(1, target, torch.full_like(target, -1, dtype=grad.dtype))
    return loss, grad * used[:, None]


def loss_and_gradient(function: Callable[[Tensor, Tensor], Tensor], logits: Tensor, labels: Tensor) -> dict[str, Run]:
    """Of a function that gives the summed loss; the gradient may be written over the logits."""
    x = logits.clone().requires_grad_()

    def call() -> Any:
        loss = function(x, labels)
        return loss.detach(), *torch.autograd.grad(loss, [x])

    return {"forward + backward": Run(call, same, lambda: x.data.copy_(logits))}


def plain(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction="sum")


def cross_entropy(tokens: int, vocabulary: int, device: torch.device) -> Problem:
    """Logits `[T, V]`; ours and some others overwrite them by their gradient."""
    logits, labels = tensor(device, tokens, vocabulary, scale=2.0), labels_of(tokens, vocabulary, device)
    backends = [b for b in kernels.BACKENDS if b.missing(Situation(device, torch.bfloat16)) is None]
    ours_function = backends[0].function

    def ours() -> dict[str, Run]:
        x, whole = logits.clone(), Vocabulary(0, vocabulary)
        return {
            "forward + backward": Run(
                lambda: ours_function(x, labels, whole, Objective(), True),
                lambda loss: (loss.loss.sum(), x),
                lambda: x.copy_(logits),
            )
        }

    def by_liger() -> dict[str, Run]:
        function = liger("LigerCrossEntropyFunction").apply
        return loss_and_gradient(
            lambda x, y: function(x, y, None, IGNORED, 0.0, 0.0, "sum", None, False, False, False)[0], logits, labels
        )

    def quack() -> dict[str, Run]:
        function = importlib.import_module("quack").cross_entropy
        return loss_and_gradient(lambda x, y: function(x, y, reduction="sum", inplace_backward=True), logits, labels)

    grad = torch.empty(tokens, vocabulary, device=device)
    total = torch.zeros((), dtype=torch.float64, device=device)
    for start in range(0, tokens, PIECE):
        rows = slice(start, start + PIECE)
        loss, grad[rows] = softmax_minus_target(logits[rows].double(), labels[rows])
        total += loss.sum()
    return Problem(
        {"forward + backward": [total, grad]},
        [
            Contender(OURS, ours),
            Contender("Liger", by_liger),
            Contender("torch eager", lambda: loss_and_gradient(plain, logits, labels)),
            Contender("QuACK", quack, slow=True),
            Contender("torch.compile", lambda: loss_and_gradient(compiled(plain), logits, labels), slow=True),
        ],
    )


def shard_cross_entropy(tokens: int, columns: int, shards: int, device: torch.device) -> Problem:
    """The two kernels of the second rank of some, on its logits `[T, V / tp]`; what is exchanged between is given."""
    vocabulary = Vocabulary(columns, columns * shards)
    logits, labels = tensor(device, tokens, columns, scale=2.0), labels_of(tokens, columns * shards, device)
    log_sum = torch.full((tokens,), 12.0, device=device)
    on_gpu = device.type == "cuda"

    place = labels - columns
    here = (place >= 0) & (place < columns)
    target_column = torch.where(here, place, 0)

    def statistics() -> Tensor:
        if on_gpu:
            return kernels.shard_statistics(logits, labels, vocabulary, Objective())
        return kernels._shard_statistics(logits, target_column, here, 3)

    def gradient(x: Tensor) -> None:
        if on_gpu:
            kernels.shard_gradient(x, labels, log_sum, vocabulary, Objective())
            return
        grad = (x.float() - log_sum[:, None]).exp_()
        grad.scatter_add_(1, target_column[:, None], -here[:, None].float())
        x.copy_(grad.mul_(used))

    def ours() -> dict[str, Run]:
        x = logits.clone()
        return {
            "statistics": Run(statistics, lambda found: found.unbind(0)),
            "gradient": Run(lambda: gradient(x), lambda _: (x,), lambda: x.copy_(logits)),
        }

    wide, used = logits.double(), (labels != IGNORED)[:, None]
    maximum = wide.amax(1)
    target = torch.where(here, wide.gather(1, target_column[:, None])[:, 0], 0.0)
    expected = [maximum, (wide - maximum[:, None]).exp().sum(1), target]
    wanted = (wide - log_sum[:, None]).exp()
    wanted.scatter_add_(1, target_column[:, None], -here[:, None].double())
    wanted = (wanted * used).float()
    return Problem(
        {"statistics": [x.float() for x in expected], "gradient": [wanted]},
        [Contender(OURS, ours)],
    )


def expected_of(x: Tensor, weight: Tensor, labels: Tensor) -> list[Tensor]:
    """The summed loss and the gradients of input and weight, from products in fp64, `PIECE` tokens at a time."""
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    grad_x, wide = torch.empty_like(x, dtype=torch.float32), weight.double()
    grad_weight = torch.zeros_like(wide)
    for start in range(0, len(x), PIECE):
        rows = slice(start, start + PIECE)
        block = x[rows].double()
        loss, grad = softmax_minus_target(block @ wide.T, labels[rows])
        total += loss.sum()
        grad_x[rows] = grad @ wide
        grad_weight.addmm_(grad.T, block)
    return [total, grad_x, grad_weight.float()]


def linear_cross_entropy(model: Model, vocabulary: int, device: torch.device) -> Problem:
    """Input `[T, H]`, weight `[V, H]`: the summed loss, and the gradients of both."""
    x, weight = tensor(device, model.tokens, model.hidden), tensor(device, vocabulary, model.hidden, scale=0.02)
    labels, ops = labels_of(model.tokens, vocabulary, device), select_ops(device, torch.bfloat16)

    def whole(function: Callable[..., Tensor]) -> dict[str, Run]:
        leaves = [x.detach().requires_grad_(), weight.detach().requires_grad_()]

        def call() -> Any:
            loss = function(*leaves, labels)
            return loss.detach(), *torch.autograd.grad(loss, leaves)

        return {"forward + backward": Run(call, same)}

    def ours() -> dict[str, Run]:
        leaves = [x.detach().requires_grad_(), weight.detach().requires_grad_()]
        everything = Vocabulary(0, vocabulary)

        def call() -> Any:
            taken: list[Tensor] = []  # as the trainer takes the fp32 gradient of the weight
            total = ops.linear_cross_entropy(*leaves, labels, everything, Objective(), taken.append)
            (grad_x,) = torch.autograd.grad(total.objective, leaves[:1])
            return total.objective.detach(), grad_x, taken[0]

        return {"forward + backward": Run(call, same)}

    def by_liger(accumulate: torch.dtype | None) -> dict[str, Run]:
        function = liger("LigerFusedLinearCrossEntropyFunction").apply
        options = (None, None, IGNORED, 0.0, 0.0, "sum", None, False, accumulate)
        return whole(lambda x, weight, labels: function(x, weight, labels, *options)[0])

    def cut() -> dict[str, Run]:
        function = importlib.import_module("cut_cross_entropy").linear_cross_entropy
        return whole(lambda x, weight, labels: function(x, weight, labels, reduction="sum", filter_eps=None))

    def quack() -> dict[str, Run]:
        function = importlib.import_module("quack.linear_cross_entropy").chunked_linear_cross_entropy
        return whole(lambda x, weight, labels: function(x, weight, labels, reduction="sum", tuned=False))

    def eager(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return plain(x @ weight.T, labels)

    return Problem(
        {"forward + backward": expected_of(x, weight, labels)},
        [
            Contender(OURS, ours),
            Contender("Liger", lambda: by_liger(None)),
            Contender("Liger, fp32 sums", lambda: by_liger(torch.float32)),
            Contender("torch eager", lambda: whole(eager)),
            Contender("cut-cross-entropy, unfiltered", cut, slow=True),
            Contender("QuACK", quack, slow=True),
            Contender("torch.compile", lambda: whole(compiled(eager)), slow=True),
        ],
        limit=2e-2,
    )
