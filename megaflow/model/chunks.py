"""The model cut along its depth: which layers each chunk of a pipeline has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megaflow.config import ModelConfig
from megaflow.config_parallel import ParallelConfig
from megaflow.model.flops import head_flops, layer_flops
from megaflow.parallel.schedule import chunk_owners


@dataclass(frozen=True)
class Chunk:
    """Consecutive layers; the first chunk has the embedding too, the last one the final norm and the output head."""

    embed: bool
    layers: range
    """May be empty."""
    head: bool


Chunks = Mapping[int, Chunk]
"""The chunks that a rank holds, by their number in the model, in order."""


def whole_model(config: ModelConfig) -> Chunks:
    """All of the model as one chunk."""
    return {0: Chunk(True, range(config.num_layers), True)}


def chunks_of(config: ModelConfig, parallel: ParallelConfig, seq_length: int, pp_rank: int) -> Chunks:
    """The chunks that the schedule gives to a pipeline rank."""
    owners = chunk_owners(parallel.schedule, parallel.pp, parallel.chunks_per_rank)
    edges = [0]
    for layers in layers_per_chunk(config, parallel, seq_length):
        edges.append(edges[-1] + layers)
    last = len(owners) - 1
    return {
        number: Chunk(number == 0, range(edges[number], edges[number + 1]), number == last)
        for number, owner in enumerate(owners)
        if owner == pp_rank
    }


def layers_per_chunk(config: ModelConfig, parallel: ParallelConfig, seq_length: int) -> list[int]:
    """Layers of every chunk: those of the config, or such that the most expensive chunk costs least.

    The last chunk's output head counts with the layers' worth of operations that it takes; the embedding, which is
    looked up, counts nothing. What is left over goes to the later chunks: the first one has the embedding, and its rank
    holds the most activations.
    """
    if parallel.layers_per_chunk is not None:
        return parallel.layers_per_chunk
    total, others = config.num_layers, parallel.num_chunks - 1
    if others == 0:
        return [total]
    layer, head = layer_flops(config, seq_length), head_flops(config)

    def most(last: int) -> int:
        return max(-(-(total - last) // others) * layer, last * layer + head)

    last = min(reversed(range(total + 1)), key=most)
    each, more = divmod(total - last, others)
    return [each + (number >= others - more) for number in range(others)] + [last]
