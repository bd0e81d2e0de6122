"""Parameters and operations against published figures and against the model itself."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megaflow.config import ModelConfig
from megaflow.kernels.dispatch import select_ops
from megaflow.model.flops import flops_per_token, num_parameters
from megaflow.model.llama import Llama
from megaflow.parallel.mesh import ParallelContext
from tests.tiny import make_batch, tiny_config, tiny_model

SEVEN_B = ModelConfig(hidden_size=4096, intermediate_size=11008, num_layers=32, num_heads=32, vocab_size=32000)
SEVENTY_B = ModelConfig(
    hidden_size=8192, intermediate_size=28672, num_layers=80, num_heads=64, num_kv_heads=8, vocab_size=32000
)


def test_parameters_of_llama_2() -> None:
    assert num_parameters(SEVEN_B) == 6_738_415_616
    assert num_parameters(SEVENTY_B) == 68_976_648_192


@pytest.mark.parametrize("tie", [False, True])
def test_parameters_of_a_model(tie: bool) -> None:
    config = tiny_config(vocab_size=192, tie_embeddings=tie)  # three times 64: no padding
    assert num_parameters(config) == sum(p.numel() for p in tiny_model(config).parameters())


def test_operations_of_llama_2() -> None:
    assert flops_per_token(SEVEN_B, 4096, causal=False) / 1e9 == pytest.approx(46.9, abs=0.05)
    assert flops_per_token(SEVEN_B, 4096, causal=True) / 1e9 == pytest.approx(42.9, abs=0.05)


def test_operations_of_a_model() -> None:
    """Counted while it runs on an explicit mask, where all of the attention is computed."""
    config = tiny_config(vocab_size=192)
    model = Llama(config, ParallelContext.single(), select_ops("cpu", torch.float32, {"attention": "reference"}))
    with FlopCounterMode(display=False) as counter:
        model.loss(make_batch([[32]], torch.Generator().manual_seed(0), vocab=192)).objective.backward()
    masked_half = 6 * config.num_layers * config.hidden_size * 32
    assert counter.get_total_flops() == 32 * (flops_per_token(config, 32, causal=True) + masked_half)
