"""The files of a corpus, byte for byte, and the refusal of damaged ones."""

from __future__ import annotations

import itertools
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from megaflow.data.corpus.corpus import Corpus
from megaflow.data.corpus.files import token_dtype
from megaflow.data.corpus.manifest import Manifest, TokenizerInfo, hash_blocks
from megaflow.data.corpus.writer import CorpusWriter
from megaflow.errors import UserError
from tests.data.corpora import add_document, document_starts, finish

TOKENIZER = TokenizerInfo(
    library="sentencepiece", version="0", sha256="ab", probe="cd", vocab_size=100, bos_id=1, eos_id=2, path="t.model"
)


def manifest(**changes: object) -> Manifest:
    fields = {"kind": "text", "language": "en", "documents": 0, "tokens": 0, "loss_tokens": 0, "bytes": 9}
    return Manifest(**{**fields, "loss_bytes": 9, "tokenizer": TOKENIZER, "shuffle_seed": 0, **changes})


def write(prefix: Path, documents: list[list[int]], masks: list[list[int]] | None = None, vocab: int = 100) -> Manifest:
    with CorpusWriter(prefix, token_dtype(vocab)) as writer:
        for i, document in enumerate(documents):
            add_document(writer, document, masks and masks[i])
        return finish(writer, manifest(tokenizer=TOKENIZER.model_copy(update={"vocab_size": vocab})))


def test_exact_bytes(tmp_path: Path) -> None:
    write(tmp_path / "a", [[1, 300, 2], [1, 2]])
    assert (tmp_path / "a.bin").read_bytes() == struct.pack("<5H", 1, 300, 2, 1, 2)
    index = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, 2, 3)
    index += struct.pack("<2i", 3, 2) + struct.pack("<2q", 0, 6) + struct.pack("<3q", 0, 1, 2)
    assert (tmp_path / "a.idx").read_bytes() == index
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "a.idx", "a.json"]


def test_large_vocabularies_take_four_bytes(tmp_path: Path) -> None:
    assert token_dtype(65_499).itemsize == 2
    write(tmp_path / "a", [[1, 70_000]], vocab=80_000)
    assert (tmp_path / "a.bin").read_bytes() == struct.pack("<2i", 1, 70_000)
    assert (tmp_path / "a.idx").read_bytes()[17] == 4
    assert Corpus.open(tmp_path / "a").tokens(0, 2).tolist() == [1, 70_000]


def test_mask_bits(tmp_path: Path) -> None:
    masks = [[1, 0, 0, 1, 1], [1, 1, 0, 1, 0, 1]]
    written = write(tmp_path / "a", [[1, 5, 6, 7, 2], [1, 5, 6, 7, 8, 2]], masks)
    assert (tmp_path / "a.mask").read_bytes() == bytes([0b01111001, 0b101])
    assert written.loss_tokens == 2 + 3  # the first token of a document is never a label
    corpus = Corpus.open(tmp_path / "a")
    assert corpus.has_mask
    flat = np.array(masks[0] + masks[1], dtype=bool)
    for start in range(11):
        for stop in range(start + 1, 12):
            assert corpus.loss_mask(start, stop).tolist() == flat[start:stop].tolist()


def test_no_mask_file_where_everything_carries_loss(tmp_path: Path) -> None:
    written = write(tmp_path / "a", [[1, 5, 2]], [[1, 1, 1]])
    corpus = Corpus.open(tmp_path / "a")
    assert not (tmp_path / "a.mask").exists()
    assert not corpus.has_mask
    assert corpus.loss_mask(0, 3).all()
    assert written.loss_tokens == 2


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    documents=st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=30), min_size=1, max_size=20),
    bits=st.randoms(use_true_random=False),
)
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]], bits: object) -> None:
    prefix = tmp_path_factory.mktemp("c") / "name.with.dots"
    masks = [[bits.randint(0, 1) for _ in document] for document in documents]  # type: ignore[attr-defined]
    written = write(prefix, documents, masks)
    corpus = Corpus.open(prefix)
    starts = document_starts(corpus)
    assert [corpus.tokens(a, b).tolist() for a, b in itertools.pairwise(starts)] == documents
    assert corpus.loss_mask(0, corpus.num_tokens).tolist() == [bool(bit) for mask in masks for bit in mask]
    assert (corpus.num_documents, corpus.num_tokens) == (len(documents), sum(map(len, documents)))
    assert corpus.manifest == written
    assert written.loss_tokens == sum(sum(mask[1:]) for mask in masks)


