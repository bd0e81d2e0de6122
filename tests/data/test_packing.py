"""Packs, boundaries and positions against plain Python."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from megaflow.data.packing import cumulative_lengths, fill_positions, lengths_between, pack

LENGTHS = st.lists(st.integers(1, 32), min_size=1, max_size=60)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(lengths=LENGTHS)
def test_every_document_is_in_one_pack_whole(lengths: list[int]) -> None:
    order, before = pack(np.array(lengths, dtype=np.int32), 32)
    assert sorted(order.tolist()) == list(range(len(lengths)))
    assert before[0] == 0
    assert before[-1] == len(lengths)
    packs = [order[a:b].tolist() for a, b in itertools.pairwise(before)]
    sizes = [sum(lengths[document] for document in documents) for documents in packs]
    assert all(0 < size <= 32 for size in sizes)
    assert all(documents == sorted(documents) for documents in packs)
    assert sum(size <= 16 for size in sizes) <= 1  # two such packs would have been one


def test_best_fit_fills_the_fullest_pack_that_holds_a_document() -> None:
    order, before = pack(np.array([7, 5, 3, 5, 2], dtype=np.int32), 10)
    assert [order[a:b].tolist() for a, b in itertools.pairwise(before)] == [[0, 2], [1, 3], [4]]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(lengths=LENGTHS, data=st.data())
def test_lengths_of_what_cuts_leave(lengths: list[int], data: st.DataObject) -> None:
    starts = np.cumsum([0, *lengths])
    total = int(starts[-1])
    start = data.draw(st.integers(0, total - 1))
    stop = data.draw(st.integers(start, total))
    found = np.array([position - start for position in starts.tolist() if start < position <= stop], dtype=np.int64)
    if stop > start:
        pieces = lengths_between(found, stop - start)
        owner = np.repeat(np.arange(len(lengths)), lengths)[start:stop].tolist()
        assert pieces.tolist() == [owner.count(document) for document in sorted(set(owner))]


@settings(max_examples=50, deadline=None, derandomize=True)
@given(lengths=LENGTHS)
def test_positions_restart(lengths: list[int]) -> None:
    cumulative = cumulative_lengths(np.array(lengths))
    assert cumulative.dtype == np.int32
    assert cumulative.tolist() == [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    positions = np.empty(sum(lengths), dtype=np.int64)
    fill_positions(cumulative, positions)
    assert positions.tolist() == [i for length in lengths for i in range(length)]
