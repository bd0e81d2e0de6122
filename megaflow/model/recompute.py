"""Activation recomputation (Chen et al., arXiv 1604.06174; selective after Korthikanti et al., arXiv 2205.05198).

A layer is a chain of `then(function(x))`, where `function` is cheap for what it makes and `then` is a linear layer,
which keeps its input for the weight gradient. `recomputed` keeps x alone: what autograd would keep of `function`, and
`function`'s result where `then` keeps it, is made again when the backward pass first asks for it. Where `function`
keeps nothing but its input, `remade` does so for a result that is there already. `then` never runs twice, nor its
collectives. The graph is that of the plain call, so gradients are equal to the last bit.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

Recompute = Literal["none", "selective", "full"]


def recompute_layers(layers: nn.ModuleDict, kind: Recompute, interval: int) -> None:
    """Lets every `interval`-th of a model's layers, by global number from 0, recompute activations from now on.

    full: only a layer's input `[S, B, H]` is kept. selective: its input, that of its second norm, and the results of
    its column-parallel products; computed again are the normalised inputs, attention and SwiGLU.
    """
    layer: Any
    for number, layer in layers.items():
        layer.recompute = kind if int(number) % interval == 0 else "none"


def remade(make: Callable[[], Tensor], result: Tensor, then: Callable[[Tensor], Tensor]) -> Tensor:
    """`then(result)`, for which the backward pass calls `make` to have the result again instead of keeping it."""
    place = _place(result)
    hooks = saved_tensors_hooks(
        lambda tensor: make if _place(tensor) == place else tensor, lambda kept: kept() if callable(kept) else kept
    )
    with hooks:
        return then(result)


def recomputed(
    function: Callable[..., Tensor | tuple[Tensor, ...]],
    then: Callable[..., Any],
    *inputs: Tensor,
    make: Callable[[], tuple[Tensor, ...]] | None = None,
) -> Any:
    """`then(function(*inputs))` of which the inputs, and what `then` keeps of its own, are kept for the backward pass.

    `function` may give several tensors, which are `then`'s arguments. It must give the same at every call, may not
    draw random numbers and may not change its inputs, nor `then` its own. make: gives the inputs again, which are not
    kept then.
    """
    if not torch.is_grad_enabled():
        return then(*_tuple(function(*inputs)))
    again = _Again(function, inputs, make)
    numbers = itertools.count()
    with saved_tensors_hooks(lambda tensor: next(numbers), again.take):
        results = _tuple(function(*inputs))

    places = {_place(result): ~i for i, result in enumerate(results)}

    def pack(tensor: Tensor) -> Tensor | int:
        if (number := places.get(_place(tensor))) is None:
            return tensor
        again.results.add(number)
        return number

    with saved_tensors_hooks(pack, lambda kept: again.take(kept) if isinstance(kept, int) else kept):
        return then(*results)


class _Again:
    """The tensors of one call: autograd's by their number, counted from 0, the results as -1, -2, ..."""

    def __init__(
        self,
        function: Callable[..., Any],
        inputs: tuple[Tensor, ...],
        make: Callable[[], tuple[Tensor, ...]] | None,
    ) -> None:
        kept = tuple(x.detach() for x in inputs)
        self.function, self.make = function, make or (lambda: kept)
        self.gradients = [x.requires_grad for x in inputs]
        self.results: set[int] = set()
        """Those that are wanted."""
        self.tensors: dict[int, Tensor] = {}

    def take(self, number: int) -> Tensor:
        """Gives a tensor away; the first call, and one for a tensor that is gone, computes all of them."""
        if number not in self.tensors:
            saved: list[Tensor] = []
            # detached, because this second graph is for nothing but what it saves
            hooks = saved_tensors_hooks(lambda tensor: saved.append(tensor.detach()), lambda kept: kept)
            inputs = [x.detach().requires_grad_(g) for x, g in zip(self.make(), self.gradients, strict=True)]
            with torch.enable_grad(), hooks:
                results = _tuple(self.function(*inputs))
            self.tensors = dict(enumerate(saved)) | {i: results[~i].detach() for i in self.results}
        return self.tensors.pop(number)


def _tuple(results: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (results,) if isinstance(results, Tensor) else results


def _place(tensor: Tensor) -> tuple[int, torch.Size, tuple[int, ...]]:
    """Equal for two tensors alive that are the same elements in the same order."""
    return tensor.data_ptr(), tensor.shape, tensor.stride()
