"""Ledgers for people: the history of a run's mix, and what two ledgers differ in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import zip_longest

from megaflow.data.sampler.estimate import in_sequences
from megaflow.data.sampler.ledger import LedgerEntry, build_sampler
from megaflow.data.sampler.schedule import ONE


def history(ledger: Sequence[LedgerEntry], last_step: int) -> Iterator[str]:
    """Every entry of a run of `last_step` steps: its steps, batch size, reason, and per group the weights with which it
    starts and ends and the shares of the sources."""
    for number, entry in enumerate(ledger):
        first = entry.first_step
        following = ledger[number + 1].first_step if number + 1 < len(ledger) else None
        if following == first:
            yield f"from step {first} on: replaced before it took effect; {entry.why}"
            continue
        if first > last_step:
            yield f"from step {first} on: after the run's last step {last_step}; batch {entry.batch_size}; {entry.why}"
            continue
        following = min(following or last_step + 1, last_step + 1)
        unit = "" if entry.loss_tokens is None else "; shares of tokens with loss"
        yield f"step {first} to {following - 1}: batch {entry.batch_size}{unit}; {entry.why}"
        sampler = build_sampler(in_sequences(ledger[: number + 1]))
        start, end = (entry.schedule.weights(sampler.clock_at(step)) for step in (first, following - 1))
        for group, a, b in zip(entry.groups, start, end, strict=True):
            ratio = share(a) if a == b else f"{share(a)} to {share(b)}"
            sources = (f"{s.name} {share(w)}" for s, w in zip(group.sources, group.weights, strict=True))
            yield f"  {group.name:<12} {ratio:<17} {', '.join(sources)}"


def differences(one: Sequence[LedgerEntry], other: Sequence[LedgerEntry]) -> Iterator[str]:
    """What the second ledger has otherwise than the first, one line each; none where they are identical."""
    for number, (a, b) in enumerate(zip_longest(one, other), start=1):
        if a is None or b is None:
            yield f"entry {number}: only in the {'second' if a is None else 'first'}: {(a or b).describe()}"
            continue
        for name in ("first_step", "batch_size", "seed", "seq_length", "unit", "why"):
            if (mine := getattr(a, name)) != (theirs := getattr(b, name)):
                yield f"entry {number}: {name}: {mine!r}, in the second {theirs!r}"
        yield from (f"entry {number}: {line}" for line in _schedules(a, b))
        yield from (f"entry {number}: {line}" for line in _sources(a, b))


def share(weight: int) -> str:
    """A weight in units of 1 / `ONE` as a ratio of at most four digits."""
    return f"{weight / ONE:.4g}"


def _schedules(a: LedgerEntry, b: LedgerEntry) -> Iterator[str]:
    mine, theirs = a.schedule, b.schedule
    names = [[group.name for group in entry.groups] for entry in (a, b)]
    if names[0] != names[1]:
        yield f"groups: {', '.join(names[0])}, in the second {', '.join(names[1])}"
    elif mine.clock != theirs.clock:
        yield f"schedule: clock {mine.clock}, in the second {theirs.clock}"
    elif mine.knots != theirs.knots:
        moments = sorted({x for x, _ in (*mine.knots, *theirs.knots)})
        # two piecewise linear functions that differ do so at a knot of either
        x = next((x for x in moments if mine.weights(x) != theirs.weights(x)), moments[0])
        first, second = (
            " ".join(f"{name} {share(w)}" for name, w in zip(names[0], s.weights(x), strict=True))
            for s in (mine, theirs)
        )
        yield f"schedule: at {x} {mine.clock}: {first}, in the second {second}"


def _sources(a: LedgerEntry, b: LedgerEntry) -> Iterator[str]:
    mine, theirs = (
        {
            source.name: {
                "group": group.name,
                "weight": share(weight),
                "manifest": entry.manifests[source.name],
                "windows": source.windows,
                "documents": source.documents,
            }
            for group in entry.groups
            for source, weight in zip(group.sources, group.weights, strict=True)
        }
        for entry in (a, b)
    )
    for name in dict.fromkeys([*mine, *theirs]):
        if name not in mine or name not in theirs:
            yield f"source {name}: only in the {'second' if name in theirs else 'first'}"
            continue
        for key, value in mine[name].items():
            if value != theirs[name][key]:
                yield f"source {name}: {key} {value}, in the second {theirs[name][key]}"
