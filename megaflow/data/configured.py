"""From the config to the ledger: its schedule and weights compiled to an entry, and what a later edit of it changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from megaflow.config import Config
from megaflow.data.groups import GroupSpec, SourceSpec
from megaflow.data.ledger import LedgerEntry
from megaflow.data.schedule import CompiledSchedule, Knot, chatflow, compile_knots, weights_from_decimals
from megaflow.data.sources import Source
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
        try:
            weights = weights_from_decimals([source.weight for source in group.sources.values()])
        except ValueError as error:
            raise UserError(f"data.groups.{name}.sources: weights: {error}") from None
        groups.append(GroupSpec(name, specs, tuple(weights)))
    return LedgerEntry(
        first_step=1,
        schedule=compile_schedule(config),
        batch_size=config.train.global_batch_size,
        seed=config.data.seed,
        seq_length=config.data.seq_length,
        groups=tuple(groups),
        manifests={source.name: source.corpus.manifest.fingerprint for source in sources},
        why=why,
    )


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
