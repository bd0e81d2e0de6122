"""Schedules: what the papers say of them, and that every one is whole and can run."""

from __future__ import annotations

import pytest

from megaflow.errors import UserError
from megaflow.parallel.schedule import SCHEDULES, Action, Schedule, make_schedule
from megaflow.parallel.simulator import Costs, Timeline, simulate

SIZES = [(pp, m) for pp in (1, 2, 3, 4, 5, 8) for m in (1, 2, 3, 4, 5, 7, 8, 12, 16, 17, 32)]
FULL = [(pp, m) for pp in (1, 2, 3, 4, 6, 8, 16) for m in (2 * pp, 2 * pp + 1, 4 * pp, 48)]


def run(name: str, pp: int, micro_batches: int, chunks: int | None = None) -> Timeline:
    return simulate(make_schedule(name, pp, micro_batches, chunks))


@pytest.mark.parametrize("name", ["gpipe", "1f1b", "zb_h1", "zb_v"])
def test_every_size_is_whole_and_runs(name: str) -> None:
    split = 3 if name in ("zb_h1", "zb_v") else 2
    for pp, micro_batches in SIZES:
        timeline = run(name, pp, micro_batches)
        chunks = timeline.schedule.chunks_per_rank
        assert [len(ends) for ends in timeline.ends] == [micro_batches * chunks * split] * pp


@pytest.mark.parametrize("chunks", [2, 3, 4])
def test_every_size_of_interleaved_is_whole_and_runs(chunks: int) -> None:
    for pp, rounds in [(pp, rounds) for pp in (1, 2, 3, 4, 8) for rounds in (1, 2, 3, 5)]:
        timeline = run("interleaved", pp, rounds * pp, chunks)
        assert [len(ends) for ends in timeline.ends] == [2 * rounds * pp * chunks] * pp


@pytest.mark.parametrize("name", list(SCHEDULES))
def test_the_largest_size_runs(name: str) -> None:
    timeline = run(name, 64, 256)
    share = {"gpipe": 63 / 319, "1f1b": 63 / 319, "interleaved": 63 / 575, "zb_h1": 63 / 831, "zb_v": 63 / 1599}
    assert timeline.bubble == pytest.approx(share[name])


@pytest.mark.parametrize("name", list(SCHEDULES))
@pytest.mark.parametrize("costs", [Costs(1, 2, 0.5, 0.25), Costs(3, 1, 1, 2), Costs(1, 1, 2)])
def test_other_costs_only_move_actions(name: str, costs: Costs) -> None:
    timeline = simulate(make_schedule(name, 4, 12), costs)
    work = 12 * timeline.schedule.chunks_per_rank * (costs.forward + costs.backward_input + costs.backward_weight)
    assert timeline.duration >= work
    assert timeline.bubble == pytest.approx(1 - work / timeline.duration)


@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
def test_bubble_of_gpipe_and_1f1b(name: str) -> None:
    for pp, micro_batches in SIZES:
        timeline = run(name, pp, micro_batches)
        assert timeline.bubble == pytest.approx((pp - 1) / (micro_batches + pp - 1))
        assert timeline.inner_bubble == pytest.approx(timeline.bubble)


@pytest.mark.parametrize("chunks", [2, 3, 4])
def test_bubble_of_interleaved_shrinks_by_the_chunks(chunks: int) -> None:
    for pp, rounds in [(pp, rounds) for pp in (1, 2, 3, 4, 8) for rounds in (1, 2, 3, 5)]:
        expected = (pp - 1) / (chunks * rounds * pp + pp - 1)
        assert run("interleaved", pp, rounds * pp, chunks).bubble == pytest.approx(expected)


def test_zb_h1_leaves_a_third_of_the_idle_time_in_the_memory_of_1f1b() -> None:
    for pp, micro_batches in FULL:
        split, whole = run("zb_h1", pp, micro_batches), run("1f1b", pp, micro_batches)
        work = 3 * micro_batches
        assert split.duration - work == pytest.approx((whole.duration - work) / 3)
        assert max(split.peak_activations) == max(whole.peak_activations)


def test_zb_v_idles_nowhere_in_the_memory_of_1f1b() -> None:
    for pp, micro_batches in FULL:
        timeline = run("zb_v", pp, micro_batches)
        assert timeline.inner_bubble == pytest.approx(0)
        assert timeline.duration == 6 * micro_batches + pp - 1  # the last rank cannot start before
        assert timeline.peak_activations == (2 * pp,) * pp  # of half a rank's layers: pp micro-batches


def test_peak_activations() -> None:
    for pp, m in SIZES:
        assert run("gpipe", pp, m).peak_activations == (m,) * pp
        assert run("1f1b", pp, m).peak_activations == tuple(min(pp - rank, m) for rank in range(pp))
        if m % pp == 0:  # what a rank runs before its first backward, and the forward that pairs with it
            warmups = [2 * (pp - 1 - rank) + (3 - 1) * pp for rank in range(pp)]
            assert run("interleaved", pp, m, 3).peak_activations == tuple(min(n + 1, 3 * m) for n in warmups)
        assert max(run("zb_h1", pp, m).peak_activations) <= min(pp, m)
        assert max(run("zb_v", pp, m).peak_activations) <= 2 * min(pp, m)


def test_1f1b_and_zb_h1_written_out() -> None:
    letters = {"forward": "F", "backward": "B", "backward_input": "B", "backward_weight": "W"}

    def brief(schedule: Schedule) -> list[str]:
        return [" ".join(f"{letters[a.kind]}{a.micro_batch}" for a in actions) for actions in schedule.ranks]

    assert brief(make_schedule("1f1b", 3, 4)) == [
        "F0 F1 F2 B0 F3 B1 B2 B3",
        "F0 F1 B0 F2 B1 F3 B2 B3",
        "F0 B0 F1 B1 F2 B2 F3 B3",
    ]
    assert brief(make_schedule("zb_h1", 3, 4)) == [
        "F0 F1 F2 B0 W0 F3 B1 W1 B2 W2 B3 W3",
        "F0 F1 B0 F2 B1 W0 F3 B2 W1 B3 W2 W3",
        "F0 B0 F1 B1 F2 B2 W0 F3 B3 W1 W2 W3",
    ]


def test_chunks_are_dealt_in_turn_or_as_a_v() -> None:
    assert make_schedule("interleaved", 3, 3, 2).owners == (0, 1, 2, 0, 1, 2)
    schedule = make_schedule("zb_v", 3, 6)
    assert schedule.owners == (0, 1, 2, 2, 1, 0)
    assert schedule.ranks[2][:2] == (Action("forward", 0, 2), Action("forward", 0, 3))


@pytest.mark.parametrize(
    ("name", "pp", "micro_batches", "chunks", "what"),
    [
        ("zb", 2, 2, None, "choose one of gpipe, 1f1b"),
        ("1f1b", 0, 2, None, "0 pipeline ranks"),
        ("1f1b", 2, 0, None, "0 micro-batches"),
        ("interleaved", 2, 2, 0, "0 chunks"),
        ("interleaved", 2, 2, 1, "at least 2 chunks"),
        ("interleaved", 4, 6, 2, "take 8"),
        ("zb_v", 4, 8, 3, "has 2 chunks"),
        ("gpipe", 4, 8, 2, "has 1 chunk per rank"),
    ],
)
def test_what_does_not_exist_is_refused(name: str, pp: int, micro_batches: int, chunks: int | None, what: str) -> None:
    with pytest.raises(UserError, match=what):
        make_schedule(name, pp, micro_batches, chunks)
