"""Recomputation changes no bit, keeps what it says and computes nothing twice that it need not."""

from __future__ import annotations

from collections import Counter
from typing import Any, Literal, cast

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megaflow.config import ModelConfig
from megaflow.config_parallel import ParallelConfig
from megaflow.data.loader import Batch, cut_batch
from megaflow.kernels import backend
from megaflow.model.llama import Layout, Llama
from megaflow.model.memory import ActivationBytes, activation_bytes
from megaflow.model.recompute import Recompute, recompute_layers
from megaflow.parallel import collectives
from megaflow.parallel.mesh import ParallelContext
from tests.distributed import run_ranks
from tests.live_bytes import LiveBytes
from tests.tiny import make_batch, tiny_config, tiny_model

KINDS: tuple[Recompute, ...] = ("none", "selective", "full")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
DOCUMENTS = [[40, 24], [64]]


def batch() -> Batch:
    return make_batch(DOCUMENTS, torch.Generator().manual_seed(0))


def results(model: Llama, given: Batch, deferred: bool = False) -> list[Tensor]:
    """Losses and all gradients of a micro-batch."""
    for parameter in model.parameters():
        parameter.grad = None
    objective, losses = model.loss(given)
    if deferred:
        with model.deferred.collect() as jobs:
            objective.backward()
        for job in jobs:
            job.run()
    else:
        objective.backward()
    grads = [parameter.grad for parameter in model.parameters()]
    return [losses, *(grad for grad in grads if grad is not None)]


def differing(model: Llama, given: Batch, deferred: bool = False) -> list[tuple[str, int]]:
    """Kind and interval of the recomputations that change any bit."""
    expected = results(model, given, deferred)
    assert len(expected) == 1 + len(list(model.parameters()))
    wrong = []
    for kind, interval in (("selective", 1), ("selective", 2), ("full", 1), ("full", 2)):
        recompute_layers(model.layers, kind, interval)  # type: ignore[arg-type]
        found = results(model, given, deferred)
        if not all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)):
            wrong.append((kind, interval))
    return wrong


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("deferred", [False, True])
def test_no_bit_changes(dtype: torch.dtype, deferred: bool) -> None:
    config = tiny_config(num_layers=3, tie_embeddings=deferred)
    assert differing(tiny_model(config, dtype=dtype), batch(), deferred) == []


def differing_on_rank(parallel: ParallelConfig) -> list[list[tuple[str, int]]]:
    model = tiny_model(tiny_config(num_layers=3), ParallelContext.create(parallel, "cpu"))
    return [differing(model, batch(), deferred) for deferred in (False, True)]


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_no_bit_changes_over_tensor_parallel_ranks(sequence_parallel: bool) -> None:
    parallel = ParallelConfig(tp=2, sequence_parallel=sequence_parallel)
    assert run_ranks(2, differing_on_rank, parallel) == [[[], []]] * 2


def with_cut_sequences(parallel: ParallelConfig) -> tuple[list[tuple[str, int]], dict[Recompute, int]]:
    """Recomputations that change any bit, and how often keys and values are gathered under each."""
    ctx = ParallelContext.create(parallel, "cpu")
    given = make_batch([[7, 17, 8], [32]], torch.Generator().manual_seed(0))
    cut, model = cut_batch(given, ctx.cp, ctx.cp_rank), tiny_model(tiny_config(num_layers=2), ctx)
    wrong = differing(model, cut)
    gather, gathers = collectives.all_gather, Counter[Recompute]()

    def counted(*args: Any, **kwargs: Any) -> Any:
        gathers[kind] += 1
        return gather(*args, **kwargs)

    collectives.all_gather = counted
    for kind in KINDS:
        recompute_layers(model.layers, kind, 1)
        results(model, cut)
    return wrong, dict(gathers)


def test_no_bit_changes_where_sequences_are_cut() -> None:
    gathers = {"none": 2, "selective": 2, "full": 4}  # by two layers
    assert run_ranks(2, with_cut_sequences, ParallelConfig(cp=2)) == [([], gathers)] * 2


def backward(outputs: tuple[Tensor, Tensor]) -> None:
    """As from the norm that adds a layer's outputs: both get one gradient."""
    grad = torch.ones_like(outputs[1])
    torch.autograd.backward(outputs, [grad, grad])


PRODUCT, ATTENTION = "aten.mm.default", "aten._scaled_dot_product_flash_attention_for_cpu.default"
BACKWARD_CALLS = {"none": (8, 0), "selective": (8, 1), "full": (11, 1)}
"""Matrix products and attentions in the backward pass of a layer: full, all products but the last are made again."""


