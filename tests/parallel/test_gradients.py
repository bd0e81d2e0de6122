"""Flat parameters and gradient sums."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from megaflow.config_parallel import ParallelConfig
from megaflow.parallel.gradients import FlatParameters, GradientBuffer
from megaflow.parallel.mesh import ParallelContext
from tests.distributed import run_ranks
from tests.tiny import make_batch, tiny_config, tiny_model


def batches(count: int) -> list:
    generator = torch.Generator().manual_seed(0)
    return [make_batch([[5, 11]], generator) for _ in range(count)]


def test_parameters_become_views_of_one_tensor_matrices_first() -> None:
    model = tiny_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    parameters = FlatParameters(model)
    norms = [name for name, p in model.named_parameters() if p.ndim == 1]
    assert list(parameters.parameters)[-len(norms) :] == norms
    assert parameters.flat[parameters.decay_numel :].numel() == sum(before[name].numel() for name in norms)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name])
    parameters.flat.fill_(0.5)
    assert all(bool((p == 0.5).all()) for p in model.parameters())
    views = parameters.views(torch.arange(parameters.flat.numel()))
    assert {name: view.shape for name, view in views.items()} == {name: p.shape for name, p in before.items()}


@pytest.mark.parametrize("tie", [False, True])
def test_sums_of_fp32_gradients(tie: bool) -> None:
    model, plain = (tiny_model(tiny_config(tie_embeddings=tie)) for _ in range(2))
    parameters = FlatParameters(model)
    gradients = GradientBuffer(parameters, ParallelContext.single())
    for batch in batches(3):
        model.loss(batch).sum().backward()
        plain.loss(batch).sum().backward()
    sums = parameters.views(gradients.flat)
    for name, p in plain.named_parameters():
        assert p.grad is not None
        torch.testing.assert_close(sums[name], p.grad)
    expected = sum(float(p.grad.double().square().sum()) for p in plain.parameters() if p.grad is not None)
    assert float(gradients.squared_norm()) == pytest.approx(expected, rel=1e-6)

    gradients.zero()
    assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)


def test_bf16_gradients_are_summed_in_fp32() -> None:
    model = tiny_model(dtype=torch.bfloat16)
    parameters = FlatParameters(model)
    gradients = GradientBuffer(parameters, ParallelContext.single())
    expected = torch.zeros_like(gradients.flat)
    for batch in batches(3):
        found = torch.autograd.grad(model.loss(batch).sum(), list(parameters.parameters.values()))
        expected += torch.cat([grad.float().flatten() for grad in found])
        model.loss(batch).sum().backward()
    assert gradients.flat.dtype == torch.float32
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(gradients.flat, expected)


def reduced_ones() -> tuple[int, float, float, float]:
    ctx = ParallelContext.create(ParallelConfig(tp=2, sequence_parallel=True), "cpu")
    parameters = FlatParameters(tiny_model(ctx=ctx))
    gradients = GradientBuffer(parameters, ctx)
    gradients.flat.fill_(1.0)
    gradients.reduce()
    squares = gradients.squared_norm()
    dist.all_reduce(squares, group=ctx.tp_group)
    matrices, norms = gradients.flat[: parameters.decay_numel], gradients.flat[parameters.decay_numel :]
    count = 2 * matrices.numel() * 2**2 + norms.numel() * 4**2
    return count, float(squares), float(matrices.mean()), float(norms.mean())


def test_reduction_over_dp_and_of_norms_over_tp() -> None:
    for count, squares, matrices, norms in run_ranks(4, reduced_ones):
        assert (matrices, norms) == (2.0, 4.0)
        assert squares == count
