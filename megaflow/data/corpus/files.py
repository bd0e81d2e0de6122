"""What the files of a corpus are called and how large they are: Megatron's `.bin/.idx` (MMIDIDX version 1), sidecars.

    <prefix>.bin        raw tokens, documents back to back
    <prefix>.idx        b"MMIDIDX\\0\\0", u64 version, u8 dtype code, u64 S sequences, u64 S + 1, then
                        S i32 lengths, S i64 byte offsets, S + 1 i64 document indices; one sequence per document
    <prefix>.json       the manifest, written last: a prefix without one is not a corpus
    <prefix>.mask       one bit per token, lowest bit first, 0 = no loss on it; absent when every bit would be 1
    <prefix>.packs-<S>  one u64 more than there are packs: how many documents lie before each pack

All numbers are little-endian.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megaflow.data.corpus.manifest import Manifest
from megaflow.errors import UserError

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
DTYPE_CODES: dict[int, np.dtype] = {4: np.dtype("<i4"), 8: np.dtype("<u2")}
UINT16_VOCABULARY = 65_500
"""Vocabularies below this size are stored in two bytes a token."""

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]


def token_dtype(vocab_size: int) -> np.dtype:
    """The type tokens of a vocabulary are stored in."""
    return DTYPE_CODES[8] if vocab_size < UINT16_VOCABULARY else DTYPE_CODES[4]


def corpus_path(prefix: str | Path, suffix: str) -> Path:
    """`<prefix>.<suffix>`, whatever dots the prefix has."""
    return Path(f"{prefix}.{suffix}")


def pack_suffix(seq_length: int) -> str:
    """Suffix of the pack index for sequences of `seq_length`."""
    return f"packs-{seq_length}"


def file_sizes(manifest: Manifest, itemsize: int) -> dict[str, int]:
    """Bytes of every file of a corpus by its suffix, the manifest apart."""
    sizes = {"idx": HEADER.size + 20 * manifest.documents + 8, "bin": manifest.tokens * itemsize}
    if "mask" in manifest.blocks:
        sizes["mask"] = (manifest.tokens + 7) // 8
    if manifest.seq_length is not None:
        sizes[pack_suffix(manifest.seq_length)] = ((manifest.packs or 0) + 1) * 8
    return sizes


def check_size(path: Path, expected: int) -> None:
    """Refuse a file that is missing or of another size. Raises UserError."""
    try:
        size = path.stat().st_size
    except OSError:
        raise UserError(f"{path}: no such file, though the corpus's manifest names it; prepare it again") from None
    if size != expected:
        raise UserError(f"{path}: {size} bytes where {expected} belong; it was cut or changed, prepare it again")


def check_index(path: Path, manifest: Manifest) -> np.dtype:
    """Check `.idx` without reading its arrays: header, size, last entries; the type of the tokens.

    Raises:
        UserError: it is not what the manifest says.
    """
    try:
        with path.open("rb") as file:
            header = file.read(HEADER.size)
            magic, version, code, documents, entries = HEADER.unpack(header.ljust(HEADER.size, b"\0"))
            if magic != MAGIC:
                raise UserError(f"{path}: not an MMIDIDX index")
            if version != 1 or code not in DTYPE_CODES:
                raise UserError(f"{path}: version {version}, dtype code {code}; read are version 1, codes 4 and 8")
            if entries != documents + 1 or documents != manifest.documents or documents == 0:
                raise UserError(
                    f"{path}: {documents} sequences and {entries - 1} documents where the manifest says "
                    f"{manifest.documents}; prepare it again"
                )
            check_size(path, HEADER.size + 12 * documents + 8 * entries)
            file.seek(HEADER.size + 4 * (documents - 1))
            last_length = int.from_bytes(file.read(4), "little", signed=True)
            file.seek(HEADER.size + 12 * documents - 8)
            last_offset = int.from_bytes(file.read(8), "little", signed=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    dtype = DTYPE_CODES[code]
    end = last_offset + last_length * dtype.itemsize
    if end != manifest.tokens * dtype.itemsize or manifest.tokens < documents:
        raise UserError(f"{path}: documents end at byte {end} of {manifest.tokens * dtype.itemsize}; prepare it again")
    return dtype
