"""Which corpora a source's path means: a prefix, a URL, a pattern of either, or a list of those."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megaflow.errors import UserError

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

FILE_SUFFIXES = (".bin", ".idx", ".json", ".mask", ".ds.index", ".ds")
"""Of files that are parts of a corpus."""
Paths = str | Path | Sequence[str]
"""A prefix, URL or pattern of them, or a list of those."""


def is_url(prefix: str | Path) -> bool:
    """Whether a prefix is read through fsspec, as in s3://bucket/corpora/zh."""
    return "://" in str(prefix)


def is_pattern(prefix: str | Path) -> bool:
    """Whether a prefix stands for every corpus whose name matches, rather than for one with such a name."""
    return any(sign in str(prefix) for sign in "*?[") and not Path(f"{prefix}.json").exists()


def filesystem(url: str) -> tuple[AbstractFileSystem, str]:
    """The file system of a URL, and the path in it. fsspec keeps one for each process and thread.

    Raises:
        UserError: the protocol is unknown, or its package is not installed.
    """
    from fsspec.core import url_to_fs

    try:
        return url_to_fs(url)
    except ImportError as error:
        raise UserError(f"{url}: its protocol needs a package: {_line(error)}") from None
    except Exception as error:  # of any package
        raise UserError(f"{url}: cannot be opened ({_line(error)}); give a URL that fsspec knows") from None


def expand(paths: Paths) -> list[str]:
    """The prefixes meant, in order; those of a pattern are sorted by name, without held-out corpora.

    Raises:
        UserError: a pattern that nothing matches, or a file of a corpus in place of its prefix.
    """
    found: list[str] = []
    for entry in [str(paths)] if isinstance(paths, str | Path) else paths:
        found += _matching(entry) if is_pattern(entry) else [_prefix(str(entry))]
    return found


def _prefix(entry: str) -> str:
    suffix = next((suffix for suffix in FILE_SUFFIXES if entry.endswith(suffix)), None)
    if suffix and Path(entry).is_file() and not Path(f"{entry}.json").exists():
        raise UserError(f"{entry}: is a file of a corpus; give its prefix, {entry.removesuffix(suffix)}")
    return entry


def _matching(pattern: str) -> list[str]:
    if is_url(pattern):
        files, path = filesystem(pattern)
        try:
            names = [files.unstrip_protocol(str(name)) for name in files.glob(f"{path}.json")]
        except Exception as error:
            raise UserError(f"{pattern}: cannot be listed ({_line(error)}); name the corpora one by one") from None
    else:
        names = glob.glob(f"{pattern}.json")
    prefixes = sorted(name.removesuffix(".json") for name in names)
    kept = [p for p in prefixes if not p.endswith(".heldout") and not p.rpartition("/")[2].startswith(".")]
    if not kept:
        raise UserError(f"no file matches {pattern}.json; write corpora with `megaflow prepare`, or mend the pattern")
    return kept


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
