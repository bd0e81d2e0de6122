"""Windows against a token-by-token oracle, and the batches of steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megaflow.data.corpus.corpus import Corpus
from megaflow.data.loader import Batch, Loader, heldout_batches, make_batch
from megaflow.data.sampler.mix import GroupSpec, Sampler, SourceSpec
from megaflow.data.sampler.order import window_offset
from megaflow.data.sampler.schedule import ONE, Knot, compile_knots
from megaflow.data.sources import (
    PackedSource,
    SequentialSource,
    Source,
    TextSource,
    heldout_prefix,
    open_heldout,
    open_heldouts,
    open_source,
    open_sources,
)
from megaflow.errors import UserError
from tests.data.corpora import EOS, TOKENIZER, read_window, write_corpus


def oracle(stream: list[tuple[int, int, bool] | None], length: int) -> tuple[list[int], list[int], list[int]]:
    """Tokens, labels and document lengths of the window that the first `length` of `length + 1` entries make.

    None is padding or what lies outside the corpus. Entries of one document follow each other with no break, unless the
    stream wraps from the last document to the first.
    """
    tokens, labels, documents = [], [], []
    for i in range(length):
        here, after = stream[i], stream[i + 1]
        tokens.append(here[0] if here else EOS)
        labels.append(after[0] if here and after and after[1] == here[1] and after[2] else -100)
        before = stream[i - 1] if i else ()
        if i and (before[1] if before else None) == (here[1] if here else None):
            documents[-1] += 1
        else:
            documents.append(1)
    return tokens, labels, documents


def check(source: Source, epoch: int, index: int, stream: list[tuple[int, int, bool] | None]) -> None:
    window = read_window(source, epoch, index)
    tokens, labels, documents = oracle(stream, source.seq_length)
    assert window.tokens.tolist() == tokens
    assert window.labels.tolist() == labels
    assert source.loss_tokens(epoch, index) == sum(label != -100 for label in labels)
    assert window.lengths.tolist() == documents
    assert window.tokens.dtype == window.labels.dtype == np.int32


LENGTHS = st.lists(st.integers(1, 12), min_size=2, max_size=12)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(lengths=LENGTHS, seq_length=st.integers(2, 20), masked=st.booleans(), seed=st.integers(0, 2**64 - 1))
def test_text_windows_are_the_ring(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], seq_length: int, masked: bool, seed: int
) -> None:
    prefix = tmp_path_factory.mktemp("t") / "c"
    tokens = write_corpus(prefix, lengths, masked=masked)
    total = len(tokens)
    if total < seq_length:
        with pytest.raises(UserError, match=f"source en .*{total} tokens do not fill a sequence of {seq_length}"):
            open_source("en", prefix, seq_length, seed)
        return
    source = open_source("en", prefix, seq_length, seed)
    assert isinstance(source, TextSource)
    assert (source.num_windows, source.documents) == (total // seq_length, len(lengths))
    for epoch in (0, 1, 5):
        offset = window_offset(seed, "en", epoch, total)
        for index in range(source.num_windows):
            start = offset + index * seq_length
            check(source, epoch, index, [tokens[(start + i) % total] for i in range(seq_length + 1)])


def test_an_epoch_of_windows_labels_every_token_once(tmp_path: Path) -> None:
    """When the length divides the corpus; a window of another epoch is cut elsewhere."""
    tokens = write_corpus(tmp_path / "c", [7, 5, 12, 8])
    source = open_source("en", tmp_path / "c", 8, 3)
    epochs = [[read_window(source, epoch, index) for index in range(4)] for epoch in range(4)]
    for windows in epochs:
        assert sorted(np.concatenate([w.tokens for w in windows]).tolist()) == sorted(token for token, _, _ in tokens)
        assert sum((w.labels != -100).sum() for w in windows) == 32 - 4
    assert len({windows[0].tokens[0] for windows in epochs}) > 1


@settings(max_examples=60, deadline=None, derandomize=True)
@given(lengths=LENGTHS, room=st.integers(0, 9), masked=st.booleans())
def test_packed_windows_hold_whole_examples(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], room: int, masked: bool
) -> None:
    prefix = tmp_path_factory.mktemp("p") / "c"
    seq_length = max(lengths) + room
    tokens = write_corpus(prefix, lengths, seq_length, masked)
    source = open_source("pairs", prefix, seq_length, 0)
    assert isinstance(source, PackedSource)
    seen = 0
    for index in range(source.num_windows):
        first, last = source.corpus.pack(index)
        inside = [entry for entry in tokens if first <= entry[1] < last]
        assert inside == tokens[seen : seen + len(inside)]
        seen += len(inside)
        check(source, index % 3, index, [*inside, *[None] * (seq_length + 1 - len(inside))])
    assert seen == len(tokens)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(lengths=LENGTHS, seq_length=st.integers(2, 40), masked=st.booleans())
def test_sequential_windows_carry_each_label_once(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], seq_length: int, masked: bool
) -> None:
    prefix = tmp_path_factory.mktemp("s") / "c"
    tokens = write_corpus(prefix, [length + 1 for length in lengths], masked=masked)
    corpus = Corpus.open(prefix)
    source = SequentialSource("en", corpus, seq_length)
    loss_tokens = 0
    for index in range(source.num_windows):
        stream = [*tokens, *[None] * (seq_length + 1)][index * seq_length : (index + 1) * seq_length + 1]
        check(source, 0, index, stream)
        loss_tokens += int((read_window(source, 0, index).labels != -100).sum())
    assert loss_tokens == corpus.manifest.loss_tokens


def test_a_batch_is_its_windows(tmp_path: Path) -> None:
    write_corpus(tmp_path / "a", [7, 5, 12, 8])
    write_corpus(tmp_path / "b", [3, 4, 5, 6], seq_length=10)
    sources = open_sources({"en": tmp_path / "a", "pairs": tmp_path / "b"}, 10, seed=1)
    cards = [(4, 0, 1), (6, 2, 0), (9, 1, 2)]
    flat = [0, 1, 0]
    batch = make_batch(sources, flat, cards, document_boundaries=True)
    windows = [read_window(sources[f], epoch, index) for f, (_, epoch, index) in zip(flat, cards, strict=True)]
    lengths = [int(length) for window in windows for length in window.lengths]
    assert batch.tokens.tolist() == [window.tokens.tolist() for window in windows]
    assert batch.labels.tolist() == [window.labels.tolist() for window in windows]
    assert batch.cu_seqlens.tolist() == [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    assert batch.max_seqlen == max(lengths)
    assert batch.positions.flatten().tolist() == [i for length in lengths for i in range(length)]
    assert batch.sources.tolist() == flat
    assert batch.cards == cards
    assert batch.cu_seqlens.dtype == torch.int32
    for name in ("tokens", "labels", "positions"):
        assert getattr(batch, name).shape == (3, 10)
        assert getattr(batch, name).dtype == torch.int32

    causal = make_batch(sources, flat, cards, document_boundaries=False)
    assert causal.cu_seqlens.tolist() == [0, 10, 20, 30]
    assert causal.max_seqlen == 10
    assert causal.positions.tolist() == [list(range(10))] * 3
    assert torch.equal(causal.labels, batch.labels)  # still none across documents

    moved = batch.to("meta")
    assert {getattr(moved, f.name).device.type for f in fields(Batch) if f.type == "torch.Tensor"} == {"meta"}
    assert moved.cards == cards


def make_sampler(sources: Sequence[Source], batch_size: int) -> Sampler:
    specs = [SourceSpec(source.name, source.num_windows, source.documents) for source in sources]
    groups = [GroupSpec("text", (specs[0],), (ONE,)), GroupSpec("pairs", (specs[1],), (ONE,))]
    schedule = compile_knots("steps", [Knot(at=0, weights=["0.75", "0.25"])])
    return Sampler(seed=1, batch_size=batch_size, seq_length=10, groups=groups, schedule=schedule)


@pytest.mark.parametrize(("dp", "micro_batch_size"), [(1, 8), (2, 2), (4, 2), (8, 1)])
def test_ranks_share_a_step(tmp_path: Path, dp: int, micro_batch_size: int) -> None:
    """On any layout the ranks' micro-batches are together the step's cards, each with its window."""
    write_corpus(tmp_path / "a", [7, 5, 12, 8] * 4)
    write_corpus(tmp_path / "b", [3, 4, 5, 6] * 3, seq_length=10)
    sources = open_sources({"en": tmp_path / "a", "pairs": tmp_path / "b"}, 10, seed=1)
    loaders = [Loader(make_sampler(sources, 8), sources, dp, rank, micro_batch_size) for rank in range(dp)]
    for step in range(1, 4):
        results = [loader.next_step() for loader in loaders]
        assert {plan.step for plan, _ in results} == {step}
        assert len({plan.digest for plan, _ in results}) == 1
        deck = results[0][0].deck
        found = []
        for _, batches in results:
            assert len(batches) == 8 // (dp * micro_batch_size)
            for batch in batches:
                assert len(batch.cards) == micro_batch_size
                for row, (card, epoch, index) in enumerate(batch.cards):
                    flat = int(batch.sources[row])
                    assert (flat, epoch, index) == (deck.source[card], deck.epoch[card], deck.window[card])
                    window = read_window(sources[flat], epoch, index)
                    assert batch.tokens[row].tolist() == window.tokens.tolist()
                    found.append(card)
        assert sorted(found) == list(range(8))


def test_batch_that_ranks_cannot_share_is_refused(tmp_path: Path) -> None:
    write_corpus(tmp_path / "a", [40])
    write_corpus(tmp_path / "b", [3], seq_length=10)
    sources = open_sources({"en": tmp_path / "a", "pairs": tmp_path / "b"}, 10, seed=1)
    with pytest.raises(UserError, match="batch size 8 is not a multiple of 3"):
        Loader(make_sampler(sources, 8), sources, 3, 0, 1).next_step()


@pytest.mark.parametrize("seq_length", [None, 12])
def test_heldout_batches(tmp_path: Path, seq_length: int | None) -> None:
    prefix = tmp_path / "c"
    assert open_heldout("c", prefix, 12) is None
    write_corpus(heldout_prefix(prefix), [7, 5, 12, 8, 9, 10, 3], seq_length, masked=True)
    held = open_heldout("c", prefix, 12)
    assert held is not None
    manifest = held.corpus.manifest
    whole = list(heldout_batches(held, 2, source=3))
    labels = torch.cat([batch.labels for batch in whole])
    assert int((labels != -100).sum()) == manifest.loss_tokens
    assert {int(source) for batch in whole for source in batch.sources} == {3}
    assert all(len(batch.tokens) <= 2 for batch in whole)
    shared = [batch for rank in range(3) for batch in heldout_batches(held, 2, dp=3, dp_rank=rank)]
    windows = [(card[2], row.tolist()) for batch in shared for card, row in zip(batch.cards, batch.labels, strict=True)]
    assert [row for _, row in sorted(windows)] == labels.tolist()
    first = list(heldout_batches(held, 2, max_windows=3))
    assert torch.equal(torch.cat([batch.labels for batch in first]), labels[:3])


def test_heldouts_of_several_sources(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_corpus(tmp_path / name, [20, 30])
    write_corpus(heldout_prefix(tmp_path / "b"), [20])
    sources = open_sources({"en": tmp_path / "a", "zh": tmp_path / "b"}, 10, seed=1)
    none, held = open_heldouts(sources, 10)
    assert none is None
    assert held is not None
    assert (held.name, held.seq_length, held.documents) == ("zh", 10, 1)
    write_corpus(heldout_prefix(tmp_path / "b"), [20], tokenizer=TOKENIZER.model_copy(update={"sha256": "xy"}))
    with pytest.raises(UserError, match=r"sources zh .*b\) and zh .*b\.heldout\) were made with different tokenizers"):
        open_heldouts(sources, 10)


def test_packs_for_another_length_are_refused_with_the_command(tmp_path: Path) -> None:
    command = "megaflow prepare c a.jsonl --kind parallel --seq-length 16 --tokenizer t.model"
    write_corpus(tmp_path / "c", [3, 4], 16, command=command)
    with pytest.raises(UserError, match=r"source pairs .*packed for sequences of 16, not 32") as caught:
        open_source("pairs", tmp_path / "c", 32, 0)
    assert str(caught.value).endswith(f"{command.replace('16', '32')} --overwrite")


def test_sources_of_different_tokenizers_are_refused(tmp_path: Path) -> None:
    write_corpus(tmp_path / "a", [20])
    write_corpus(tmp_path / "b", [20])
    other = TOKENIZER.model_copy(update={"sha256": "other", "path": "other.model"})
    write_corpus(tmp_path / "c", [20], tokenizer=other)
    with pytest.raises(UserError, match=r"sources en .* and zh .*\(t\.model, other\.model\)"):
        open_sources({"en": tmp_path / "a", "more": tmp_path / "b", "zh": tmp_path / "c"}, 8, seed=1)


def test_damaged_pack_index_is_named(tmp_path: Path) -> None:
    write_corpus(tmp_path / "c", [3, 4, 9], 10)
    path = tmp_path / "c.packs-10"
    path.write_bytes(path.read_bytes()[:-8] + (2).to_bytes(8, "little"))
    with pytest.raises(UserError, match=r"packs-10: pack 1 is said to be documents 2 to 1 of 3"):
        read_window(open_source("pairs", tmp_path / "c", 10, 0, "off"), 0, 1)
    with pytest.raises(UserError, match=r"packs-10: bytes 0 to 23 \(packs 0 to 1\) are not what was written"):
        read_window(open_source("pairs", tmp_path / "c", 10, 0), 0, 0)
    path.write_bytes(b"".join(entry.to_bytes(8, "little") for entry in (0, 3, 3)))
    with pytest.raises(UserError, match=r"c: pack 0 has 16 tokens"):
        read_window(open_source("pairs", tmp_path / "c", 10, 0, "off"), 0, 0)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(UserError, match="packs-10: 16 bytes where 24 belong"):
        open_source("pairs", tmp_path / "c", 10, 0)


@pytest.mark.parametrize("dtype", ["<u2", "<i4"])
def test_an_id_outside_the_vocabulary_is_named(tmp_path: Path, dtype: str) -> None:
    """Even where no checksum is looked at; also a negative one, and one that is only ever a label."""
    write_corpus(tmp_path / "c", [4, 6, 7], dtype=np.dtype(dtype))
    path = tmp_path / "c.bin"
    ids = np.fromfile(path, dtype)
    for at, value in ((5, 999), (9, 30_000), (12, -7 if dtype == "<i4" else 65_535)):
        damaged = ids.copy()
        damaged[at] = value
        damaged.tofile(path)
        document = 1 if at < 10 else 2
        source = SequentialSource("en", Corpus.open(tmp_path / "c", "off"), 3)
        for index in range(source.num_windows):
            if index * 3 <= at <= index * 3 + 3:
                message = rf"c\.bin: token {at} \(document {document}\) is id {value}, outside the vocabulary of 999"
                with pytest.raises(UserError, match=message):
                    read_window(source, 0, index)
            else:
                read_window(source, 0, index)
