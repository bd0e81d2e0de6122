"""Damaged corpora and files of other tools: one line that says so, or right data; no crash, no hang, nothing else.

Thousands of seeded cases run in a forked child, which a crash or an endless loop cannot take the tests with.
"""

from __future__ import annotations

import functools
import json
import os
import resource
import shutil
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megaflow.data.corpus.corpus import Corpus
from megaflow.data.corpus.manifest import Manifest, TokenizerInfo
from megaflow.data.corpus.merge import MergeOptions, merge_corpora
from megaflow.data.corpus.writer import CorpusWriter
from megaflow.data.packing import IGNORE, pack
from megaflow.data.sources import open_source
from megaflow.data.tokenizer import load_tokenizer
from megaflow.errors import UserError
from megaflow.tools.data_inspect import _of_corpus
from tests.data.corpora import document_starts, finish, read_window

LENGTH = 32
SECONDS = 60
"""After which a batch of cases that takes a few seconds is taken to hang."""
MEMORY = 2 << 30
"""Bytes of address space that the child may take beyond its parent's."""
NUMBERS = [0, 1, 2, 3, -1, 255, 2**15, 2**16, 2**31 - 1, 2**31, 2**32, 2**40, 2**62, 2**63 - 1, -(2**63)]

Case = Callable[[np.random.Generator, Path], None]


def in_child(cases: int, case: Case, folder: Path) -> None:
    """Run `case` with generators 0 to `cases - 1` in a forked process; fail with the first that ends badly."""
    log, errors = folder / "log", folder / "errors"
    memory = Path("/dev/shm")  # disks are slow at small files
    work = Path(tempfile.mkdtemp(dir=memory if memory.is_dir() else None)) / "work"
    try:
        _in_child(cases, case, work, log, errors)
    finally:
        shutil.rmtree(work.parent, ignore_errors=True)


def _in_child(cases: int, case: Case, work: Path, log: Path, errors: Path) -> None:
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            os.fsync = lambda file: None  # slow, and nothing here outlives the test
            for seed in range(cases):
                log.write_text(str(seed))
                shutil.rmtree(work, ignore_errors=True)
                work.mkdir()
                case(np.random.default_rng(seed), work)
            status = 0
        except BaseException:
            errors.write_text(traceback.format_exc())
        finally:
            os._exit(status)
    end = time.monotonic() + SECONDS
    while (done := os.waitpid(pid, os.WNOHANG))[0] == 0 and time.monotonic() < end:
        time.sleep(0.02)
    if done[0] == 0:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        pytest.fail(f"case {log.read_text()} hangs")
    if done[1]:
        why = errors.read_text() if errors.exists() else f"status {done[1]}"
        pytest.fail(f"case {log.read_text()}: {why}")


def damage(random: np.random.Generator, path: Path) -> None:
    """Change a file: flip a bit, cut, insert, or write a telling number over others."""
    data = bytearray(path.read_bytes())
    for _ in range(random.integers(1, 3)):
        at = int(random.integers(len(data))) if data else 0
        if random.random() < 0.5:
            at = min(at, 40)  # headers are small
        match random.integers(5):
            case 0 if data:
                data[at] ^= 1 << int(random.integers(8))
            case 1:
                del data[at : at + int(random.choice([1, 2, 8, 1000]))]
            case 2:
                data[at:at] = random.bytes(int(random.choice([1, 2, 4, 8, 20])))
            case _:
                width = int(random.choice([1, 2, 4, 8]))
                number = int(random.choice(np.array(NUMBERS, dtype=object)))
                data[at : at + width] = (number % 2 ** (8 * width)).to_bytes(width, "little")
    path.write_bytes(bytes(data))


def damage_json(random: np.random.Generator, path: Path) -> None:
    """Change a value of a manifest, or its bytes."""
    if random.random() < 0.4:
        damage(random, path)
        return
    tree: dict[str, Any] = json.loads(path.read_text())
    place: Any = tree
    key = str(random.choice(list(tree)))
    while isinstance(place[key], dict) and random.random() < 0.8:
        place, key = place[key], str(random.choice(list(place[key])))
    values = [*NUMBERS, "", "x", None, [], {}, 1.5, True, [""], ["0" * 16], "text", "parallel"]
    place[key] = values[int(random.integers(len(values)))]
    path.write_text(json.dumps(tree))


def read(prefix: Path, verify: str) -> list[list[list[int]]]:
    """Every window of a corpus."""
    source = open_source("a", prefix, LENGTH, 3, verify)  # type: ignore[arg-type]
    windows = [read_window(source, 1, index) for index in range(min(source.num_windows, 1000))]
    for window in windows:
        assert window.tokens.min() >= 0
        assert window.tokens.max() < source.corpus.manifest.tokenizer.vocab_size
        assert window.labels.min() >= IGNORE
        assert window.lengths.sum() == LENGTH
        assert window.lengths.min() > 0
    return [[window.tokens.tolist(), window.labels.tolist(), window.lengths.tolist()] for window in windows]


def inspected(prefix: Path) -> list[str]:
    """The lines and rules that `data inspect` shows of all windows."""
    parts: list[Any] = list(_of_corpus(str(prefix), 10**6, None, 0, 0, 0, None))
    return [str(getattr(part, "title", part)) for part in parts]


def merged(prefix: Path, out: Path) -> list[list[int]]:
    """The documents of a corpus after a merge."""
    merge_corpora(out, [str(prefix)], MergeOptions())
    return documents(out)


def documents(prefix: Path) -> list[list[int]]:
    corpus = Corpus.open(prefix, "full")
    starts = document_starts(corpus)
    return [corpus.tokens(a, b).tolist() for a, b in pairwise(starts)]


