"""How many tokens' logits exist at a time; planned with as well, so without torch."""

from __future__ import annotations

BLOCK_BYTES = {"cpu": 2**26, "cuda": 2**28}
"""Of the logits of a block, about."""


def block_size(vocabulary: int, element: int, device: str) -> int:
    """Tokens of a block: a multiple of 128, which products like.

    vocabulary: columns on this rank; element: bytes of a logit; device: "cpu" or "cuda".
    """
    tokens = BLOCK_BYTES[device] // (vocabulary * element)
    return max(tokens // 128 * 128, 128)
