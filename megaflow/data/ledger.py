"""The ledger of a run: everything the sampler depends on, compiled to integers when the run is created.

Stored as `<run>/ledger.json`. The sampler reads nothing else, so replaying, auditing and resuming on another layout
need neither the config nor the same floating point.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megaflow.data.mix import GroupSpec, Sampler, SourceSpec
from megaflow.data.schedule import CompiledSchedule
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
    """

    first_step: int
    schedule: CompiledSchedule
    batch_size: int
    seed: int
    seq_length: int
    groups: tuple[GroupSpec, ...]
    manifests: Mapping[str, str]
    why: str

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
        return cls(
            first_step=int(data["first_step"]),
            schedule=CompiledSchedule.from_json(data["schedule"]),
            batch_size=int(data["batch_size"]),
            seed=int(data["seed"]),
            seq_length=int(data["seq_length"]),
            groups=groups,
            manifests={source["name"]: source["manifest"] for group in data["groups"] for source in group["sources"]},
            why=data["why"],
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
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path}: not a ledger ({type(error).__name__}: {error}): restore the run's own file"
        ) from error
    return entries


def build_sampler(ledger: Sequence[LedgerEntry], use_native: bool = True) -> Sampler:
    """The sampler that a run's ledger describes, before its first step.

    Raises:
        UserError: the ledger has another number of entries than one.
    """
    if len(ledger) != 1:
        raise UserError(f"the ledger has {len(ledger)} entries; this version reads runs whose mix was set once")
    entry = ledger[0]
    return Sampler(entry.seed, entry.batch_size, entry.seq_length, entry.groups, entry.schedule, use_native)