def test_offsets_beyond_four_gigabytes(tmp_path: Path) -> None:
    """The index of many large documents, without writing them."""
    writer = CorpusWriter(tmp_path / "a", np.dtype("<i4"))
    with writer:
        writer._idx.write(np.full(5, 2**30, dtype="<i4").tobytes())
        writer.documents = 5
        writer._write_index()
        raw = (tmp_path / ".tmp-a.idx").read_bytes()
    assert struct.unpack("<5q", raw[34 + 20 : 34 + 60]) == tuple(i * 2**32 for i in range(5))


def test_block_hashes(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(bytes(range(250)))
    assert hash_blocks(path, 100) == [
        xxhash.xxh3_64_hexdigest(bytes(range(i, min(i + 100, 250)))) for i in (0, 100, 200)
    ]
    written = write(tmp_path / "a", [[1, 2]])
    assert written.blocks["bin"] == [xxhash.xxh3_64_hexdigest((tmp_path / "a.bin").read_bytes())]
    assert set(written.blocks) == {"bin", "idx"}


def test_fingerprint_is_of_the_content(tmp_path: Path) -> None:
    first = write(tmp_path / "a", [[1, 5, 2]])
    assert write(tmp_path / "b", [[1, 5, 2]]).fingerprint == first.fingerprint
    assert first.model_copy(update={"command": "other"}).fingerprint == first.fingerprint
    assert write(tmp_path / "c", [[1, 6, 2]]).fingerprint != first.fingerprint
    assert write(tmp_path / "d", [[1, 5, 2]], [[1, 0, 1]]).fingerprint != first.fingerprint


def test_an_interrupted_writer_leaves_nothing(tmp_path: Path) -> None:
    def interrupted() -> None:
        with CorpusWriter(tmp_path / "a", np.dtype("<u2")) as writer:
            add_document(writer, [1, 2])
            writer.complete(manifest())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_a_corpus_is_replaced_whole(tmp_path: Path) -> None:
    with CorpusWriter(tmp_path / "a", np.dtype("<u2")) as writer:
        add_document(writer, [1, 5, 2], [1, 0, 1])
        writer.write_packs(16, np.array([0, 1]))
        finish(writer, manifest(kind="parallel", seq_length=16, packs=1))
    assert Corpus.open(tmp_path / "a").pack(0) == (0, 1)
    write(tmp_path / "a", [[1, 2]])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "a.idx", "a.json"]
    assert Corpus.open(tmp_path / "a").num_tokens == 2


@pytest.mark.parametrize(("tokens", "lengths"), [([1, 2], [1]), ([1], [1, 0]), ([-1, 2], [2]), ([1, 65_536], [2])])
def test_impossible_documents_are_refused(tmp_path: Path, tokens: list[int], lengths: list[int]) -> None:
    with CorpusWriter(tmp_path / "a", np.dtype("<u2")) as writer, pytest.raises(ValueError, match=r"token"):
        writer.add_documents(np.array(tokens), np.array(lengths, dtype=np.int32))


def damage(prefix: Path, suffix: str, change: object) -> Path:
    path = Path(f"{prefix}.{suffix}")
    path.write_bytes(change(path.read_bytes()))  # type: ignore[operator]
    return path


