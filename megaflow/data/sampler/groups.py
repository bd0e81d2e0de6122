"""What a run is mixed from and how that may change: groups of sources, append-only from one mix to the next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megaflow.data.sampler.schedule import ONE, CompiledSchedule
from megaflow.errors import UserError

MAX_BATCH = 2**20  # batch * weight then stays below 2**52


@dataclass(frozen=True)
class SourceSpec:
    """A tokenised corpus as the sampler sees it: `windows` sequences per epoch that hold `documents` documents."""

    name: str
    windows: int
    documents: int


@dataclass(frozen=True)
class GroupSpec:
    """A language group: the schedule weighs groups; `weights`, of sum `ONE`, share a group among its sources."""

    name: str
    sources: tuple[SourceSpec, ...]
    weights: tuple[int, ...]


@dataclass(frozen=True)
class Mix:
    """What holds from `first_step` on. Raises UserError or ValueError where its parts do not fit together."""

    first_step: int
    batch_size: int
    groups: tuple[GroupSpec, ...]
    schedule: CompiledSchedule

    def __post_init__(self) -> None:
        if not 1 <= self.batch_size <= MAX_BATCH:
            raise UserError(f"batch size {self.batch_size} is outside 1 to {MAX_BATCH}")
        if len(self.schedule.knots[0][1]) != len(self.groups):
            weighed = len(self.schedule.knots[0][1])
            raise ValueError(f"the schedule weighs {weighed} groups, but there are {len(self.groups)}")
        names: set[str] = set()
        for group in self.groups:
            if len(group.weights) != len(group.sources) or min(group.weights) < 0 or sum(group.weights) != ONE:
                raise ValueError(f"group {group.name}: not one weight per source, of sum {ONE}")
            for source in group.sources:
                if source.name in names:
                    raise UserError(f"source {source.name!r} is listed twice: its windows would be repeated")
                if not 1 <= source.windows < 2**62 or source.documents < 0:
                    raise UserError(f"source {source.name!r} has {source.windows} windows: at least 1 is needed")
                names.add(source.name)

    @property
    def sources(self) -> list[SourceSpec]:
        """Every source, by group."""
        return [source for group in self.groups for source in group.sources]

    def check_follows(self, earlier: Mix) -> None:
        """Refuse a mix that a run cannot change to: groups and sources are only ever appended.

        Raises:
            UserError: it begins before the one before it, or a group or source is missing, moved or of another size.
        """
        if self.first_step < earlier.first_step:
            raise UserError(
                f"a mix from step {self.first_step} on comes after one from step {earlier.first_step} on: give a step "
                f"that is not before {earlier.first_step}"
            )
        check_names("group", [group.name for group in earlier.groups], [group.name for group in self.groups])
        for old, new in zip(earlier.groups, self.groups, strict=False):
            names = [source.name for source in new.sources]
            check_names(f"source of group {new.name}", [source.name for source in old.sources], names)
            for before, after in zip(old.sources, new.sources, strict=False):
                check_size(after, before.windows, before.documents)

    def widened(self, last: Mix) -> tuple[CompiledSchedule, list[int]]:
        """Schedule and source weights over the groups and sources of a later mix: 0 for those appended since.

        A weight of 0 gets nothing and is owed nothing, so counts are the same.
        """
        more = (0,) * (len(last.groups) - len(self.groups))
        knots = tuple((x, weights + more) for x, weights in self.schedule.knots)
        own = {source.name: w for g in self.groups for source, w in zip(g.sources, g.weights, strict=True)}
        return CompiledSchedule(self.schedule.clock, knots), [own.get(source.name, 0) for source in last.sources]


def check_names(kind: str, earlier: Sequence[str], current: Sequence[str]) -> None:
    """Refuse names that do not continue the earlier ones: identity and order both matter to the plan."""
    for position, name in enumerate(earlier):
        if name not in current:
            raise UserError(f"{kind} {name!r} is in the run but not in the config: keep it, with weight 0 if unwanted")
        if current[position] != name:
            raise UserError(f"{kind} {name!r} was number {position + 1} in the run: keep the order and append new ones")


def check_size(source: SourceSpec, windows: int, documents: int) -> None:
    """Refuse a source that is not of the size it was: its order would be another one."""
    if (windows, documents) != (source.windows, source.documents):
        raise UserError(
            f"source {source.name!r} has {source.windows} windows of {source.documents} documents, but the run was "
            f"started with {windows} of {documents}: restore its corpus and the sequence length, or add it as a new "
            "source under another name"
        )
