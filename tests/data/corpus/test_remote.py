"""Corpora at URLs: fetched block by block, each checked before it is used, whatever the network and kills do."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from megaflow.data.corpus import remote, shards
from megaflow.data.corpus.manifest import Manifest
from megaflow.data.corpus.remote import RemoteFile
from megaflow.data.corpus.shards import open_corpus, open_heldout_corpus
from megaflow.errors import UserError
from megaflow.tools.cli import app
from tests.data.corpora import TOKENIZER
from tests.data.corpus.test_shards import LENGTH, every_window, sources_of, write_shard
from tests.distributed import run_ranks

URL = "memory://bucket/zh"


class Network:
    """What happens to requests for bytes of the memory file system: `spoil` changes an answer or raises."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, int | None]] = []
        self.spoil: Callable[[str, bytes], bytes] = lambda path, data: data

    def blocks(self, suffix: str) -> int:
        """Blocks of the files of a suffix asked for so far."""
        return sum(path.endswith(suffix) for path, _ in self.requests)


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> Iterator[Network]:
    network, sound = Network(), MemoryFileSystem.cat_file

    def cat_file(files: MemoryFileSystem, path: str, start: int | None = None, end: int | None = None) -> bytes:
        network.requests.append((path, start))
        return network.spoil(path, sound(files, path, start, end))

    monkeypatch.setattr(MemoryFileSystem, "cat_file", cat_file)
    monkeypatch.setattr(remote, "BACKOFF_SECONDS", 0)
    yield network
    MemoryFileSystem.store.clear()


def upload(prefix: str, url: str = URL) -> None:
    """Copy a corpus's files to a URL of the memory file system."""
    path, name = Path(prefix), url.rpartition("/")[2]
    for file in path.parent.glob(f"{path.name}.*"):
        suffix = file.name.removeprefix(path.name)
        MemoryFileSystem().pipe_file(f"{url.rpartition('/')[0]}/{name}{suffix}", file.read_bytes())


def windows(paths: str | list[str], cache: Path | None, verify: str = "lazy") -> list[object]:
    corpus = open_corpus(paths, verify, cache)  # type: ignore[arg-type]
    return [every_window(source) for source in sources_of(corpus)]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("verify", ["off", "lazy", "full"])
def test_windows_are_those_of_the_files(tmp_path: Path, network: Network, packed: bool, verify: str) -> None:
    prefix = write_shard(tmp_path / "zh", [9, 4, 11, 8, 12, 7], 0, LENGTH if packed else None)
    write_shard(tmp_path / "zh.heldout", [5, 7], 1, LENGTH if packed else None)
    upload(prefix)
    cache = tmp_path / "cache"
    corpus = open_corpus(URL, verify, cache)  # type: ignore[arg-type]
    assert network.blocks(".bin") == (4 if verify == "full" else 0)  # 102 bytes in blocks of 32
    assert windows(URL, cache) == windows(prefix, None)
    assert (network.blocks(".bin"), network.blocks(".mask")) == (4, 1)
    requests = len(network.requests)
    assert windows(f"file://{prefix}", cache) == windows(URL, cache, verify)
    assert len(network.requests) == requests + 1  # the manifest
    assert corpus.manifest == open_corpus(prefix).manifest
    assert (str(corpus.prefix), corpus.prefixes) == (URL, [URL])
    held = open_heldout_corpus(URL, cache_dir=cache)
    assert held is not None
    assert held.num_documents == 2
    assert open_heldout_corpus(f"{URL}.heldout", cache_dir=cache) is None


def test_a_block_is_fetched_when_touched(tmp_path: Path, network: Network) -> None:
    upload(write_shard(tmp_path / "zh", [12] * 10, 0))
    corpus = open_corpus(URL, "lazy", tmp_path / "cache")
    corpus.tokens(33, 40)
    assert [start for path, start in network.requests if path.endswith(".bin")] == [64]
    path = next((tmp_path / "cache").rglob("zh.bin"))
    assert path.stat().st_size == 240


def test_the_default_cache(tmp_path: Path, network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    upload(write_shard(tmp_path / "zh", [12], 0))
    open_corpus(URL)
    assert list((tmp_path / "xdg" / "megaflow").iterdir())


def flaky(times: int, spoil: Callable[[bytes], bytes]) -> Callable[[str, bytes], bytes]:
    """Spoils the first answers of each request for a part of `.bin`."""
    left: dict[bytes, int] = {}

    def answer(path: str, data: bytes) -> bytes:
        if not path.endswith(".bin") or left.setdefault(data, times) == 0:
            return data
        left[data] -= 1
        return spoil(data)

    return answer


def broken(data: bytes) -> bytes:
    raise ConnectionResetError("connection\nreset by peer")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (broken, "ConnectionResetError: connection reset by peer, 5 times"),
        (lambda data: data[:-1], "31 bytes came where 32 belong"),
        (lambda data: data[:3] + bytes([data[3] ^ 1]) + data[4:], "not what was written, by their checksum"),
    ],
)
def test_what_a_network_spoils_is_asked_for_again(
    tmp_path: Path, network: Network, spoil: Callable[[bytes], bytes], message: str
) -> None:
    prefix = write_shard(tmp_path / "zh", [9, 4, 11, 8, 12, 20], 0)
    upload(prefix)
    network.spoil = flaky(remote.ATTEMPTS, spoil)
    corpus = open_corpus(URL, "lazy", tmp_path / "cache")
    with pytest.raises(UserError, match=rf"^memory://bucket/zh.bin: bytes 0 to 31 \(documents 0 to 2\) .*{message}"):
        corpus.tokens(0, 5)
    assert next((tmp_path / "cache").rglob("zh.bin")).read_bytes().count(0) == 128  # nothing of it was kept
    network.spoil = flaky(remote.ATTEMPTS - 1, spoil)
    assert windows(URL, tmp_path / "cache") == windows(prefix, None)


