"""Corpus files held block by block against the checksums of the corpus's manifest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import xxhash

from megaflow.errors import UserError

Verify = Literal["off", "lazy", "full"]
"""When blocks are checked: never, each before its data is first used, or all of them at opening."""


class BlockFile:
    """A memory-mapped file whose blocks are checked before their data is used.

    The first touch of a block reads the whole block, in the calling thread; from then on a check is one look-up.

    Args:
        path: a file of one byte or more, whose size is known to be right.
        hashes: xxh3-64 of each `block_bytes` of the file, in hexadecimal; ignored when `verify` is "off".
        locate: says which documents lie in a range of bytes, for the message.

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
    ) -> None:
        self.path = path
        self.bytes = np.asarray(np.memmap(path, dtype=np.uint8, mode="r"))  # slices of np.memmap itself are slow
        self._hashes = hashes
        self._block_bytes = block_bytes
        self._locate = locate
        blocks = -(-len(self.bytes) // block_bytes)
        self._sound = bytearray([verify == "off"]) * blocks
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

    def _check_block(self, block: int) -> None:
        start = block * self._block_bytes
        stop = min(start + self._block_bytes, len(self.bytes))
        if xxhash.xxh3_64_hexdigest(self.bytes.data[start:stop]) != self._hashes[block]:
            raise UserError(
                f"{self.path}: bytes {start} to {stop - 1} ({self._locate(start, stop)}) are not what was written; "
                "restore the file from a copy or prepare the corpus again"
            )
        self._sound[block] = True
