"""Sequences cut over ranks give the losses and gradients of one process, whatever their documents."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megaflow.config_parallel import ParallelConfig
from megaflow.data.loader import Batch, cut_batch
from megaflow.data.zigzag import local_columns
from megaflow.model.llama import Llama
from megaflow.model.placement import placement
from megaflow.parallel.context_parallel import gather_keys_values
from megaflow.parallel.mesh import ParallelContext
from tests.distributed import run_ranks
from tests.tiny import make_batch, tiny_model

TOLERANCE = 1e-5
LAYOUTS = {
    "cp2": (2, {"cp": 2}),
    "cp4": (4, {"cp": 4}),
    "cp2 x tp2": (4, {"cp": 2, "tp": 2}),
    "cp2 x tp2+sp": (4, {"cp": 2, "tp": 2, "sequence_parallel": True}),
    "dp2 x cp2": (4, {"cp": 2}),
}
"""Ranks and settings; data parallelism takes what is left."""
DOCUMENTS = {
    "one, or no boundaries": [[32], [32]],
    "short": [[1, 2, 3, 4, 1, 1, 5, 3, 2, 6, 4], [3] * 10 + [2]],
    "at the parts' edges": [[8, 16, 8], [4, 4, 12, 4, 8]],
    "one token beside them": [[7, 17, 8], [9, 15, 1, 7]],
    "unequal": [[32], [5, 1, 20, 6]],
}
"""Two rows of 32 tokens; with 4 and 8 parts of 8 and 4."""


def random_documents(generator: torch.Generator) -> list[list[int]]:
    rows = []
    for _ in range(2):
        edges = torch.randperm(31, generator=generator)[: int(torch.randint(8, (1,), generator=generator))] + 1
        edges = torch.cat((torch.tensor([0]), edges.sort()[0], torch.tensor([32])))
        rows.append(edges.diff().tolist())
    return rows


def batches() -> list[Batch]:
    generator = torch.Generator().manual_seed(3)
    rows = [*DOCUMENTS.values(), *(random_documents(generator) for _ in range(3))]
    return [make_batch(documents, generator) for documents in rows]


def row_of(batch: Batch, row: int) -> Batch:
    """One sequence of a batch, as a batch."""
    size = batch.tokens.shape[1]
    edges = [edge - row * size for edge in batch.cu_seqlens.tolist() if row * size <= edge <= (row + 1) * size]
    names = ("tokens", "labels", "positions", "sources")
    return Batch(
        **{name: getattr(batch, name)[row : row + 1] for name in names},
        cu_seqlens=torch.tensor(edges, dtype=torch.int32),
        max_seqlen=max(b - a for a, b in itertools.pairwise(edges)),
        cards=batch.cards[row : row + 1],
    )


def gradients(model: Llama, losses: Tensor) -> dict[str, Tensor]:
    """Of the sum of the losses, by parameter."""
    named = dict(model.named_parameters())
    return dict(zip(named, torch.autograd.grad(losses.sum(), list(named.values())), strict=True))


def deviations(settings: dict[str, Any]) -> list[float]:
    """The largest relative deviation of this rank's losses and gradients from one process, for each batch."""
    ctx = ParallelContext.create(ParallelConfig(**settings), "cpu")
    single, model = tiny_model(), tiny_model(ctx=ctx)
    whole_pieces, pieces = placement(model.config, single.ctx), placement(model.config, ctx)
    worst_of_all = []
    for whole in batches():
        objective, expected_losses = single.loss(whole)
        grads = gradients(single, objective)
        expected = {p.name: grads[name][p.local_slices()] for name, found in whole_pieces.items() for p in found}
        own = whole if ctx.dp == 1 else row_of(whole, ctx.dp_rank)
        objective, losses = model.loss(cut_batch(own, ctx.cp, ctx.cp_rank))
        mine = expected_losses[ctx.dp_rank :: ctx.dp]
        wanted = torch.cat([mine[:, part] for part in local_columns(32, ctx.cp, ctx.cp_rank)], dim=1)
        worst = [relative(losses, wanted)]
        for name, grad in gradients(model, objective).items():
            dist.all_reduce(grad, group=ctx.group("data"))
            if ctx.sequence_parallel and grad.ndim == 1:
                dist.all_reduce(grad, group=ctx.tp_group)
            worst += [relative(grad[p.local_slices()], expected[p.name][p.global_slices()]) for p in pieces[name]]
        worst_of_all.append(float(torch.tensor(worst).max()))  # NaN if one of them is
    return worst_of_all


def relative(ours: Tensor, wanted: Tensor) -> float:
    return float((ours - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_follows_one_process(layout: str) -> None:
    world, settings = LAYOUTS[layout]
    for found in run_ranks(world, deviations, settings):
        assert all(deviation < TOLERANCE for deviation in found), found


def gathered(dtype: torch.dtype) -> None:
    """Keys and values are the very ones of the ranks, and each rank gets the sum of what all took from its own."""
    ctx = ParallelContext.create(ParallelConfig(cp=2), "cpu")
    k, v = (torch.full((3, 2, 4), 10.0 * ctx.rank + i, dtype=dtype, requires_grad=True) for i in (1, 2))
    index = torch.tensor([5, 0, 2, 5][: 4 - ctx.rank], dtype=torch.int32)
    keys, values = gather_keys_values(torch.cat((k, v), dim=1), index, ctx).chunk(2, dim=1)
    assert keys.dtype == dtype
    assert keys[:, 0, 0].tolist() == [11, 1, 1, 11][: len(index)]
    assert values[:, 1, 3].tolist() == [12, 2, 2, 12][: len(index)]
    grads = torch.autograd.grad((keys + 2 * values).sum(), (k, v))
    taken = torch.tensor([[2.0, 0.0, 2.0], [0.0, 0.0, 3.0]])[ctx.rank]
    for factor, grad in enumerate(grads, 1):
        assert grad.dtype == dtype
        assert torch.equal(grad.float(), factor * taken[:, None, None].expand(3, 2, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gathered_keys_and_their_gradients(dtype: torch.dtype) -> None:
    run_ranks(2, gathered, dtype)
