"""Models and batches small enough for tests of many layouts."""

from __future__ import annotations

from typing import Any

import torch

from megaflow.config import ModelConfig
from megaflow.data.loader import Batch
from megaflow.kernels.dispatch import select_ops
from megaflow.model.init import initialise
from megaflow.model.llama import Llama
from megaflow.parallel.mesh import ParallelContext


def tiny_config(**changes: Any) -> ModelConfig:
    """Two layers with grouped heads that tp 1, 2 and 4 divide, and a vocabulary that nothing divides."""
    shape = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_layers": 2,
        "num_heads": 8,
        "num_kv_heads": 4,
        "vocab_size": 199,
        "init_std": 0.2,
    }
    return ModelConfig(**(shape | changes))


def tiny_model(
    config: ModelConfig | None = None, ctx: ParallelContext | None = None, dtype: torch.dtype = torch.float32
) -> Llama:
    """An initialised model; the same weights in every layout."""
    model = Llama(config or tiny_config(), ctx or ParallelContext.single(), select_ops("cpu", dtype), dtype)
    initialise(model, seed=7)
    return model


def make_batch(rows: list[list[int]], generator: torch.Generator, vocab: int = 199, masked: float = 0.2) -> Batch:
    """Random tokens in documents of the given lengths, row by row; a share of the labels carries no loss."""
    lengths = torch.tensor([length for row in rows for length in row])
    shape = (len(rows), sum(rows[0]))
    labels = torch.randint(vocab, shape, generator=generator)
    labels[torch.rand(shape, generator=generator) < masked] = -100
    return Batch(
        tokens=torch.randint(vocab, shape, generator=generator),
        labels=labels,
        positions=torch.cat([torch.arange(int(length)) for length in lengths]).view(shape),
        cu_seqlens=torch.cat((torch.zeros(1, dtype=torch.int64), lengths.cumsum(0))).int(),
        max_seqlen=int(lengths.max()),
        sources=torch.zeros(len(rows), dtype=torch.int64),
        cards=[(i, 0, i) for i in range(len(rows))],
    )
