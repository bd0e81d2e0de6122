"""The manifest beside a corpus: what it holds, how it was made, and checksums of its files."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Literal

import xxhash
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from megaflow.data.tokenizer import Tokenizer
from megaflow.errors import UserError

BLOCK_BYTES = 16 * 1024 * 1024
"""Bytes of a corpus file under one checksum."""

SUMMED = (
    *("documents", "tokens", "loss_tokens", "bytes", "loss_bytes"),
    *("heldout_documents", "bad_records", "too_long", "duplicates"),
)
"""Fields of manifests that add up where corpora are read as one."""


class TokenizerInfo(BaseModel):
    """Which tokenizer made a corpus."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    library: str
    version: str
    sha256: str
    """Of the tokenizer's file."""
    probe: str
    """Hash of its ids on fixed multilingual strings."""
    vocab_size: int
    bos_id: int | None = None
    eos_id: int
    path: str

    @model_validator(mode="after")
    def _check_end(self) -> TokenizerInfo:
        if not 0 <= self.eos_id < self.vocab_size:  # it is what windows are padded with
            raise ValueError(f"eos_id {self.eos_id} is outside the vocabulary of {self.vocab_size}")
        return self

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> TokenizerInfo:
        """Describe `tokenizer`."""
        return cls(
            library=tokenizer.library,
            version=tokenizer.version,
            sha256=tokenizer.sha256,
            probe=tokenizer.probe,
            vocab_size=tokenizer.vocab_size,
            bos_id=tokenizer.bos_id,
            eos_id=tokenizer.eos_id,
            path=str(tokenizer.path),
        )


class EncoderInfo(BaseModel):
    """Which library encoded the corpus in place of the tokenizer's own."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    library: str
    version: str
    compared: int
    """Documents that the tokenizer itself encoded too, all with the same ids."""


class Manifest(BaseModel):
    """Everything about a corpus that its arrays do not say.

    Loss counts are those of whole documents: the first token of a document is never a label, and tokens masked out by
    the preparation carry none. `bytes` counts the UTF-8 bytes of the documents as trained on (templates included),
    `loss_bytes` those of them that the loss covers, so nats / (loss_bytes * ln 2) are exact bits per byte.
    """

    model_config = ConfigDict(extra="forbid")

    format: Literal[1] = 1
    kind: Literal["text", "parallel", "instruction"]
    language: str
    documents: int
    tokens: int
    loss_tokens: int
    bytes: int
    loss_bytes: int
    tokenizer: TokenizerInfo
    encoder: EncoderInfo | None = None
    """None where the tokenizer's own library encoded."""
    shuffle_seed: int
    seq_length: int | None = None
    """Length the examples are packed for; None for a text corpus."""
    packs: int | None = None
    template: str | None = None
    loss: Literal["all", "response"] = "all"
    plain_fraction: float | None = None
    """Share of instruction examples written without the template."""
    heldout: float = 0.0
    """Share of documents held out by the preparation."""
    heldout_documents: int = 0
    bad_records: int = 0
    """Input records that could not be used."""
    too_long: int = 0
    """Examples left out because they are longer than `seq_length`."""
    duplicates: int = 0
    """Documents left out because an earlier one has the same text."""
    block_bytes: int = Field(default=BLOCK_BYTES, ge=1)
    blocks: dict[str, list[str]] = {}
    """xxh3-64 of each `block_bytes` of each file, by the file's suffix."""
    command: str = ""
    """The command line that wrote the corpus."""

    @property
    def fingerprint(self) -> str:
        """Identity of the corpus's content: the same for the same data, wherever and however often it is prepared."""
        content = json.dumps([self.kind, self.tokenizer.sha256, sorted(self.blocks.items())])
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def to_json(self) -> str:
        """The file's text."""
        return self.model_dump_json(indent=2, exclude_none=True) + "\n"


def read_manifest(path: Path) -> Manifest:
    """Read and check a manifest.

    Raises:
        UserError: the file is missing, is not JSON or lacks a field.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: no such corpus manifest; `megaflow prepare` writes one last") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    return parse_manifest(content, str(path))


def parse_manifest(content: bytes, name: str) -> Manifest:
    """A manifest from its file's content; `name` says in messages where it came from.

    Raises:
        UserError: it is not JSON or lacks a field.
    """
    try:
        return Manifest.model_validate_json(content.decode())
    except UnicodeDecodeError:
        raise UserError(f"{name}: cannot be read: it is not UTF-8 text") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise UserError(f"{name}: not a corpus manifest: {where}: {first['msg']}") from error


def hash_blocks(path: Path, block_bytes: int = BLOCK_BYTES) -> list[str]:
    """xxh3-64 in hexadecimal of each block of a file."""
    with path.open("rb") as file:
        return [xxhash.xxh3_64_hexdigest(block) for block in iter(lambda: file.read(block_bytes), b"")]
