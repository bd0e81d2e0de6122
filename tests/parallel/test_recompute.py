"""Recomputation changes no bit, keeps what it says and computes nothing twice that it need not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import pytest
import torch
from torch import Tensor

from megaflow.config import ModelConfig
from megaflow.config_parallel import ParallelConfig
from megaflow.data.loader import Batch
from megaflow.model.llama import Layer, Layout, Llama
from megaflow.model.memory import activation_bytes
from megaflow.model.recompute import Recompute, recompute_layers
from megaflow.parallel.mesh import ParallelContext
from tests.distributed import run_ranks
from tests.live_bytes import LiveBytes
from tests.tiny import make_batch, tiny_config, tiny_model

KINDS: tuple[Recompute, ...] = ("none", "selective", "full")
DOCUMENTS = [[40, 24], [64]]


def batch() -> Batch:
    return make_batch(DOCUMENTS, torch.Generator().manual_seed(0))


def results(model: Llama, given: Batch, deferred: bool = False) -> list[Tensor]:
    """Losses and all gradients of a micro-batch."""
    for parameter in model.parameters():
        parameter.grad = None
    losses = model.loss(given)
    if deferred:
        with model.deferred.collect() as jobs:
            losses.sum().backward()
        for job in jobs:
            job.run()
    else:
        losses.sum().backward()
    grads = [parameter.grad for parameter in model.parameters()]
    return [losses.detach(), *(grad for grad in grads if grad is not None)]


def differing(model: Llama, given: Batch, deferred: bool = False) -> list[tuple[str, int]]:
    """Kind and interval of the recomputations that change any bit."""
    expected = results(model, given)
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


def test_interval_counts_layers_by_their_global_number() -> None:
    model = tiny_model(tiny_config(num_layers=5))
    for number in ("0", "3"):  # as a pipeline stage would
        del model.layers[number]
    recompute_layers(model.layers, "full", 2)
    assert {name: layer.recompute for name, layer in model.layers.items()} == {"1": "none", "2": "full", "4": "full"}


def layer_of(config: ModelConfig, dtype: torch.dtype, kind: Recompute) -> tuple[Layer, Callable[[], Tensor]]:
    """A layer, and what runs it on an input that nobody else holds."""
    model = tiny_model(config, dtype=dtype)
    recompute_layers(model.layers, kind, 1)
    layer, given = model.layers["0"], batch()
    assert isinstance(layer, Layer)
    layout = Layout.of(config, given.positions, given.cu_seqlens, given.max_seqlen)
    leaf = torch.randn(64, 2, config.hidden_size, dtype=dtype, requires_grad=True)
    return layer, lambda: layer(leaf * 1, layout, None)


SHAPES = {
    "multi-head": {"num_kv_heads": 8},
    "grouped": {"num_kv_heads": 2},
    "narrow heads": {"num_heads": 16, "num_kv_heads": 16},
    "wide": {"hidden_size": 96, "intermediate_size": 256},
}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_layer_keeps_what_is_predicted(shape: str, kind: Recompute, precision: Literal["fp32", "bf16"]) -> None:
    config = tiny_config(**({"hidden_size": 64, "intermediate_size": 160} | SHAPES[shape]))
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    _, run = layer_of(config, dtype, kind)
    with LiveBytes() as live:
        out = run()
        kept = live.now - out.nbytes
    predicted = activation_bytes(config, 128, recompute=kind, precision=precision, attention="sdpa")
    assert kept == pytest.approx(predicted.kept, rel=0.05)
