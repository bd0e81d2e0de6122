"""Weights of a group's sources from their sizes, in exact integers: computed once and stored in the run's ledger."""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Context, Decimal
from fractions import Fraction

from megaflow.data.sampler.schedule import integer_weights

DIGITS = 50  # of a power: far more than the 32 bits that are kept, so every host floors to the same integer


def temperature(sizes: Sequence[int], tau: Decimal) -> list[int]:
    """Weights proportional to `size ** (1 / tau)`, of sum `ONE`; a size of 0 gets 0.

    `tau` = 1 is proportional, larger is flatter (Arivazhagan et al., arXiv 1907.05019).
    """
    context = Context(prec=DIGITS)
    exponent = context.divide(Decimal(1), tau)
    return integer_weights([Fraction(context.power(Decimal(n), exponent)) if n else Fraction(0) for n in sizes])


def unimax(limits: Sequence[Fraction], budget: int) -> list[int]:
    """UniMax (Chung et al., arXiv 2304.09151): a budget shared alike, but to no source more than its limit.

    From the smallest limit up each source gets `min(remaining / left, limit)`. Where the budget exceeds all limits
    together, weights are proportional to the limits.

    Args:
        limits: most sequences, or tokens, that each source may give; at least one above 0.
        budget: those of the whole group.

    Returns:
        Weights of sum `ONE`.
    """
    remaining, shares = Fraction(max(1, budget)), [Fraction(0)] * len(limits)
    ascending = sorted(range(len(limits)), key=lambda k: (limits[k], k))
    for place, k in enumerate(ascending):
        shares[k] = min(remaining / (len(limits) - place), Fraction(limits[k]))
        remaining -= shares[k]
    return integer_weights(shares)
