"""Runs a pipeline schedule without processes: is it whole, can it stall, how long does it take, what does it hold.

Everything is linear in the number of actions.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from megaflow.parallel.schedule import Action, Kind, Schedule

Fault = Literal["missing", "doubled", "misplaced", "disordered", "deadlock", "transfers"]

_PASSES: tuple[Kind, ...] = ("forward", "backward_input", "backward_weight")
"""What every micro-batch does in every chunk, in this order; an unsplit backward is the last two."""


class ScheduleError(ValueError):
    """A schedule that cannot be run; `fault` is the kind of mistake, which the message begins with."""

    def __init__(self, fault: Fault, message: str) -> None:
        super().__init__(f"{fault}: {message}")
        self.fault = fault


@dataclass(frozen=True)
class Costs:
    """Time units for one chunk; an unsplit backward takes both of its parts, a transfer to another rank a latency."""

    forward: float = 1
    backward_input: float = 1
    backward_weight: float = 1
    communication: float = 0

    def of(self, kind: Kind) -> float:
        """How long an action of that kind takes."""
        if kind == "backward":
            return self.backward_input + self.backward_weight
        return {"forward": self.forward, "backward_input": self.backward_input}.get(kind, self.backward_weight)


@dataclass(frozen=True)
class Communicator:
    """One of the four channels of a rank: which pass, and towards higher ranks ("up") or lower ones ("down").

    Between two ranks each carries messages one way only. So plain sends and receives cannot cross, however many are
    under way, as long as both ends post them in the same order; `check` sees to that.
    """

    phase: Literal["forward", "backward"]
    direction: Literal["up", "down"]

    @property
    def group(self) -> str:
        """The name of its process group."""
        return f"{self.phase}_{self.direction}"


@dataclass(frozen=True, slots=True)
class Transfer:
    """One end of a message between two ranks: the output of `chunk` or, in the backward phase, its input gradient."""

    communicator: Communicator
    sends: bool
    peer: int
    micro_batch: int
    chunk: int


@dataclass(frozen=True)
class Timeline:
    """A schedule that ran: start and end of every action, and what follows from them."""

    schedule: Schedule
    starts: tuple[tuple[float, ...], ...]
    ends: tuple[tuple[float, ...], ...]
    peak_activations: tuple[int, ...]
    """Per rank, the most activations of a chunk for a micro-batch that it holds at once, each from its forward until
    its weight gradient is done."""

    @property
    def duration(self) -> float:
        """From the first action of any rank to the last."""
        return max(ends[-1] for ends in self.ends)

    @property
    def bubble(self) -> float:
        """The share of all ranks' time that is idle when every rank waits for all others at the end of the step."""
        return 1 - sum(self._busy(rank) for rank in range(self.schedule.pp)) / (self.schedule.pp * self.duration)

    @property
    def inner_bubble(self) -> float:
        """The share of its time from first action to last that the rank with the longest such time idles.

        The bubble rate of arXiv 2401.10241, whose optimizer steps wait for no other rank: then the staggered starts and
        ends of consecutive steps fit into each other.
        """
        spans = [ends[-1] - starts[0] for starts, ends in zip(self.starts, self.ends, strict=True)]
        longest = max(range(len(spans)), key=spans.__getitem__)
        return 1 - self._busy(longest) / spans[longest]

    def _busy(self, rank: int) -> float:
        return sum(end - start for start, end in zip(self.starts[rank], self.ends[rank], strict=True))


def simulate(schedule: Schedule, costs: Costs | Sequence[Costs] | None = None) -> Timeline:
    """Runs every action as early as its rank and what it depends on allow.

    `costs` are those of every chunk, or of each one, from the first layers to the last.

    Raises:
        ScheduleError: when the schedule does not pass `check`, or its ranks wait for each other.
    """
    check(schedule)
    each = costs if isinstance(costs, Sequence) else [costs or Costs()] * len(schedule.owners)
    arrived: dict[tuple[str, int, int], float] = {}  # when (phase, micro-batch, chunk) has its input from its neighbour
    starts: list[list[float]] = [[] for _ in schedule.ranks]
    ends: list[list[float]] = [[] for _ in schedule.ranks]
    runnable = list(range(schedule.pp))
    while runnable:
        rank = runnable.pop()
        actions = schedule.ranks[rank]
        while len(ends[rank]) < len(actions):
            action = actions[len(ends[rank])]
            phase = _phase(action)
            ready = 0.0
            if phase is not None and _source(schedule, action) is not None:
                found = arrived.pop((phase, action.micro_batch, action.chunk), None)
                if found is None:
                    break  # whoever produces it wakes this rank
                ready = found
            start = max(ready, ends[rank][-1]) if ends[rank] else ready
            starts[rank].append(start)
            ends[rank].append(start + each[action.chunk].of(action.kind))
            target = _target(schedule, action)
            if phase is not None and target is not None:
                owner = schedule.owners[target]
                latency = each[action.chunk].communication if owner != rank else 0
                arrived[phase, action.micro_batch, target] = ends[rank][-1] + latency
                if owner != rank:
                    runnable.append(owner)
    stuck = [
        f"rank {rank} waits to run {actions[len(done)]}"
        for rank, (actions, done) in enumerate(zip(schedule.ranks, ends, strict=True))
        if len(done) < len(actions)
    ]
    if stuck:
        raise ScheduleError("deadlock", "; ".join(stuck))
    peaks = tuple(_peak(actions) for actions in schedule.ranks)
    return Timeline(schedule, tuple(map(tuple, starts)), tuple(map(tuple, ends)), peaks)


