"""Array work shared by sources and preparation: packs, document boundaries, labels, positions."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from megaflow.data.native import best_fit

IGNORE = -100
"""Label of a position that carries no loss."""

Int64Array = npt.NDArray[np.int64]


def pack(lengths: npt.NDArray[np.int32], capacity: int) -> tuple[Int64Array, Int64Array]:
    """Pack whole documents best-fit into windows of `capacity` tokens.

    Args:
        lengths: [D] tokens per document, each at most `capacity`.

    Returns:
        [D] documents pack by pack, in each pack by number; [packs + 1] documents before each pack.
    """
    bins = np.asarray(best_fit(lengths, capacity))
    order = np.argsort(bins, kind="stable")
    per_pack = np.bincount(bins)
    return order.astype(np.int64), np.concatenate([[0], np.cumsum(per_pack)]).astype(np.int64)


def lengths_between(starts: Int64Array, length: int) -> Int64Array:
    """Lengths of the pieces that cuts at `starts` (ascending, in 1..length) make of a window of `length`."""
    edges = np.empty(len(starts) + 2, dtype=np.int64)
    edges[0] = 0
    edges[1:-1] = starts
    edges[-1] = length
    if len(starts) and starts[-1] == length:
        edges = edges[:-1]
    return edges[1:] - edges[:-1]


def cumulative_lengths(lengths: Int64Array) -> npt.NDArray[np.int32]:
    """[D + 1] cu_seqlens of D documents laid back to back."""
    cumulative = np.zeros(len(lengths) + 1, dtype=np.int32)
    np.cumsum(lengths, out=cumulative[1:])
    return cumulative


def fill_positions(cu_seqlens: npt.NDArray[np.int32], positions: Int64Array) -> None:
    """Fill `positions` [cu_seqlens[-1]] with the position of each token in its document."""
    positions.fill(1)
    positions[0] = 0
    positions[cu_seqlens[1:-1]] = cu_seqlens[:-2] - cu_seqlens[1:-1] + 1
    np.cumsum(positions, out=positions)
