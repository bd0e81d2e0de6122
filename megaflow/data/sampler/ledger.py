"""The ledger of a run: everything the sampler depends on, compiled to integers: what holds, and from which step on.

Stored as `<run>/ledger.json`, an append-only list. The sampler reads nothing else, so replaying, auditing and resuming
on another layout need neither the config nor the same floating point.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from megaflow.data.sampler.deficit import LossTokens
from megaflow.data.sampler.groups import GroupSpec, Mix, SourceSpec
from megaflow.data.sampler.mix import Sampler
from megaflow.data.sampler.schedule import ONE, CompiledSchedule
from megaflow.errors import UserError


@dataclass(frozen=True)
class LedgerEntry:
    """What holds from a step on.

    Attributes:
        first_step: the first step it holds for; 1 when the run is created.
        schedule: compiled weights of the groups, in their order.
        batch_size: sequences per step.
        seed: of the sample order.
        seq_length: tokens per sequence.
        groups: the language groups with their sources and weights.
        manifests: source name -> hash of its corpus's manifest.
        why: for the reader of the ledger.
        loss_tokens: source name -> about how many tokens with loss an epoch has, where weights are shares of those;
            None where they are shares of sequences.
    """

    first_step: int
    schedule: CompiledSchedule
    batch_size: int
    seed: int
    seq_length: int
    groups: tuple[GroupSpec, ...]
    manifests: Mapping[str, str]
    why: str
    loss_tokens: Mapping[str, int] | None = None

    @property
    def unit(self) -> str:
        """What the weights are shares of."""
        return "sequences" if self.loss_tokens is None else "loss_tokens"

    @property
    def mix(self) -> Mix:
        """What the sampler needs of it."""
        return Mix(self.first_step, self.batch_size, self.groups, self.schedule)

    def check_follows(self, earlier: LedgerEntry) -> None:
        """Refuse an entry that a run cannot change to.

        Raises:
            UserError: another seed, sequence length or unit, another corpus of a source, or as `Mix.check_follows`.
        """
        for name in ("seed", "seq_length", "unit"):
            if getattr(self, name) != getattr(earlier, name):
                raise UserError(
                    f"{name} is {getattr(earlier, name)} in this run, not {getattr(self, name)}: it stays as it is"
                )
        self.mix.check_follows(earlier.mix)
        earlier.check_manifests(self.manifests)

    def describe(self) -> str:
        """One line: from which step on, the groups' weights (at both ends of the schedule), batch size, why."""
        knots = self.schedule.knots
        ends = [weights for _, weights in (knots[:1] if knots[0][1] == knots[-1][1] else (knots[0], knots[-1]))]
        weights = " ".join(
            f"{group.name} " + " to ".join(f"{end[g] / ONE:.4g}" for end in ends) for g, group in enumerate(self.groups)
        )
        return f"from step {self.first_step} on: {weights}, batch {self.batch_size} ({self.why})"

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dict that `from_json` reads back."""
        groups = [
            {
                "name": group.name,
                "sources": [
                    {
                        "name": source.name,
                        "manifest": self.manifests[source.name],
                        "windows": source.windows,
                        "documents": source.documents,
                        "weight": weight,
                    }
                    | ({} if self.loss_tokens is None else {"loss_tokens": self.loss_tokens[source.name]})
                    for source, weight in zip(group.sources, group.weights, strict=True)
                ],
            }
            for group in self.groups
        ]
        return {
            "first_step": self.first_step,
            "why": self.why,
            "seed": self.seed,
            "batch_size": self.batch_size,
            "seq_length": self.seq_length,
            "unit": self.unit,
            "schedule": self.schedule.to_json(),
            "groups": groups,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> LedgerEntry:
        """Read `to_json`'s dict; raises ValueError, KeyError or TypeError where it is not one."""
        groups = tuple(
            GroupSpec(
                group["name"],
                tuple(SourceSpec(s["name"], int(s["windows"]), int(s["documents"])) for s in group["sources"]),
                tuple(int(source["weight"]) for source in group["sources"]),
            )
            for group in data["groups"]
        )
        sources = [source for group in data["groups"] for source in group["sources"]]
        return cls(
            first_step=int(data["first_step"]),
            schedule=CompiledSchedule.from_json(data["schedule"]),
            batch_size=int(data["batch_size"]),
            seed=int(data["seed"]),
            seq_length=int(data["seq_length"]),
            groups=groups,
            manifests={source["name"]: source["manifest"] for source in sources},
            why=data["why"],
            loss_tokens={source["name"]: int(source["loss_tokens"]) for source in sources}
            if data.get("unit") == "loss_tokens"
            else None,
        )

    def check_manifests(self, manifests: Mapping[str, str]) -> None:
        """Refuse corpora other than the run's.

        Raises:
            UserError: the manifest hash of a source differs from the ledger's, or the source is missing.
        """
        for name, expected in self.manifests.items():
            if name not in manifests:
                raise UserError(f"source {name!r} is in the run's ledger but not in the config: keep it")
            if manifests[name] != expected:
                raise UserError(
                    f"source {name!r}: its corpus is not the one the run was started with (manifest {manifests[name]}, "
                    f"ledger {expected}): restore it, or start a new run"
                )


