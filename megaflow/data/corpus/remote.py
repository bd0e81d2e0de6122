"""Corpora read over the network, kept on this machine block by block.

Index and packs are fetched when a corpus is opened, tokens and masks when they are first touched, 16 MiB at a time,
into sparse files of full size. What lies there is never trusted: a block is held against the manifest's checksum once
in every process, and fetched (again) where it does not match. So files half-written, by whomever, do no harm,
processes and runs share them without asking each other, and `verify: off` is the same as `lazy`.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
from rich.console import Console
from rich.progress import track

from megaflow.data.corpus.blocks import BlockFile, Verify
from megaflow.data.corpus.corpus import Corpus
from megaflow.data.corpus.files import check_index, file_sizes
from megaflow.data.corpus.manifest import Manifest, parse_manifest
from megaflow.data.corpus.prefixes import filesystem
from megaflow.errors import UserError

ATTEMPTS = 5
"""Requests for the same bytes before giving up."""
BACKOFF_SECONDS = 0.5
"""Pause after the first request that failed; each further one is twice as long."""
SHOWN_BYTES = 64 * 1024 * 1024
"""Progress of a download of more than this is shown."""

T = TypeVar("T")


def default_cache_dir() -> Path:
    """Where fetched blocks are kept unless the config says otherwise."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "megaflow"


def fetch_manifest(prefix: str) -> Manifest | None:
    """The manifest of the corpus at a URL; None where there is none.

    Raises:
        UserError: it cannot be fetched, or is not a manifest.
    """
    url = f"{prefix}.json"
    content = _existing(url, lambda: filesystem(url)[0].cat_file(filesystem(url)[1]))
    return None if content is None else parse_manifest(content, url)


def check_remote_files(prefix: str, manifest: Manifest) -> None:
    """Check that the files of a corpus are there, of sizes that the manifest allows, without reading them.

    Raises:
        UserError: one is missing or of another size.
    """
    narrow, wide = file_sizes(manifest, 2), file_sizes(manifest, 4)
    for suffix in narrow:
        url = f"{prefix}.{suffix}"
        info = _existing(url, lambda url=url: filesystem(url)[0].info(filesystem(url)[1]))  # type: ignore[misc]
        if info is None:
            raise UserError(f"{url}: no such file, though the corpus's manifest names it; copy it there")
        if info.get("size") not in (None, narrow[suffix], wide[suffix]):
            raise UserError(f"{url}: {info['size']} bytes where {wide[suffix]} belong; copy it there again")


class RemoteCorpus(Corpus):
    """A corpus at a URL, opened for reading; every method raises UserError where it cannot be fetched.

    Args:
        prefix: the corpus's URL without suffix.
        manifest: the one that is there now; corpora that differ are kept apart.
        cache_dir: folder on this machine for what is fetched; large, and emptied by whoever likes when no run goes.
    """

    def __init__(
        self, prefix: str, manifest: Manifest, verify: Verify, sound: dict[str, bytearray], cache_dir: Path
    ) -> None:
        key = hashlib.sha256(f"{prefix}\n{manifest.fingerprint}".encode()).hexdigest()[:16]
        name = prefix.rpartition("/")[2]
        self._cached = cache_dir / f"{name}-{key}" / name
        super().__init__(prefix, manifest, verify, sound)

    def _check_files(self) -> np.dtype:
        self._file("idx")
        return check_index(self._path("idx"), self.manifest)

    def _path(self, suffix: str) -> Path:
        return Path(f"{self._cached}.{suffix}")

    def _file(self, suffix: str) -> BlockFile:
        size = file_sizes(self.manifest, 1 if suffix == "idx" else self._itemsize)[suffix]
        file = RemoteFile(f"{self.prefix}.{suffix}", size, self._path(suffix), *self._checksums(suffix))
        if self._verify == "full" or suffix not in ("bin", "mask"):
            file.fetch()
        return file


