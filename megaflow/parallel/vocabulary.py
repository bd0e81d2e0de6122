"""How a vocabulary is cut over tensor-parallel ranks."""

from __future__ import annotations

VOCAB_MULTIPLE = 64
"""Each rank's vocabulary rows are padded to a multiple of this, for the matrix units."""


def vocabulary_rows(vocab_size: int, tp: int) -> int:
    """Rows of the vocabulary that each of `tp` ranks holds, padding included."""
    return -(-vocab_size // (VOCAB_MULTIPLE * tp)) * VOCAB_MULTIPLE
