"""The whole model type-checked in one process: on the ranks of a group, is an activation the same on each, a part, or
a partial sum? A reduction that is forgotten does not type-check, whatever the numbers are.

Types of spmd_types: I is the same on every rank, and so is its gradient; R is the same, but its gradient is a partial
sum that somebody must reduce; V differs from rank to rank; P is a partial sum. The rules below say what our autograd
functions do; that they do it is proven on real ranks in test_parity.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import spmd_types as spmd
import torch
import torch.distributed as dist
from spmd_types import I, P, R, S, SpmdTypeError, V, rules
from spmd_types.checker import typecheck
from torch import Tensor, nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from megaflow.config_parallel import ParallelConfig
from megaflow.kernels import linear_cross_entropy, norm, rotary, swiglu
from megaflow.kernels.cross_entropy import Vocabulary
from megaflow.kernels.linear_cross_entropy import TotalLoss
from megaflow.model import llama
from megaflow.model.llama import Llama
from megaflow.parallel import layers, regions
from megaflow.parallel.mesh import ParallelContext
from tests.tiny import make_batch, tiny_config, tiny_model

SEQUENCE_PARALLEL = pytest.mark.parametrize("sequence_parallel", [False, True], ids=["tp", "tp+sp"])


def whole(x: Tensor, parallel: ParallelContext) -> Any:
    """What a column-parallel layer multiplies, whose gradients are partial sums."""
    if parallel.sequence_parallel:
        return rules.all_gather(x, parallel.tp_group, src=S(0), dst=R)
    return rules.convert(x, parallel.tp_group, src=I, dst=R)


def summed(x: Any, parallel: ParallelContext) -> Any:
    """What a row-parallel layer gives: products of a rank's columns and rows are partial sums."""
    partial = rules.reinterpret(x, parallel.tp_group, src=V, dst=P)
    if parallel.sequence_parallel:
        return rules.reduce_scatter(partial, parallel.tp_group, src=P, dst=S(0))
    return rules.all_reduce(partial, parallel.tp_group, src=P, dst=I)


def column_rule(*, x: Tensor, weight: Tensor, parallel: ParallelContext) -> Any:
    return rules.einsum("sbh,oh->sbo", whole(x, parallel), weight)


def row_rule(*, x: Tensor, weight: Tensor, parallel: ParallelContext) -> Any:
    return summed(rules.einsum("sbh,oh->sbo", x, weight), parallel)


def linear_rule(*, x: Tensor, weight: Tensor) -> Any:
    return rules.einsum("sbh,oh->sbo", x, weight)


def in_place_rule(out: Tensor, *, x: Tensor, parallel: ParallelContext) -> None:
    rules.ignore(x)  # the result is the operand, written over
    spmd.mutate_type(out, parallel.tp_group, src=V, dst=I)


def scatter_rule(*, x: Tensor, parallel: ParallelContext) -> Any:
    return summed(x, parallel)


def norm_rule(*, x: Tensor, delta: Tensor | None, weight: Tensor) -> Any:
    if delta is None:
        return rules.einsum("sbh,h->sbh", x, weight)
    total = rules.einsum("sbh,sbh->sbh", x, delta, linear_in=((0, 1),))
    return total, rules.einsum("sbh,h->sbh", total, weight)


def rotary_rule(*, x: Tensor, cos: Tensor, sin: Tensor) -> Any:
    return rules.einsum("sbw,sbd,sbd->sbw", x, cos, sin)


def swiglu_rule(*, gate_up: Tensor) -> Any:
    return rules.einsum("sbf->sbf", gate_up)


def loss_rule(*, x: Tensor, weight: Tensor, labels: Tensor, vocabulary: Vocabulary, region: Any) -> Any:
    rules.ignore(labels)
    entered, group = whole(x, region.parallel) if region else x, vocabulary.group
    partial = rules.einsum("sbv->sb", rules.einsum("sbh,vh->sbv", entered, weight))
    losses = rules.all_reduce(rules.reinterpret(partial, group, src=V, dst=P), group, src=P, dst=I)
    return rules.einsum("sb->", losses), losses


RULES: dict[type, Callable[..., Any]] = {
    layers._ColumnParallel: column_rule,
    layers._RowParallel: row_rule,
    layers._Linear: linear_rule,
    regions._ReduceFromTensorRegion: in_place_rule,
    regions._ReduceScatterToSequenceRegion: scatter_rule,
    norm._RMSNorm: norm_rule,
    rotary._Rotary: rotary_rule,
    swiglu._SwiGLU: swiglu_rule,
    linear_cross_entropy._LinearCrossEntropy: loss_rule,
}


