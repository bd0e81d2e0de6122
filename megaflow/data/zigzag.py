"""Sequences cut over context-parallel ranks so that causal attention costs all of them the same.

A sequence of S tokens falls into 2 cp parts; rank r takes the parts r and 2 cp - 1 - r, an early one whose queries see
little and a late one whose queries see much (Llama 3, arXiv 2407.21783, section 3.3.2). The queries of one document in
one part are a segment; it attends to its document from the start up to the segment's own end.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from megaflow.data.packing import Int64Array, cumulative_lengths


@dataclass(frozen=True)
class Keys:
    """What a rank's segments attend to, packed segment after segment out of the keys of all context-parallel ranks.

    A key is in at most two segments, one in each of the rank's parts.
    """

    cu_seqlens: torch.Tensor
    """Edges of the segments' keys, int32 `[N + 1]`; the last query of a segment is the last of its keys."""
    max_seqlen: int
    """Keys of the segment that has most."""
    index: torch.Tensor
    """Where each packed key is among the ranks' tokens, rank after rank as an all-gather lays them, int32 `[K]`."""


def local_columns(seq_length: int, cp: int, cp_rank: int) -> tuple[slice, slice]:
    """The two parts of each sequence that a rank takes.

    Raises:
        ValueError: 2 cp does not divide the sequence length.
    """
    part, left = divmod(seq_length, 2 * cp)
    if left:
        raise ValueError(f"sequences of {seq_length} tokens cannot be cut into {2 * cp} parts")
    early, late = cp_rank * part, seq_length - (cp_rank + 1) * part
    return slice(early, early + part), slice(late, late + part)


def cut_documents(
    cu_seqlens: npt.NDArray[np.int32], sequences: int, cp: int, cp_rank: int
) -> tuple[npt.NDArray[np.int32], int, Keys]:
    """A rank's segments, given the edges `[D + 1]` of the documents of B sequences laid one after the other.

    Returns:
        [N + 1] edges of the segments in the rank's own tokens, which lie sequence after sequence too; the longest
        segment; the keys.
    """
    edges: Int64Array = cu_seqlens.astype(np.int64)
    part = int(edges[-1]) // (sequences * 2 * cp)
    own_parts = np.array([cp_rank, 2 * cp - 1 - cp_rank])
    starts = part * (2 * cp * np.arange(sequences)[:, None] + own_parts).ravel()
    begin = np.searchsorted(edges, starts, side="right") - 1
    end = np.searchsorted(edges, starts + part, side="left")
    document = _ranges(begin, end - begin)
    own = np.repeat(starts, end - begin)
    query = np.maximum(edges[document], own)
    stop = np.minimum(edges[document + 1], own + part)
    queries, keys = stop - query, stop - edges[document]
    index = _gathered_order(sequences, cp, part)[_ranges(edges[document], keys)]
    packed = Keys(torch.from_numpy(cumulative_lengths(keys)), int(keys.max()), torch.from_numpy(index))
    return cumulative_lengths(queries), int(queries.max()), packed


def _gathered_order(sequences: int, cp: int, part: int) -> npt.NDArray[np.int32]:
    """Where each of the B S tokens is once the ranks' tokens are gathered, int32 `[B S]`."""
    number = np.arange(2 * cp)
    rank, late = np.minimum(number, 2 * cp - 1 - number), number >= cp
    place = (rank * sequences + np.arange(sequences)[:, None]) * 2 + late
    return (place.ravel()[:, None] * part + np.arange(part)).astype(np.int32).ravel()


def _ranges(starts: Int64Array, lengths: Int64Array) -> Int64Array:
    """start, start + 1, ... of each of the lengths, one range after the other."""
    return np.arange(lengths.sum()) + np.repeat(starts - (np.cumsum(lengths) - lengths), lengths)
