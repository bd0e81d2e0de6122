"""The global-batch sampler: how many sequences of each source a step takes, and which ones.

Every rank computes the same plan from the same integers: no communication, no shared file, no floating point. The state
is one residual per group and source and one count per source; a resume continues from it on any layout.
"""

from __future__ import annotations

import copy
import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megaflow.data.sampler import order
from megaflow.data.sampler.counts import CountRule, Progress, StepCounts
from megaflow.data.sampler.deficit import Lengths, LossTokens
from megaflow.data.sampler.groups import GroupSpec, Mix, SourceSpec
from megaflow.data.sampler.plan import Deck, StepPlan
from megaflow.data.sampler.schedule import CompiledSchedule
from megaflow.data.sampler.state import read_state, write_state
from megaflow.errors import UserError

__all__ = ["GroupSpec", "Mix", "Sampler", "SourceSpec"]


class Sampler:
    """Plans one global batch after another.

    Attributes:
        groups: of the latest mix, which holds every group and source of the run so far.
        sources: every source in the order in which the run came to know them: by group, those of a later mix after all
            earlier ones. Their index, the flat source index, therefore never changes.
        digest: of every plan so far.

    Args:
        seed: unsigned 64 bits.
        batch_size: sequences per optimizer step over all ranks.
        seq_length: tokens per sequence (for the `tokens` clock).
        groups: in the order of the schedule's weights; append-only within a run.
        schedule: group weights on a global clock.
        use_native: False selects the Python and numpy twins.
        loss_tokens: counts a sequence's labels with loss; given, weights are shares of those, not of sequences.

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
        loss_tokens: LossTokens | None = None,
    ) -> None:
        if not 0 <= seed < 2**64:
            raise UserError(f"seed {seed} is outside 0 to 2**64 - 1")
        self.seed = seed
        self.seq_length = seq_length
        self.use_native = use_native
        self.loss_tokens = loss_tokens
        self.digest = _hash64(seed.to_bytes(8, "little"))
        self._mixes = [Mix(1, batch_size, tuple(groups), schedule)]
        self._arrange()
        self._progress = Progress.start(len(self.groups), len(self.sources))

    def change(self, first_step: int, batch_size: int, groups: Sequence[GroupSpec], schedule: CompiledSchedule) -> None:
        """Another mix from `first_step` on. Counts and residuals carry over: no sequence is skipped or repeated.

        The schedule's clock counts from the run's first step. Of two mixes with one first step the later one holds.

        Raises:
            UserError: the step is past or before an earlier mix's, or groups or sources do not continue those before.
        """
        if first_step <= self.step:
            raise UserError(f"a mix cannot change at step {first_step}: step {self.step} is planned already")
        mix = Mix(first_step, batch_size, tuple(groups), schedule)
        mix.check_follows(self._mixes[-1])
        state = self.state_dict()
        self._mixes.append(mix)
        self._arrange()
        self.load_state_dict(state)

    def forget(self, number: int) -> None:
        """Take back the latest `number` mixes; before the first step."""
        if number:
            self._mixes = self._mixes[:-number]
            self._arrange()
            self._progress = Progress.start(len(self.groups), len(self.sources))

    def _arrange(self) -> None:
        """Lay out arrays over the groups and sources of the latest mix, which are every mix's and more."""
        last = self._mixes[-1]
        self.groups = last.groups
        first_seen = list(dict.fromkeys(source.name for mix in self._mixes for source in mix.sources))
        index = {name: i for i, name in enumerate(first_seen)}
        self._specs = last.sources
        self._flat = np.array([index[spec.name] for spec in self._specs], np.int64)
        self.sources = tuple(self._specs[place] for place in np.argsort(self._flat).tolist())
        sizes = [len(group.sources) for group in self.groups]
        group = np.repeat(np.arange(len(sizes)), sizes)
        self._columns = np.stack([group, self._flat, np.concatenate([np.arange(size) for size in sizes])])
        keys, windows = [order.name_key(spec.name) for spec in self._specs], [spec.windows for spec in self._specs]
        self._keys, self._windows = np.array(keys, np.uint64), np.array(windows, np.int64)
        length = None
        if self.loss_tokens is not None:
            length = Lengths(self.seed, keys, windows, self._flat.tolist(), self.loss_tokens)
        self._rules: list[CountRule] = []
        self._known: list[NDArray[np.bool_]] = []
        for mix in self._mixes:
            schedule, weights = mix.widened(last)
            names = {source.name for source in mix.sources}
            self._known.append(np.array([spec.name in names for spec in self._specs]))
            self._rules.append(
                CountRule(
                    schedule,
                    self.seq_length,
                    group_sizes=np.array(sizes, np.int64),
                    source_weights=np.array(weights, np.int64),
                    windows=self._windows,
                    documents=np.array([spec.documents for spec in self._specs], np.int64),
                    length=length,
                )
            )

    def _index(self, step: int) -> int:
        """The mix that holds for a step."""
        return bisect_right(self._mixes, max(1, step), key=lambda mix: mix.first_step) - 1

    @property
    def step(self) -> int:
        """The step planned last; 0 before the first."""
        return self._progress.step

    @property
    def mix(self) -> Mix:
        """What holds for the next step."""
        return self._mixes[self._index(self.step + 1)]

    @property
    def batch_size(self) -> int:
        """Sequences of the next step."""
        return self.mix.batch_size

    @property
    def schedule(self) -> CompiledSchedule:
        """The schedule of the group weights of the next step."""
        return self.mix.schedule

    @property
    def consumed(self) -> list[int]:
        """Sequences taken so far from each of `sources`."""
        consumed: list[int] = self._progress.consumed[np.argsort(self._flat)].tolist()
        return consumed

    def plan(self) -> StepPlan:
        """Plan the next step and advance past it."""
        index = self._index(self.step + 1)
        clock = self._rules[index].clock(self._progress)
        first = self._progress.consumed.copy()
        counts = self._advance(self._progress, 1)
        deck = self._deck(first, counts.sources)
        columns = np.stack([deck.group, deck.source_in_group, deck.epoch, deck.window], axis=1)
        known = np.array(counts.sources)[self._known[index]]
        numbers = np.concatenate([[self.step], known, columns.reshape(-1)]).astype("<i8")
        self.digest = _hash64(self.digest.to_bytes(8, "big") + numbers.tobytes())
        ends = np.cumsum([len(group.sources) for group in self.groups]).tolist()
        return StepPlan(
            step=self.step,
            clock=clock,
            weights=counts.weights,
            group_counts=counts.groups,
            counts=[counts.sources[end - len(g.sources) : end] for end, g in zip(ends, self.groups, strict=True)],
            deck=deck,
            digest=self.digest,
            total=counts.total,
            corrections=counts.corrections,
            seed=self.seed,
            after=self._progress.copy(),
        )

    def fork(self) -> Sampler:
        """Another sampler at this one's place, to plan ahead with in another thread while this one stays."""
        other = copy.copy(self)
        other._mixes, other._progress = self._mixes.copy(), self._progress.copy()
        other._rules = [replace(rule) for rule in self._rules]  # what they cache is then one thread's own
        return other

    @property
    def place(self) -> tuple[int, int, int]:
        """What the next plan follows from, in short: alike as long as a fork's plans are this sampler's too."""
        return self.step, self.digest, len(self._mixes)

    def follow(self, plan: StepPlan) -> None:
        """Take the next step as a fork of this sampler planned it."""
        if plan.step != self.step + 1:
            raise ValueError(f"a plan of step {plan.step} does not follow step {self.step}")
        self._progress, self.digest = plan.after.copy(), plan.digest

    def _advance(self, progress: Progress, steps: int) -> StepCounts:
        """Move `progress` on by `steps >= 1` steps, through every mix on the way; the counts of the last one."""
        end, corrections = progress.step + steps, 0
        while progress.step < end:
            index = self._index(progress.step + 1)
            following = self._mixes[index + 1].first_step - 1 if index + 1 < len(self._mixes) else end
            steps, batch_size = min(end, following) - progress.step, self._mixes[index].batch_size
            last = self._rules[index].advance(progress, steps, batch_size, self.use_native)
            corrections += last.corrections
        return replace(last, corrections=corrections)

    def _deck(self, first: NDArray[np.int64], counts: list[int]) -> Deck:
        """The cards of a step: `counts[k]` sequences of source `k` from its `first[k]`-th, permuted epoch by epoch."""
        taken = np.array(counts, np.int64)
        group, source, source_in_group = np.repeat(self._columns, taken, axis=1)
        epoch, window = order.draw(self.seed, self._keys, self._windows, first, taken, self.use_native)
        return Deck(group, source, source_in_group, epoch, window)

    def replay(self, steps: int) -> dict[str, Any]:
        """The state `steps` steps on, counts only: what a checkpoint written then must hold.

        Fast (no ids are computed); this sampler stays where it is.

        Returns:
            `state_dict()` without the digest.
        """
        progress = self._progress.copy()
        if steps > 0:
            self._advance(progress, steps)
        return self._state(progress)

    def skip(self, steps: int) -> None:
        """Advance by `steps` steps, counts only: fast, but the digest no longer stands for all steps."""
        if steps > 0:
            self._advance(self._progress, steps)

    @property
    def deviations(self) -> list[int]:
        """Each group's largest distance from what its weights sum to, in 1 / `ONE` sequences, in steps planned here."""
        worst: list[int] = self._progress.worst.tolist()
        return worst

    def clock_at(self, step: int) -> int:
        """The schedule's clock before a step after the one planned last; this sampler stays where it is."""
        progress = self._progress.copy()
        if step > self.step + 1:
            self._advance(progress, step - 1 - self.step)
        return self._rules[self._index(step)].clock(progress)

    def state_dict(self) -> dict[str, Any]:
        """The state as a JSON-able dict: strings, integers, lists; the digest in hexadecimal."""
        return {**self._state(self._progress), "digest": f"{self.digest:016x}"}

    def _state(self, progress: Progress) -> dict[str, Any]:
        return write_state(self.seed, progress, self._mixes[self._index(progress.step)].groups, self._specs)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state, with the mix that this sampler has for the next step.

        Its groups and sources must begin with the state's, in order; those appended start at their first sequence.

        Raises:
            UserError: another seed, or a group or source that is missing, moved or of another size.
        """
        self._progress, self.digest = read_state(state, self.seed, self.groups)


def _hash64(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")
