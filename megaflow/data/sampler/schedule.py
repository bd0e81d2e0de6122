"""How the weights of language groups move along a global clock: compiled once to integers, then exact everywhere.

A schedule is a list of knots (clock value, weights, pacing). The pacing of a knot says how the weights travel from the
previous knot to it, `u` being the fraction of the way covered on the clock and `p` the fraction covered in weights:

    linear     p = u
    const      the previous weights hold up to this knot and change there at once
    step       three equal stairs: p = 0, then 1/2 from a third of the way, then 1 from two thirds
    cosine     p = (1 - cos(pi u)) / 2: slow at both ends
    root       p = sqrt(u): fast at first (Platanios et al., "Competence-based curriculum learning", 2019)
    geometric  each weight changes by a constant ratio, `a ** (1 - u) * b ** u`, and the sum is made 1 again

Curves become at most 256 linear pieces when a run is created. The compiled knots are stored with the run, so another
machine's floating point never matters.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from typing import Any

ONE = 2**32
CLOCKS = ("steps", "sequences", "tokens", "documents")
PACINGS = ("const", "linear", "cosine", "step", "root", "geometric")
MAX_KNOTS = 4096
PIECES = 256  # linear pieces of one curve: a cosine is within 2e-5 of the way, a root within 0.1 %

Number = str | float | int | Decimal


@dataclass(frozen=True)
class Knot:
    """The weights of all groups, in group order, at the clock value `at`, and how they travel there (`PACINGS`)."""

    at: int | Decimal
    weights: Sequence[Number]
    pacing: str = "linear"


@dataclass(frozen=True)
class CompiledSchedule:
    """Integer weights on a clock: linear between the knots, constant before the first and after the last.

    Attributes:
        clock: one of `CLOCKS`, read before the step.
        knots: `(x, (W_1, ..., W_K))` with x ascending and each sum of weights equal to `ONE`.
    """

    clock: str
    knots: tuple[tuple[int, tuple[int, ...]], ...]

    def __post_init__(self) -> None:
        if self.clock not in CLOCKS:
            raise ValueError(f"clock {self.clock!r} is not one of {', '.join(CLOCKS)}")
        if not 1 <= len(self.knots) <= MAX_KNOTS:
            raise ValueError(f"a schedule has 1 to {MAX_KNOTS} knots, not {len(self.knots)}")
        positions = [x for x, _ in self.knots]
        if positions != sorted(set(positions)) or positions[0] < 0 or positions[-1] >= 2**62:
            raise ValueError("knots must ascend on the clock, from 0 or more and below 2**62")
        for x, weights in self.knots:
            if len(weights) != len(self.knots[0][1]) or min(weights) < 0 or sum(weights) != ONE:
                raise ValueError(f"the weights of the knot at {x} are not {len(self.knots[0][1])} that sum to {ONE}")

    def weights(self, x: int) -> list[int]:
        """The weights at clock value `x`, in units of 1 / `ONE`; their sum is `ONE`."""
        after = bisect_right(self.knots, x, key=lambda knot: knot[0])
        if after == 0 or after == len(self.knots):
            return list(self.knots[max(after - 1, 0)][1])
        (x0, start), (x1, end) = self.knots[after - 1], self.knots[after]
        weights = [a + (b - a) * (x - x0) // (x1 - x0) for a, b in zip(start, end, strict=True)]
        sums = [a + b for a, b in zip(start, end, strict=True)]
        weights[sums.index(max(sums))] += ONE - sum(weights)
        return weights

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dict that `from_json` reads back."""
        return {"clock": self.clock, "knots": [[x, list(weights)] for x, weights in self.knots]}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> CompiledSchedule:
        """Read `to_json`'s dict; raises ValueError, KeyError or TypeError where it is not one."""
        return cls(data["clock"], tuple((int(x), tuple(int(w) for w in weights)) for x, weights in data["knots"]))


def weights_from_decimals(values: Sequence[Number]) -> list[int]:
    """Numbers of any scale, taken as exact decimals, as integer weights that sum to `ONE`.

    Each is `floor(v * ONE / sum)`; what flooring leaves goes to the largest (ties: the first).

    Raises:
        ValueError: no values, all zero, a negative value or one that is not a finite number.
    """
    return integer_weights(_exact_values(values))


def compile_knots(clock: str, knots: Sequence[Knot]) -> CompiledSchedule:
    """Turn configured knots into integer linear ones. The first knot's pacing has nothing to travel and is ignored.

    Raises:
        ValueError: an unknown clock or pacing, knots that do not ascend or differ in their number of weights, weights
            that `weights_from_decimals` refuses, or a geometric pacing from or to a weight of 0.
    """
    if not knots:
        raise ValueError("a schedule needs at least one knot")
    points: dict[int, list[Fraction]] = {}
    previous: tuple[int, list[Fraction]] | None = None
    for knot in knots:
        if knot.pacing not in PACINGS:
            raise ValueError(f"pacing {knot.pacing!r} is not one of {', '.join(PACINGS)}")
        x, weights = _clock_value(knot.at), _normalised(_exact_values(knot.weights))
        if previous is not None:
            if x <= previous[0]:
                raise ValueError(f"knots must ascend on the clock: {x} comes after {previous[0]}")
            if len(weights) != len(previous[1]):
                raise ValueError(f"the knot at {x} has {len(weights)} weights, the one before {len(previous[1])}")
            points.update(_travel(previous, (x, weights), knot.pacing))
        points[x] = weights
        previous = x, weights
    return CompiledSchedule(clock, tuple((x, tuple(integer_weights(points[x]))) for x in sorted(points)))