def test_what_is_missing_is_said_at_once(tmp_path: Path, network: Network) -> None:
    prefix = write_shard(tmp_path / "zh", [9, 4], 0)
    cache = tmp_path / "cache"
    with pytest.raises(UserError, match=r"memory://bucket/zh\.json: no such corpus manifest"):
        open_corpus(URL, "lazy", cache)
    upload(prefix)
    files = MemoryFileSystem()
    files.pipe_file("memory://bucket/zh.mask", b"123")
    with pytest.raises(UserError, match=r"memory://bucket/zh\.mask: 3 bytes where 2 belong"):
        open_corpus(URL, "lazy", cache)
    files.rm("memory://bucket/zh.bin")
    with pytest.raises(UserError, match=r"memory://bucket/zh\.bin: no such file"):
        open_corpus(URL, "lazy", cache)
    network.spoil = lambda path, data: (_ for _ in ()).throw(PermissionError("access denied"))
    requests = len(network.requests)
    with pytest.raises(UserError, match=r"zh\.json cannot be fetched \(PermissionError: access denied\)"):
        open_corpus(URL, "lazy", cache)
    assert len(network.requests) == requests + 1
    network.spoil = lambda path, data: b"<html>"
    with pytest.raises(UserError, match=r"memory://bucket/zh\.json: not a corpus manifest"):
        open_corpus(URL, "lazy", cache)
    with pytest.raises(UserError, match=r"s3://bucket/zh\.json: its protocol needs a package: .*s3fs"):
        open_corpus("s3://bucket/zh", "lazy", cache)
    with pytest.raises(UserError, match=r"no file matches memory://bucket/fr-\*\.json"):
        open_corpus("memory://bucket/fr-*", "lazy", cache)


def test_without_checksums_nothing_is_fetched(tmp_path: Path, network: Network) -> None:
    upload(write_shard(tmp_path / "zh", [9, 4], 0))
    files = MemoryFileSystem()
    manifest = Manifest.model_validate_json(files.cat_file("memory://bucket/zh.json"))
    bare = manifest.model_copy(update={"blocks": {"idx": manifest.blocks["idx"]}})
    files.pipe_file("memory://bucket/zh.json", bare.to_json().encode())
    with pytest.raises(UserError, match=r"zh\.bin: the manifest has checksums of 0 blocks"):
        open_corpus(URL, "off", tmp_path / "cache")


def test_a_changed_corpus_is_kept_apart(tmp_path: Path, network: Network) -> None:
    first, second = (write_shard(tmp_path / name, [9, 4, 11, 8], seed) for seed, name in enumerate("ab"))
    upload(first)
    opened = sources_of(open_corpus(URL, "lazy", tmp_path / "cache"))[0]
    assert windows(URL, tmp_path / "cache") == windows(first, None)
    upload(second)
    assert windows(URL, tmp_path / "cache") == windows(second, None)
    assert len(list((tmp_path / "cache").iterdir())) == 2
    assert every_window(opened) == windows(first, None)[0]
    opened = sources_of(open_corpus(URL, "lazy", tmp_path / "fresh"))[0]
    upload(first)  # under a run that has read nothing yet
    with pytest.raises(UserError, match="not what was written, by their checksum"):
        every_window(opened)


def test_a_spoilt_cache_is_mended(tmp_path: Path, network: Network) -> None:
    prefix = write_shard(tmp_path / "zh", [9, 4, 11, 8, 12, 20], 0)
    upload(prefix)
    expected = windows(URL, tmp_path / "cache")
    (folder,) = (tmp_path / "cache").iterdir()
    for spoil in (
        lambda b: b[:40] + b"\xff" + b[41:],
        lambda b: b[:33],
        lambda b: b + b"more",
        lambda b: bytes(len(b)),
    ):
        for path in folder.iterdir():
            path.write_bytes(spoil(path.read_bytes()))
        assert windows(URL, tmp_path / "cache", "off") == expected
    for path in folder.iterdir():
        path.unlink()
    assert windows(URL, tmp_path / "cache") == expected


