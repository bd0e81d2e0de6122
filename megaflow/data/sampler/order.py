"""Which window a source's next sequence is, and which rank and micro-batch it goes to: integers only.

Nothing is stored: the order of an epoch is a keyed permutation computed index by index, so it takes O(1) memory at any
corpus size, and every rank computes the same order from the same integers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from megaflow.data import native

MASK32 = 2**32 - 1
MASK64 = 2**64 - 1
GOLDEN_RATIO = 0x9E3779B97F4A7C15  # 2**64 divided by the golden ratio: the step of splitmix64
MIX_A, MIX_B = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB  # splitmix64's finaliser (Stafford's variant 13)
ROUND_A, ROUND_B = 0x21F0AAAD, 0x735A2D97  # a 32-bit mixer of low bias
SMALL = 2**16  # below this many windows a permutation takes 6 rounds, from it on 4


def mix64(x: int) -> int:
    """splitmix64's finaliser: a bijection of 64-bit integers in which every input bit moves every output bit."""
    x = ((x ^ (x >> 30)) * MIX_A) & MASK64
    x = ((x ^ (x >> 27)) * MIX_B) & MASK64
    return x ^ (x >> 31)


def hash_ints(*values: int) -> int:
    """A 64-bit hash of a sequence of unsigned 64-bit integers; order matters."""
    state = 0
    for value in values:
        state = mix64((state + GOLDEN_RATIO + value) & MASK64)
    return state


def name_key(name: str) -> int:
    """The 64-bit identity of a source: the first 8 bytes, little-endian, of the SHA-256 of its UTF-8 name."""
    return int.from_bytes(hashlib.sha256(name.encode("utf-8")).digest()[:8], "little")


def perm(key: int, n: int, x: int) -> int:
    """Position `x` of the permutation of `[0, n)` chosen by `key`.

    An unbalanced Feistel network over the smallest power of two that holds `n` (at least 4), walked along its cycle
    until the value is below `n`: a bijection for every `n` (Black and Rogaway, "Ciphers with Arbitrary Finite Domains",
    2002).

    Raises:
        ValueError: `n < 1` or `x` is not in `[0, n)`.
    """
    if not 0 <= x < n:
        raise ValueError(f"index {x} is not in [0, {n})")
    if n == 1:
        return 0
    bits = max(2, (n - 1).bit_length())
    low_bits = bits // 2
    low_mask, high_mask = (1 << low_bits) - 1, (1 << (bits - low_bits)) - 1
    keys = [hash_ints(key, r) & MASK32 for r in range(6 if n < SMALL else 4)]
    while True:
        high, low = x >> low_bits, x & low_mask
        for r, round_key in enumerate(keys):
            if r % 2 == 0:
                high ^= _round_function(low, round_key) & high_mask
            else:
                low ^= _round_function(high, round_key) & low_mask
        x = high << low_bits | low
        if x < n:
            return x


def _round_function(value: int, key: int) -> int:
    z = value ^ key
    z = ((z ^ (z >> 16)) * ROUND_A) & MASK32
    z = ((z ^ (z >> 15)) * ROUND_B) & MASK32
    return z ^ (z >> 15)


def perm_many(key: int, n: int, xs: NDArray[np.int64], use_native: bool = True) -> NDArray[np.int64]:
    """`perm(key, n, x)` for every `x` of the array `xs`, in C++ or numpy.

    Raises:
        ValueError: `n < 1` or an index is not in `[0, n)`.
    """
    indices = np.asarray(xs, dtype=np.int64)
    if n < 1 or (indices.size and not 0 <= int(indices.min()) <= int(indices.max()) < n):
        raise ValueError(f"indices must be in [0, {n})")
    return perm_runs([key], [n], [indices.size], indices.reshape(-1), use_native).reshape(indices.shape)


def perm_inverse_many(key: int, n: int, xs: NDArray[np.int64]) -> NDArray[np.int64]:
    """The positions at which `perm(key, n, .)` has the values `xs`: its rounds undone, last first.

    Raises:
        ValueError: `n < 1` or a value is not in `[0, n)`.
    """
    values = np.asarray(xs, dtype=np.int64)
    if n < 1 or (values.size and not 0 <= int(values.min()) <= int(values.max()) < n):
        raise ValueError(f"values must be in [0, {n})")
    key_array, size_array = np.array([key], dtype=np.uint64), np.array([n], dtype=np.uint64)
    return _perm_runs_numpy(key_array, size_array, np.array([values.size]), values.reshape(-1), inverse=True).reshape(
        values.shape
    )


def perm_runs(
    keys: Sequence[int], sizes: Sequence[int], lengths: Sequence[int], xs: NDArray[np.int64], use_native: bool = True
) -> NDArray[np.int64]:
    """Several permutations in one call: the next `lengths[r]` indices of `xs` go through `perm(keys[r], sizes[r], .)`.

    Indices are taken to be in range; `perm_many` checks them.
    """
    key_array = np.array(keys, dtype=np.uint64)
    size_array = np.array(sizes, dtype=np.uint64)
    length_array = np.array(lengths, dtype=np.int64)
    host = native.library() if use_native else None
    if host is None:
        return _perm_runs_numpy(key_array, size_array, length_array, xs)
    out = np.array(xs, dtype=np.int64, order="C")
    host.megaflow_permute(
        len(keys), key_array.ctypes.data, size_array.ctypes.data, length_array.ctypes.data, out.ctypes.data
    )
    return out