def chatflow(
    clock: str, initial: Sequence[Number], final: Sequence[Number], t_grow: int | Decimal, lambda0: Number = 0
) -> CompiledSchedule:
    """The ChatFlow schedule: `w(t) = (1 - l) initial + l final`, `l = min(1, lambda0 + (1 - lambda0) t / t_grow)`.

    One run from unsupervised pre-training to supervised fine-tuning (ChatFlow, arXiv 2405.10626): English and parallel
    text first, the new language and instructions rising, then the final mix is held.

    Raises:
        ValueError: weights of different lengths or refused by `weights_from_decimals`, `lambda0` outside 0 to 1, or
            `t_grow` below 1.
    """
    start, end = _normalised(_exact_values(initial)), _normalised(_exact_values(final))
    if len(start) != len(end):
        raise ValueError(f"{len(start)} initial weights but {len(end)} final ones")
    blend = _exact_number(lambda0)
    if not 0 <= blend <= 1:
        raise ValueError(f"lambda0 must be from 0 to 1, got {lambda0}")
    grown = _clock_value(t_grow)
    if grown < 1:
        raise ValueError(f"t_grow must be at least 1, got {t_grow}")
    first = _blend(start, end, blend)
    return CompiledSchedule(clock, ((0, tuple(integer_weights(first))), (grown, tuple(integer_weights(end)))))


def _travel(
    start: tuple[int, list[Fraction]], end: tuple[int, list[Fraction]], pacing: str
) -> dict[int, list[Fraction]]:
    """The points strictly between two knots that make linear pieces follow `pacing`."""
    (x0, a), (x1, b) = start, end
    span = x1 - x0
    if pacing == "linear":
        return {}
    if pacing in ("const", "step"):
        edges = (
            [(x1, Fraction(1))]
            if pacing == "const"
            else [
                (x0 + -(-span // 3), Fraction(1, 2)),
                (x0 + -(-2 * span // 3), Fraction(1)),
            ]
        )
        points, covered = {}, Fraction(0)
        for edge, after in edges:  # on an integer clock a jump is a linear piece of length 1
            points[edge - 1] = _blend(a, b, covered)
            points[edge] = _blend(a, b, after)
            covered = after
        return {x: weights for x, weights in points.items() if x0 < x < x1}
    if pacing == "geometric" and any((p == 0) != (q == 0) for p, q in zip(a, b, strict=True)):
        raise ValueError(
            f"geometric pacing to the knot at {x1} starts or ends at a weight of 0: give it a small weight"
        )
    mixes: dict[str, Callable[[float], list[Fraction]]] = {
        "cosine": lambda u: _blend(a, b, Fraction((1 - math.cos(math.pi * u)) / 2)),
        "root": lambda u: _blend(a, b, Fraction(math.sqrt(u))),
        "geometric": lambda u: _normalised(
            [Fraction(float(p) ** (1 - u) * float(q) ** u) for p, q in zip(a, b, strict=True)]
        ),
    }
    pieces = min(PIECES, span)
    # A root is steepest at its start: pieces of equal height there, of equal width elsewhere.
    inner = {x0 + (span * j * j // pieces**2 if pacing == "root" else span * j // pieces) for j in range(1, pieces)}
    return {x: mixes[pacing]((x - x0) / span) for x in inner if x > x0}


def _blend(start: list[Fraction], end: list[Fraction], covered: Fraction) -> list[Fraction]:
    return [(1 - covered) * a + covered * b for a, b in zip(start, end, strict=True)]


def _normalised(values: list[Fraction]) -> list[Fraction]:
    total = sum(values)
    return [value / total for value in values]


def integer_weights(values: Sequence[Fraction]) -> list[int]:
    """Weights of sum `ONE` in proportion to exact values; what flooring leaves goes to the largest (ties: first)."""
    total = sum(values)
    weights = [math.floor(value * ONE / total) for value in values]
    weights[values.index(max(values))] += ONE - sum(weights)
    return weights


def _exact_values(values: Sequence[Number]) -> list[Fraction]:
    exact = [_exact_number(value) for value in values]
    for value, given in zip(exact, values, strict=True):
        if value < 0:
            raise ValueError(f"weights must not be negative, got {given}")
    if not any(exact):
        raise ValueError("at least one weight must be above 0")
    return exact


def _exact_number(value: Number) -> Fraction:
    try:
        number = Decimal(str(value))
    except InvalidOperation:
        number = Decimal("nan")
    if not number.is_finite() or abs(number.adjusted()) > 40:  # a huge exponent would be a huge integer
        raise ValueError(f"{value!r} is not a number from 1e-40 to 1e40")
    return Fraction(number)


def _clock_value(at: int | Decimal) -> int:
    exact = _exact_number(at)
    if exact < 0 or exact.denominator != 1:
        raise ValueError(f"clock values are whole numbers from 0, got {at}")
    return int(exact)
