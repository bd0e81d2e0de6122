"""From the config to the ledger: its schedule and weights compiled to an entry, and what a later edit of it changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from decimal import Decimal
from fractions import Fraction
from typing import Any

from megaflow.config import Config
from megaflow.data.sampler.estimate import epoch_loss_tokens, in_sequences
from megaflow.data.sampler.groups import GroupSpec, SourceSpec
from megaflow.data.sampler.ledger import LedgerEntry, build_sampler, consumed
from megaflow.data.sampler.schedule import (
    CompiledSchedule,
    Knot,
    chatflow,
    compile_knots,
    integer_weights,
    weights_from_decimals,
)
from megaflow.data.sampler.weights import temperature, unimax
from megaflow.data.sources import Source
from megaflow.errors import UserError

EDITED = "config edited on resume"


def configured_entry(config: Config, sources: Sequence[Source], why: str = "the run's config") -> LedgerEntry:
    """The entry that a config describes, from step 1 on; `sources` are those it names, opened.

    Raises:
        UserError: weights or a schedule that cannot be compiled.
    """
    by_name = {source.name: source for source in sources}
    by_tokens = config.data.unit == "loss_tokens"
    loss_tokens = {source.name: epoch_loss_tokens(source) for source in sources} if by_tokens else None
    groups = []
    for name, group in config.data.groups.items():
        specs = tuple(SourceSpec(s, by_name[s].num_windows, by_name[s].documents) for s in group.sources)
        kept = [
            0 if source.weight == 0 else _size(spec, loss_tokens)
            for spec, source in zip(specs, group.sources.values(), strict=True)
        ]
        if group.weights == "explicit":
            weights = weights_from_decimals([source.weight for source in group.sources.values()])
        elif group.weights == "temperature":
            assert group.temperature is not None
            weights = temperature(kept, group.temperature)
        else:  # for UniMax until the group's sequences are known
            weights = integer_weights([Fraction(size) for size in kept])
        groups.append(GroupSpec(name, specs, tuple(weights)))
    return with_unimax(
        config,
        [],
        LedgerEntry(
            first_step=1,
            schedule=compile_schedule(config),
            batch_size=config.train.global_batch_size,
            seed=config.data.seed,
            seq_length=config.data.seq_length,
            groups=tuple(groups),
            manifests={source.name: source.corpus.manifest.fingerprint for source in sources},
            why=why,
            loss_tokens=loss_tokens,
        ),
    )


def _size(source: SourceSpec, loss_tokens: Mapping[str, int] | None) -> int:
    """Of an epoch, in what weights are shares of."""
    return source.windows if loss_tokens is None else loss_tokens[source.name]


def caps(config: Config) -> dict[str, Decimal]:
    """Largest number of epochs of every source that has a cap."""
    found = {name: group.cap(name) for group in config.data.groups.values() for name in group.sources}
    return {name: cap for name, cap in found.items() if cap is not None}


def with_unimax(config: Config, ledger: Sequence[LedgerEntry], entry: LedgerEntry) -> LedgerEntry:
    """The entry with the weights of UniMax groups, as it follows a ledger that has none from a later step.

    Their budget is what the schedule gives them from the entry's first step to the end of the run, their limits are
    what their caps leave of what they have been read by then. Where nothing is left the whole caps count, and the check
    of the caps will refuse the run. On the documents clock, which depends on the sources, the budget is that of the
    weights that the entry has.
    """
    if all(group.weights != "unimax" for group in config.data.groups.values()):
        return entry
    sampler, past, groups = build_sampler(in_sequences([*ledger, entry])), entry.first_step - 1, []
    before, after = (consumed(sampler.replay(step)) for step in (past, max(past, config.train.steps)))
    for spec, group in zip(entry.groups, config.data.groups.values(), strict=True):
        if group.weights == "unimax":
            budget, whole, left = Fraction(0), [], []
            for source in spec.sources:
                size, read = _size(source, entry.loss_tokens), before.get(source.name, 0)
                budget += Fraction(size * (after[source.name] - read), source.windows)
                cap = group.cap(source.name) if group.sources[source.name].weight else None
                whole.append(Fraction(cap or 0) * size)
                left.append(max(Fraction(0), whole[-1] - Fraction(size * read, source.windows)))
            spec = replace(spec, weights=tuple(unimax(left if any(left) else whole, int(budget))))
        groups.append(spec)
    return replace(entry, groups=tuple(groups))


def compile_schedule(config: Config) -> CompiledSchedule:
    """The configured schedule as integer knots over the groups in config order."""
    schedule, groups = config.data.schedule, list(config.data.groups)
    try:
        if schedule.knots is not None:
            knots = [Knot(knot.at, [knot.weights[name] for name in groups], knot.pacing) for knot in schedule.knots]
            return compile_knots(schedule.clock, knots)
        assert schedule.initial is not None
        assert schedule.final is not None
        grow = schedule.grow
        if grow is None:
            sequences = config.train.global_batch_size
            per_step = {"steps": 1, "sequences": sequences, "tokens": sequences * config.data.seq_length}
            grow = max(1, int(config.train.steps * per_step[schedule.clock] * schedule.grow_fraction))
        initial, final = ([mix[name] for name in groups] for mix in (schedule.initial, schedule.final))
        return chatflow(schedule.clock, initial, final, grow, schedule.lambda0)
    except ValueError as error:
        raise UserError(f"data.schedule: {error}") from None


def edited_entry(began: Mapping[str, Any], config: Config, entry: LedgerEntry, last: LedgerEntry) -> LedgerEntry | None:
    """What an edit of the config asks for, or None where it asks for nothing new.

    Schedules, groups and batch sizes are compared as configured: a ramp that is a share of the run's length is not
    stretched when a run is lengthened, and a mix changed in the ledger alone stays.

    Args:
        began: the config that the run's last launch wrote, as plain values.
        entry: what the config describes now.
        last: the latest entry of the run's ledger.
    """
    now = config.model_dump(mode="json")
    schedule, groups, batch_size = (part(began) != part(now) for part in (_schedule, _groups, _batch_size))
    edited = replace(
        last,
        schedule=entry.schedule if schedule else last.schedule,
        groups=entry.groups if groups else last.groups,
        manifests=entry.manifests if groups else last.manifests,
        loss_tokens=entry.loss_tokens if groups else last.loss_tokens,
        batch_size=entry.batch_size if batch_size else last.batch_size,
    )
    return None if edited == last else replace(edited, why=EDITED)


def _schedule(tree: Mapping[str, Any]) -> Any:
    return tree["data"]["schedule"]


def _groups(tree: Mapping[str, Any]) -> Any:
    """The groups without the places of their corpora, which may move, in order."""
    return [
        (
            name,
            {key: value for key, value in group.items() if key != "sources"},
            [(s, {k: v for k, v in source.items() if k != "path"}) for s, source in group["sources"].items()],
        )
        for name, group in tree["data"]["groups"].items()
    ]


def _batch_size(tree: Mapping[str, Any]) -> Any:
    return tree["train"]["global_batch_size"]
