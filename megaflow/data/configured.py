"""From the config to the ledger: its schedule and weights compiled to an entry, and what a later edit of it changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from decimal import Decimal
from fractions import Fraction
from typing import Any

from megaflow.config import Config
from megaflow.data.groups import GroupSpec, SourceSpec
from megaflow.data.ledger import LedgerEntry, build_sampler
from megaflow.data.schedule import (
    CompiledSchedule,
    Knot,
    chatflow,
    compile_knots,
    integer_weights,
    weights_from_decimals,
)
from megaflow.data.sources import Source
from megaflow.data.weights import temperature, unimax
from megaflow.errors import UserError

EDITED = "config edited on resume"


def configured_entry(config: Config, sources: Sequence[Source], why: str = "the run's config") -> LedgerEntry:
    """The entry that a config describes, from step 1 on; `sources` are those it names, opened.

    Raises:
        UserError: weights or a schedule that cannot be compiled.
    """
    by_name = {source.name: source for source in sources}
    groups = []
    for name, group in config.data.groups.items():
        specs = tuple(SourceSpec(s, by_name[s].num_windows, by_name[s].documents) for s in group.sources)
        kept = [
            0 if source.weight == 0 else spec.windows
            for spec, source in zip(specs, group.sources.values(), strict=True)
        ]
        if group.weights == "explicit":
            weights = weights_from_decimals([source.weight for source in group.sources.values()])
        elif group.weights == "temperature":
            assert group.temperature is not None
            weights = temperature(kept, group.temperature)
        else:  # for UniMax until the group's sequences are known
            weights = integer_weights([Fraction(windows) for windows in kept])
        groups.append(GroupSpec(name, specs, tuple(weights)))
    entry = LedgerEntry(
        first_step=1,
        schedule=compile_schedule(config),
        batch_size=config.train.global_batch_size,
        seed=config.data.seed,
        seq_length=config.data.seq_length,
        groups=tuple(groups),
        manifests={source.name: source.corpus.manifest.fingerprint for source in sources},
        why=why,
    )
    return _with_unimax(config, entry)


def caps(config: Config) -> dict[str, Decimal]:
    """Largest number of epochs of every source that has a cap."""
    found = {name: group.cap(name) for group in config.data.groups.values() for name in group.sources}
    return {name: cap for name, cap in found.items() if cap is not None}


def _with_unimax(config: Config, entry: LedgerEntry) -> LedgerEntry:
    """The entry with the weights of UniMax groups, whose budget is what the schedule gives them over the whole run.

    On the documents clock, which depends on the sources, the budget is that of weights proportional to sizes.
    """
    if all(group.weights != "unimax" for group in config.data.groups.values()):
        return entry
    state, groups = build_sampler([entry]).replay(config.train.steps), []
    for spec, group, planned in zip(entry.groups, config.data.groups.values(), state["groups"], strict=True):
        if group.weights == "unimax":
            budget = sum(source["consumed"] for source in planned["sources"])
            limits = [
                Fraction(group.cap(source.name) or 0) * source.windows * (group.sources[source.name].weight != 0)
                for source in spec.sources
            ]
            spec = replace(spec, weights=tuple(unimax(limits, budget)))
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