@pytest.mark.parametrize(
    ("suffix", "change", "message"),
    [
        ("bin", lambda b: b[:-1], "19 bytes where 20 belong"),
        ("bin", lambda b: b + b"\0", "21 bytes where 20 belong"),
        ("mask", lambda b: b + b"\0", "bytes where"),
        ("idx", lambda b: b[:-1], "bytes where"),
        ("idx", lambda b: b[:20], "sequences"),
        ("idx", lambda b: b"", "not an MMIDIDX index"),
        ("idx", lambda b: b"X" + b[1:], "not an MMIDIDX index"),
        ("idx", lambda b: b[:9] + struct.pack("<Q", 2) + b[17:], "version 2"),
        ("idx", lambda b: b[:17] + b"\5" + b[18:], "dtype code 5"),
        ("idx", lambda b: b[:17] + b"\4" + b[18:], "documents end at byte"),
        ("idx", lambda b: b[:18] + struct.pack("<Q", 1) + b[26:], "sequences"),
        ("idx", lambda b: b[:38] + struct.pack("<i", 9) + b[42:], "documents end at byte"),
        ("json", lambda b: b[:-5], "not a corpus manifest"),
        ("json", lambda b: b.replace(b'"kind"', b'"kin"'), "not a corpus manifest: kin"),
        ("json", lambda b: b"\xff", "cannot be read"),
    ],
)
def test_damage_is_named(tmp_path: Path, suffix: str, change: object, message: str) -> None:
    write(tmp_path / "a", [[1, 3, 4, 5, 2], [1, 6, 7, 8, 2]], [[1, 0, 0, 0, 1], [1] * 5])
    path = damage(tmp_path / "a", suffix, change)
    with pytest.raises(UserError, match=message) as caught:
        Corpus.open(tmp_path / "a")
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", ["json", "bin", "idx", "mask"])
def test_missing_files_are_named(tmp_path: Path, suffix: str) -> None:
    write(tmp_path / "a", [[1, 3, 2]], [[1, 0, 1]])
    (tmp_path / f"a.{suffix}").unlink()
    with pytest.raises(UserError, match=rf"a\.{suffix}: "):
        Corpus.open(tmp_path / "a")


def test_damaged_offsets_are_found_when_used(tmp_path: Path) -> None:
    write(tmp_path / "a", [[1, 2], [1, 2], [1, 2]])
    damage(tmp_path / "a", "idx", lambda b: b[: 34 + 12 + 8] + struct.pack("<q", 8) + b[34 + 12 + 16 :])
    with pytest.raises(UserError, match=r"a\.idx: the offsets near document 1 do not increase"):
        Corpus.open(tmp_path / "a", "off").starts_within(0, 5)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(lengths=st.lists(st.integers(1, 32), min_size=1, max_size=60), data=st.data())
def test_starts_within(tmp_path_factory: pytest.TempPathFactory, lengths: list[int], data: st.DataObject) -> None:
    prefix = tmp_path_factory.mktemp("c") / "a"
    vocab = data.draw(st.sampled_from([100, 70_000]))
    write(prefix, [[1] * length for length in lengths], vocab=vocab)
    corpus = Corpus.open(prefix)
    total = sum(lengths)
    start = data.draw(st.integers(0, total - 1))
    stop = data.draw(st.integers(start, total))
    starts = np.cumsum([0, *lengths]).tolist()
    assert document_starts(corpus) == starts
    expected = [position - start for position in starts if start < position <= stop]
    assert corpus.starts_within(start, stop).tolist() == expected


def test_opening_does_not_grow_with_the_corpus(tmp_path: Path) -> None:
    """Half a million documents cost no more memory than two, at opening and for a window."""
    peaks = []
    for documents in (2, 500_000):
        prefix = tmp_path / f"{documents}"
        with CorpusWriter(prefix, np.dtype("<u2")) as writer:
            writer.write_packs(8, np.arange(documents + 1))
            writer.add_documents(np.ones(4 * documents, np.uint16), np.full(documents, 4, np.int32))
            finish(writer, manifest(kind="parallel", seq_length=8, packs=documents))
        tracemalloc.start()
        corpus = Corpus.open(prefix)
        assert corpus.starts_within(4 * documents - 8, 4 * documents).tolist() == [4, 8]
        assert corpus.pack(documents - 1) == (documents - 1, documents)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 20_000


def test_a_thousand_million_documents_open(tmp_path: Path) -> None:
    """The files are holes but for the ends; only the offsets at the end are looked at."""
    documents = 10**9
    written = manifest(documents=documents, tokens=2 * documents)
    (tmp_path / "a.json").write_text(written.to_json())
    with (tmp_path / "a.bin").open("wb") as file:
        file.truncate(4 * documents)
    with (tmp_path / "a.idx").open("wb") as file:
        file.write(struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 8, documents, documents + 1))
        file.seek(34 + 4 * (documents - 1))
        file.write(struct.pack("<i", 2))
        file.seek(34 + 4 * documents + 8 * (documents - 4))
        file.write(struct.pack("<4q", *(4 * (documents - i) for i in (4, 3, 2, 1))))
        file.truncate(34 + 20 * documents + 8)
    corpus = Corpus.open(tmp_path / "a", "off")
    assert corpus.starts_within(2 * documents - 7, 2 * documents).tolist() == [1, 3, 5, 7]
    assert corpus.document_start(documents - 2) == 2 * documents - 4