def _perm_runs_numpy(
    keys: NDArray[np.uint64],
    sizes: NDArray[np.uint64],
    lengths: NDArray[np.int64],
    xs: NDArray[np.int64],
    inverse: bool = False,
) -> NDArray[np.int64]:
    """Numpy twin of `megaflow_permute`, or its inverse: all runs at once, one table column per run."""
    bits = np.array([max(2, (size - 1).bit_length()) for size in sizes.tolist()], dtype=np.uint64)
    low_bits = bits // np.uint64(2)
    one = np.uint64(1)
    low_mask = ((one << low_bits) - one).astype(np.uint32)
    high_mask = ((one << (bits - low_bits)) - one).astype(np.uint32)
    rounds = 6 if bool((sizes < SMALL).any()) else 4
    round_keys = np.stack([_hash_pair(keys, r) for r in range(rounds)]).astype(np.uint32)
    # Larger permutations have no rounds 4 and 5: an empty mask makes those rounds leave them as they are.
    masks = np.stack([low_mask if r % 2 else high_mask for r in range(rounds)])
    masks[4:, sizes >= SMALL] = 0

    run = np.repeat(np.arange(len(keys)), lengths)
    values = xs.astype(np.uint64)
    active = np.flatnonzero(sizes[run] > one)
    while active.size:
        column = run[active]
        shift, cut, key = low_bits[column], masks[:, column], round_keys[:, column]
        x = values[active]
        high, low = (x >> shift).astype(np.uint32), x.astype(np.uint32) & low_mask[column]
        for r in reversed(range(rounds)) if inverse else range(rounds):
            if r % 2 == 0:
                high ^= _round_function_numpy(low, key[r]) & cut[r]
            else:
                low ^= _round_function_numpy(high, key[r]) & cut[r]
        x = high.astype(np.uint64) << shift | low
        values[active] = x
        active = active[x >= sizes[column]]
    return values.astype(np.int64)


def _round_function_numpy(value: NDArray[np.uint32], key: NDArray[np.uint32]) -> NDArray[np.uint32]:
    z = value ^ key
    z ^= z >> np.uint32(16)
    z *= np.uint32(ROUND_A)
    z ^= z >> np.uint32(15)
    z *= np.uint32(ROUND_B)
    z ^= z >> np.uint32(15)
    return z


def _hash_pair(keys: NDArray[np.uint64], second: int) -> NDArray[np.uint64]:
    """`hash_ints(key, second)` for an array of keys."""

    def mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
        x = (x ^ (x >> np.uint64(30))) * np.uint64(MIX_A)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(MIX_B)
        return x ^ (x >> np.uint64(31))

    return mix(mix(keys + np.uint64(GOLDEN_RATIO)) + np.uint64((GOLDEN_RATIO + second) & MASK64))


def draw(
    seed: int,
    keys: NDArray[np.uint64],
    windows: NDArray[np.int64],
    first: NDArray[np.int64],
    counts: NDArray[np.int64],
    use_native: bool = True,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The cards of a step: `counts[k]` sequences of source `k` from its `first[k]`-th on, source after source.

    Args:
        keys: `[K]` the sources' `name_key`s.
        windows: `[K]` per epoch.

    Returns:
        (epoch `[B]`, window `[B]`) of each.
    """
    host = native.library() if use_native else None
    if host is None:
        return _draw_numpy(seed, keys.tolist(), windows.tolist(), first.tolist(), counts.tolist())
    epoch, window = np.empty((2, int(counts.sum())), np.int64)
    host.megaflow_draw(seed, len(keys), *map(native.address, (keys, windows, first, counts, epoch, window)))
    return epoch, window


def _draw_numpy(
    seed: int, keys: list[int], windows: list[int], first: list[int], counts: list[int]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Numpy twin of `megaflow_draw`."""
    runs: list[tuple[int, int, int, int, int]] = []  # (key, windows, epoch, first index in the epoch, length)
    for key, size, taken, count in zip(keys, windows, first, counts, strict=True):
        end = taken + count
        while taken < end:
            epoch, start = divmod(taken, size)
            length = min(size - start, end - taken)
            runs.append((hash_ints(seed, key, epoch), size, epoch, start, length))
            taken += length
    run_keys, sizes, epochs, starts, lengths = zip(*runs, strict=True) if runs else [()] * 5
    index = np.concatenate([np.arange(a, a + n) for a, n in zip(starts, lengths, strict=True)] or [np.arange(0)])
    window = perm_runs(run_keys, sizes, lengths, index, use_native=False)
    return np.repeat(np.array(epochs, np.int64), np.array(lengths, np.int64)), window


def window_offset(seed: int, name: str, epoch: int, tokens: int) -> int:
    """The token at which window 0 of a text source starts in `epoch`, on the ring of its `tokens` tokens.

    Each epoch cuts documents at other places and leaves out other tokens (fewer than one window's).
    """
    return hash_ints(seed, name_key(name), epoch, 1) % tokens


def rotation(seed: int, step: int, hands: int) -> int:
    """The hand that card 0 of a step goes to."""
    return hash_ints(seed, step, 2) % hands