def write_ledger(path: Path, entries: Sequence[LedgerEntry]) -> None:
    """Write the ledger to `path`, whole or not at all."""
    beside = path.with_name(f".tmp-{path.name}")
    with beside.open("w", encoding="utf-8") as file:
        json.dump([entry.to_json() for entry in entries], file, ensure_ascii=False, indent=1)
        file.flush()
        os.fsync(file.fileno())
    beside.rename(path)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keeps other processes that would change the ledger at `path` waiting; readers need no lock."""
    with path.with_name(f".{path.name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def replace_ledger(path: Path, read: Sequence[LedgerEntry], now: Sequence[LedgerEntry]) -> None:
    """Write `now` over the ledger that was read as `read`; call it under `locked`.

    Raises:
        UserError: somebody has changed it since.
    """
    if read_ledger(path) != list(read):
        raise UserError(f"{path}: was changed meanwhile; do it again on the ledger as it is now")
    write_ledger(path, now)


def append_entry(path: Path, read: Sequence[LedgerEntry], entry: LedgerEntry) -> None:
    """Append to the ledger that was read as `read`; as `replace_ledger`."""
    replace_ledger(path, read, [*read, entry])


def read_ledger(path: Path) -> list[LedgerEntry]:
    """Read a run's ledger.

    Raises:
        UserError: the file is missing or is not a ledger.
    """
    try:
        entries = [LedgerEntry.from_json(entry) for entry in json.loads(path.read_text(encoding="utf-8"))]
        if not entries:
            raise ValueError("no entries")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}: a run's folder must hold its ledger.json") from error
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise UserError(
            f"{path}: not a ledger ({type(error).__name__}: {error}): restore the run's own file"
        ) from error
    try:
        build_sampler(entries)
        for earlier, entry in pairwise(entries):
            entry.check_follows(earlier)
    except (UserError, ValueError) as error:
        raise UserError(f"{path}: {error}; restore the run's own file") from None
    return entries


def build_sampler(
    ledger: Sequence[LedgerEntry], use_native: bool = True, loss_tokens: LossTokens | None = None
) -> Sampler:
    """The sampler that a run's ledger describes, before its first step; it changes from entry to entry by itself.

    Args:
        loss_tokens: counts a sequence's labels with loss (flat source index, epoch, window). Only a ledger whose
            weights are shares of tokens with loss asks for it, and only to plan: without it, that raises ValueError.

    Raises:
        UserError: an entry does not follow the one before it.
        ValueError: the first entry is not from step 1 on, or an entry's parts do not fit together.
    """
    first, *later = ledger
    if first.first_step != 1:
        raise ValueError(f"the first entry is from step {first.first_step} on, not 1")
    counter = None if first.unit == "sequences" else loss_tokens or _uncounted
    sampler = Sampler(first.seed, first.batch_size, first.seq_length, first.groups, first.schedule, use_native, counter)
    for entry in later:
        sampler.change(entry.first_step, entry.batch_size, entry.groups, entry.schedule)
    return sampler


def _uncounted(source: int, epoch: int, window: int) -> int:
    raise ValueError("a plan by tokens with loss needs the run's sources")


def entries_from(ledger: Sequence[LedgerEntry], step: int) -> list[LedgerEntry]:
    """The entries that hold at `step` or later: without those past and those replaced before they took effect."""
    following = [*(entry.first_step for entry in ledger[1:]), None]
    return [
        entry for entry, end in zip(ledger, following, strict=True) if end is None or end > max(step, entry.first_step)
    ]


def postponed(entry: LedgerEntry, step: int) -> LedgerEntry:
    """The entry from `step` on, where it was to hold earlier."""
    if entry.first_step >= step:
        return entry
    return replace(entry, first_step=step, why=f"{entry.why} (asked for step {entry.first_step})")


def consumed(state: Mapping[str, Any]) -> dict[str, int]:
    """Sequences taken so far of each source that a sampler's state knows."""
    return {source["name"]: source["consumed"] for group in state["groups"] for source in group["sources"]}


def source_names(ledger: Sequence[LedgerEntry]) -> list[str]:
    """Every source of the run in the order of its flat index: by entry, by group."""
    return list(dict.fromkeys(source.name for entry in ledger for source in entry.mix.sources))
