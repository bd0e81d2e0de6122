"""The global-batch sampler: how many sequences of each source a step takes, and which ones.

Every rank computes the same plan from the same integers: no communication, no shared file, no floating point. The state
is one residual per group and source and one count per source; a resume continues from it on any layout.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megaflow.data import order
from megaflow.data.counts import CountRule, Progress
from megaflow.data.plan import Deck, StepPlan
from megaflow.data.schedule import ONE, CompiledSchedule
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


class Sampler:
    """Plans one global batch after another.

    Args:
        seed: unsigned 64 bits.
        batch_size: sequences per optimizer step over all ranks.
        seq_length: tokens per sequence (for the `tokens` clock).
        groups: in the order of the schedule's weights; append-only within a run.
        schedule: group weights on a global clock.
        use_native: False selects the Python and numpy twins.

    Raises:
        UserError: a seed or batch size out of range, a source without windows or two sources of one name.
        ValueError: weights that do not fit the groups or sources.
    """

    def __init__(
        self,
        seed: int,
        batch_size: int,
        seq_length: int,
        groups: Sequence[GroupSpec],
        schedule: CompiledSchedule,
        use_native: bool = True,
    ) -> None:
        _check(seed, batch_size, groups, schedule)
        self.seed = seed
        self.batch_size = batch_size
        self.seq_length = seq_length
        self.groups = tuple(groups)
        self.sources = tuple(source for group in groups for source in group.sources)
        self.use_native = use_native
        self.digest = _hash64(seed.to_bytes(8, "little"))
        sizes = [len(group.sources) for group in groups]
        self._rule = CountRule(
            schedule,
            seq_length,
            group_sizes=np.array(sizes, np.int64),
            source_weights=np.array([weight for group in groups for weight in group.weights], np.int64),
            windows=np.array([source.windows for source in self.sources], np.int64),
            documents=np.array([source.documents for source in self.sources], np.int64),
        )
        self._progress = Progress.start(len(groups), len(self.sources))
        self._keys = [order.name_key(source.name) for source in self.sources]
        self._group_of_source = np.repeat(np.arange(len(groups)), sizes)
        self._place_of_source = np.concatenate([np.arange(size) for size in sizes])

    @property
    def step(self) -> int:
        """The step planned last; 0 before the first."""
        return self._progress.step

    @property
    def consumed(self) -> list[int]:
        """Sequences taken from each source so far, over all groups in order."""
        consumed: list[int] = self._progress.consumed.tolist()
        return consumed

    @property
    def schedule(self) -> CompiledSchedule:
        """The schedule of the group weights."""
        return self._rule.schedule

    def plan(self) -> StepPlan:
        """Plan the next step and advance past it."""
        clock = self._rule.clock(self._progress)
        first = self._progress.consumed.tolist()
        counts = self._rule.advance(self._progress, 1, self.batch_size, self.use_native)
        deck = self._deck(first, counts.sources)
        columns = np.stack([deck.group, deck.source_in_group, deck.epoch, deck.window], axis=1)
        numbers = np.concatenate([[self.step], counts.sources, columns.reshape(-1)]).astype("<i8")
        self.digest = _hash64(self.digest.to_bytes(8, "big") + numbers.tobytes())
        ends = np.cumsum(self._rule.group_sizes).tolist()
        return StepPlan(
            step=self.step,
            clock=clock,
            weights=counts.weights,
            group_counts=counts.groups,
            counts=[counts.sources[end - len(g.sources) : end] for end, g in zip(ends, self.groups, strict=True)],
            deck=deck,
            digest=self.digest,
            corrections=counts.corrections,
            seed=self.seed,
        )

    def _deck(self, first: list[int], counts: list[int]) -> Deck:
        """The cards of a step: `counts[k]` sequences of source `k` from its `first[k]`-th, permuted epoch by epoch."""
        runs: list[tuple[int, int, int, int]] = []  # (source, epoch, first index in the epoch, length)
        for k, spec in enumerate(self.sources):
            taken, end = first[k], first[k] + counts[k]
            while taken < end:
                epoch, start = divmod(taken, spec.windows)
                length = min(spec.windows - start, end - taken)
                runs.append((k, epoch, start, length))
                taken += length
        sources, epochs, starts, lengths = (np.array(column, np.int64) for column in zip(*runs, strict=True))
        keys = [order.hash_ints(self.seed, self._keys[k], epoch) for k, epoch, _, _ in runs]
        sizes = [self.sources[k].windows for k, _, _, _ in runs]
        position = np.arange(self.batch_size) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        index = np.repeat(starts, lengths) + position
        source = np.repeat(sources, lengths)
        return Deck(
            group=self._group_of_source[source],
            source=source,
            source_in_group=self._place_of_source[source],
            epoch=np.repeat(epochs, lengths),
            window=order.perm_runs(keys, sizes, lengths.tolist(), index, self.use_native),
        )

    def replay(self, steps: int) -> dict[str, Any]:
        """The state `steps` steps on, counts only: what a checkpoint written then must hold.

        Fast (no ids are computed); this sampler stays where it is.

        Returns:
            `state_dict()` without the digest.
        """
        progress = self._progress.copy()
        if steps > 0:
            self._rule.advance(progress, steps, self.batch_size, self.use_native)
        return self._state(progress)

    def state_dict(self) -> dict[str, Any]:
        """The state as a JSON-able dict: strings, integers, lists; the digest in hexadecimal."""
        return {**self._state(self._progress), "digest": f"{self.digest:016x}"}

    def _state(self, progress: Progress) -> dict[str, Any]:
        residuals, consumed = iter(progress.source_residuals.tolist()), iter(progress.consumed.tolist())
        groups = [
            {
                "name": group.name,
                "residual": residual,
                "sources": [
                    {
                        "name": source.name,
                        "windows": source.windows,
                        "documents": source.documents,
                        "residual": next(residuals),
                        "consumed": next(consumed),
                    }
                    for source in group.sources
                ],
            }
            for group, residual in zip(self.groups, progress.group_residuals.tolist(), strict=True)
        ]
        return {"seed": self.seed, "step": progress.step, "groups": groups}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state. This sampler's schedule and batch size hold from the next step on.

        Its groups and sources must begin with the state's, in order; those appended start at their first sequence.

        Raises:
            UserError: another seed, or a group or source that is missing, moved or of another size.
        """
        try:
            progress, digest = self._read_state(state)
        except (LookupError, TypeError, ValueError) as error:
            raise UserError(f"sampler state: not readable ({type(error).__name__}: {error})") from error
        self._progress, self.digest = progress, digest

    def _read_state(self, state: dict[str, Any]) -> tuple[Progress, int]:
        if int(state["seed"]) != self.seed:
            raise UserError(
                f"sampler state: the run was started with seed {state['seed']}, not {self.seed}: restore it"
            )
        _check_names("group", [group["name"] for group in state["groups"]], [group.name for group in self.groups])
        progress = Progress.start(len(self.groups), len(self.sources))
        progress.step = int(state["step"])
        first = 0
        for g, (saved, group) in enumerate(zip(state["groups"], self.groups, strict=False)):
            names = [source.name for source in group.sources]
            _check_names(f"source of group {group.name}", [source["name"] for source in saved["sources"]], names)
            progress.group_residuals[g] = saved["residual"]
            for k, (old, source) in enumerate(zip(saved["sources"], group.sources, strict=False), start=first):
                if (old["windows"], old["documents"]) != (source.windows, source.documents):
                    raise UserError(
                        f"source {source.name!r} has {source.windows} windows of {source.documents} documents, but the "
                        f"run was started with {old['windows']} of {old['documents']}: restore its corpus and the "
                        "sequence length, or add it as a new source under another name"
                    )
                progress.source_residuals[k] = old["residual"]
                progress.consumed[k] = old["consumed"]
            first += len(group.sources)
        return progress, int(state["digest"], 16)


