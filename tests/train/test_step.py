"""One optimizer step: the arithmetic of the loss, the clip, AdamW, and what a step that is not finite does."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megaflow.config import OptimConfig
from megaflow.config_parallel import ParallelConfig
from megaflow.data.loader import Batch
from megaflow.model.llama import Llama
from megaflow.optim.adamw import AdamW
from megaflow.optim.learning_rate import learning_rate
from megaflow.parallel.gradients import GradientBuffer
from megaflow.parallel.mesh import ParallelContext
from megaflow.parallel.parameters import FlatParameters
from megaflow.parallel.runner import Pipeline
from megaflow.train.metrics import LOSS, LOSS_TOKENS, SEQUENCES
from megaflow.train.step import StepOutcome, train_step
from tests.tiny import make_batch, tiny_model


def batches() -> list[Batch]:
    generator = torch.Generator().manual_seed(5)
    return [make_batch([[16], [4, 12]], generator, masked=masked) for masked in (0.1, 0.8)]


def build(dtype: torch.dtype = torch.float32, clip: float = 0.0) -> tuple[Llama, GradientBuffer, AdamW]:
    model = tiny_model(dtype=dtype)
    parameters = FlatParameters(model, ParallelConfig())
    gradients = GradientBuffer(parameters, ParallelContext.single(), ParallelConfig())
    return model, gradients, AdamW(OptimConfig(lr=1e-2, weight_decay=0.1, clip=clip), parameters, gradients)


def step(model: Llama, gradients: GradientBuffer, optimizer: AdamW) -> StepOutcome:
    pipeline = Pipeline(model, ParallelConfig())
    return train_step(pipeline, gradients, optimizer, batches(), 1, 1e-2, stop=False)


@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_step_is_torch_adamw_on_the_mean_over_all_tokens_with_loss(clip: float) -> None:
    model, gradients, optimizer = build(clip=clip)
    peer = tiny_model()
    decayed = [p for p in peer.parameters() if p.ndim > 1]
    plain = [p for p in peer.parameters() if p.ndim == 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    peer_optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-8)
    for _ in range(5):
        outcome = step(model, gradients, optimizer)
        peer_optimizer.zero_grad()
        tokens = sum(int((batch.labels >= 0).sum()) for batch in batches())
        loss = sum((peer.loss(batch).objective for batch in batches()), torch.zeros(())) / tokens
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(peer.parameters(), clip or float("inf"))
        peer_optimizer.step()
        row = outcome.totals[0].tolist()
        assert row[LOSS] / row[LOSS_TOKENS] == pytest.approx(float(loss.detach()), rel=1e-5)
        assert (row[LOSS_TOKENS], row[SEQUENCES]) == (tokens, 4)
        torch.testing.assert_close(outcome.grad_norm, norm, rtol=1e-5, atol=0)
    for ours, theirs in zip(model.parameters(), peer.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_bf16_parameters_are_the_rounded_master() -> None:
    model, gradients, optimizer = build(torch.bfloat16)
    start = torch.cat(optimizer.master)
    step(model, gradients, optimizer)
    master = torch.cat(optimizer.master)
    assert master.dtype == gradients.flat.dtype == torch.float32
    assert not torch.equal(master, start)
    assert torch.equal(optimizer.parameters.flat, master.bfloat16())
    assert not torch.equal(optimizer.parameters.flat.float(), master)


def test_a_gradient_that_is_not_finite_changes_nothing_and_is_counted() -> None:
    model, gradients, optimizer = build()
    step(model, gradients, optimizer)

    def state() -> list[Tensor]:
        lists = (optimizer.params, optimizer.exp_avg, optimizer.exp_avg_sq)
        return [torch.cat(tensors) for tensors in lists] + [optimizer.steps.clone()]

    before = state()
    squared_norm = gradients.squared_norm

    def poisoned() -> Tensor:
        gradients.flat[3] = float("nan")
        return squared_norm()

    gradients.squared_norm = poisoned  # type: ignore[method-assign]
    assert float(step(model, gradients, optimizer).skipped) == 1
    assert all(torch.equal(a, b) for a, b in zip(state(), before, strict=True))
    del gradients.squared_norm
    assert float(step(model, gradients, optimizer).skipped) == 0
    assert not torch.equal(state()[0], before[0])
    assert torch.isfinite(state()[0]).all()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"schedule": "constant"}, {1: 0.25, 4: 1.0, 50: 1.0, 104: 1.0}),
        ({"schedule": "linear"}, {2: 0.5, 4: 1.0, 54: 0.55, 104: 0.1}),
        ({"schedule": "cosine"}, {4: 1.0, 29: 0.1 + 0.9 * 0.8535534, 54: 0.55, 104: 0.1}),
        ({"schedule": "wsd", "decay_steps": 20}, {4: 1.0, 84: 1.0, 94: 0.55, 104: 0.1}),
    ],
)
def test_learning_rate(settings: dict, expected: dict[int, float]) -> None:
    config = OptimConfig(lr=1.0, min_lr=0.1, warmup_steps=4, **settings)
    assert {s: learning_rate(config, s, 104) for s in expected} == pytest.approx(expected)


def test_learning_rate_without_warm_up_starts_at_its_peak() -> None:
    assert learning_rate(OptimConfig(lr=1.0), 1, 1000) == pytest.approx(1.0, rel=1e-5)
