"""Where the model is cut along its depth, and that its chunks are the whole of it."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch

from megaflow.config import ModelConfig
from megaflow.config_parallel import ParallelConfig
from megaflow.kernels.dispatch import select_ops
from megaflow.model.chunks import chunks_of, layers_per_chunk, whole_model
from megaflow.model.flops import flops_per_token, head_flops, layer_flops
from megaflow.model.llama import Llama
from megaflow.model.placement import placement
from megaflow.parallel.mesh import ParallelContext
from tests.tiny import tiny_config

SEVEN_B = ModelConfig(hidden_size=4096, intermediate_size=11008, num_layers=32, num_heads=32, vocab_size=32000)


@pytest.mark.parametrize(
    ("vocab", "pp", "expected"),
    [
        (32000, 1, [32]),
        (32000, 2, [16, 16]),  # the head costs less than a layer
        (32000, 4, [8, 8, 8, 8]),
        (128256, 4, [8, 9, 9, 6]),  # here as much as two and a half
        (32000, 5, [6, 6, 7, 7, 6]),
    ],
)
def test_layers_are_cut_so_that_the_dearest_chunk_costs_least(vocab: int, pp: int, expected: list[int]) -> None:
    config = SEVEN_B.model_copy(update={"vocab_size": vocab})
    assert layers_per_chunk(config, ParallelConfig(pp=pp), 4096) == expected


@pytest.mark.parametrize("vocab", [64, 1000, 4000, 9000])
def test_no_other_cut_is_better(vocab: int) -> None:
    config, parallel = tiny_config(num_layers=7, vocab_size=vocab), ParallelConfig(pp=3)

    def dearest(cut: tuple[int, ...]) -> int:
        layer, head = layer_flops(config, 16), head_flops(config)
        return max(*(count * layer for count in cut[:-1]), cut[-1] * layer + head)

    ours = tuple(layers_per_chunk(config, parallel, 16))
    cuts = [cut for cut in itertools.product(range(8), repeat=3) if sum(cut) == 7]
    assert ours in cuts
    assert dearest(ours) == min(map(dearest, cuts))


def test_costs_are_those_of_the_whole_model() -> None:
    forward = 32 * layer_flops(SEVEN_B, 4096) + head_flops(SEVEN_B)
    assert 3 * forward == flops_per_token(SEVEN_B, 4096, causal=True)


def test_given_layers_are_taken() -> None:
    parallel = ParallelConfig(pp=2, schedule="zb_v", layers_per_chunk=[1, 3, 0, 0])
    first, second = (chunks_of(tiny_config(num_layers=4), parallel, 16, rank) for rank in (0, 1))
    assert {number: list(chunk.layers) for number, chunk in first.items()} == {0: [0], 3: []}
    assert {number: list(chunk.layers) for number, chunk in second.items()} == {1: [1, 2, 3], 2: []}
    assert (first[0].embed, first[0].head, first[3].embed, first[3].head) == (True, False, False, True)


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("schedule", ["1f1b", "interleaved", "zb_v"])
def test_ranks_share_out_the_whole_model(schedule: str, tie: bool) -> None:
    config = tiny_config(num_layers=5, tie_embeddings=tie)
    parallel = ParallelConfig.model_validate({"pp": 2, "schedule": schedule})
    ctx, ops = ParallelContext.single(), select_ops("cpu", torch.float32)
    held: Counter[str] = Counter()
    for rank in (0, 1):
        chunks = chunks_of(config, parallel, 16, rank)
        model, table = Llama(config, ctx, ops, chunks=chunks), placement(config, ctx, chunks)
        assert set(table) == {name for name, _ in model.named_parameters()}
        held.update(piece.name for pieces in table.values() for piece in pieces)
    whole = {piece.name for pieces in placement(config, ctx, whole_model(config)).values() for piece in pieces}
    assert set(held) == whole
    # only a tied embedding is held twice, where the first and the last chunk are apart
    apart = {"model.embed_tokens.weight"} if tie and schedule != "zb_v" else set()
    assert {name for name, times in held.items() if times > 1} == apart
