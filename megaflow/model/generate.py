"""Generation of text from one prompt: the prompt in one pass, then one token at a time with a key-value cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megaflow.kernels.attention import cached_attention
from megaflow.model.llama import Attention, Llama


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen."""

    temperature: float = 0.0
    """Divides the logits; 0 takes the likeliest token."""
    top_p: float = 1.0
    """Only the likeliest tokens that together reach this probability (Holtzman et al., 2020)."""
    seed: int = 0


class KeyValueCache:
    """Keys and values of one sequence, per attention layer `[capacity, kv_heads, head_dim]`."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0
        """Tokens of finished passes; a pass adds its own when it ends, through `advance`."""
        self.store: dict[Attention, tuple[Tensor, Tensor]] = {}

    def attend(self, layer: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Remember k and v of the new tokens and attend to all, old and new; `[n, heads, head_dim]` as q."""
        if layer not in self.store:
            self.store[layer] = (k.new_empty(self.capacity, *k.shape[1:]), v.new_empty(self.capacity, *v.shape[1:]))
        keys, values = self.store[layer]
        end = self.length + k.shape[0]
        keys[self.length : end] = k
        values[self.length : end] = v
        return cached_attention(q, keys[:end], values[:end])

    def advance(self, tokens: int) -> None:
        """End a pass over `tokens` new tokens."""
        self.length += tokens


@torch.no_grad()
def generate(
    model: Llama,
    prompt: Sequence[int],
    max_tokens: int,
    eos_id: int | None,
    sampling: Sampling | None = None,
    vocab_size: int | None = None,
) -> Iterator[int]:
    """Yield up to `max_tokens` ids that follow the ids of the prompt; `eos_id` ends them and is not yielded.

    `vocab_size`: the tokenizer's, where the model has more rows than it has pieces.
    With tensor parallelism every rank must iterate, and every rank gets the same ids.

    Raises:
        ValueError: for an empty prompt.
    """
    if not prompt:
        raise ValueError("the prompt has no tokens")
    model = model.without_sequence_parallel()
    device = model.embed.weight.device
    sampling = sampling or Sampling()
    generator = torch.Generator().manual_seed(sampling.seed)
    cache = KeyValueCache(len(prompt) + max_tokens)
    new = list(prompt)
    for _ in range(max_tokens):
        count = len(new)
        tokens = torch.tensor([new], device=device)
        positions = torch.arange(cache.length, cache.length + count, device=device)[None]
        edges = torch.tensor([0, count], dtype=torch.int32, device=device)
        logits = model.logits(tokens, positions, edges, count, cache)[0, -1, :vocab_size]
        cache.advance(count)
        token = choose(logits, sampling, generator)
        if token == eos_id:
            return
        yield token
        new = [token]


def choose(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """The next token's id from its logits `[V]`, drawn on the CPU so that it is the same on every device and rank."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    logits = logits.double().cpu()
    probabilities = ((logits - logits.max()) / sampling.temperature).softmax(0)
    likeliest, ids = probabilities.sort(descending=True, stable=True)
    before = likeliest.cumsum(0) - likeliest
    likeliest[1:] *= before[1:] < sampling.top_p
    return int(ids[torch.multinomial(likeliest, 1, generator=generator)])
