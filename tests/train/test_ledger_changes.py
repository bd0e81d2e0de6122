"""Runs whose mix changes, by hand or by an edited config, train on exactly what the ledger says, killed or moved."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megaflow.config import Config
from megaflow.config_load import dump_config, parse_config, read_yaml
from megaflow.data.sampler.ledger import LedgerEntry, append_entry, read_ledger, write_ledger
from megaflow.data.sampler.schedule import Knot, compile_knots
from megaflow.errors import UserError
from megaflow.tools.data import change
from megaflow.train.run import Run, plan_run
from megaflow.train.samples import read_samples
from tests.distributed import RankError
from tests.train.runs import MakeConfig, killed, losses, planned_samples, run

GROUPS = ["en", "zh", "parallel", "instruction"]


def ledger_of(config: Config) -> list[LedgerEntry]:
    return read_ledger(Path(config.run_dir) / "ledger.json")


def group_counts(config: Config, step: int) -> list[int]:
    sources = [source for source, _, _ in read_samples(Path(config.run_dir))[step]]
    return [sources.count(k) for k in range(len(GROUPS))]


def with_more_english(config: Config, corpora: dict[str, Path], batch_size: int = 12) -> Config:
    """A second English source, of the Chinese corpus's text, in the first group; another schedule and batch size."""
    tree = config.model_dump(mode="json")
    tree["data"]["groups"]["en"]["sources"]["more"] = {"path": str(corpora["zh"]), "weight": 3}
    tree["data"]["groups"]["en"]["sources"]["en_source"]["weight"] = 1
    tree["data"]["schedule"] = {"clock": "tokens", "knots": [{"at": 0, "weights": dict.fromkeys(GROUPS, 0.25)}]}
    tree["train"]["global_batch_size"] = batch_size
    return parse_config(tree, "edited")


def test_a_change_by_hand_takes_effect_at_its_step_killed_and_moved(make_config: MakeConfig) -> None:
    config = make_config("run", train__steps=5)
    run(config)
    change(Path(config.run_dir), at_step=7, weights="zh=0.5,en=0.5,parallel=0,instruction=0", config=None, why="a test")
    config = make_config("run")
    killed(config, 2, rank=1, step=10)
    run(make_config("run", train__micro_batch_size=4))
    first, second = ledger_of(config)
    assert (first.first_step, second.first_step, second.why) == (1, 7, "a test")
    assert read_samples(Path(config.run_dir)) == planned_samples(config)
    assert [step for step, _ in losses(config)] == list(range(1, 13))
    assert group_counts(config, 6)[2] > 0
    assert [group_counts(config, step) for step in range(7, 13)] == [[4, 4, 0, 0]] * 6


