"""Flat parameters and gradient sums of one process."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megaflow.config_parallel import ParallelConfig
from megaflow.parallel.gradients import GradientBuffer
from megaflow.parallel.mesh import ParallelContext
from megaflow.parallel.parameters import FlatParameters
from tests.tiny import make_batch, tiny_config, tiny_model


def batches(count: int) -> list:
    generator = torch.Generator().manual_seed(0)
    return [make_batch([[5, 11]], generator) for _ in range(count)]


def buffer_of(parameters: FlatParameters) -> GradientBuffer:
    return GradientBuffer(parameters, ParallelContext.single(), ParallelConfig())


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("bucket_bytes", [1, 3 * 32 * 48 * 4, 1 << 20])
def test_parameters_become_views_of_one_tensor_in_buckets(bucket_bytes: int, tie: bool) -> None:
    model = tiny_model(tiny_config(tie_embeddings=tie))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    parameters = FlatParameters(model, ParallelConfig(), bucket_bytes)
    matrices = [name for name, p in before.items() if p.ndim > 1 and not (tie and name == "embed.weight")]
    norms = [name for name, p in before.items() if p.ndim == 1]
    kinds = [bucket.kind for bucket in parameters.buckets]
    assert kinds == ["matrices"] * (len(kinds) - 1 - tie) + ["tied"] * tie + ["norms"]
    in_backward_order = matrices[::-1] + ["embed.weight"] * tie + norms[::-1]
    assert [name for bucket in parameters.buckets for name in bucket.names] == in_backward_order
    for bucket in parameters.buckets:
        size = sum(before[name].numel() for name in bucket.names)
        assert size <= bucket.numel < size + 32
        assert bucket.kind == "norms" or size * 4 <= bucket_bytes or len(bucket.names) == 1
    assert len(kinds) == {1: len(matrices) + 1 + tie, 1 << 20: 2 + tie}.get(bucket_bytes, len(kinds))
    assert parameters.numel == sum(p.numel() for p in before.values())

    for name, p in model.named_parameters():
        assert torch.equal(p, before[name])
    parameters.flat.fill_(0.5)
    assert all(bool((p == 0.5).all()) for p in model.parameters())
    views = parameters.views(torch.arange(parameters.flat.numel()))
    assert {name: view.shape for name, view in views.items()} == {name: p.shape for name, p in before.items()}


@pytest.mark.parametrize("zero", [True, False])
def test_every_rank_has_an_equal_and_aligned_part_of_a_bucket(zero: bool) -> None:
    ctx = ParallelContext(torch.device("cpu"), world_size=6, dp=3, cp=2, dp_rank=2, cp_rank=1)
    parameters = FlatParameters(tiny_model(ctx=ctx), ParallelConfig(zero=zero), 1)
    own, parts = parameters.own(parameters.flat), parameters.parts(parameters.flat)
    for bucket, mine, part in zip(parameters.buckets, own, parts, strict=True):
        size = sum(parameters.parameters[name].numel() for name in bucket.names)
        assert size <= bucket.numel < size + 6 * 32
        assert len(part) * 6 == bucket.numel
        assert len(part) % 32 == part.storage_offset() % 32 == 0
        assert part.storage_offset() == bucket.start + 5 * len(part)
        assert torch.equal(mine, part if zero else bucket.of(parameters.flat))
        assert mine.data_ptr() == (part if zero else bucket.of(parameters.flat)).data_ptr()  # collectives are in place


@pytest.mark.parametrize("tie", [False, True])
def test_sums_of_fp32_gradients(tie: bool) -> None:
    model, plain = (tiny_model(tiny_config(tie_embeddings=tie)) for _ in range(2))
    parameters = FlatParameters(model, ParallelConfig())
    gradients = buffer_of(parameters)
    for batch in batches(3):
        model.loss(batch).objective.backward()
        plain.loss(batch).objective.backward()
    sums = parameters.views(gradients.flat)
    for name, p in plain.named_parameters():
        assert p.grad is not None
        torch.testing.assert_close(sums[name], p.grad)
    expected = sum(float(p.grad.double().square().sum()) for p in plain.parameters() if p.grad is not None)
    assert float(gradients.squared_norm()) == pytest.approx(expected, rel=1e-6)

    gradients.zero()
    assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)


def test_bf16_gradients_are_summed_in_fp32() -> None:
    """That of the head is never rounded: it is computed in fp32 and does not go through autograd."""
    model, plain = (tiny_model(dtype=torch.bfloat16) for _ in range(2))
    parameters = FlatParameters(model, ParallelConfig())
    gradients = buffer_of(parameters)
    taken: list[Tensor] = []
    plain.deferred.accumulate = lambda weight, grad: taken.append(grad)
    expected = {name: torch.zeros(p.shape) for name, p in plain.named_parameters()}
    for batch in batches(3):
        model.loss(batch).objective.backward()
        plain.loss(batch).objective.backward()
        for name, parameter in plain.named_parameters():
            grad = taken.pop() if name == "head.weight" else parameter.grad
            assert grad is not None
            assert grad.dtype == (torch.float32 if name == "head.weight" else torch.bfloat16)
            expected[name] += grad
            parameter.grad = None
    assert gradients.flat.dtype == torch.float32
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(total, expected[name]) for name, total in parameters.views(gradients.flat).items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_that_were_put_off_go_into_the_sums(dtype: torch.dtype) -> None:
    sums = []
    for put_off in (False, True):
        model = tiny_model(dtype=dtype)
        parameters = FlatParameters(model, ParallelConfig())
        gradients = buffer_of(parameters)
        for batch in batches(2):
            losses = model.loss(batch).objective
            if put_off:
                with model.deferred.collect() as jobs:
                    losses.backward()
                assert jobs
                for job in jobs:
                    job.run()
            else:
                losses.backward()
        sums.append(gradients.flat)
    assert torch.equal(*sums)


def test_a_gradient_after_the_last_is_an_error() -> None:
    model = tiny_model()
    parameters = FlatParameters(model, ParallelConfig())
    gradients = buffer_of(parameters)
    gradients.final(parameters.parameters)
    batch, *_ = batches(1)
    model.loss(batch).objective.backward()
    with pytest.raises(RuntimeError, match=r"head\.weight: a gradient came after the one that was announced"):
        model.loss(batch).objective.backward()
