"""Damaged bytes of a corpus are named before anything is made of them."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from megaflow.data.corpus.corpus import Corpus
from megaflow.data.corpus.manifest import Manifest, TokenizerInfo
from megaflow.data.corpus.writer import CorpusWriter
from megaflow.data.packing import pack
from megaflow.data.sources import PackedSource, SequentialSource, Source
from megaflow.errors import UserError
from tests.data.corpora import finish, read_window

TOKENIZER = TokenizerInfo(
    library="sentencepiece", version="0", sha256="ab", probe="cd", vocab_size=60_000, bos_id=1, eos_id=2, path="t.model"
)
BLOCK = 64
LENGTH = 32


def write(prefix: Path, packed: bool) -> Path:
    """60 documents with a mask, packed or not, in blocks of 64 bytes."""
    random = np.random.default_rng(4)
    lengths = random.integers(1, LENGTH, size=60).astype(np.int32)
    packs = None
    with CorpusWriter(prefix, np.dtype("<u2")) as writer:
        if packed:
            order, before = pack(lengths, LENGTH)
            lengths, packs = lengths[order], len(before) - 1
            writer.write_packs(LENGTH, before)
        total = int(lengths.sum())
        writer.add_documents(random.integers(0, 60_000, size=total), lengths, random.integers(0, 2, size=total))
        fields = {"documents": 0, "tokens": 0, "loss_tokens": 0, "bytes": 1, "loss_bytes": 1, "shuffle_seed": 0}
        seq_length = LENGTH if packed else None
        kind = "parallel" if packed else "text"
        finish(
            writer,
            Manifest(
                kind=kind,
                language="en",
                tokenizer=TOKENIZER,
                seq_length=seq_length,
                packs=packs,
                block_bytes=BLOCK,
                **fields,
            ),
        )
    return prefix


def open_whole(prefix: Path, verify: str) -> Source:
    """A source that reads every token."""
    corpus = Corpus.open(prefix, verify)  # type: ignore[arg-type]
    make = SequentialSource if corpus.manifest.kind == "text" else PackedSource
    return make("a", corpus, LENGTH)


def windows(source: Source) -> list[tuple[list[int], list[int], list[int]] | str]:
    """Every window, or what is said of it."""
    found: list[tuple[list[int], list[int], list[int]] | str] = []
    for index in range(source.num_windows):
        try:
            window = read_window(source, 0, index)
            found.append((window.tokens.tolist(), window.labels.tolist(), window.lengths.tolist()))
        except UserError as error:
            found.append(str(error))
    return found


@pytest.mark.parametrize(("packed", "suffix"), [(False, "bin"), (False, "idx"), (False, "mask"), (True, "packs-32")])
def test_flipped_bits_are_never_trained_on(tmp_path: Path, packed: bool, suffix: str) -> None:
    prefix = write(tmp_path / "a", packed)
    sound = windows(open_whole(prefix, "lazy"))
    assert not any(isinstance(window, str) for window in sound)
    path = Path(f"{prefix}.{suffix}")
    original = path.read_bytes()
    random = np.random.default_rng(5)
    for _ in range(50):
        byte = int(random.integers(len(original)))
        damaged = bytearray(original)
        damaged[byte] ^= 1 << int(random.integers(8))
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=re.escape(f"{path}: ")):
            open_whole(prefix, "full")
        try:
            unchecked = open_whole(prefix, "off")
        except UserError:
            continue  # the header, or the end of the offsets
        assert len(windows(unchecked)) == len(sound)  # a window or one line, nothing else
        first = byte // BLOCK * BLOCK
        said = re.escape(f"{path}: bytes {first} to {min(first + BLOCK, len(original)) - 1} (")
        found = windows(open_whole(prefix, "lazy"))
        for window, before in zip(found, sound, strict=True):
            assert re.fullmatch(said + ".*", window) if isinstance(window, str) else window == before
        offsets = range(34 + 4 * 60, 34 + 12 * 60)
        if suffix != "idx" or byte in offsets:
            assert any(isinstance(window, str) for window in found)
    path.write_bytes(original)
    assert windows(open_whole(prefix, "full")) == windows(open_whole(prefix, "off")) == sound


def test_the_documents_of_a_damaged_block_are_named(tmp_path: Path) -> None:
    prefix = write(tmp_path / "a", False)
    starts = [Corpus.open(prefix).document_start(document) for document in range(61)]

    def holding(token: int) -> int:
        return next(document for document in range(60) if starts[document] <= token < starts[document + 1])

    # 64 bytes are 32 tokens of .bin, 512 bits of .mask; the offsets of .idx begin at byte 274
    spans = {
        "bin": (3, holding(96), holding(127)),
        "mask": (0, 0, holding(511)),
        "idx": (6, (384 - 274) // 8, (447 - 274) // 8),
    }
    for suffix, (block, first, last) in spans.items():
        path = Path(f"{prefix}.{suffix}")
        original = path.read_bytes()
        path.write_bytes(
            original[: block * 64 + 5] + bytes([original[block * 64 + 5] ^ 4]) + original[block * 64 + 6 :]
        )
        message = rf"a\.{suffix}: bytes {block * 64} to {block * 64 + 63} \(documents {first} to {last}\) are not"
        with pytest.raises(UserError, match=message):
            Corpus.open(prefix, "full")
        path.write_bytes(original)


def test_a_block_is_read_when_first_touched_and_once(tmp_path: Path) -> None:
    prefix = write(tmp_path / "a", False)
    source = open_whole(prefix, "lazy")
    read_window(source, 0, 0)
    path = tmp_path / "a.bin"
    data = bytearray(path.read_bytes())
    data[4] ^= 1  # within the window just read: trusted from then on
    data[200] ^= 1  # elsewhere
    with path.open("r+b") as file:
        file.write(data)
    read_window(source, 0, 0)
    with pytest.raises(UserError, match=r"a\.bin: bytes 192 to 255"):
        read_window(source, 0, 3)


def test_checksums_that_do_not_cover_a_file(tmp_path: Path) -> None:
    prefix = write(tmp_path / "a", False)
    path = tmp_path / "a.json"
    manifest = Manifest.model_validate_json(path.read_text())
    path.write_text(manifest.model_copy(update={"blocks": {**manifest.blocks, "idx": []}}).to_json())
    with pytest.raises(UserError, match=r"a\.idx: the manifest has checksums of 0 blocks where the file has "):
        Corpus.open(prefix)
    Corpus.open(prefix, "off")


@pytest.mark.parametrize("suffix", ["bin", "idx", "mask", "packs-32"])
@pytest.mark.parametrize("verify", ["off", "lazy", "full"])
def test_cut_files_are_named_at_opening(tmp_path: Path, suffix: str, verify: str) -> None:
    path = Path(f"{write(tmp_path / 'a', True)}.{suffix}")
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(UserError, match=rf"a\.{suffix}: \d+ bytes where"):
        open_whole(tmp_path / "a", verify)
