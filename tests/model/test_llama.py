"""The model against transformers' LlamaForCausalLM with the same weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from megaflow.config import ModelConfig
from megaflow.kernels.dispatch import select_ops
from megaflow.model.init import load_hf_weights
from megaflow.model.llama import Llama
from megaflow.model.placement import placement
from megaflow.parallel.mesh import ParallelContext
from tests.kernels.interpreter import interpreted, triton_ops
from tests.tiny import make_batch, tiny_config, tiny_model

SHAPES = {
    "multi-head": tiny_config(num_kv_heads=8),
    "grouped": tiny_config(),
    "one-kv-head": tiny_config(num_kv_heads=1, rope_theta=5e5, norm_eps=1e-6),
    "tied": tiny_config(tie_embeddings=True),
}


def oracle(config: ModelConfig) -> LlamaForCausalLM:
    torch.manual_seed(1)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            vocab_size=config.vocab_size,
            rms_norm_eps=config.norm_eps,
            rope_theta=config.rope_theta,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            tie_word_embeddings=config.tie_embeddings,
            initializer_range=0.2,
            attn_implementation="eager",
        )
    )


@pytest.fixture(params=[*((shape, "torch") for shape in SHAPES), ("grouped", "triton"), ("tied", "triton")])
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Llama, LlamaForCausalLM]]:
    """Ours on plain torch or on the Triton kernels, which are interpreted, and theirs with the same weights."""
    shape, kernels = request.param
    config = SHAPES[shape]
    theirs = oracle(config)
    theirs.save_pretrained(tmp_path, safe_serialization=True)
    ops = triton_ops() if kernels == "triton" else select_ops("cpu", torch.float32)
    ours = Llama(config, ParallelContext.single(), ops)
    load_hf_weights(ours, tmp_path)
    with interpreted() if kernels == "triton" else nullcontext():
        yield ours, theirs


def relative(out: torch.Tensor, expected: torch.Tensor) -> float:
    return float((out.detach() - expected.detach()).norm() / expected.detach().norm())


def test_logits_equal_transformers(pair: tuple[Llama, LlamaForCausalLM]) -> None:
    ours, theirs = pair
    batch = make_batch([[24], [24], [24]], torch.Generator().manual_seed(0))
    out = ours.logits(batch.tokens, batch.positions, batch.cu_seqlens, batch.max_seqlen)
    assert out.shape == (3, 24, 199)
    assert relative(out, theirs(batch.tokens).logits) < 1e-5


def test_loss_and_gradients_equal_transformers(pair: tuple[Llama, LlamaForCausalLM]) -> None:
    ours, theirs = pair
    batch = make_batch([[24], [24]], torch.Generator().manual_seed(0))
    objective, losses = ours.loss(batch)
    objective.backward()
    logits = theirs(batch.tokens).logits
    expected = F.cross_entropy(logits.transpose(1, 2), batch.labels.long(), reduction="none")
    expected.sum().backward()
    assert relative(losses, expected) < 1e-5

    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    for parameter, pieces in placement(ours.config, ours.ctx).items():
        for piece in pieces:
            grad = dict(ours.named_parameters())[parameter].grad
            assert grad is not None
            assert relative(grad[piece.local_slices()], gradients[piece.name]) < 1e-5, piece.name


def test_packed_documents_equal_documents_alone(pair: tuple[Llama, LlamaForCausalLM]) -> None:
    ours, theirs = pair
    rows = [[5, 1, 18], [24], [2, 2, 20]]
    batch = make_batch(rows, torch.Generator().manual_seed(0))
    packed = ours.logits(batch.tokens, batch.positions, batch.cu_seqlens, batch.max_seqlen)
    for tokens, logits, lengths in zip(batch.tokens, packed, rows, strict=True):
        for document, out in zip(tokens.split(lengths), logits.split(lengths), strict=True):
            assert relative(out, theirs(document[None]).logits[0]) < 1e-5


def test_bf16_follows_fp32() -> None:
    batch = make_batch([[10, 6]], torch.Generator().manual_seed(0))
    wide, narrow = tiny_model(tiny_config(init_std=0.05)), tiny_model(tiny_config(init_std=0.05), dtype=torch.bfloat16)
    objective, losses = narrow.loss(batch)
    objective.backward()
    assert losses.dtype == torch.float32
    assert relative(losses, wide.loss(batch).losses) < 5e-3
    assert all(p.grad is not None and p.grad.isfinite().all() for p in narrow.parameters())


def test_a_layer_more_needs_new_names_only() -> None:
    shallow, deep = (dict(tiny_model(tiny_config(num_layers=n)).named_parameters()) for n in (2, 3))
    assert set(deep) - set(shallow) == {name for name in deep if name.startswith("layers.2.")}
