"""Packs and boundaries against plain Python."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from megaflow.data.packing import cumulative_lengths, pack

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


def test_cu_seqlens_are_where_documents_end() -> None:
    cumulative = cumulative_lengths(np.array([3, 1, 5]))
    assert cumulative.dtype == np.int32
    assert cumulative.tolist() == [0, 3, 4, 9]
