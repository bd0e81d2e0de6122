"""Array work shared by corpora and preparation: packs, labels, positions, document boundaries."""

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


def fill_window(
    ids: npt.NDArray[np.integer],
    mask: npt.NDArray[np.bool_] | None,
    starts: Int64Array,
    length: int,
    eos_id: int,
    window: npt.NDArray[np.int32],
) -> Int64Array:
    """Fill `window` [3, S] with tokens, labels and positions: the numpy twin of `megaflow_fill`.

    Args:
        ids: [length + 1] the window's tokens and the one after; [length] at the end of the stream.
        mask: as `ids`, whether a token carries loss as a label; None where all do.
        starts: where documents start among 1 .. length, ascending.
        length: at most S; the rest is padding.

    Returns:
        [D] lengths of the documents, padding last.
    """
    tokens, labels, positions = window
    labelled, size = len(ids) - 1, len(tokens)
    tokens[:length], tokens[length:] = ids[:length], eos_id
    labels[:labelled], labels[labelled:] = ids[1:], IGNORE
    if mask is not None:
        labels[:labelled][~mask[1:]] = IGNORE
    if length < size and (len(starts) == 0 or starts[-1] != length):
        starts = np.append(starts, length)
    labels[starts - 1] = IGNORE
    inner = starts[starts < size]
    lengths = np.diff(inner, prepend=0, append=size)
    positions.fill(1)
    positions[0] = 0
    positions[inner] = 1 - lengths[:-1]
    np.cumsum(positions, dtype=np.int32, out=positions)
    return lengths


def cumulative_lengths(lengths: Int64Array) -> npt.NDArray[np.int32]:
    """[D + 1] cu_seqlens of D documents laid back to back."""
    cumulative = np.zeros(len(lengths) + 1, dtype=np.int32)
    np.cumsum(lengths, out=cumulative[1:])
    return cumulative
