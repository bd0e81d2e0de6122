"""The cut over context-parallel ranks against the mask of one process."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megaflow.data.loader import Batch, Loader, cut_batch, heldout_batches
from megaflow.data.sources import Source, heldout_prefix, open_heldout, open_sources
from tests.data.corpora import write_corpus
from tests.data.test_loader import make_sampler


def whole_batch(rows: list[list[int]]) -> Batch:
    """Documents of the given lengths, row by row; every token is its own place in the batch, the label the next's."""
    lengths = torch.tensor([length for row in rows for length in row])
    shape = (len(rows), sum(rows[0]))
    tokens = torch.arange(lengths.sum(), dtype=torch.int32).view(shape)
    return Batch(
        tokens=tokens,
        labels=tokens + 1,
        positions=torch.cat([torch.arange(int(length)) for length in lengths]).view(shape).int(),
        cu_seqlens=torch.cat((torch.zeros(1, dtype=torch.int64), lengths.cumsum(0))).int(),
        max_seqlen=int(lengths.max()),
        sources=torch.arange(len(rows)),
        cards=[(i, 0, i) for i in range(len(rows))],
    )


def queries_and_keys(ranks: list[Batch]) -> list[dict[int, list[int]]]:
    """By rank, each of its tokens and those that it sees, as the attention backends read a batch."""
    gathered = torch.cat([batch.tokens.flatten() for batch in ranks])
    seen = []
    for batch in ranks:
        assert batch.keys is not None
        edges, edges_k = batch.cu_seqlens.tolist(), batch.keys.cu_seqlens.tolist()
        packed, queries = gathered[batch.keys.index].tolist(), batch.tokens.flatten().tolist()
        assert (edges[0], edges[-1], edges_k[0], edges_k[-1]) == (0, len(queries), 0, len(packed))
        assert batch.max_seqlen == max(b - a for a, b in pairwise(edges))
        assert batch.keys.max_seqlen == max(b - a for a, b in pairwise(edges_k))
        of_rank = {}
        for segment in range(len(edges) - 1):
            keys = packed[edges_k[segment] : edges_k[segment + 1]]
            for query in range(edges[segment], edges[segment + 1]):
                of_rank[queries[query]] = keys[: len(keys) - (edges[segment + 1] - 1 - query)]
        seen.append(of_rank)
    return seen


@st.composite
def cuts(draw: st.DrawFn) -> tuple[list[list[int]], int]:
    """Rows of documents and cp: many edges are those of parts."""
    cp, part = draw(st.integers(2, 4)), draw(st.integers(1, 6))
    seq_length = 2 * cp * part
    rows = []
    for _ in range(draw(st.integers(1, 3))):
        edge = st.one_of(st.integers(1, seq_length - 1), st.integers(1, 2 * cp - 1).map(lambda i: i * part))
        edges = [0, *sorted(set(draw(st.lists(edge, max_size=12)))), seq_length]
        rows.append([b - a for a, b in pairwise(edges)])
    return rows, cp


@settings(max_examples=150, deadline=None)
@given(cuts())
def test_every_query_comes_once_and_sees_what_it_does_in_one_process(cut: tuple[list[list[int]], int]) -> None:
    rows, cp = cut
    whole = whole_batch(rows)
    ranks = [cut_batch(whole, cp, rank) for rank in range(cp)]
    starts = {int(t): int(t - p) for t, p in zip(whole.tokens.flatten(), whole.positions.flatten(), strict=True)}

    seen = queries_and_keys(ranks)
    queries = [query for of_rank in seen for query in of_rank]
    assert sorted(queries) == list(range(whole.tokens.numel()))
    for of_rank in seen:
        for query, keys in of_rank.items():
            assert keys == list(range(starts[query], query + 1))
    for batch in ranks:
        assert torch.equal(batch.labels, batch.tokens + 1)
        assert torch.equal(batch.positions.flatten(), whole.positions.flatten()[batch.tokens.flatten().long()])
        assert batch.keys is not None
        assert (
            int(batch.keys.index.bincount().max()) <= 2
        )  # or the order of additions would matter in the backward pass
        assert (batch.keys.index.dtype, batch.keys.cu_seqlens.dtype, batch.cu_seqlens.dtype) == (torch.int32,) * 3
        assert torch.equal(batch.sources, whole.sources)


@pytest.mark.parametrize("cp", [2, 4, 8])
def test_ranks_share_the_work(cp: int) -> None:
    part = 8
    long, short = whole_batch([[2 * cp * part]] * 2), whole_batch([[1, 3, 4] * (2 * cp * part // 8)] * 2)
    for whole in (long, short):
        ranks = [cut_batch(whole, cp, rank) for rank in range(cp)]
        keys = {len(batch.keys.index) for batch in ranks if batch.keys is not None}
        assert keys == {2 * (2 * cp + 1) * part if whole is long else 2 * 2 * part}  # here none but its own
        pairs = {sum(map(len, of_rank.values())) for of_rank in queries_and_keys(ranks)}
        assert len(pairs) == 1


def test_one_rank_keeps_the_batch_itself() -> None:
    whole = whole_batch([[5, 7]])
    assert cut_batch(whole, 1, 0) is whole
    with pytest.raises(ValueError, match="sequences of 12 tokens cannot be cut into 8 parts"):
        cut_batch(whole, 4, 0)


@pytest.fixture
def sources(tmp_path: Path) -> list[Source]:
    write_corpus(tmp_path / "a", [7, 5, 12, 8] * 4)
    write_corpus(tmp_path / "b", [3, 4, 5, 6] * 3, seq_length=10)
    return open_sources({"en": tmp_path / "a", "pairs": tmp_path / "b"}, 10, seed=1)


@pytest.mark.parametrize("document_boundaries", [True, False])
def test_loader_gives_the_ranks_their_parts(sources: list[Source], document_boundaries: bool) -> None:
    cp = 5
    (_, whole) = Loader(make_sampler(sources, 8), sources, 2, 1, 2, document_boundaries).next_step()
    for rank in range(cp):
        loader = Loader(make_sampler(sources, 8), sources, 2, 1, 2, document_boundaries, cp=cp, cp_rank=rank)
        (_, batches) = loader.next_step()
        for batch, of_all in zip(batches, whole, strict=True):
            assert_same(batch, cut_batch(of_all, cp, rank))
            assert batch.tokens.shape == (2, 2)
            assert batch.tokens.is_contiguous()


def test_heldout_batches_are_cut(tmp_path: Path) -> None:
    write_corpus(heldout_prefix(tmp_path / "c"), [7, 5, 12, 8, 9, 10, 3], masked=True)
    held = open_heldout("c", tmp_path / "c", 12)
    assert held is not None
    whole = list(heldout_batches(held, 2, 2, 1, source=3))
    for rank in range(2):
        for batch, of_all in zip(heldout_batches(held, 2, 2, 1, source=3, cp=2, cp_rank=rank), whole, strict=True):
            assert_same(batch, cut_batch(of_all, 2, rank))


def assert_same(one: Batch, other: Batch) -> None:
    for name in ("tokens", "labels", "positions", "cu_seqlens", "sources"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    assert one.keys is not None
    assert other.keys is not None
    assert torch.equal(one.keys.index, other.keys.index)
    assert torch.equal(one.keys.cu_seqlens, other.keys.cu_seqlens)
    moved = one.to("meta")
    assert moved.keys is not None
    assert {moved.keys.index.device.type, moved.keys.cu_seqlens.device.type} == {"meta"}
