"""How many bytes of tensors exist, counted by following every storage that an operation makes until it is freed."""

from __future__ import annotations

import weakref
from typing import Any

import torch._dynamo  # noqa: F401 - the mode would import it, for seconds, in every forked rank
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts, while it is entered, the storages of tensors that operations make; those made before do not count."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        """The most since the start, or since it was last set to `now`."""
        self.calls: list[str] = []
        """Every operation that ran, for example `aten.mm.default`."""
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.calls.append(str(func))
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for storage in (x.untyped_storage() for x in tree_leaves(out) if isinstance(x, Tensor)):
            key = storage._cdata
            if key not in given and key not in self._sizes:
                self._sizes[key] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._freed, key)
        return out

    def _freed(self, key: int) -> None:
        self.now -= self._sizes.pop(key)
