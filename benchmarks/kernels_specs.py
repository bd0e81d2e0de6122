"""What `kernels.py` measures, in the order of importance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch

from benchmarks import kernels_attention as attentions
from benchmarks import kernels_floors as floors
from benchmarks import kernels_losses as losses
from benchmarks import kernels_ops as operations
from benchmarks import kernels_optimizer as optimizers
from benchmarks.kernels_floors import Work
from benchmarks.kernels_problem import Model, Problem

PARTS = 8
"""The optimizer's rows are measured on this part of the model's parameters."""


@dataclass(frozen=True)
class Sizes:
    """What is measured."""

    models: tuple[Model, ...] = (Model("7B", 4096, 32, 11008), Model("13B", 5120, 40, 13824))
    vocabularies: tuple[int, ...] = (32000, 55296)
    tensors: int = 32
    length: int = floors.PARAMETERS // PARTS // 32
    """Of the optimizer's tensors."""
    seconds: float = 0.1
    """Of measuring, a phase of a contender."""


TINY = Model("7B", 64, 4, 96, sequences=2, seq_length=32)
REHEARSAL = Sizes((TINY, replace(TINY, name="13B", hidden=80, heads=5)), (96, 160), 3, 50, 0.002)


class Spec(NamedTuple):
    """A problem before its tensors are made."""

    name: str
    works: dict[str, Work]
    """Of each phase."""
    build: Callable[[torch.device], Problem]
    slow_peers: bool = True
    """Whether there are contenders that compile for many seconds."""


def specs(sizes: Sizes) -> list[Spec]:
    """All problems, the most important first."""
    first, *others = sizes.models
    small, *large = sizes.vocabularies
    found = [*_attention(first), _linear(first, small), *_elementwise(first, small), *_optimizer(sizes)]
    for vocabulary in sizes.vocabularies:
        found.append(_loss(first.tokens, vocabulary))
        found += [_linear(first, vocabulary)] if vocabulary in large else []
    for vocabulary in sizes.vocabularies:
        found += [_shard(first.tokens, vocabulary, tp) for tp in (2, 8)]
    for model in others:
        found += _attention(model) + _elementwise(model, small)
        found += [_linear(model, vocabulary) for vocabulary in sizes.vocabularies]
    return found


def _attention(model: Model) -> list[Spec]:
    cases = {"causal": attentions.whole_sequences, "packed documents": attentions.packed_documents}
    return [
        Spec(
            f"attention, {name}, {model.name}",
            floors.attention(lengths(model), model.heads, model.head_dim),
            partial(attentions.attention, model, lengths),
        )
        for name, lengths in cases.items()
    ]


def _elementwise(model: Model, vocabulary: int) -> list[Spec]:
    builders: dict[str, Callable[..., Problem]] = {
        "rms_norm, residual": operations.added_rms_norm,
        "swiglu": operations.swiglu,
        "rotary in place": operations.rotary,
        "rms_norm": operations.rms_norm,
        "embedding": partial(operations.embedding, vocabulary=vocabulary),
    }
    works = operations.works(model, vocabulary)
    return [
        Spec(f"{name}, {model.name}", works[name], partial(build, model), name != "embedding")
        for name, build in builders.items()
    ]


def _linear(model: Model, vocabulary: int) -> Spec:
    work = floors.linear_cross_entropy(model.tokens, model.hidden, vocabulary)
    name = f"linear + cross-entropy, V {vocabulary}, {model.name}"
    return Spec(name, work, partial(losses.linear_cross_entropy, model, vocabulary))


def _loss(tokens: int, vocabulary: int) -> Spec:
    work = floors.cross_entropy(tokens, vocabulary)
    return Spec(f"cross-entropy in place, V {vocabulary}", work, partial(losses.cross_entropy, tokens, vocabulary))


def _shard(tokens: int, vocabulary: int, tp: int) -> Spec:
    columns = vocabulary // tp
    work = floors.shard_cross_entropy(tokens, columns)
    name = f"vocabulary-parallel cross-entropy, V {vocabulary}, tp {tp}"
    return Spec(name, work, partial(losses.shard_cross_entropy, tokens, columns, tp), slow_peers=False)


def _optimizer(sizes: Sizes) -> list[Spec]:
    count, length = sizes.tensors, sizes.length
    found = [
        Spec(
            f"adamw, {'int16 remainder' if remainder else 'fp32 master'}",
            floors.adamw(count * length, remainder),
            partial(optimizers.adamw, count, length, remainder),
            slow_peers=False,
        )
        for remainder in (False, True)
    ]
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        work = floors.squared_norm(count * length, dtype.itemsize)
        build = partial(optimizers.squared_norm, count, length, dtype)
        found.append(Spec(f"gradient norm, {name}", work, build, slow_peers=False))
    return found
