"""Pipeline schedules as data: what each pipeline rank does, in order.

The layers are cut into chunks, numbered from the first layers to the last; a rank holds one chunk or several. A
schedule lists for every rank its actions on chunks and micro-batches, in order. When each runs is not part of it: the
order alone decides what a run computes and which transfers it posts.

A backward pass may be split (Qi et al., Zero Bubble Pipeline Parallelism, arXiv 2401.10241): the gradient of a chunk's
input is what the neighbour waits for, the gradient of its weights can be computed at any later time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from megaflow.errors import UserError

Kind = Literal["forward", "backward", "backward_input", "backward_weight"]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Action:
    """One pass of one micro-batch through one chunk; `backward` is both gradients at once."""

    kind: Kind
    micro_batch: int
    chunk: int

    def __str__(self) -> str:
        return f"{self.kind} of micro-batch {self.micro_batch}, chunk {self.chunk}"


@dataclass(frozen=True)
class Schedule:
    """The ordered actions of every pipeline rank."""

    name: str
    micro_batches: int
    owners: tuple[int, ...]
    """The rank that holds each chunk of the model."""
    ranks: tuple[tuple[Action, ...], ...]
    """The actions of each rank, in the order it runs them."""

    @property
    def pp(self) -> int:
        """Number of pipeline ranks."""
        return len(self.ranks)

    @property
    def chunks_per_rank(self) -> int:
        """Chunks that each rank holds."""
        return len(self.owners) // len(self.ranks)


def chunk_owners(name: str, pp: int, chunks: int) -> tuple[int, ...]:
    """The rank that holds each chunk of the model, `chunks` per rank, under the schedule of that name."""
    ranks = tuple(range(pp))
    return (*ranks, *reversed(ranks)) if name == "zb_v" else ranks * chunks


def gpipe(pp: int, micro_batches: int) -> Schedule:
    """All forwards, then all backwards (Huang et al., GPipe, arXiv 1811.06965): every activation is alive at once."""
    order = [*_each("forward", micro_batches), *_each("backward", micro_batches)]
    ranks = [[Action(kind, index, rank) for kind, index in order] for rank in range(pp)]
    return _schedule("gpipe", micro_batches, ranks)


def one_f_one_b(pp: int, micro_batches: int) -> Schedule:
    """A backward follows each forward as soon as the last rank has one (Narayanan et al., arXiv 2006.09503).

    The bubble is GPipe's; rank r holds the activations of pp - r micro-batches only.
    """
    ranks = []
    for rank in range(pp):
        forwards, backwards = _each("forward", micro_batches), _each("backward", micro_batches)
        order = _alternate(forwards, backwards, warmup=pp - 1 - rank)
        ranks.append([Action(kind, index, rank) for kind, index in order])
    return _schedule("1f1b", micro_batches, ranks)


def interleaved(pp: int, micro_batches: int, chunks: int) -> Schedule:
    """1F1B over `chunks` chunks per rank, dealt in turn (Narayanan et al., arXiv 2104.04473).

    A rank takes pp micro-batches through its first chunk, the same through its next, and so on; the bubble shrinks by
    the number of chunks, and transfers grow by it.
    """
    groups = [range(i, i + pp) for i in range(0, micro_batches, pp)]
    ranks = []
    for rank in range(pp):
        held = range(rank, pp * chunks, pp)
        forwards = [Action("forward", i, chunk) for group in groups for chunk in held for i in group]
        backwards = [Action("backward", i, chunk) for group in groups for chunk in reversed(held) for i in group]
        ranks.append(_alternate(forwards, backwards, warmup=2 * (pp - 1 - rank) + (chunks - 1) * pp))
    return _schedule("interleaved", micro_batches, ranks, chunks)


def zb_h1(pp: int, micro_batches: int) -> Schedule:
    """1F1B with split backwards and the memory of 1F1B's first rank (Qi et al., arXiv 2401.10241, ZB-H1).

    Rank r lets r weight gradients wait: so input gradients leave the last ranks early, every rank holds pp activations
    at most, and what waited fills the end, where 1F1B idles. With equal costs a third of 1F1B's bubble is left.
    """
    ranks = []
    for rank in range(pp):
        forwards, backwards = _each("forward", micro_batches), _each("backward_input", micro_batches)
        actions = []
        for kind, index in _alternate(forwards, backwards, warmup=pp - 1 - rank):
            actions.append(Action(kind, index, rank))
            if kind == "backward_input" and index >= rank:
                actions.append(Action("backward_weight", index - rank, rank))
        rest = range(max(micro_batches - rank, 0), micro_batches)
        actions += [Action("backward_weight", index, rank) for index in rest]
        ranks.append(actions)
    return _schedule("zb_h1", micro_batches, ranks)


def zb_v(pp: int, micro_batches: int) -> Schedule:
    """Split backwards over two chunks per rank in the shape of a V (Qi et al., arXiv 2405.15362, ZB-V).

    Rank r holds chunks r and 2 pp - 1 - r, so that the last chunk's backward starts on the rank that loads the data.
    With equal costs and at least 2 pp micro-batches no rank idles between its first action and its last, and each holds
    2 pp activations of half a rank's layers: 1F1B's peak, on every rank.
    """
    return _schedule("zb_v", micro_batches, [_v_rank(pp, rank, micro_batches) for rank in range(pp)], chunks=2)


def _v_rank(pp: int, rank: int, micro_batches: int) -> list[Action]:
    """A rank's actions in ZB-V: "down" is the chunk on the V's left leg, "up" the one on its right."""
    down, up = rank, 2 * pp - 1 - rank
    actions: list[Action] = []
    done: dict[tuple[Kind, int], int] = {}

    def run(*passes: tuple[Kind, int]) -> None:
        for kind, chunk in passes:
            index = done.get((kind, chunk), 0)
            if index < micro_batches:
                done[kind, chunk] = index + 1
                actions.append(Action(kind, index, chunk))

    def whole(chunk: int) -> tuple[tuple[Kind, int], ...]:
        return ("backward_input", chunk), ("backward_weight", chunk)

    # until the first backward arrives, 2 pp forwards: down alone until the first micro-batch comes back up
    for _ in range(2 * (pp - rank) - 1):
        run(("forward", down))
    for _ in range(rank):
        run(("forward", up), ("forward", down))
    # backwards of the right leg until those of the left leg arrive
    for _ in range(pp - rank):
        run(("forward", up), *whole(up))
    while done.get(("forward", up), 0) < micro_batches:
        run(("forward", down), *whole(down), ("forward", up), *whole(up))
    # input gradients first, for the neighbours wait for them; what weight gradients are left fills the end
    for _ in range(rank):
        run(("backward_input", down), ("backward_input", up))
    for _ in range(pp - rank):
        run(*whole(down))
    for chunk in (up, down):
        for _ in range(micro_batches - done[("backward_weight", chunk)]):
            run(("backward_weight", chunk))
    return actions


def forward_only(owners: tuple[int, ...], micro_batches: int) -> Schedule:
    """Forward passes without backward ones, pp micro-batches at a time from each chunk to the next: for evaluation."""
    pp = max(owners) + 1
    groups = [range(i, min(i + pp, micro_batches)) for i in range(0, micro_batches, pp)]
    order = [Action("forward", i, chunk) for group in groups for chunk in range(len(owners)) for i in group]
    ranks = [tuple(action for action in order if owners[action.chunk] == rank) for rank in range(pp)]
    return Schedule("forward", micro_batches, owners, tuple(ranks))


def _each(kind: Kind, micro_batches: int) -> list[tuple[Kind, int]]:
    return [(kind, index) for index in range(micro_batches)]


def _alternate(forwards: list[T], backwards: list[T], warmup: int) -> list[T]:
    """`warmup` forwards, then a forward and a backward in turn, then the backwards that are left."""
    warmup = min(warmup, len(forwards))
    steady = [item for pair in zip(forwards[warmup:], backwards, strict=False) for item in pair]
    return [*forwards[:warmup], *steady, *backwards[len(forwards) - warmup :]]


def _schedule(name: str, micro_batches: int, ranks: Sequence[Iterable[Action]], chunks: int = 1) -> Schedule:
    owners = chunk_owners(name, len(ranks), chunks)
    return Schedule(name, micro_batches, owners, tuple(tuple(actions) for actions in ranks))


SCHEDULES: dict[str, Callable[[int, int, int], Schedule]] = {
    "gpipe": lambda pp, micro_batches, chunks: gpipe(pp, micro_batches),
    "1f1b": lambda pp, micro_batches, chunks: one_f_one_b(pp, micro_batches),
    "interleaved": interleaved,
    "zb_h1": lambda pp, micro_batches, chunks: zb_h1(pp, micro_batches),
    "zb_v": lambda pp, micro_batches, chunks: zb_v(pp, micro_batches),
}


def make_schedule(name: str, pp: int, micro_batches: int, chunks: int | None = None) -> Schedule:
    """The schedule of that name; `chunks` is per rank, None: as few as the schedule works with.

    Raises UserError when there is no such schedule, or it does not exist for these numbers.
    """
    if name not in SCHEDULES:
        raise UserError(f"schedule {name!r}: there is none of that name; choose one of {', '.join(SCHEDULES)}")
    fewest = 2 if name in ("interleaved", "zb_v") else 1
    chunks = fewest if chunks is None else chunks
    for what, value in (("pipeline ranks", pp), ("micro-batches", micro_batches), ("chunks", chunks)):
        if value < 1:
            raise UserError(f"{value} {what}: must be at least 1")
    if name == "interleaved":
        if chunks < 2:
            raise UserError(f"schedule interleaved: needs at least 2 chunks per rank, got {chunks}; 1f1b has one")
        if micro_batches % pp:
            raise UserError(
                f"schedule interleaved: {micro_batches} micro-batches are no multiple of {pp} pipeline ranks; "
                f"take {-(-micro_batches // pp) * pp}"
            )
    elif chunks != fewest:
        raise UserError(f"schedule {name}: has {fewest} chunk{'s' * (fewest > 1)} per rank, got {chunks}")
    return SCHEDULES[name](pp, micro_batches, chunks)
