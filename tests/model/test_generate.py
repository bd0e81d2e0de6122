"""Generation with the cache equals generation without it, on one rank and on two."""

from __future__ import annotations

import pytest
import torch

from megaflow.config_parallel import ParallelConfig
from megaflow.model.generate import Sampling, choose, generate
from megaflow.model.llama import Llama
from megaflow.parallel.mesh import ParallelContext
from tests.distributed import run_ranks
from tests.tiny import tiny_model

PROMPT = [3, 141, 59, 26, 53]


def without_cache(model: Llama, prompt: list[int], max_tokens: int) -> list[int]:
    ids = list(prompt)
    for _ in range(max_tokens):
        edges = torch.tensor([0, len(ids)], dtype=torch.int32)
        logits = model.logits(torch.tensor([ids]), torch.arange(len(ids))[None], edges, len(ids))
        ids.append(int(logits[0, -1].argmax()))
    return ids[len(prompt) :]


def test_greedy_with_the_cache_equals_greedy_without() -> None:
    model = tiny_model()
    expected = without_cache(model, PROMPT, 20)
    assert len(set(expected)) > 5
    assert list(generate(model, PROMPT, 20, eos_id=None)) == expected
    assert list(generate(model, PROMPT[:1], 3, eos_id=None)) == without_cache(model, PROMPT[:1], 3)


def generate_on_rank(sequence_parallel: bool, sampling: Sampling) -> list[int]:
    ctx = ParallelContext.create(ParallelConfig(tp=2, sequence_parallel=sequence_parallel), "cpu")
    return list(generate(tiny_model(ctx=ctx), PROMPT, 20, None, sampling))


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.8, top_p=0.9, seed=4)])
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_two_ranks_generate_what_one_does(sequence_parallel: bool, sampling: Sampling) -> None:
    expected = list(generate(tiny_model(), PROMPT, 20, None, sampling))
    assert run_ranks(2, generate_on_rank, sequence_parallel, sampling) == [expected, expected]


def test_eos_ends_and_is_not_yielded() -> None:
    ids = list(generate(tiny_model(), PROMPT, 20, eos_id=None))
    stop = next(i for i in range(3, 20) if ids[i] not in ids[:i])
    assert list(generate(tiny_model(), PROMPT, 20, eos_id=ids[stop])) == ids[:stop]


def test_seed_decides_the_draw() -> None:
    def drawn(seed: int) -> list[int]:
        return list(generate(tiny_model(), PROMPT, 12, None, Sampling(temperature=1.0, seed=seed)))

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)


def test_top_p_keeps_the_likeliest_tokens_that_reach_it() -> None:
    logits = torch.tensor([0.1, 0.4, 0.2, 0.3]).log()
    generator = torch.Generator().manual_seed(0)

    def drawn(top_p: float) -> set[int]:
        return {choose(logits, Sampling(1.0, top_p), generator) for _ in range(200)}

    assert drawn(0.3) == {1}
    assert drawn(0.6) == {1, 3}
    assert drawn(0.75) == {1, 2, 3}
    assert drawn(1.0) == {0, 1, 2, 3}


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="no tokens"):
        next(generate(tiny_model(), [], 4, None))