@pytest.fixture
def four_ranks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Rank 0 of four, whose collectives do nothing."""
    for function, rule in RULES.items():
        monkeypatch.setattr(function, "spmd_typecheck", staticmethod(rule), raising=False)
    dist.init_process_group(backend="fake", rank=0, world_size=4, store=FakeStore())
    yield
    dist.destroy_process_group()


def loss_types(sequence_parallel: bool, changed: dict[str, dict[str, Any]] | None = None) -> dict[str, Any]:
    """Types over dp and tp of the losses of dp 2 x tp 2, or SpmdTypeError.

    changed: types of parameters by name and group, instead of the right ones.
    """
    ctx = ParallelContext.create(ParallelConfig(tp=2, sequence_parallel=sequence_parallel), "cpu")
    dp, tp = ctx.group("data"), ctx.group("tp")
    model = tiny_model(tiny_config(num_layers=1), ctx)
    batch = make_batch([[16], [5, 11]], torch.Generator().manual_seed(0))
    layout = model.layout(batch)
    with typecheck(local=True):
        for name, parameter in model.named_parameters():
            types = expected_types(parameter, sequence_parallel) | (changed or {}).get(name, {})
            spmd.assert_type(parameter, {dp: types["dp"], tp: types["tp"]})
        for tensor in (batch.tokens, batch.labels, layout.cos, layout.sin, batch.cu_seqlens):
            spmd.assert_type(tensor, {dp: V, tp: R})
        losses = model.losses(model.run_chunk(0, batch.tokens.T, layout), batch.labels)
        types = spmd.get_local_type(losses.objective)
        assert types == spmd.get_local_type(losses.losses)
    return {"dp": types[spmd.normalize_axis(dp)], "tp": types[spmd.normalize_axis(tp)]}


def expected_types(parameter: nn.Parameter, sequence_parallel: bool) -> dict[str, Any]:
    """Matrices are cut over tp; norms are whole, and see a part of the tokens where the sequence is cut."""
    return {"dp": R, "tp": V if parameter.ndim > 1 else R if sequence_parallel else I}


@SEQUENCE_PARALLEL
def test_the_loss_is_the_same_on_every_tensor_parallel_rank(four_ranks: None, sequence_parallel: bool) -> None:
    assert loss_types(sequence_parallel) == {"dp": V, "tp": I}


@SEQUENCE_PARALLEL
def test_gradients_that_need_a_reduction_are_those_that_get_one(four_ranks: None, sequence_parallel: bool) -> None:
    """Over dp all of them; over tp those of the norms, under sequence parallelism only."""
    partial = {}
    for name, parameter in tiny_model(tiny_config(num_layers=1)).named_parameters():
        for group in ("dp", "tp"):
            if parameter.ndim > 1 and group == "tp":
                continue  # cut: every rank has its own
            try:
                loss_types(sequence_parallel, {name: {group: I}})
            except SpmdTypeError:
                partial[name, group] = True
            else:
                partial[name, group] = False
    assert {name for (name, group), found in partial.items() if group == "dp" and not found} == set()
    assert {found for (name, group), found in partial.items() if group == "tp"} == {sequence_parallel}


def without_reduction(self: layers.RowParallelLinear, x: Tensor) -> Tensor:
    return layers._Linear.apply(x, self.weight, self.deferred)


def without_backward_reduction(x: Tensor, weight: Tensor, parallel: ParallelContext, deferred: Any) -> Tensor:
    return layers._Linear.apply(x, weight, deferred)


FORGOTTEN: dict[str, tuple[Any, str, Callable[..., Any]]] = {
    "sum after a row-parallel layer": (layers.RowParallelLinear, "forward", without_reduction),
    "sum of embeddings": (layers, "leave_tensor_region", lambda x, parallel: x),
    "sum of input gradients before a column-parallel layer": (
        layers,
        "column_parallel_linear",
        without_backward_reduction,
    ),
    "sum of input gradients before the loss": (llama, "TensorRegion", lambda parallel: None),
}


@pytest.mark.parametrize("what", FORGOTTEN)
def test_a_forgotten_reduction_does_not_type_check(
    four_ranks: None, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(*FORGOTTEN[what])
    with pytest.raises(SpmdTypeError):
        loss_types(False)


def test_a_loss_of_one_rank_s_vocabulary_is_not_the_loss(four_ranks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def of_this_rank(self: Llama, x: Tensor, labels: Tensor) -> TotalLoss:
        losses = self.head(x).logsumexp(-1)
        return TotalLoss(losses.sum(), losses)

    monkeypatch.setattr(Llama, "losses", of_this_rank)
    assert loss_types(False)["tp"] == V