def test_an_edited_config_takes_effect_after_the_checkpoint_resumed_from(
    make_config: MakeConfig, corpora: dict[str, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    """With a source appended to the first group and a larger batch; killed again, and moved, before the next save."""
    config = make_config("run")
    killed(config, 1, rank=0, step=6)
    edited = with_more_english(config, corpora)
    killed(edited, 2, rank=0, step=7)
    assert "the mix changes from step 5 on" in capfd.readouterr().out
    run(edited)
    assert "the mix changes" not in capfd.readouterr().out
    _, second = ledger_of(config)
    assert (second.first_step, second.batch_size, second.why) == (5, 12, "config edited on resume")
    samples = read_samples(Path(config.run_dir))
    assert samples == planned_samples(config)
    assert [len(samples[step]) for step in sorted(samples)] == [8] * 4 + [12] * 8
    assert {source for step in range(5, 13) for source, _, _ in samples[step]} == {0, 1, 2, 3, 4}
    of_english = [source for step in range(5, 13) for source, _, _ in samples[step] if source in (0, 4)]
    assert (of_english.count(0), of_english.count(4)) == (6, 18)
    records = losses(config)
    assert [step for step, _ in records] == list(range(1, 13))


def test_a_change_by_hand_with_another_config_needs_that_config_to_resume(
    make_config: MakeConfig, corpora: dict[str, Path], tmp_path: Path
) -> None:
    config = make_config("run", train__steps=4)
    run(config, 2)
    longer = make_config("run", train__steps=9)
    edited, file = with_more_english(longer, corpora), tmp_path / "edited.yaml"
    file.write_text(dump_config(edited))
    change(Path(config.run_dir), at_step=6, weights="", config=file, why="more English")
    with pytest.raises(UserError, match="'more' is in the run's ledger but not in the config"):
        run_planned(longer)
    run(edited)
    assert [entry.first_step for entry in ledger_of(config)] == [1, 6]
    assert read_samples(Path(config.run_dir)) == planned_samples(edited)


def run_planned(config: Config) -> Run:
    import torch

    return plan_run(config, torch.device("cpu"))


def appended(first_step: int, **changes: Any) -> Any:
    """Appends an entry of constant weights to the ledger of a run while it takes step 5."""

    def during(rank: int, planned: Run) -> None:
        if rank == 0 and planned.sampler.step == 5:
            ledger = read_ledger(planned.dir / "ledger.json")
            schedule = compile_knots("steps", [Knot(0, [0, 1, 0, 0])])
            entry = replace(ledger[-1], **({"first_step": first_step, "schedule": schedule, "why": "live"} | changes))
            write_ledger(planned.dir / "ledger.json", [*ledger, entry])

    return during


@pytest.mark.parametrize(("asked", "got"), [(8, 8), (6, 7)])
def test_a_run_that_is_going_takes_up_a_change(make_config: MakeConfig, asked: int, got: int) -> None:
    """It looks every other step: what was asked for a step that has passed by then comes at the next one."""
    config = make_config("run")
    data = config.data.model_dump(mode="json") | {"digest_interval": 2}
    config = parse_config(config.model_dump(mode="json") | {"data": data}, "run")
    run(config, 2, during=appended(asked, batch_size=4))
    assert [(entry.first_step, entry.batch_size) for entry in ledger_of(config)] == [(1, 8), (got, 4)]
    assert read_samples(Path(config.run_dir)) == planned_samples(config)
    assert sum(group_counts(config, got - 1)) == 8
    assert [group_counts(config, step) for step in range(got, 13)] == [[0, 4, 0, 0]] * (13 - got)


def test_a_run_that_is_going_stops_for_a_new_source(make_config: MakeConfig, corpora: dict[str, Path]) -> None:
    config = make_config("run")
    edited = with_more_english(config, corpora, batch_size=8)
    [entry] = run_planned(with_name(edited, "other")).ledger
    changes = {"groups": entry.groups, "manifests": entry.manifests, "schedule": entry.schedule}
    run(config, 1, during=appended(11, **changes))
    assert losses(config)[-1][0] == 8  # the first look at the ledger: the checkpoint there
    run(edited)
    assert [entry.first_step for entry in ledger_of(config)] == [1, 11]
    assert read_samples(Path(config.run_dir)) == planned_samples(config)


def with_name(config: Config, name: str) -> Config:
    return config.model_copy(update={"run_dir": str(Path(config.run_dir).with_name(name))})


def test_lengthening_a_run_with_the_default_ramp_appends_nothing(make_config: MakeConfig) -> None:
    weights = dict(zip(GROUPS, ([0.5, 0.1], [0.1, 0.4], [0.4, 0.2], [0.0, 0.3]), strict=True))
    schedule = {"clock": "tokens"} | {
        key: {name: ends[i] for name, ends in weights.items()} for i, key in enumerate(("initial", "final"))
    }
    config = make_config("run", train__steps=5)
    data = config.data.model_dump(mode="json") | {"schedule": schedule}
    short = parse_config(config.model_dump(mode="json") | {"data": data}, "short")
    run(short)
    longer = short.model_copy(update={"train": short.train.model_copy(update={"steps": 12})})
    before = ledger_of(short)
    run(longer)
    assert ledger_of(longer) == before
    assert before[0].schedule.knots[-1][0] == 3 * 8 * 32
    assert read_samples(Path(longer.run_dir)) == planned_samples(longer)


def test_an_edit_before_an_entry_that_is_to_come_is_refused(make_config: MakeConfig) -> None:
    config = make_config("run", train__steps=5)
    run(config)
    change(Path(config.run_dir), at_step=9, weights="zh=0.5,en=0.5,parallel=0,instruction=0", config=None, why="")
    with pytest.raises(RankError, match=r"has an entry from step 9 on, so the mix cannot be edited at step 6"):
        run(make_config("run", train__global_batch_size=4))
    assert len(ledger_of(config)) == 2


def test_a_batch_that_the_layout_cannot_share_out_is_refused_at_launch(make_config: MakeConfig) -> None:
    config = make_config("run", train__steps=4)
    run(config)
    change_batch = make_config("run", train__global_batch_size=6)
    with pytest.raises(RankError, match=r"from step 5 on: batch size 6 is not a multiple of 8"):
        run(change_batch, 4)
    assert len(ledger_of(config)) == 1


def test_a_batch_that_the_schedule_cannot_take_is_refused_at_launch(make_config: MakeConfig) -> None:
    layout = {"parallel__pp": 2, "parallel__schedule": "interleaved", "model__num_layers": 4}
    config = make_config("run", train__steps=2, **layout)
    run(config, 2)
    edited = make_config("run", train__global_batch_size=6, **layout)
    with pytest.raises(RankError, match=r"from step 3 on: schedule interleaved: 3 micro-batches are no multiple of 2"):
        run(edited, 2)
    file = Path(config.run_dir).with_name("edited.yaml")
    file.write_text(dump_config(edited))
    with pytest.raises(UserError, match=r"train.global_batch_size: schedule interleaved: 3 micro-batches"):
        change(Path(config.run_dir), at_step=9, weights="", config=file, why="")


def test_an_entry_that_was_replaced_before_it_took_effect_is_no_obstacle(make_config: MakeConfig) -> None:
    config = make_config("run", train__steps=4)
    run(config)
    ledger = ledger_of(config)
    ledger += [replace(ledger[0], first_step=7, batch_size=size, why="by hand") for size in (6, 16)]
    write_ledger(Path(config.run_dir) / "ledger.json", ledger)
    run(make_config("run"), 4)
    assert read_samples(Path(config.run_dir)) == planned_samples(make_config("run"))


def test_an_entry_for_steps_that_are_saved_takes_effect_after_them(make_config: MakeConfig) -> None:
    """Of three appended to a run that had stopped, the first two are too late: on resume they move, in the file too."""
    config = make_config("run", train__steps=5)
    run(config)
    ledger = ledger_of(config)
    ledger += [replace(ledger[0], first_step=step, batch_size=size, why="late") for step, size in ((3, 6), (5, 4))]
    ledger.append(replace(ledger[0], first_step=9, batch_size=12, why="in time"))
    write_ledger(Path(config.run_dir) / "ledger.json", ledger)
    run(make_config("run"), 2)
    assert [(entry.first_step, entry.batch_size, entry.why) for entry in ledger_of(config)[1:]] == [
        (6, 6, "late (asked for step 3)"),
        (6, 4, "late (asked for step 5)"),
        (9, 12, "in time"),
    ]
    samples = read_samples(Path(config.run_dir))
    assert samples == planned_samples(make_config("run"))
    assert [len(samples[step]) for step in sorted(samples)] == [8] * 5 + [4] * 3 + [12] * 4


def test_a_ledger_without_what_the_checkpoint_knew_is_refused(make_config: MakeConfig) -> None:
    config = make_config("run", train__steps=5)
    run(config)
    change(Path(config.run_dir), at_step=9, weights="zh=0.5,en=0.5,parallel=0,instruction=0", config=None, why="")
    run(make_config("run", train__steps=7))
    write_ledger(Path(config.run_dir) / "ledger.json", ledger_of(config)[:1])
    with pytest.raises(RankError, match=r"step 7 was saved with another ledger\.json"):
        run(make_config("run"))


def test_sources_that_are_moved_or_left_out_are_refused(make_config: MakeConfig) -> None:
    config = make_config("run", train__steps=2)
    run(config)
    tree = config.model_dump(mode="json")
    groups = tree["data"]["groups"]
    for changed, words in (
        (dict(reversed(groups.items())), "group 'en' was number 1"),
        ({name: group for name, group in groups.items() if name != "zh"}, "'zh_source' is in the run's ledger"),
    ):
        schedule = {"clock": "steps", "knots": [{"at": 0, "weights": dict.fromkeys(changed, 0) | {"en": 1}}]}
        data = tree["data"] | {"groups": changed, "schedule": schedule}
        with pytest.raises(UserError, match=words) as caught:
            run_planned(parse_config(tree | {"data": data}, "changed"))
        assert "give a new run_dir" in str(caught.value)


def test_two_changes_by_hand_and_then_a_resume(
    make_config: MakeConfig, corpora: dict[str, Path], tmp_path: Path
) -> None:
    """The first by a config with a new source, the second by weights: resumed with either config, neither is undone."""
    run(make_config("run", train__steps=4))
    config = make_config("run")
    folder, file = Path(config.run_dir), tmp_path / "edited.yaml"
    edited = with_more_english(config, corpora, batch_size=8)
    file.write_text(dump_config(edited))
    change(folder, at_step=6, config=file, why="one")
    change(folder, at_step=8, weights="en=0,zh=1,parallel=0,instruction=0", why="two")
    for resumed in (edited, with_name_of_own(folder)):
        planned = run_planned(resumed)
        assert [(entry.first_step, entry.why) for entry in planned.ledger[1:]] == [(6, "one"), (8, "two")]
        assert planned.mix.edit is None
    run(edited)
    assert read_samples(folder) == planned_samples(config)
    assert group_counts_of_chinese(config, 9) == 8


def with_name_of_own(folder: Path) -> Config:
    """The config that the run's folder holds."""
    return parse_config(read_yaml(folder / "config.yaml"), "own")


def group_counts_of_chinese(config: Config, step: int) -> int:
    return sum(source == 1 for source, _, _ in read_samples(Path(config.run_dir))[step])


def test_a_ledger_that_somebody_else_changed_meanwhile_is_not_overwritten(make_config: MakeConfig) -> None:
    config = make_config("run", train__steps=4)
    run(config)
    path = Path(config.run_dir) / "ledger.json"
    read = read_ledger(path)
    entry = replace(read[0], first_step=9, why="theirs")
    append_entry(path, read, entry)
    with pytest.raises(UserError, match="was changed meanwhile"):
        append_entry(path, read, replace(entry, why="mine"))
    assert read_ledger(path)[-1].why == "theirs"