def check(schedule: Schedule) -> None:
    """Proves that a schedule is whole and that its transfers match.

    Every micro-batch passes every chunk forward, for the input's gradient and for the weights', once each and in that
    order, on the rank that holds the chunk; and both ends of each pair of ranks post the same transfers in the same
    order on each communicator.

    Raises:
        ScheduleError: for the first mistake found, by name.
    """
    places: dict[tuple[Kind, int, int], int] = {}
    for rank, actions in enumerate(schedule.ranks):
        for place, action in enumerate(actions):
            if not (0 <= action.chunk < len(schedule.owners) and 0 <= action.micro_batch < schedule.micro_batches):
                raise ScheduleError("misplaced", f"rank {rank} runs {action}, which does not exist")
            if schedule.owners[action.chunk] != rank:
                owner = schedule.owners[action.chunk]
                raise ScheduleError("misplaced", f"rank {rank} runs {action}, which rank {owner} holds")
            for kind in _PASSES[1:] if action.kind == "backward" else (action.kind,):
                if places.setdefault((kind, action.micro_batch, action.chunk), place) != place:
                    raise ScheduleError("doubled", f"rank {rank} runs {action} a second time")
    for chunk, rank in enumerate(schedule.owners):
        for index in range(schedule.micro_batches):
            found = [places.get((kind, index, chunk)) for kind in _PASSES]
            if None in found:
                raise ScheduleError(
                    "missing", f"rank {rank} never runs {Action(_PASSES[found.index(None)], index, chunk)}"
                )
            forward, backward_input, backward_weight = (place for place in found if place is not None)
            if not forward < backward_input <= backward_weight:
                order = "forward, input gradient, weight gradient"
                raise ScheduleError(
                    "disordered", f"rank {rank} runs micro-batch {index}, chunk {chunk} in another order than {order}"
                )
    _check_transfers(schedule)


def transfers(schedule: Schedule, rank: int) -> list[Transfer]:
    """The messages a rank posts, in order: what an action needs before it, what it yields after it."""
    return [end for action in schedule.ranks[rank] for end in action_ends(schedule, action) if end is not None]


def action_ends(schedule: Schedule, action: Action) -> tuple[Transfer | None, Transfer | None]:
    """The message that an action's rank receives before it and the one it sends after it, where another rank has part.

    A forward-only schedule has those of its forwards.
    """
    phase, rank = _phase(action), schedule.owners[action.chunk]
    if phase is None:
        return None, None
    receive = send = None
    source, target = _source(schedule, action), _target(schedule, action)
    if source is not None and schedule.owners[source] != rank:
        peer = schedule.owners[source]
        channel = Communicator(phase, "up" if peer < rank else "down")
        receive = Transfer(channel, False, peer, action.micro_batch, source)
    if target is not None and schedule.owners[target] != rank:
        peer = schedule.owners[target]
        channel = Communicator(phase, "up" if rank < peer else "down")
        send = Transfer(channel, True, peer, action.micro_batch, action.chunk)
    return receive, send


def _check_transfers(schedule: Schedule) -> None:
    sent: dict[tuple[Communicator, int, int], list[tuple[int, int]]] = defaultdict(list)
    received: dict[tuple[Communicator, int, int], list[tuple[int, int]]] = defaultdict(list)
    for rank in range(schedule.pp):
        for transfer in transfers(schedule, rank):
            ends, pair = (sent, (rank, transfer.peer)) if transfer.sends else (received, (transfer.peer, rank))
            ends[(transfer.communicator, *pair)].append((transfer.micro_batch, transfer.chunk))
    for key in sent.keys() | received.keys():
        channel, sender, receiver = key
        for number, (given, taken) in enumerate(zip(sent[key], received[key], strict=True)):
            if given != taken:
                raise ScheduleError(
                    "transfers",
                    f"{channel.phase} {channel.direction}, message {number}: rank {sender} sends micro-batch "
                    f"{given[0]} of chunk {given[1]}, rank {receiver} expects {taken[0]} of chunk {taken[1]}",
                )


def _phase(action: Action) -> Literal["forward", "backward"] | None:
    """The phase whose messages an action takes and gives; none for a weight gradient, which is the rank's own."""
    if action.kind == "forward":
        return "forward"
    return None if action.kind == "backward_weight" else "backward"


def _source(schedule: Schedule, action: Action) -> int | None:
    """The chunk whose result the action needs; None at the ends of the model."""
    chunk = action.chunk - 1 if action.kind == "forward" else action.chunk + 1
    return chunk if 0 <= chunk < len(schedule.owners) else None


def _target(schedule: Schedule, action: Action) -> int | None:
    """The chunk that needs the action's result."""
    chunk = action.chunk + 1 if action.kind == "forward" else action.chunk - 1
    return chunk if 0 <= chunk < len(schedule.owners) else None


def _peak(actions: tuple[Action, ...]) -> int:
    live = peak = 0
    for action in actions:
        live += (action.kind == "forward") - (action.kind in ("backward", "backward_weight"))
        peak = max(peak, live)
    return peak
