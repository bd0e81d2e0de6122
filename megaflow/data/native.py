"""The host library of `csrc/host/` and the work it shares with its Python twins.

The library is plain `extern "C"`, loaded with ctypes, which releases the interpreter lock while C++ runs. Where it is
missing every function falls back to a twin with identical results; `use_native=False` selects the twin explicitly.
"""

from __future__ import annotations

import ctypes
import functools
import heapq
from bisect import bisect_left, insort
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

LIBRARY_PATH = Path(__file__).resolve().parents[1] / "_host.so"
ABI_VERSION = 4  # raised together with `megaflow_abi_version` in csrc/host/host.cpp whenever a signature changes

_I64 = ctypes.c_int64
_ARRAY = ctypes.c_void_p  # the address of the first element
_NO_BYTES = ctypes.c_char * 0


class Stream(ctypes.Structure):
    """The mapped files of a corpus, as `csrc/host/windows.cpp` reads them.

    `mask` is null where every token carries loss.
    """

    _fields_ = (
        ("tokens", _ARRAY),
        ("offsets", _ARRAY),
        ("mask", _ARRAY),
        ("item_size", _I64),
        ("num_tokens", _I64),
        ("num_documents", _I64),
        ("vocab_size", _I64),
        ("eos_id", _I64),
    )


def address(array: NDArray[Any]) -> ctypes.Array[ctypes.c_char]:
    """Where a writable, contiguous array begins, as an argument of the library; a quarter of the time of `.ctypes`."""
    return _NO_BYTES.from_buffer(array.data)


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    """The library, or None, and the statement for the log."""
    rebuild = "numpy twins serve (install with a C++ compiler present to build it)"
    if not LIBRARY_PATH.exists():
        return None, f"host C++: not built, {rebuild}"
    try:
        library = ctypes.CDLL(str(LIBRARY_PATH))
        version = library.megaflow_abi_version()
    except (OSError, AttributeError) as error:
        return None, f"host C++: {LIBRARY_PATH.name} cannot be loaded ({error}), {rebuild}"
    if version != ABI_VERSION:
        return None, f"host C++: {LIBRARY_PATH.name} is of another version of the sources, {rebuild}"
    library.megaflow_permute.argtypes = [_I64, _ARRAY, _ARRAY, _ARRAY, _ARRAY]
    library.megaflow_permute.restype = None
    library.megaflow_draw.argtypes = [ctypes.c_uint64, _I64, *[_ARRAY] * 6]
    library.megaflow_draw.restype = None
    library.megaflow_starts.argtypes = [_ARRAY, _I64, _I64, _ARRAY, _ARRAY]
    library.megaflow_starts.restype = _I64
    library.megaflow_fill.argtypes = [_ARRAY, *[_I64] * 4, *[_ARRAY] * 3]
    library.megaflow_fill.restype = _I64
    library.megaflow_count_labels.argtypes = [_ARRAY, _I64, _I64, *[_ARRAY] * 3]
    library.megaflow_count_labels.restype = _I64
    library.megaflow_advance.argtypes = [*[_I64] * 5, _ARRAY, _ARRAY, _I64, *[_ARRAY] * 12]
    library.megaflow_advance.restype = _I64
    library.megaflow_best_fit.argtypes = [_I64, _ARRAY, _I64, _ARRAY]
    library.megaflow_best_fit.restype = None
    return library, f"host C++: {LIBRARY_PATH.name} loaded"


def library() -> ctypes.CDLL | None:
    """The loaded host library, or None where it was not built."""
    return _load()[0]


def status() -> str:
    """One line for the log: whether the host library serves, and if not why."""
    return _load()[1]


def best_fit(lengths: NDArray[np.int32], capacity: int, use_native: bool = True) -> NDArray[np.int64]:
    """Pack examples into bins of `capacity` tokens, best fit, in the order given.

    Each example goes to the open bin with the least room that still holds it (ties: the oldest bin); where none does,
    it opens the next bin. Deterministic, O(n log n).

    Args:
        lengths: `[n]` example lengths in tokens, each from 1 to `capacity`.
        capacity: tokens per bin.
        use_native: False selects the Python twin.

    Returns:
        `[n]` the bin of each example; bins are numbered from 0 in the order in which they were opened.

    Raises:
        ValueError: a length is outside 1 to `capacity`.
    """
    sizes = np.ascontiguousarray(lengths, dtype=np.int32)
    if sizes.size and (int(sizes.min()) < 1 or int(sizes.max()) > capacity):
        raise ValueError(f"example lengths must be from 1 to {capacity}, got {int(sizes.min())} to {int(sizes.max())}")
    bins = np.empty(sizes.size, dtype=np.int64)
    host = library() if use_native else None
    if host is None:
        bins[:] = _best_fit_python(sizes.tolist(), capacity)
    else:
        host.megaflow_best_fit(sizes.size, sizes.ctypes.data, capacity, bins.ctypes.data)
    return bins


def _best_fit_python(lengths: list[int], capacity: int) -> list[int]:
    """Twin of `megaflow_best_fit`: open bins by room, at most `capacity` different rooms."""
    rooms: list[int] = []  # the rooms that some open bin has, ascending
    open_bins: dict[int, list[int]] = {}  # room -> heap of bins
    bins: list[int] = []
    opened = 0
    for length in lengths:
        position = bisect_left(rooms, length)
        if position == len(rooms):
            room, chosen = capacity, opened
            opened += 1
        else:
            room = rooms[position]
            chosen = heapq.heappop(open_bins[room])
            if not open_bins[room]:
                rooms.pop(position)
        bins.append(chosen)
        left = room - length
        if left == 0:
            continue
        heap = open_bins.setdefault(left, [])
        if not heap:
            insort(rooms, left)
        heapq.heappush(heap, chosen)
    return bins
