from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megaflow.data import native
from megaflow.data.loader import Loader
from megaflow.data.sampler.mix import GroupSpec, Sampler, SourceSpec
from megaflow.data.sampler.schedule import ONE, Knot, compile_knots
from megaflow.data.sources import open_sources
from tests.data.corpora import write_corpus

both = pytest.mark.parametrize("use_native", [False, True], ids=["python", "native"])


def plain_best_fit(lengths: list[int], capacity: int) -> list[int]:
    rooms: list[int] = []
    bins = []
    for length in lengths:
        fitting = [(room, i) for i, room in enumerate(rooms) if room >= length]
        if not fitting:
            rooms.append(capacity)
            fitting = [(capacity, len(rooms) - 1)]
        chosen = min(fitting)[1]
        rooms[chosen] -= length
        bins.append(chosen)
    return bins


@both
@settings(max_examples=200, deadline=None, derandomize=True)
@given(data=st.data(), capacity=st.integers(1, 40))
def test_best_fit_takes_the_fullest_open_bin_that_fits(use_native, data, capacity):
    lengths = data.draw(st.lists(st.integers(1, capacity), max_size=60))
    bins = native.best_fit(np.array(lengths, np.int32), capacity, use_native)
    assert bins.dtype == np.int64
    assert bins.tolist() == plain_best_fit(lengths, capacity)


def test_best_fit_at_size_is_the_same_in_both_and_wastes_little():
    lengths = np.random.default_rng(1).integers(1, 1500, 50_000).astype(np.int32)
    bins = native.best_fit(lengths, 4096, use_native=True)
    assert np.array_equal(bins, native.best_fit(lengths, 4096, use_native=False))
    filled = np.bincount(bins, weights=lengths)
    assert filled.max() <= 4096
    assert filled.mean() / 4096 > 0.99


@both
@pytest.mark.parametrize("lengths", [[0], [5, 11], [-3]])
def test_best_fit_refuses_lengths_that_do_not_fit(use_native, lengths):
    with pytest.raises(ValueError, match="from 1 to 10"):
        native.best_fit(np.array(lengths, np.int32), 10, use_native)


@both
def test_best_fit_of_nothing_is_nothing(use_native):
    assert native.best_fit(np.array([], np.int32), 10, use_native).tolist() == []


def test_a_missing_or_broken_library_is_stated_and_not_fatal(tmp_path, monkeypatch):
    load = native._load.__wrapped__
    monkeypatch.setattr(native, "LIBRARY_PATH", tmp_path / "_host.so")
    library, statement = load()
    assert library is None
    assert "not built" in statement
    assert "numpy twins serve" in statement
    (tmp_path / "_host.so").write_bytes(b"not a library")
    library, statement = load()
    assert library is None
    assert "cannot be loaded" in statement


def test_a_library_of_other_sources_is_not_called(monkeypatch):
    if native.library() is None:
        pytest.skip(native.status())
    monkeypatch.setattr(native, "ABI_VERSION", native.ABI_VERSION + 1)
    library, statement = native._load.__wrapped__()
    assert library is None
    assert "another version" in statement


def test_a_run_without_the_library_reads_the_same(tmp_path, monkeypatch):
    if native.library() is None:
        pytest.skip(native.status())
    write_corpus(tmp_path / "text", [7, 5, 12, 8] * 6, masked=True)
    write_corpus(tmp_path / "pairs", [3, 4, 5, 6] * 5, seq_length=10)

    def steps() -> list:
        sources = open_sources({name: tmp_path / name for name in ("text", "pairs")}, 10, seed=5)
        groups = [
            GroupSpec(source.name, (SourceSpec(source.name, source.num_windows, source.documents),), (ONE,))
            for source in sources
        ]
        loader = Loader(Sampler(1, 8, 10, groups, compile_knots("tokens", [Knot(0, [2, 1])])), sources, 2, 1, 2)
        read = []
        for _ in range(6):
            plan, batches = loader.next_step()
            tensors = [(batch.tokens, batch.labels, batch.positions, batch.cu_seqlens) for batch in batches]
            read.append((plan.digest, [[tensor.tolist() for tensor in four] for four in tensors]))
        return [read, [source.loss_tokens(0, index) for source in sources for index in range(source.num_windows)]]

    with_library = steps()
    monkeypatch.setattr(native, "library", lambda: None)
    assert steps() == with_library


def test_status_is_one_line():
    assert native.status().startswith("host C++: ")
    assert "\n" not in native.status()
