"""Corpus files held block by block against the checksums of the corpus's manifest."""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import xxhash

from megaflow.errors import UserError

Verify = Literal["off", "lazy", "full"]
"""When blocks are checked: never, each before its data is first used, or all of them at opening."""


@functools.cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    return libc


def map_file(path: Path) -> npt.NDArray[np.uint8]:
    """The bytes of a file, mapped read-only until the last view of them is gone; the file is of one byte or more.

    Unlike Python's `mmap` this keeps no file descriptor, of which a corpus of thousands of files would run out. A file
    that is cut while it is mapped kills its reader (SIGBUS), as with every mapping.

    Raises:
        OSError: it cannot be opened or mapped.
    """
    file = os.open(path, os.O_RDONLY)
    try:
        size = os.fstat(file).st_size
        address = _libc().mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, file, 0)
        if address == ctypes.c_void_p(-1).value:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(path))
    finally:
        os.close(file)
    memory = (ctypes.c_uint8 * size).from_address(address)
    weakref.finalize(memory, _libc().munmap, address, size).atexit = False  # threads may read to the very end
    array = np.frombuffer(memoryview(memory), dtype=np.uint8)
    array.flags.writeable = False
    return array


class BlockFile:
    """A memory-mapped file whose blocks are checked before their data is used.

    The first touch of a block reads the whole block, in the calling thread; from then on a check is one look-up.
    Threads may check at once: each that meets an unchecked block checks it itself.

    Args:
        path: a file of one byte or more, whose size is known to be right.
        hashes: xxh3-64 of each `block_bytes` of the file, in hexadecimal; ignored when `verify` is "off".
        locate: says which documents lie in a range of bytes, for the message.
        sound: one byte per block, 1 where it was found sound when the file was mapped before; kept up to date.

    Raises:
        UserError: `hashes` does not cover the file, or `verify` is "full" and a block is damaged.
    """

    def __init__(
        self,
        path: Path,
        hashes: Sequence[str],
        block_bytes: int,
        verify: Verify,
        locate: Callable[[int, int], str],
        sound: bytearray | None = None,
    ) -> None:
        self.path = path
        try:
            self.bytes = map_file(path)
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}") from None
        self._hashes = hashes
        self._block_bytes = block_bytes
        self._locate = locate
        blocks = -(-len(self.bytes) // block_bytes)
        self._sound = bytearray() if sound is None else sound
        if not self._sound:
            self._sound.extend(bytes([verify == "off"]) * blocks)
        if verify != "off" and len(hashes) != blocks:
            raise UserError(
                f"{path}: the manifest has checksums of {len(hashes)} blocks where the file has {blocks}; "
                "prepare the corpus again, or train without checks with data.verify: off"
            )
        if verify == "full":
            self.check(0, len(self.bytes))

    def check(self, start: int, stop: int) -> None:
        """Check the blocks of bytes `start .. stop - 1` that have not been checked yet.

        Raises:
            UserError: one of them is not what was written.
        """
        for block in range(start // self._block_bytes, (stop - 1) // self._block_bytes + 1):
            if not self._sound[block]:
                self._check_block(block)
                self._sound[block] = True

    def _check_block(self, block: int) -> None:
        start, stop = self._span(block)
        if not self._matches(block, self.bytes.data[start:stop]):
            raise UserError(
                f"{self.path}: bytes {start} to {stop - 1} ({self._locate(start, stop)}) are not what was written; "
                "restore the file from a copy or prepare the corpus again"
            )

    def _span(self, block: int) -> tuple[int, int]:
        """First and last (exclusive) byte of a block."""
        start = block * self._block_bytes
        return start, min(start + self._block_bytes, len(self.bytes))

    def _matches(self, block: int, data: bytes | memoryview) -> bool:
        return bool(xxhash.xxh3_64_hexdigest(data) == self._hashes[block])