@pytest.mark.parametrize("deferred", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_computed_twice_that_need_not_be(kind: Recompute, deferred: bool) -> None:
    model = tiny_model()
    recompute_layers(model.layers, kind, 1)
    given = make_batch([[16]], torch.Generator().manual_seed(0))
    layout = model.layout(given)
    outputs = model.layers["0"](torch.randn(16, 1, 32, requires_grad=True), None, layout)
    with LiveBytes() as live:
        if deferred:
            with model.deferred.collect() as jobs:
                backward(outputs)
            for job in jobs:
                job.run()
        else:
            backward(outputs)
    assert (live.calls.count(PRODUCT), live.calls.count(ATTENTION)) == BACKWARD_CALLS[kind]


def test_jobs_hold_no_more_than_without_recomputation() -> None:
    """Of each product its input and the gradient of its output: less than what makes the input again."""
    holding = {}
    for kind in KINDS:
        model = tiny_model()
        recompute_layers(model.layers, kind, 1)
        layout = model.layout(make_batch([[64], [64]], torch.Generator().manual_seed(0)))
        leaf = torch.randn(64, 2, 32, requires_grad=True)
        with LiveBytes() as live, model.deferred.collect() as jobs:
            outputs = model.layers["0"](leaf * 1, None, layout)
            backward(outputs)
            del outputs
            leaf.grad = None
            model.zero_grad()
            holding[kind] = live.now
            assert len(jobs) == 4
    # of qkv, out, gate_up and down
    inputs, gradients = 32 + 32 + 32 + 48, 64 + 32 + 96 + 32
    assert holding == dict.fromkeys(KINDS, 4 * 64 * 2 * (inputs + gradients))


def test_interval_counts_layers_by_their_global_number() -> None:
    model = tiny_model(tiny_config(num_layers=5))
    for number in ("0", "3"):  # as a pipeline stage would
        del model.layers[number]
    recompute_layers(model.layers, "full", 2)
    assert {name: layer.recompute for name, layer in model.layers.items()} == {"1": "none", "2": "full", "4": "full"}


@pytest.fixture(autouse=True)
def _short_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU the norms take rows in blocks, which shall be small beside these tensors."""
    monkeypatch.setattr(backend, "CACHED_NUMBERS", 4096)


SHAPES = {
    "multi-head": {"num_kv_heads": 8},
    "grouped": {"num_kv_heads": 2},
    "narrow heads": {"num_heads": 16, "num_kv_heads": 16},
    "wide": {"hidden_size": 48, "num_heads": 4, "num_kv_heads": 4, "intermediate_size": 192},
}


def held(
    config: ModelConfig, ctx: ParallelContext, kind: Recompute, dtype: torch.dtype = torch.float32
) -> ActivationBytes:
    """What a layer holds for the backward pass, and what that needs beside it, as tensors show it.

    Of 4096 tokens, so that weight gradients are small beside those of activations.
    """
    model = tiny_model(config, ctx, dtype)
    recompute_layers(model.layers, kind, 1)
    given = make_batch([[256] * 8] * 2, torch.Generator().manual_seed(0))
    layout = Layout.of(config, given.positions, given.cu_seqlens, given.max_seqlen)
    rows = 2048 // (ctx.tp if ctx.sequence_parallel else 1)
    leaf = torch.randn(rows, 2, config.hidden_size, dtype=dtype, requires_grad=True)
    with LiveBytes() as live:
        outputs = model.layers["0"](leaf * 1, None, layout)  # an input that nobody else holds
        passed_on = outputs[1].nbytes * (2 if kind == "full" else 1)  # else the first is kept by the second norm
        kept = live.now - passed_on
        live.peak = 0
        backward(outputs)
    return ActivationBytes(kept, live.peak - kept - passed_on)


def check(found: ActivationBytes, predicted: ActivationBytes) -> None:
    assert found.kept == pytest.approx(predicted.kept, rel=0.01)
    assert sum(found) == pytest.approx(sum(predicted), rel=0.05)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_layer_holds_what_is_predicted(shape: str, kind: Recompute, precision: Literal["fp32", "bf16"]) -> None:
    config = tiny_config(**({"intermediate_size": 86} | SHAPES[shape]))
    found = held(config, ParallelContext.single(), kind, DTYPES[precision])
    check(found, activation_bytes(config, 4096, recompute=kind, precision=precision, attention="sdpa"))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("tp", "sequence_parallel"), [(2, False), (2, True), (4, False), (4, True)])
def test_a_cut_layer_holds_what_is_predicted(
    tp: int,
    sequence_parallel: bool,
    kind: Recompute,
    precision: Literal["fp32", "bf16"],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One rank of several, alone: the others' parts are whatever was in memory."""
    for module, name in ((dist, "all_reduce"), (collectives, "all_gather"), (collectives, "reduce_scatter")):
        monkeypatch.setattr(module, name, lambda *tensors, **_: None)
    ctx = ParallelContext(
        torch.device("cpu"), tp=tp, sequence_parallel=sequence_parallel, groups={"tp": cast(dist.ProcessGroup, None)}
    )
    config = tiny_config(intermediate_size=96)
    predicted = activation_bytes(
        config,
        4096,
        tp=tp,
        sequence_parallel=sequence_parallel,
        recompute=kind,
        precision=precision,
        attention="sdpa",
    )
    check(held(config, ctx, kind, DTYPES[precision]), predicted)
