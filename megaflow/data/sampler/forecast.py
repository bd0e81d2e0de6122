"""The whole run before it begins: what every source will be read, simulated with the sampler's own integers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction

from megaflow.data.sampler.estimate import in_sequences
from megaflow.data.sampler.ledger import LedgerEntry, build_sampler, consumed
from megaflow.data.sampler.mix import Sampler
from megaflow.data.sampler.schedule import ONE
from megaflow.errors import UserError

CHUNKS = 256  # parts of a run in which the step at which a cap is reached is searched
ROUNDING = 2  # sequences by which the sampler's rounding may exceed a cap that the weights meet exactly


@dataclass(frozen=True)
class SourceForecast:
    """What a source will have been read at the end of the run."""

    group: str
    name: str
    sequences: int
    tokens: int
    loss_tokens: int | None
    """Where weights are shares of tokens with loss: how many of those, by the source's average."""
    windows: int
    """Sequences in an epoch."""
    cap: Decimal | None
    """Largest number of epochs; None: no cap."""
    capped_at: int | None
    """First step after which the cap is reached, None if it never is."""

    @property
    def epochs(self) -> Fraction:
        """How often the source will have been read."""
        return Fraction(self.sequences, self.windows)


@dataclass(frozen=True)
class Forecast:
    """A run of `steps` steps: its sources by group, and each group's largest cumulative deviation in sequences.

    Where weights are shares of tokens with loss it is an estimate, and has no deviations.
    """

    steps: int
    sources: list[SourceForecast]
    deviations: dict[str, float]

    def check_caps(self) -> None:
        """Refuse a schedule that reads a source more often than its cap allows.

        Raises:
            UserError: naming source, step and remedy.
        """
        for source in self.sources:
            if source.cap is None or source.sequences <= Fraction(source.cap) * source.windows + ROUNDING:
                continue
            raise UserError(
                f"data.groups.{source.group}.sources.{source.name}: max_epochs {source.cap} is reached at step "
                f"{source.capped_at} of {self.steps}, which read it {float(source.epochs):.2f} times; lower its ratio, "
                "shorten the run, or raise max_epochs"
            )

    def table(self) -> list[str]:
        """The forecast as lines of a table."""
        width = max(len(name) for s in self.sources for name in (s.name, s.group, "source"))
        lines = [f"{'source':<{width}}  {'group':<{width}}  {'sequences':>14}  {'tokens':>18}  {'epochs':>10}  cap"]
        for s in self.sources:
            cap = "none" if s.cap is None else f"{s.cap}, " + (f"step {s.capped_at}" if s.capped_at else "not reached")
            numbers = f"{s.sequences:>14,}  {s.tokens:>18,}  {float(s.epochs):>10.3f}"
            lines.append(f"{s.name:<{width}}  {s.group:<{width}}  {numbers}  {cap}")
        if not self.deviations:
            return [*lines, *self._shares()]
        total = sum(s.sequences for s in self.sources)
        for group, deviation in self.deviations.items():
            sequences = sum(s.sequences for s in self.sources if s.group == group)
            lines.append(
                f"group {group}: {100 * sequences / total:.2f} % of {total:,} sequences in {self.steps:,} steps; never "
                f"more than {deviation:.2f} sequences from the schedule's sum"
            )
        return lines

    def _shares(self) -> Iterator[str]:
        """Groups by tokens with loss."""
        given: dict[str, int] = {}
        for s in self.sources:
            given[s.group] = given.get(s.group, 0) + (s.loss_tokens or 0)
        total = sum(given.values())
        for group, tokens in given.items():
            yield f"group {group}: {100 * tokens / total:.2f} % of {total:,} tokens with loss in {self.steps:,} steps"
        yield "an estimate: each sequence taken to have its source's average of tokens with loss"

    def summary(self) -> str:
        """One line: epochs of every source."""
        epochs = ", ".join(f"{source.name} {float(source.epochs):.3g}" for source in self.sources)
        return f"epochs over {self.steps:,} steps: {epochs}"


def forecast(ledger: Sequence[LedgerEntry], steps: int, caps: Mapping[str, Decimal]) -> Forecast:
    """Simulate a run of `steps` steps from its first: about 0.2 s per million steps with the host library.

    By tokens with loss it is an estimate: the data are not read.
    """
    sampler = build_sampler(in_sequences(ledger))
    epochs = ledger[-1].loss_tokens
    limits = {
        k: Fraction(caps[source.name]) * source.windows
        for k, source in enumerate(sampler.sources)
        if source.name in caps
    }
    reached: dict[int, int] = {}
    while sampler.step < steps:
        chunk = min(-(-steps // CHUNKS), steps - sampler.step)
        after = _taken(sampler, chunk)
        for k in [k for k, limit in limits.items() if k not in reached and after[k] >= limit]:
            reached[k] = sampler.step + _first(sampler, chunk, k, limits[k])
        sampler.skip(chunk)
    group_of = {source.name: group.name for group in sampler.groups for source in group.sources}
    taken = consumed(sampler.state_dict())
    index = {source.name: k for k, source in enumerate(sampler.sources)}
    sources = [
        SourceForecast(
            group=group_of[source.name],
            name=source.name,
            sequences=taken.get(source.name, 0),
            tokens=taken.get(source.name, 0) * sampler.seq_length,
            loss_tokens=None if epochs is None else taken.get(source.name, 0) * epochs[source.name] // source.windows,
            windows=source.windows,
            cap=caps.get(source.name),
            capped_at=reached.get(index[source.name]),
        )
        for group in sampler.groups
        for source in group.sources
    ]
    worst = {} if epochs else zip((group.name for group in sampler.groups), sampler.deviations, strict=True)
    return Forecast(steps, sources, {name: deviation / ONE for name, deviation in dict(worst).items()})


def _taken(sampler: Sampler, steps: int) -> list[int]:
    """Sequences taken from each of `sampler.sources` some steps on."""
    taken = consumed(sampler.replay(steps))
    return [taken.get(source.name, 0) for source in sampler.sources]


def _first(sampler: Sampler, chunk: int, k: int, limit: Fraction) -> int:
    """The first of the next `chunk` steps after which source `k` has reached `limit`, which it has after the last."""
    low, high = 0, chunk
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if _taken(sampler, middle)[k] >= limit else (middle, high)
    return high