class RemoteFile(BlockFile):
    """A file at a URL whose blocks are fetched and checked before their data is used.

    Args:
        url, size: the file, and how many bytes it has.
        path: where its blocks are kept; other arguments are those of `BlockFile`.

    Raises:
        UserError: `path` cannot be made, or the manifest has no checksums of the file.
    """

    def __init__(
        self,
        url: str,
        size: int,
        path: Path,
        hashes: Sequence[str],
        block_bytes: int,
        verify: Verify,
        locate: Callable[[int, int], str],
        sound: bytearray,
    ) -> None:
        self.url = url
        if _make_sparse(path, size):
            sound[:] = bytes(len(sound))  # what was mapped before is gone
        super().__init__(path, hashes, block_bytes, "lazy", locate, sound)

    def fetch(self) -> None:
        """Fetch whatever is missing; where several processes want to, one does and the others find it done."""
        missing = [block for block, sound in enumerate(self._sound) if not sound]
        if not missing:
            return
        large = len(self.bytes) > SHOWN_BYTES and sys.stderr.isatty()
        with self.path.open("rb") as file:
            with contextlib.suppress(OSError):  # some network folders have no locks
                fcntl.flock(file, fcntl.LOCK_EX)
            for block in track(missing, f"fetching {self.url}", console=Console(stderr=True)) if large else missing:
                start, stop = self._span(block)
                self.check(start, stop)

    def _check_block(self, block: int) -> None:
        start, stop = self._span(block)
        if self._is_hole(start, stop) or not self._matches(block, self.bytes.data[start:stop]):
            where = f"bytes {start} to {stop - 1} ({self._locate(start, stop)})"
            data = _retried(f"{self.url}: {where}", lambda: self._fetched(block))
            self._keep(start, data)
            if not self._matches(block, self.bytes.data[start:stop]):  # it went into another file than is mapped
                raise UserError(f"{self.path}: was removed while it was read; start again, and keep it there")

    def _is_hole(self, start: int, stop: int) -> bool:
        """Whether the file has nothing in a range yet; where the file system cannot tell, the checksum does.

        What is one is not read: of a full tmpfs that would kill the reader (SIGBUS).
        """
        try:
            with self.path.open("rb") as file:
                return os.lseek(file.fileno(), start, os.SEEK_DATA) >= stop
        except OSError as error:
            return error.errno == errno.ENXIO  # nothing from there on

    def _fetched(self, block: int) -> bytes:
        start, stop = self._span(block)
        files, path = filesystem(self.url)
        data = files.cat_file(path, start=start, end=stop)
        if len(data) != stop - start:
            raise OSError(f"{len(data)} bytes came where {stop - start} belong")
        if not self._matches(block, data):
            raise OSError("they are not what was written, by their checksum")
        return bytes(data)

    def _keep(self, start: int, data: bytes) -> None:
        """Write a block that is known to be right; another process that does so too writes the same."""
        try:
            with self.path.open("r+b", buffering=0) as file:
                file.seek(start)
                rest = memoryview(data)
                while rest:
                    rest = rest[file.write(rest) :]
        except OSError as error:
            raise _unusable(self.path, error) from None


def _make_sparse(path: Path, size: int) -> bool:
    """A file of `size` bytes, which takes no room yet; one that is there keeps what it has.

    Returns:
        Whether it was not there.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            missing = os.fstat(file).st_size != size
            if missing:
                os.ftruncate(file, size)
        finally:
            os.close(file)
    except OSError as error:
        raise _unusable(path, error) from None
    return missing


def _unusable(path: Path, error: OSError) -> UserError:
    return UserError(f"{path}: cannot be written ({error.strerror}); make room there or give another data.cache_dir")


def _existing(url: str, request: Callable[[], T]) -> T | None:
    """What a request gives; None where the file is not there."""

    def answered() -> T | None:
        try:
            return request()
        except FileNotFoundError:
            return None

    return _retried(url, answered)


def _retried(what: str, request: Callable[[], T]) -> T:
    """What a request gives, sent again where it fails; UserError where it keeps failing."""
    for attempt in range(ATTEMPTS):
        try:
            return request()
        except (UserError, PermissionError, FileNotFoundError) as error:
            if isinstance(error, UserError):
                raise
            reason = f"{type(error).__name__}: {error}"
            break
        except Exception as error:  # of whatever package reads the URL
            reason = f"{type(error).__name__}: {error}, {ATTEMPTS} times"
            if attempt < ATTEMPTS - 1:
                time.sleep(BACKOFF_SECONDS * 2**attempt)
    raise UserError(f"{what} cannot be fetched ({' '.join(reason.split())}); mend the connection or the copy there")
