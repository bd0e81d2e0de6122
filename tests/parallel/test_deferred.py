"""Weight gradients that are put off equal those that are not, and each is computed once."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor

from megaflow.config_parallel import ParallelConfig
from megaflow.parallel.mesh import ParallelContext
from tests.distributed import run_ranks
from tests.tiny import make_batch, tiny_config, tiny_model


def gradients(ctx: ParallelContext, tie: bool, put_off: bool) -> dict[str, Tensor]:
    model = tiny_model(tiny_config(tie_embeddings=tie), ctx)
    batch = make_batch([[5, 11]], torch.Generator().manual_seed(0))
    losses = model.loss(batch).objective
    if not put_off:
        losses.backward()
    else:
        with model.deferred.collect() as jobs:
            losses.backward()
        ends = (model.embed.weight, model.head.weight)  # the head's gradient is there before anything can be put off
        matrices = [p for p in model.parameters() if p.ndim > 1 and all(p is not end for end in ends)]
        assert Counter(id(job.weight) for job in jobs) == Counter(map(id, matrices))
        assert all(p.grad is None for p in matrices)
        assert all(p.grad is not None for p in ends)
        assert all(p.grad is not None for p in model.parameters() if p.ndim == 1)
        for job in jobs:
            job.run()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def largest_difference(ctx: ParallelContext, tie: bool) -> float:
    whole, parts = (gradients(ctx, tie, put_off) for put_off in (False, True))
    assert whole.keys() == parts.keys()
    return max(float((whole[name] - parts[name]).abs().max()) for name in whole)


@pytest.mark.parametrize("tie", [False, True])
def test_gradients_put_off_are_the_same(tie: bool) -> None:
    assert largest_difference(ParallelContext.single(), tie) < 1e-6


def difference_on_rank(sequence_parallel: bool) -> float:
    return largest_difference(
        ParallelContext.create(ParallelConfig(tp=2, sequence_parallel=sequence_parallel), "cpu"), False
    )


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_on_two_ranks(sequence_parallel: bool) -> None:
    assert max(run_ranks(2, difference_on_rank, sequence_parallel)) < 1e-6
