"""The simulator: broken schedules are named, times are those of hand-made examples, transfers pair up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from megaflow.parallel.schedule import SCHEDULES, Action, Schedule, make_schedule
from megaflow.parallel.simulator import Communicator, Costs, ScheduleError, check, simulate, transfers

Actions = list[Action]


def broken(schedule: Schedule, change: Callable[[list[Actions]], None]) -> Schedule:
    ranks = [list(actions) for actions in schedule.ranks]
    change(ranks)
    return replace(schedule, ranks=tuple(tuple(actions) for actions in ranks))


def fault(schedule: Schedule) -> ScheduleError:
    with pytest.raises(ScheduleError) as caught:
        simulate(schedule)
    assert str(caught.value).startswith(f"{caught.value.fault}: ")
    return caught.value


def move(actions: Actions, source: int, target: int) -> None:
    actions.insert(target, actions.pop(source))


@pytest.mark.parametrize("name", list(SCHEDULES))
def test_each_action_dropped_is_missed_and_doubled_is_seen(name: str) -> None:
    schedule = make_schedule(name, 2, 4)
    for rank, actions in enumerate(schedule.ranks):
        for place, action in enumerate(actions):
            dropped = fault(broken(schedule, lambda ranks, r=rank, p=place: ranks[r].pop(p)))
            assert dropped.fault == "missing"
            assert f"rank {rank} " in str(dropped)
            assert f"micro-batch {action.micro_batch}, chunk {action.chunk}" in str(dropped)
            doubled = fault(broken(schedule, lambda ranks, r=rank, a=action: ranks[r].append(a)))
            assert doubled.fault == "doubled"
            assert str(action) in str(doubled)


def test_a_half_of_a_backward_beside_the_whole_is_doubled() -> None:
    schedule = make_schedule("1f1b", 2, 2)
    assert fault(broken(schedule, lambda ranks: ranks[0].append(Action("backward_weight", 1, 0)))).fault == "doubled"


def test_an_action_on_another_rank_or_on_nothing_is_misplaced() -> None:
    schedule = make_schedule("zb_v", 2, 4)
    moved = fault(broken(schedule, lambda ranks: ranks[1].append(ranks[0].pop())))
    assert moved.fault == "misplaced"
    assert "which rank 0 holds" in str(moved)
    for nothing in (Action("forward", 4, 0), Action("forward", -1, 0), Action("forward", 0, 4)):
        error = fault(broken(schedule, lambda ranks, action=nothing: ranks[0].append(action)))
        assert error.fault == "misplaced"
        assert "does not exist" in str(error)


def test_gradients_before_what_they_need_are_disordered() -> None:
    def weight_first(ranks: list[Actions]) -> None:
        move(ranks[1], ranks[1].index(Action("backward_weight", 2, 1)), 0)

    def backward_first(ranks: list[Actions]) -> None:
        move(ranks[1], ranks[1].index(Action("backward_input", 2, 1)), 0)

    for change in (weight_first, backward_first):
        error = fault(broken(make_schedule("zb_h1", 2, 4), change))
        assert error.fault == "disordered"
        assert "rank 1 runs micro-batch 2, chunk 1" in str(error)


def test_ranks_that_wait_for_each_other_are_a_deadlock() -> None:
    def no_warmup(ranks: list[Actions]) -> None:  # rank 0 wants a gradient of what rank 1 runs after the next forward
        ranks[0][:] = [Action(kind, i, 0) for i in range(2) for kind in ("forward", "backward")]
        ranks[1][:] = [Action(kind, i, 1) for kind in ("forward", "backward") for i in range(2)]

    error = fault(broken(make_schedule("1f1b", 2, 2), no_warmup))
    assert error.fault == "deadlock"
    assert "rank 0 waits to run backward of micro-batch 0, chunk 0" in str(error)
    assert "rank 1 waits to run forward of micro-batch 1, chunk 1" in str(error)


def test_a_rank_that_waits_for_itself_is_a_deadlock() -> None:
    def up_before_down(ranks: list[Actions]) -> None:
        move(ranks[0], ranks[0].index(Action("forward", 0, 1)), 0)

    assert fault(broken(make_schedule("zb_v", 1, 2), up_before_down)).fault == "deadlock"


def test_transfers_in_another_order_than_the_other_end_are_named() -> None:
    def swap(ranks: list[Actions]) -> None:  # dependencies still hold: rank 0 has run both
        move(ranks[1], 1, 0)

    error = fault(broken(make_schedule("gpipe", 3, 4), swap))
    assert error.fault == "transfers"
    assert "forward up, message 0" in str(error)


@pytest.mark.parametrize("name", list(SCHEDULES))
@pytest.mark.parametrize(("pp", "micro_batches"), [(2, 4), (3, 6), (4, 8)])
def test_between_two_ranks_a_communicator_goes_one_way(name: str, pp: int, micro_batches: int) -> None:
    schedule = make_schedule(name, pp, micro_batches)
    posted = [transfers(schedule, rank) for rank in range(pp)]
    for rank, own in enumerate(posted):
        for transfer in own:
            upwards = transfer.peer > rank if transfer.sends else transfer.peer < rank
            assert transfer.communicator.direction == ("up" if upwards else "down")
    cuts = sum(a != b for a, b in zip(schedule.owners, schedule.owners[1:], strict=False))
    assert sum(map(len, posted)) == 4 * cuts * micro_batches  # two ends of an activation and of its gradient


def test_transfers_of_a_v_use_all_four_communicators() -> None:
    middle = {transfer.communicator for transfer in transfers(make_schedule("zb_v", 3, 6), 1)}
    assert middle == {Communicator(phase, way) for phase in ("forward", "backward") for way in ("up", "down")}


def test_times_of_a_schedule_by_hand() -> None:
    timeline = simulate(
        make_schedule("1f1b", 2, 2), Costs(forward=1, backward_input=2, backward_weight=1, communication=5)
    )
    # F0 F1 B0 B1 on rank 0, F0 B0 F1 B1 on rank 1, a latency of 5 on each way
    assert timeline.starts == ((0, 1, 15, 19), (6, 7, 10, 11))
    assert timeline.ends == ((1, 2, 18, 22), (7, 10, 11, 14))
    assert timeline.duration == 22
    assert timeline.bubble == pytest.approx(1 - 16 / 44)
    assert timeline.inner_bubble == pytest.approx(1 - 8 / 22)


def test_chunks_of_one_rank_hand_over_without_a_transfer() -> None:
    schedule = make_schedule("zb_v", 1, 2)
    check(schedule)
    assert transfers(schedule, 0) == []
    assert simulate(schedule, Costs(communication=100)).bubble == pytest.approx(0)
