"""What each operation has to move and to compute at the least, and how long that takes at given ceilings.

Bytes count every input read once and every output written once. FLOP of attention and of the loss are those of their
matrix products, 2 for a multiply-add; those of the others are the additions, multiplications and exponentials of their
formulas for every number, so that they have an arithmetic intensity.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

BF16, FP32 = 2, 4
"""Bytes."""
PARAMETERS = 6_738_415_616
"""Of LLaMA-2 7B."""


@dataclass(frozen=True)
class Ceilings:
    """What the GPU reached in the same run."""

    copy_tb: float
    """TB/s of a copy within the GPU's memory, bytes read and written."""
    matmul_tflops: float
    """TFLOP/s of an 8192 x 8192 x 8192 bf16 matrix product of random numbers."""


@dataclass(frozen=True)
class Work:
    """What an operation does at the least."""

    bytes: float
    flops: float
    bound: str
    """Which of the two its floor is quoted in, `bytes` or `flops`."""

    def floor_ms(self, ceilings: Ceilings) -> float:
        """Milliseconds that nothing can be faster than: the longer of moving and computing, at the ceilings.

        Where the bound is bytes, only moving counts: arithmetic that is no matrix product has another ceiling.
        """
        moving = self.bytes / ceilings.copy_tb / 1e9
        return moving if self.bound == "bytes" else max(moving, self.flops / ceilings.matmul_tflops / 1e9)

    @property
    def intensity(self) -> float:
        """FLOP per byte."""
        return self.flops / self.bytes


def _moves(numbers: float, flops: float = 0.0, element: int = BF16) -> Work:
    return Work(element * numbers, flops, "bytes")


def rms_norm(tokens: int, hidden: int, residual: bool) -> dict[str, Work]:
    """x (and what is added) read, the result (and the sum) written; backward the gradients and the sum."""
    n = tokens * hidden
    forward, backward = _moves(2 * n, 4 * n), _moves(3 * n, 8 * n)
    if residual:
        forward, backward = _moves(4 * n, 5 * n), _moves(4 * n, 9 * n)
    return {"forward": forward, "backward": backward}


def rotary(tokens: int, hidden: int) -> dict[str, Work]:
    """Queries and keys read and written, as many heads of each; tables are small."""
    n = 2 * tokens * hidden
    return dict.fromkeys(("forward", "backward"), _moves(2 * n, 3 * n))


def swiglu(tokens: int, intermediate: int) -> dict[str, Work]:
    """Gate and up read, the result written; backward these and a gradient read, two gradients written."""
    n = tokens * intermediate
    return {"forward": _moves(3 * n, 5 * n), "backward": _moves(5 * n, 10 * n)}


def embedding(tokens: int, hidden: int, vocabulary: int) -> dict[str, Work]:
    """The gradient of all tokens' rows read, that of the whole weight written."""
    return {"backward": _moves((tokens + vocabulary) * hidden, tokens * hidden)}


def cross_entropy(tokens: int, vocabulary: int) -> dict[str, Work]:
    """Logits read and overwritten by their gradient."""
    n = tokens * vocabulary
    return {"forward + backward": _moves(2 * n, 6 * n)}


def shard_cross_entropy(tokens: int, columns: int) -> dict[str, Work]:
    """Of a rank: its logits read for the statistics; and read and overwritten, once these are exchanged."""
    n = tokens * columns
    return {"statistics": _moves(n, 4 * n), "gradient": _moves(2 * n, 3 * n)}


def linear_cross_entropy(tokens: int, hidden: int, vocabulary: int) -> dict[str, Work]:
    """Three products. Input and weight read, a bf16 and an fp32 gradient written; no logits."""
    moved = BF16 * hidden * (2 * tokens + vocabulary) + FP32 * hidden * vocabulary
    return {"forward + backward": Work(moved, 6.0 * tokens * hidden * vocabulary, "flops")}


def attention(lengths: Sequence[int], heads: int, head_dim: int) -> dict[str, Work]:
    """Causal attention inside documents of these lengths; half of a square counts. Two products, backward five."""
    pairs = sum(length * length for length in lengths) / 2
    product, n = 2.0 * pairs * head_dim * heads, sum(lengths) * heads * head_dim
    return {
        "forward": Work(BF16 * 4 * n, 2 * product, "flops"),
        "backward": Work(BF16 * 8 * n, 5 * product, "flops"),
    }


def adamw(parameters: int, remainder: bool) -> dict[str, Work]:
    """bf16 gradient and fp32 moments read, moments and bf16 parameter written, and the master read and written.

    That is fp32, or the parameter with an int16 remainder.
    """
    state = 2 * 2 * FP32
    return {"step": Work((10 if remainder else 12) * parameters + state * parameters, 15.0 * parameters, "bytes")}


def squared_norm(numbers: int, element: int) -> dict[str, Work]:
    """Every gradient read."""
    return {"norm": _moves(numbers, 2 * numbers, element)}
