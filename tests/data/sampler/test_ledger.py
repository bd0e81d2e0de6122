from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megaflow.data.sampler.ledger import LedgerEntry, build_sampler, entries_from, read_ledger, write_ledger
from megaflow.data.sampler.mix import GroupSpec, Sampler, SourceSpec
from megaflow.data.sampler.plan import StepPlan
from megaflow.data.sampler.schedule import CLOCKS, ONE, Knot, chatflow, compile_knots, weights_from_decimals
from megaflow.errors import UserError
from tests.data.sampler_oracle import entry_at


def entry() -> LedgerEntry:
    en = GroupSpec(
        "en", (SourceSpec("wiki", 1000, 10), SourceSpec("小说", 30, 3)), tuple(weights_from_decimals([3, 1]))
    )
    zh = GroupSpec("zh", (SourceSpec("wiki_zh", 700, 10),), tuple(weights_from_decimals([1])))
    return LedgerEntry(
        first_step=1,
        schedule=chatflow("tokens", ["0.9", "0.1"], ["0.2", "0.8"], 10**15),
        batch_size=24,
        seed=2**63 - 1,
        seq_length=4096,
        groups=(en, zh),
        manifests={"wiki": "aa", "小说": "bb", "wiki_zh": "cc"},
        why="the config of the run",
    )


def test_a_ledger_gives_the_same_run_after_writing_and_reading(tmp_path):
    path = tmp_path / "ledger.json"
    write_ledger(path, [entry()])
    assert [file.name for file in tmp_path.iterdir()] == ["ledger.json"]
    ledger = read_ledger(path)
    assert ledger == [entry()]
    first, second = build_sampler([entry()]), build_sampler(ledger, use_native=False)
    assert [first.plan().digest for _ in range(5)] == [second.plan().digest for _ in range(5)]
    assert (first.batch_size, first.seq_length, first.seed) == (24, 4096, 2**63 - 1)


@pytest.mark.parametrize("text", ["", "[]", "{}", "[1]", '[{"first_step": 1}]', '["x"]'])
def test_a_file_that_is_no_ledger_is_named(tmp_path, text):
    path = tmp_path / "ledger.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"ledger.json: not a ledger") as caught:
        read_ledger(path)
    assert "\n" not in str(caught.value)


def test_a_ledger_whose_weights_were_edited_is_refused(tmp_path):
    path = tmp_path / "ledger.json"
    data = entry().to_json()
    data["schedule"]["knots"][0][1][0] += 1
    path.write_text(json.dumps([data]))
    with pytest.raises(UserError, match="not a ledger"):
        read_ledger(path)


def test_a_missing_ledger_is_named(tmp_path):
    with pytest.raises(UserError, match=r"ledger.json: No such file"):
        read_ledger(tmp_path / "ledger.json")


def test_other_corpora_than_the_run_s_are_refused():
    entry().check_manifests({"wiki": "aa", "小说": "bb", "wiki_zh": "cc", "new": "dd"})
    with pytest.raises(UserError, match="'小说': its corpus is not the one"):
        entry().check_manifests({"wiki": "aa", "小说": "b0", "wiki_zh": "cc"})
    with pytest.raises(UserError, match="'wiki_zh' is in the run's ledger but not in the config"):
        entry().check_manifests({"wiki": "aa", "小说": "bb"})


# ------------------------------------------------------------------ several entries

some = settings(max_examples=40, deadline=None, derandomize=True)


def changed(last: LedgerEntry, draw, first_step: int, number: int) -> LedgerEntry:
    """An entry that follows `last`: other weights and batch size, perhaps with appended sources and groups."""
    groups, manifests = [], dict(last.manifests)
    for group in last.groups:
        added = tuple(
            SourceSpec(f"{group.name}+{number}", draw(st.integers(1, 60)), 7) for _ in range(draw(st.integers(0, 1)))
        )
        weights = st.lists(st.integers(0, 9), min_size=len(group.sources + added), max_size=len(group.sources + added))
        shares = tuple(weights_from_decimals(draw(weights.filter(any))))
        groups.append(GroupSpec(group.name, group.sources + added, shares))
        manifests |= {source.name: "new" for source in added}
    if draw(st.booleans()):
        groups.append(GroupSpec(f"group{number}", (SourceSpec(f"source{number}", 40, 4),), (ONE,)))
        manifests[f"source{number}"] = "new"
    mix = st.lists(st.integers(0, 9), min_size=len(groups), max_size=len(groups)).filter(any)
    clock = draw(st.sampled_from(CLOCKS))
    schedule = compile_knots(clock, [Knot(0, draw(mix)), Knot(draw(st.integers(1, 3000)), draw(mix))])
    return LedgerEntry(
        first_step, schedule, draw(st.integers(1, 50)), last.seed, last.seq_length, tuple(groups), manifests, "a test"
    )


@st.composite
def ledgers(draw) -> list[LedgerEntry]:
    ledger = [entry()]
    for number in range(draw(st.integers(1, 3))):
        first_step = ledger[-1].first_step + draw(st.integers(0, 6))
        ledger.append(changed(ledger[-1], draw, first_step, number))
    return ledger


def cards(sampler: Sampler, plan: StepPlan) -> list[tuple[str, int, int]]:
    deck, names = plan.deck, [source.name for source in sampler.sources]
    return [
        (names[source], epoch, window)
        for source, epoch, window in zip(deck.source.tolist(), deck.epoch.tolist(), deck.window.tolist(), strict=True)
    ]


