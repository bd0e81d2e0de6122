"""A million steps of one run, as one number: the plain integers gave it once, every other implementation must again.

Every hundredth step is planned with its ids; the state after it, residuals and counts, stands for the steps between.

    python -m tests.data.million_steps      the digests, from the plain integers: a minute
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from itertools import chain
from typing import Any

import numpy as np

from megaflow.data.sampler.mix import GroupSpec, Sampler, SourceSpec
from megaflow.data.sampler.schedule import chatflow, weights_from_decimals
from tests.data.sampler_oracle import OracleSampler

INTERVAL = 100
"""Steps from one that is planned with its ids to the next."""

DIGESTS = {10_000: "5a4d20f629e431b9", 1_000_000: "b11e3e4b6f0de4c7"}
"""After so many steps."""

SIZES = {
    "en": [("news", 812_345, 3), ("books", 40_961, 2), ("web", 7_000_003, 5)],
    "parallel": [("subtitles", 65_536, 1), ("parliament", 65_537, 1)],
    "zh": [("wiki", 1_000, 1), ("papers", 99_991, 2)],
    "instruction": [("chat", 313, 1)],
}
"""Of each group its sources' names, windows (from a fraction of an epoch to thousands are read) and weights."""

SETTINGS = {"seed": 20240517, "batch_size": 16, "seq_length": 4096}
SCHEDULE = chatflow(
    "tokens", ["0.45", "0.45", "0.1", "0"], ["0.1", "0.05", "0.6", "0.25"], 600_000 * 16 * 4096
)  # the ramp ends after 600,000 steps


def make_sampler(use_native: bool) -> Sampler:
    groups = [
        GroupSpec(
            name,
            tuple(SourceSpec(source, windows, 3 * windows) for source, windows, _ in sources),
            tuple(weights_from_decimals([weight for _, _, weight in sources])),
        )
        for name, sources in SIZES.items()
    ]
    return Sampler(groups=groups, schedule=SCHEDULE, use_native=use_native, **SETTINGS)


def make_oracle() -> OracleSampler:
    groups = [
        (
            name,
            [(source, windows, 3 * windows) for source, windows, _ in sources],
            weights_from_decimals([weight for _, _, weight in sources]),
        )
        for name, sources in SIZES.items()
    ]
    knots = [(x, list(weights)) for x, weights in SCHEDULE.knots]
    return OracleSampler(*SETTINGS.values(), groups, SCHEDULE.clock, knots)


def sampler_steps(sampler: Sampler) -> Iterator[list[Any]]:
    """Of every `INTERVAL`-th step the number, state, counts and cards."""
    while True:
        sampler.skip(INTERVAL - 1)
        plan = sampler.plan()
        after, deck = plan.after, plan.deck
        cards = np.stack([deck.group, deck.source_in_group, deck.epoch, deck.window], axis=1).reshape(-1)
        counts = [count for row in plan.counts for count in row]
        yield [[plan.step], after.group_residuals, after.source_residuals, after.consumed, counts, cards]


def oracle_steps(oracle: OracleSampler) -> Iterator[list[Any]]:
    """The same from the plain integers."""
    while True:
        for _ in range(INTERVAL - 1):
            oracle.advance()
        counts, cards, _ = oracle.plan()
        rows = (list(chain.from_iterable(rows)) for rows in (oracle.rs, oracle.consumed, counts, cards))
        yield [[oracle.step], oracle.r, *rows]


def digest_after(steps: Iterator[list[Any]], until: int) -> str:
    """The digest of all that `steps` gives up to step `until`."""
    state = hashlib.blake2b(digest_size=8)
    for numbers in steps:
        state.update(np.concatenate(numbers).astype("<i8").tobytes())
        if numbers[0][0] == until:
            return state.hexdigest()
    raise AssertionError("the steps ended")


if __name__ == "__main__":
    for until in DIGESTS:
        print(until, digest_after(oracle_steps(make_oracle()), until))