def _hash64(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")


def _check_names(kind: str, saved: list[str], current: list[str]) -> None:
    """Refuse names that do not continue the saved ones: identity and order both matter to the plan."""
    for position, name in enumerate(saved):
        if name not in current:
            raise UserError(f"{kind} {name!r} is in the run but not in the config: keep it, with weight 0 if unwanted")
        if current[position] != name:
            raise UserError(f"{kind} {name!r} was number {position + 1} in the run: keep the order and append new ones")


def _check(seed: int, batch_size: int, groups: Sequence[GroupSpec], schedule: CompiledSchedule) -> None:
    if not 0 <= seed < 2**64:
        raise UserError(f"seed {seed} is outside 0 to 2**64 - 1")
    if not 1 <= batch_size <= MAX_BATCH:
        raise UserError(f"batch size {batch_size} is outside 1 to {MAX_BATCH}")
    if len(schedule.knots[0][1]) != len(groups):
        raise ValueError(f"the schedule weighs {len(schedule.knots[0][1])} groups, but there are {len(groups)}")
    names: set[str] = set()
    for group in groups:
        if len(group.weights) != len(group.sources) or min(group.weights) < 0 or sum(group.weights) != ONE:
            raise ValueError(f"group {group.name}: not one weight per source, of sum {ONE}")
        for source in group.sources:
            if source.name in names:
                raise UserError(f"source {source.name!r} is listed twice: its windows would be repeated")
            if not 1 <= source.windows < 2**62 or source.documents < 0:
                raise UserError(f"source {source.name!r} has {source.windows} windows: at least 1 is needed")
            names.add(source.name)
