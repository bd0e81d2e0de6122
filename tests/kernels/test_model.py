"""The whole model on the Triton kernels, interpreted: gradients, layouts, recomputation, bf16 beside plain torch."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from megaflow.config_parallel import ParallelConfig
from megaflow.data.loader import Batch
from megaflow.kernels.cross_entropy import Objective
from megaflow.kernels.dispatch import Ops, select_ops
from megaflow.model.init import initialise
from megaflow.model.llama import Llama
from megaflow.model.placement import placement
from megaflow.model.recompute import Recompute, recompute_layers
from megaflow.parallel.mesh import ParallelContext
from tests.distributed import run_ranks
from tests.kernels.interpreter import interpreted, triton_ops
from tests.kernels.numerics import distance
from tests.tiny import make_batch, tiny_config

OBJECTIVE = Objective(label_smoothing=0.1, z_loss=1e-3)


class Results(NamedTuple):
    losses: Tensor
    gradients: dict[str, Tensor]


def run(
    ops: Ops,
    dtype: torch.dtype = torch.float32,
    ctx: ParallelContext | None = None,
    recompute: Recompute = "none",
    deferred: bool = False,
    rounded: bool = False,
) -> tuple[Llama, Results]:
    """Losses and gradients of packed documents; weights and tokens are always the same, but for `rounded` to bf16."""
    model = Llama(tiny_config(init_std=0.1), ctx or ParallelContext.single(), ops, dtype, objective=OBJECTIVE)
    initialise(model, seed=7)
    if rounded:
        model.bfloat16().float()
    recompute_layers(model.layers, recompute, 1)
    objective, losses = model.loss(batch())
    if deferred:
        with model.deferred.collect() as jobs:
            objective.backward()
        for job in jobs:
            job.run()
    else:
        objective.backward()
    return model, Results(losses, {name: p.grad for name, p in model.named_parameters() if p.grad is not None})


def batch() -> Batch:
    return make_batch([[5, 11], [16]], torch.Generator().manual_seed(0))


def test_gradients_of_the_whole_model() -> None:
    with interpreted():
        _, found = run(triton_ops())
    _, expected = run(select_ops("cpu", torch.float32))
    assert distance(found.losses, expected.losses.double()) < 1e-6
    assert set(found.gradients) == set(expected.gradients)
    for name, gradient in found.gradients.items():
        assert distance(gradient, expected.gradients[name].double()) < 5e-6, name


def test_bf16_is_as_near_to_fp32_as_plain_torch_is() -> None:
    with interpreted():
        _, found = run(triton_ops(), torch.bfloat16)
    plain = select_ops("cpu", torch.float32)
    (_, eager), (_, exact) = run(plain, torch.bfloat16), run(plain, rounded=True)
    assert distance(found.losses, exact.losses.double()) < 1.5 * distance(eager.losses, exact.losses.double())
    for name, gradient in found.gradients.items():
        wanted = exact.gradients[name].double()
        assert distance(gradient, wanted) < 1.5 * distance(eager.gradients[name], wanted), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation_changes_no_bit(recompute: Recompute, dtype: torch.dtype) -> None:
    with interpreted():
        _, kept = run(triton_ops(), dtype)
        _, again = run(triton_ops(), dtype, recompute=recompute)
    assert torch.equal(kept.losses, again.losses)
    assert all(torch.equal(gradient, again.gradients[name]) for name, gradient in kept.gradients.items())


def deviations(parallel: ParallelConfig) -> dict[str, float]:
    """Of a rank whose kernels are interpreted from one process on plain torch."""
    with interpreted():
        ctx = ParallelContext.create(parallel, "cpu")
        model, found = run(triton_ops(), ctx=ctx, recompute="selective", deferred=True)
    reference, expected = run(select_ops("cpu", torch.float32))
    table = placement(model.config, reference.ctx)
    wholes = {piece.name: (name, piece) for name, pieces in table.items() for piece in pieces}
    worst = {"losses": distance(found.losses, expected.losses.double())}
    for name, pieces in placement(model.config, ctx).items():
        gradient = found.gradients[name]
        if gradient.ndim == 1 and ctx.sequence_parallel:
            torch.distributed.all_reduce(gradient, group=ctx.tp_group)
        for piece in pieces:
            whole, of_whole = wholes[piece.name]
            wanted = expected.gradients[whole][of_whole.local_slices()][piece.global_slices()]
            worst[piece.name] = distance(gradient[piece.local_slices()], wanted.double())
    return worst


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_tensor_parallel_ranks_follow_one_process(sequence_parallel: bool) -> None:
    parallel = ParallelConfig(tp=2, sequence_parallel=sequence_parallel)
    for worst in run_ranks(2, deviations, parallel):
        assert max(worst.values()) < 1e-5, worst