def write(prefix: Path, model: Path, dtype: str, seq_length: int | None) -> Path:
    """40 documents with a mask, in blocks of 64 bytes."""
    random, tokenizer = np.random.default_rng(4), load_tokenizer(model)
    lengths, packs = random.integers(1, LENGTH, size=40).astype(np.int32), None
    with CorpusWriter(prefix, np.dtype(dtype)) as writer:
        if seq_length is not None:
            order, before = pack(lengths, seq_length)
            lengths, packs = lengths[order], len(before) - 1
            writer.write_packs(seq_length, before)
        total = int(lengths.sum())
        ids = random.integers(0, tokenizer.vocab_size, size=total)
        writer.add_documents(ids, lengths, random.integers(0, 2, size=total))
        manifest = Manifest(
            kind="text" if seq_length is None else "parallel",
            language="en",
            documents=0,
            tokens=0,
            loss_tokens=0,
            bytes=1,
            loss_bytes=1,
            tokenizer=TokenizerInfo.of(tokenizer),
            shuffle_seed=0,
            seq_length=seq_length,
            packs=packs,
            block_bytes=64,
        )
        finish(writer, manifest)
    return prefix


@pytest.fixture(autouse=True)
def tokenizer_read_once(sp_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading it takes longer than a case; another path is still refused."""
    load = functools.cache(load_tokenizer)
    monkeypatch.setattr("megaflow.data.corpus.merge.load_tokenizer", load)
    monkeypatch.setattr("megaflow.data.tokenizer.load_tokenizer", load)


def one_line(error: UserError) -> None:
    assert str(error)
    assert "\n" not in str(error)


@pytest.mark.parametrize(("dtype", "seq_length"), [("<u2", None), ("<i4", LENGTH)])
def test_damaged_corpora(tmp_path: Path, sp_model: Path, dtype: str, seq_length: int | None) -> None:
    (tmp_path / "sound").mkdir()
    sound = write(tmp_path / "sound" / "a", sp_model, dtype, seq_length)
    uses: dict[str, Callable[[Path], Any]] = {
        "lazy": lambda prefix: read(prefix, "lazy"),
        "full": lambda prefix: read(prefix, "full"),
        "off": lambda prefix: read(prefix, "off"),
        "inspect": inspected,
        "merge": lambda prefix: merged(prefix, prefix.with_name("out")),
    }
    right = {use: run(sound) for use, run in uses.items() if use != "merge"}
    right["merge"] = documents(sound)
    paths = sorted(sound.parent.iterdir())
    refused = dict.fromkeys(uses, 0)

    def case(random: np.random.Generator, work: Path) -> None:
        for path in paths:
            shutil.copy(path, work)
        path = work / str(random.choice([path.name for path in paths]))
        (damage_json if path.suffix == ".json" else damage)(random, path)
        use = str(random.choice(list(uses)))
        try:
            found = uses[use](work / "a")
        except UserError as error:
            one_line(error)
            assert not list(work.glob("*out*"))
            refused[use] += 1
            return
        if use != "off" and path.suffix != ".json":  # whoever changes the manifest changes the checksums
            assert found == right[use], f"{use} of a damaged {path.name}"

    in_child(900, case, tmp_path)


@pytest.mark.parametrize("kind", ["megatron", "datatrove"])
def test_damaged_files_of_other_tools(tmp_path: Path, sp_model: Path, kind: str) -> None:
    sound = write(tmp_path / "sound", sp_model, "<u2", None)
    right = documents(sound)
    (tmp_path / "files").mkdir()
    if kind == "megatron":
        shutil.copy(f"{sound}.bin", tmp_path / "files" / "a.bin")
        shutil.copy(f"{sound}.idx", tmp_path / "files" / "a.idx")
    else:
        shutil.copy(f"{sound}.bin", tmp_path / "files" / "a.ds")
        np.cumsum([len(ids) for ids in right]).astype("<u8").tofile(tmp_path / "files" / "a.ds.index")
    options = MergeOptions(tokenizer=str(sp_model), language="en")

    def case(random: np.random.Generator, work: Path) -> None:
        for path in (tmp_path / "files").iterdir():
            shutil.copy(path, work)
        damaged = work / str(random.choice(sorted(path.name for path in work.iterdir())))
        damage(random, damaged)
        try:
            report = merge_corpora(work / "out", [str(work / "a")], options)
        except UserError as error:
            one_line(error)
            assert not list(work.glob("*out*"))
            return
        found = documents(work / "out")  # there are no checksums: another id, or another cut, may pass
        assert report.documents == len(found)
        raw = next(path for path in work.iterdir() if path.suffix in (".bin", ".ds") and path.stem == "a").read_bytes()
        assert np.concatenate(found).astype("<u2").tobytes() == raw or damaged.suffix == ".idx"

    in_child(600, case, tmp_path)


def test_padding_is_in_the_vocabulary(tmp_path: Path, sp_model: Path) -> None:
    prefix = write(tmp_path / "a", sp_model, "<u2", LENGTH)
    manifest = json.loads(Path(f"{prefix}.json").read_text())
    manifest["tokenizer"]["eos_id"] = manifest["tokenizer"]["vocab_size"]
    Path(f"{prefix}.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"a\.json: not a corpus manifest: tokenizer: .*eos_id \d+ is outside"):
        Corpus.open(prefix)


def test_the_child_reports_a_crash_and_a_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.data.corpus.test_fuzz.SECONDS", 1)
    for case, why in (
        (lambda random, work: os.kill(os.getpid(), signal.SIGKILL), "case 0: status 9"),
        (lambda random, work: time.sleep(60), "case 0 hangs"),
        (lambda random, work: np.empty(2**40, dtype=np.uint8).fill(1), "MemoryError"),
    ):
        with pytest.raises(pytest.fail.Exception, match=why):
            in_child(1, case, tmp_path)
