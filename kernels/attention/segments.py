"""Which queries of a micro-batch see which keys.

The tokens of a micro-batch of B sequences lie one sequence after the other, in segments: `cu_seqlens_q [N + 1]` holds
their edges, and `cu_seqlens_k [N + 1]` those of the keys that each segment attends to. A segment is the end of its
keys: its last query sees all of them, the one before all but one. Where each rank holds whole documents these are the
segments, and keys and queries have the same edges.

So a query sees an interval of keys and a key is seen by an interval of queries, and both ends of the intervals never
move back from one query, or key, to the next. That is all a kernel needs: a block of queries sees the keys from where
the interval of its first begins to where that of its last ends, and needs no mask between where the interval of its
last begins and where that of its first ends.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Segments:
    """The segments of a micro-batch; made once for it and used by all layers."""

    cu_seqlens_q: Tensor
    """Edges of the segments, int32 `[N + 1]`; the last one is the number of queries T."""
    cu_seqlens_k: Tensor
    """Edges of their keys, int32 `[N + 1]`; the last one is the number of keys K."""
    max_seqlen_q: int
    """Queries of the segment that has most."""
    max_seqlen_k: int
    """Keys of the segment that has most."""
    queries: int
    """T."""
    keys: int
    """K."""

    @classmethod
    def documents(cls, cu_seqlens: Tensor, max_seqlen: int, tokens: int) -> Segments:
        """Each document attends to itself."""
        return cls(cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, tokens, tokens)

    @cached_property
    def seen(self) -> Tensor:
        """The first key that each query sees and the one behind its last, int32 `[2, T]`."""
        query = torch.arange(self.queries, dtype=torch.int32, device=self.cu_seqlens_q.device)
        segment = torch.searchsorted(self.cu_seqlens_q, query, right=True)
        left = self.cu_seqlens_q[segment] - query  # to the segment's end
        return torch.stack((self.cu_seqlens_k[segment - 1], self.cu_seqlens_k[segment] - left + 1))

    @cached_property
    def seen_by(self) -> Tensor:
        """The first query that sees each key and the one behind the last, int32 `[2, K]`."""
        key = torch.arange(self.keys, dtype=torch.int32, device=self.cu_seqlens_k.device)
        segment = torch.searchsorted(self.cu_seqlens_k, key, right=True)
        left = self.cu_seqlens_k[segment] - key
        begin, end = self.cu_seqlens_q[segment - 1], self.cu_seqlens_q[segment]
        return torch.stack((torch.maximum(begin, end - left), end))

    @property
    def equal_length(self) -> bool:
        """Whether all segments have as many queries, and as many keys, as the longest."""
        count = len(self.cu_seqlens_q) - 1
        return count * self.max_seqlen_q == self.queries and count * self.max_seqlen_k == self.keys


def unpack(heads: int, *tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries `[S, B, heads, D]`, keys and values `[S, B, kv_heads, D]` as views.

    tensors: all three side by side, `[S, B, heads + 2 kv_heads, D]`; or the queries, and keys and values side by side.
    """
    if len(tensors) == 2:
        q, (k, v) = tensors[0], tensors[1].chunk(2, dim=2)
    else:
        (packed,) = tensors
        kv_heads = (packed.shape[2] - heads) // 2
        q, k, v = packed.split((heads, kv_heads, kv_heads), dim=2)
    return q, k, v