@some
@given(ledgers(), st.booleans())
def test_an_entry_takes_effect_at_exactly_its_step(ledger, use_native):
    """One sampler over the whole ledger plans what samplers of one entry each, handing over their state, plan."""
    sampler, state = build_sampler(ledger, use_native), None
    for step in range(1, 25):
        now = entry_at(ledger, step)
        alone = Sampler(now.seed, now.batch_size, now.seq_length, now.groups, now.schedule, not use_native)
        if state is not None:
            alone.load_state_dict(state)
        assert sampler.batch_size == now.batch_size
        expected, plan = alone.plan(), sampler.plan()
        assert (plan.step, plan.clock, plan.digest) == (step, expected.clock, expected.digest)
        assert cards(sampler, plan) == cards(alone, expected)
        state = alone.state_dict()
        assert sampler.state_dict() == state
        for group, counts in zip(sampler.groups, plan.counts, strict=True):
            assert len(group.sources) == len(counts)


@some
@given(ledgers(), st.integers(0, 20), st.integers(0, 20), st.booleans())
def test_no_window_is_skipped_or_repeated_by_a_change_or_a_resume(ledger, first, second, use_native):
    """Stopped anywhere and resumed with the ledger as far as it is then known: the order is the undisturbed one."""
    whole, planned = build_sampler(ledger, use_native), {}
    for _ in range(first + second):
        plan = whole.plan()
        planned[plan.step] = cards(whole, plan)
    known = [e for e in ledger if e.first_step <= first + 1]
    before, resumed = build_sampler(known, use_native), build_sampler(ledger, not use_native)
    for _ in range(first):
        assert cards(before, before.plan()) == planned[before.step]
    resumed.load_state_dict(json.loads(json.dumps(before.state_dict())))
    for _ in range(second):
        assert cards(resumed, resumed.plan()) == planned[resumed.step]
    assert resumed.digest == whole.digest
    taken: dict[str, list[tuple[int, int]]] = {}
    for step in sorted(planned):
        for name, epoch, window in planned[step]:
            taken.setdefault(name, []).append((epoch, window))
    for source in whole.sources:
        windows = taken.get(source.name, [])
        assert [epoch for epoch, _ in windows] == [i // source.windows for i in range(len(windows))]
        assert len(set(windows)) == len(windows)


@some
@given(ledgers(), st.integers(0, 10), st.integers(0, 30))
def test_replay_crosses_entries(ledger, first, steps):
    replayed = []
    for use_native in (False, True):
        sampler = build_sampler(ledger, use_native)
        for _ in range(first):
            sampler.plan()
        replayed.append(sampler.replay(steps))
        for _ in range(steps):
            sampler.plan()
        assert {**replayed[-1], "digest": sampler.state_dict()["digest"]} == sampler.state_dict()
    assert replayed[0] == replayed[1]


@some
@given(ledgers())
def test_the_flat_index_of_a_source_never_changes(ledger):
    names = [[source.name for source in build_sampler(ledger[: n + 1]).sources] for n in range(len(ledger))]
    for earlier, later in pairwise(names):
        assert later[: len(earlier)] == earlier


@some
@given(ledgers())
def test_several_entries_are_written_and_read(tmp_path_factory, ledger):
    path = tmp_path_factory.mktemp("ledger") / "ledger.json"
    write_ledger(path, ledger)
    assert read_ledger(path) == ledger


def test_the_clock_runs_on_over_a_change():
    """The same schedule again, appended later, changes nothing: its clock still counts from the run's first step."""
    once, again = build_sampler([entry()]), build_sampler([entry(), replace(entry(), first_step=7)])
    assert [once.plan().digest for _ in range(12)] == [again.plan().digest for _ in range(12)]


def test_of_two_entries_for_one_step_the_later_one_holds():
    ledger = [entry(), replace(entry(), first_step=4, batch_size=7), replace(entry(), first_step=4, batch_size=9)]
    sampler = build_sampler(ledger)
    assert [len(sampler.plan().deck.window) for _ in range(5)] == [24, 24, 24, 9, 9]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ([{"first_step": 2}], "the first entry is from step 2 on"),
        ([{}, {"first_step": 9}, {"first_step": 8}], "a mix from step 8 on comes after one from step 9 on"),
        ([{}, {"seed": 3}], "seed is 9223372036854775807 in this run, not 3"),
        ([{}, {"seq_length": 8}], "seq_length is 4096 in this run, not 8"),
        ([{}, {"manifests": {"wiki": "xx", "小说": "bb", "wiki_zh": "cc"}}], "'wiki': its corpus is not the one"),
        ([{}, {"groups": entry().groups[::-1]}], "group 'en' was number 1"),
        ([{}, {"batch_size": 0}], "batch size 0"),
    ],
)
def test_entries_that_do_not_follow_are_refused_by_file_and_reason(tmp_path, changes, message):
    path = tmp_path / "ledger.json"
    write_ledger(path, [replace(entry(), **change) for change in changes])
    with pytest.raises(UserError, match=message) as caught:
        read_ledger(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_the_entries_that_hold_from_a_step_on():
    ledger = [replace(entry(), first_step=step, why=str(n)) for n, step in enumerate((1, 4, 4, 9, 9, 9, 12))]
    holds = {step: [found.why for found in entries_from(ledger, step)] for step in (1, 3, 4, 8, 9, 11, 12, 50)}
    assert holds == {step: sorted({entry_at(ledger, later).why for later in range(step, 60)}) for step in holds}
    assert holds[4] == ["2", "5", "6"]


def test_a_change_in_the_past_is_refused():
    sampler = build_sampler([entry()])
    for _ in range(3):
        sampler.plan()
    before = sampler.state_dict()
    with pytest.raises(UserError, match="step 3 is planned already"):
        sampler.change(3, 8, entry().groups, entry().schedule)
    assert sampler.state_dict() == before
