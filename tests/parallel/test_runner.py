"""What a rank posts cannot stall, however strictly its communicators keep their order."""

from __future__ import annotations

from collections import defaultdict, deque

import pytest

from megaflow.parallel.runner import SENDS_UNDER_WAY, posts
from megaflow.parallel.schedule import Action, Schedule, forward_only, make_schedule
from megaflow.parallel.simulator import Communicator, Transfer, action_ends


def stuck(schedule: Schedule) -> list[str]:
    """Ranks that never end, where a communicator does one thing at a time, in the order posted, and keeps no message.

    So does NCCL: a send ends when its receive is running, and both wait for what was posted before them.
    """
    programs = [deque(posts(schedule, rank)) for rank in range(schedule.pp)]
    queues: dict[tuple[int, Communicator], deque[Transfer]] = defaultdict(deque)
    arrived: set[Transfer] = set()
    moved = True
    while moved:
        moved = False
        for rank, program in enumerate(programs):
            while program and not waits(program[0], queues, rank, arrived, schedule):
                step, moved = program.popleft(), True
                if isinstance(step, Transfer):
                    queues[rank, step.communicator].append(step)
        for (rank, channel), queue in list(queues.items()):
            while queue and queue[0].sends and (others := queues[queue[0].peer, channel]):
                send, receive = queue[0], others[0]
                if receive.sends or receive.peer != rank:
                    break
                assert (send.micro_batch, send.chunk) == (receive.micro_batch, receive.chunk)
                queue.popleft()
                arrived.add(others.popleft())
                moved = True
    return [f"rank {rank}: {program[0]}" for rank, program in enumerate(programs) if program]


def waits(
    step: Action | Transfer,
    queues: dict[tuple[int, Communicator], deque[Transfer]],
    rank: int,
    arrived: set[Transfer],
    schedule: Schedule,
) -> bool:
    if isinstance(step, Action):
        receive, _ = action_ends(schedule, step)
        return receive is not None and receive not in arrived
    queue = queues[rank, step.communicator]
    return step.sends and sum(end.sends for end in queue) == SENDS_UNDER_WAY


@pytest.mark.parametrize("pp", [2, 3, 4, 8])
@pytest.mark.parametrize("name", ["gpipe", "1f1b", "interleaved", "zb_h1", "zb_v"])
def test_no_rank_stalls(name: str, pp: int) -> None:
    for micro_batches in (1, 2, 3, 5, 8, 16, 33):
        if name != "interleaved":
            schedules = [make_schedule(name, pp, micro_batches)]
        else:
            schedules = [make_schedule(name, pp, pp * micro_batches, chunks) for chunks in (2, 3)]
        for schedule in schedules:
            assert stuck(schedule) == [], (micro_batches, schedule.chunks_per_rank)
            assert stuck(forward_only(schedule.owners, micro_batches)) == []


def test_a_stall_is_noticed() -> None:
    schedule = make_schedule("1f1b", 2, 4)
    first = schedule.ranks[0]
    assert stuck(Schedule("broken", 4, schedule.owners, ((*first[2:], *first[:2]), schedule.ranks[1])))
