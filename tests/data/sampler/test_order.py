from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megaflow.data import native
from megaflow.data.sampler import order
from tests.data import sampler_oracle

GOLDEN = json.loads((Path(__file__).parents[1] / "sampler_golden.json").read_text(encoding="utf-8"))
U64 = st.integers(0, 2**64 - 1)
both = pytest.mark.parametrize("use_native", [False, True], ids=["numpy", "native"])


def test_hashes_and_name_keys_match_the_golden_vectors():
    for values, expected in GOLDEN["hash"]:
        assert order.hash_ints(*values) == int(expected)
    for name, expected in GOLDEN["name_key"].items():
        assert order.name_key(name) == int(expected)


@both
def test_permutations_match_the_golden_vectors(use_native):
    for case in GOLDEN["perm"]:
        key, n, first = int(case["key"]), case["n"], case["first"]
        assert [order.perm(key, n, x) for x in range(len(first))] == first
        assert order.perm_many(key, n, np.arange(len(first)), use_native).tolist() == first


def test_window_offsets_match_the_golden_vectors():
    for case in GOLDEN["offset"]:
        got = order.window_offset(case["seed"], case["source"], case["epoch"], case["tokens"])
        assert got == case["offset"]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(key=U64, n=st.one_of(st.integers(1, 70000), st.integers(1, 2**62)), data=st.data())
def test_python_numpy_and_native_permutations_are_identical(key, n, data):
    xs = data.draw(st.lists(st.integers(0, n - 1), max_size=20))
    expected = [sampler_oracle.permuted(key, n, x) for x in xs]
    assert [order.perm(key, n, x) for x in xs] == expected
    for use_native in (False, True):
        assert order.perm_many(key, n, np.array(xs, np.int64), use_native).tolist() == expected


@both
def test_runs_of_many_permutations_equal_single_ones(use_native):
    keys, sizes, lengths = [5, 2**63 + 1, 7, 8], [1, 50, 2**40 + 1, 65536], [1, 50, 3, 4]
    xs = np.concatenate([np.arange(length) for length in lengths])
    expected = [order.perm(k, n, x) for k, n, m in zip(keys, sizes, lengths, strict=True) for x in range(m)]
    assert order.perm_runs(keys, sizes, lengths, xs, use_native).tolist() == expected


def is_bijection(key: int, n: int, use_native: bool) -> bool:
    values = order.perm_many(key, n, np.arange(n), use_native)
    return bool((np.bincount(values, minlength=n) == 1).all()) and len(values) == n


def test_permutation_is_a_bijection_for_every_size_up_to_4096():
    bad = [n for n in range(1, 4097) if not is_bijection(n * 7919, n, use_native=True)]
    assert bad == []


def test_numpy_permutation_is_a_bijection():
    bad = [n for n in [*range(1, 300), *range(300, 4097, 41)] if not is_bijection(n, n, use_native=False)]
    assert bad == []


@both
@pytest.mark.parametrize("k", [1, 2, 3, 5, 8, 12, 15, 16, 17, 20])
def test_permutation_is_a_bijection_around_powers_of_two(k, use_native):
    """A widely used library skips or repeats samples exactly at 2**k + 1."""
    for n in (2**k - 1, 2**k, 2**k + 1):
        assert is_bijection(20240517, n, use_native), n


@pytest.mark.parametrize("k", [32, 40, 61])
def test_huge_permutations_stay_in_range_without_collisions(k):
    for n in (2**k - 1, 2**k, 2**k + 1):
        xs = np.concatenate([np.arange(20000), np.arange(n - 20000, n)])
        values = order.perm_many(3, n, xs)
        assert values.min() >= 0
        assert values.max() < n
        assert len(np.unique(values)) == len(xs)


@both
def test_indices_out_of_range_are_refused(use_native):
    for n, xs in ((5, [5]), (5, [-1]), (0, [0])):
        with pytest.raises(ValueError, match=r"\[0, "):
            order.perm_many(1, n, np.array(xs), use_native)
        with pytest.raises(ValueError, match=r"\[0, "):
            order.perm(1, n, xs[0])
    assert order.perm_many(1, 5, np.array([], np.int64), use_native).size == 0


def chi_square(values: np.ndarray, bins: int) -> float:
    """Deviation of counts from uniform in standard deviations of the chi-square statistic (about normal)."""
    counts = np.bincount(values, minlength=bins)
    expected = len(values) / bins
    return float((((counts - expected) ** 2 / expected).sum() - (bins - 1)) / np.sqrt(2 * (bins - 1)))


# Fixed seeds: these never flicker. A random permutation exceeds 6 standard deviations once in millions of draws.
@pytest.mark.parametrize("n", [50_021, 65_537, 262_144, 300_007])
@pytest.mark.parametrize("key", [1, 2, 20240517])
def test_neighbours_are_spread_evenly(n, key):
    values = order.perm_many(key, n, np.arange(n))
    for lag in (1, 2, 16, 256):
        differences = (np.roll(values, -lag) - values) % n
        assert abs(chi_square(differences * 64 // n, 64)) < 6
    # where a thirty-second of an epoch comes from
    assert abs(chi_square(values[: n // 32] * 64 // n, 64)) < 6


@pytest.mark.parametrize("n", [4096, 65_536, 262_144])
def test_low_bits_of_index_and_window_are_uncorrelated(n):
    xs = np.arange(n)
    values = order.perm_many(99, n, xs)
    for i in range(8):
        for j in range(8):
            agree = int((((xs >> i) ^ (values >> j)) & 1 == 0).sum())
            assert abs(agree - n / 2) < 6 * np.sqrt(n) / 2, (i, j)


@pytest.mark.parametrize("n", [2, 3, 10, 37, 64, 300])  # at 5 to 9 windows a position is up to a sixth off even
def test_small_sources_are_shuffled_differently_in_every_epoch(n):
    keys = [order.hash_ints(1, 2, epoch) for epoch in range(4000)]
    for x in (0, n - 1):
        values = order.perm_runs(keys, [n] * 4000, [1] * 4000, np.full(4000, x))
        assert abs(chi_square(values, n)) < 6


def test_native_library_is_used_where_it_is_built(monkeypatch):
    if native.library() is None:
        pytest.skip(native.status())
    monkeypatch.setattr(order, "_perm_runs_numpy", None)  # the twin would fail
    assert order.perm_many(42, 10, np.arange(10)).tolist() == GOLDEN["perm"][2]["first"]
