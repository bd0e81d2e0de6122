"""Ledgers by tokens with loss, told in sequences: estimates by averages, to simulate without the data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction

from megaflow.data.sampler.groups import GroupSpec
from megaflow.data.sampler.ledger import LedgerEntry
from megaflow.data.sampler.schedule import MAX_KNOTS, CompiledSchedule, integer_weights
from megaflow.data.sources import Source
from megaflow.errors import UserError

PIECES = 64  # into which a linear piece is cut, as shares of sequences curve where shares of tokens do not


def epoch_loss_tokens(source: Source) -> int:
    """About how many tokens with loss an epoch of a source has, by its manifest.

    Raises:
        UserError: it has none, so no number of its sequences would make up a share.
    """
    manifest = source.corpus.manifest
    found = manifest.loss_tokens * min(manifest.tokens, source.num_windows * source.seq_length) // manifest.tokens
    if found == 0:
        raise UserError(
            f"data.unit: source {source.name} ({source.corpus.prefix}) has no tokens with loss; leave it out, or give "
            "unit sequences"
        )
    return found


def in_sequences(ledger: Sequence[LedgerEntry]) -> list[LedgerEntry]:
    """The ledger with shares of sequences that come to about the same tokens with loss; one by sequences as it is."""
    return [entry if entry.loss_tokens is None else _in_sequences(entry) for entry in ledger]


def _in_sequences(entry: LedgerEntry) -> LedgerEntry:
    assert entry.loss_tokens is not None
    groups, averages = [], []
    for group in entry.groups:
        parts = [
            weight * Fraction(source.windows, entry.loss_tokens[source.name])
            for source, weight in zip(group.sources, group.weights, strict=True)
        ]
        groups.append(GroupSpec(group.name, group.sources, tuple(integer_weights(parts))))
        averages.append(Fraction(sum(group.weights)) / sum(parts))  # tokens with loss of a sequence of the group
    schedule = entry.schedule
    pieces = max(1, min(PIECES, (MAX_KNOTS - 1) // len(schedule.knots)))
    moments = [x for x, _ in schedule.knots]
    for (x0, start), (x1, end) in zip(schedule.knots, schedule.knots[1:], strict=False):
        if start != end:
            moments += [x0 + (x1 - x0) * j // pieces for j in range(1, pieces)]
    knots = []
    for x in sorted(set(moments)):
        shares = [w / average for w, average in zip(schedule.weights(x), averages, strict=True)]
        knots.append((x, tuple(integer_weights(shares))))
    return replace(
        entry, schedule=CompiledSchedule(schedule.clock, tuple(knots)), groups=tuple(groups), loss_tokens=None
    )