def test_a_cache_that_is_emptied_under_a_run_gives_no_zeros(tmp_path: Path, network: Network) -> None:
    prefixes = [write_shard(tmp_path / f"zh-{i}", [40, 40], i) for i in range(2)]
    for i, prefix in enumerate(prefixes):
        upload(prefix, f"memory://bucket/zh-{i}")
    expected = open_corpus(prefixes).tokens(0, 160).tolist()

    def read() -> tuple[list[bool], list[str]]:
        """Threads fetch manifests, so that this is for a child process."""
        shards.MAPPED_SHARDS = 1
        corpus = open_corpus("memory://bucket/zh-*", "lazy", tmp_path / "cache")
        same, said = [], []
        for at in (0, 80, 0):  # of either shard, and of the first one mapped again
            for path in (tmp_path / "cache").glob("*/*.bin"):
                path.unlink()
            same.append(corpus.tokens(at, at + 9).tolist() == expected[at : at + 9])
        (path,) = (tmp_path / "cache").glob("zh-0-*/*.bin")
        path.unlink()
        for _ in range(2):
            try:
                corpus.tokens(40, 80)
            except UserError as error:
                said.append(str(error))
            path.write_bytes(bytes(160))
        return same, said

    ((same, (gone, replaced)),) = run_ranks(1, read)
    assert same == [True] * 3
    assert "zh-0.bin: cannot be written (No such file or directory)" in gone
    assert "zh-0.bin: was removed while it was read; start again" in replaced


def test_a_full_disk_is_one_line(tmp_path: Path, network: Network) -> None:
    upload(write_shard(tmp_path / "zh", [40], 0))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written \(Not a directory\); make room there or give another data"):
        open_corpus(URL, "lazy", tmp_path / "file")
    corpus = open_corpus(URL, "lazy", tmp_path / "cache")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50, limits[1]))  # the second block ends in the middle
    try:
        with pytest.raises(UserError, match=r"zh\.bin: cannot be written \(File too large\); make room there"):
            corpus.tokens(16, 32)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert corpus.tokens(0, 40).tolist() == open_corpus(str(tmp_path / "zh")).tokens(0, 40).tolist()


def test_what_is_not_there_yet_is_not_read(tmp_path: Path, network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    upload(write_shard(tmp_path / "zh", [40], 0))
    corpus = open_corpus(URL, "lazy", tmp_path / "cache")
    compared, matches = [], RemoteFile._matches

    def seen(file: RemoteFile, block: int, data: bytes | memoryview) -> bool:
        compared.append(type(data))
        return matches(file, block, data)

    monkeypatch.setattr(RemoteFile, "_matches", seen)
    corpus.tokens(0, 9)
    assert compared == [bytes, memoryview]  # what came, then what was kept


def test_a_kill_in_the_middle_of_a_block(tmp_path: Path, network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    prefix = write_shard(tmp_path / "zh", [9, 4, 11, 8, 12, 20], 0)
    upload(prefix)
    for written in (0, 7, 31):

        def keep(file: RemoteFile, start: int, data: bytes, written: int = written) -> None:
            with file.path.open("r+b", buffering=0) as half:
                half.seek(start)
                half.write(data[:written])
            os.kill(os.getpid(), signal.SIGKILL)

        pid = os.fork()
        if pid == 0:
            monkeypatch.setattr(RemoteFile, "_keep", keep)
            windows(URL, tmp_path / "cache")
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == signal.SIGKILL
    assert windows(URL, tmp_path / "cache") == windows(prefix, None)


def test_processes_share_a_cache(tmp_path: Path, network: Network) -> None:
    prefixes = [write_shard(tmp_path / f"zh-{i}", [9, 4, 11, 8, 12, 20], i) for i in range(3)]
    for i, prefix in enumerate(prefixes):
        upload(prefix, f"memory://bucket/zh-{i}")
    expected = windows(prefixes, None)

    def read() -> tuple[bool, bool, int]:
        """Threads fetch manifests, so that this is for a child process."""
        listed = windows("memory://bucket/zh-*", tmp_path / "cache")
        from_files = windows([f"file://{prefix}" for prefix in prefixes], tmp_path / "cache", "full")
        return listed == expected, from_files == expected, network.blocks(".bin")

    for _ in range(3):
        assert [result[:2] for result in run_ranks(2, read)] == [(True, True)] * 2
    assert run_ranks(1, read) == [(True, True, 0)]
    manifest = Manifest.model_validate_json(Path(f"{prefixes[1]}.json").read_text())
    odd = manifest.model_copy(update={"tokenizer": TOKENIZER.model_copy(update={"probe": "x"})})
    MemoryFileSystem().pipe_file("memory://bucket/zh-1.json", odd.to_json().encode())

    def refused() -> str:
        try:
            open_corpus("memory://bucket/zh-*", "lazy", tmp_path / "cache")
        except UserError as error:
            return str(error)
        return "opened"

    assert "bucket/zh-1: its tokenizer (t.model) has another probe" in run_ranks(1, refused)[0]


def test_corpora_are_not_prepared_at_urls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = tmp_path / "a.txt"
    text.write_text("words\n")
    monkeypatch.chdir(tmp_path)
    command = ["prepare", "s3://bucket/zh", str(text), "--tokenizer", str(text), "--language", "zh"]
    with pytest.raises(UserError, match="corpora are written to local folders"):
        app(command, standalone_mode=False)
