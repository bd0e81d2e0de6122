"""`megaflow data`: changing the mix of a run, its history, and the difference of two."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from megaflow.data.sampler.groups import GroupSpec, SourceSpec
from megaflow.data.sampler.ledger import LedgerEntry, read_ledger, write_ledger
from megaflow.data.sampler.schedule import ONE, chatflow, weights_from_decimals
from megaflow.errors import UserError
from megaflow.tools.data import data


def entry() -> LedgerEntry:
    en = GroupSpec(
        "en", (SourceSpec("wiki", 1000, 10), SourceSpec("novels", 30, 3)), tuple(weights_from_decimals([3, 1]))
    )
    zh = GroupSpec("zh", (SourceSpec("wiki_zh", 700, 10),), (ONE,))
    schedule = chatflow("steps", ["0.9", "0.1"], ["0.1", "0.9"], 100)
    return LedgerEntry(
        1, schedule, 8, 0, 32, (en, zh), {"wiki": "a", "novels": "b", "wiki_zh": "c"}, "the run's config"
    )


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of 100 steps that was killed in step 21, on two data-parallel ranks, after a checkpoint of step 16."""
    run = tmp_path / "run"
    (run / "checkpoints" / "step-00000016").mkdir(parents=True)
    write_ledger(run / "ledger.json", [entry()])
    groups = {group.name: {"sources": {s.name: {"path": "-"} for s in group.sources}} for group in entry().groups}
    groups["en"]["sources"]["novels"]["max_epochs"] = "5"
    config = {"data": {"groups": groups}, "train": {"steps": 100, "micro_batch_size": 2}}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    records = [{"kind": "launch", "step": 0, "layout": {"dp": 2}}, {"kind": "train", "step": 20}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records) + '{"kind": "tr')
    return run


def call(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(data, [str(argument) for argument in arguments])
    if isinstance(result.exception, UserError):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.stdout


def test_a_change_is_appended_and_shown(run: Path) -> None:
    assert call("change", run, "--at-step", 21, "--weights", "zh=0.75, en=0.25", "--why", "more Chinese") == (
        "from step 21 on: en 0.25 zh 0.75, batch 8 (more Chinese)\n"
    )
    first, second = read_ledger(run / "ledger.json")
    assert first == entry()
    assert [second.schedule.weights(x) for x in (0, 10**6)] == [[ONE // 4, 3 * ONE // 4]] * 2
    assert second == replace(entry(), first_step=21, schedule=second.schedule, why="more Chinese")
    assert call("history", run).splitlines() == [
        "step 1 to 20: batch 8; the run's config",
        "  en           0.9 to 0.748      wiki 0.75, novels 0.25",
        "  zh           0.1 to 0.252      wiki_zh 1",
        "step 21 to 100: batch 8; more Chinese",
        "  en           0.25              wiki 0.75, novels 0.25",
        "  zh           0.75              wiki_zh 1",
    ]


def test_an_entry_that_never_held_says_so(run: Path) -> None:
    call("change", run, "--at-step", 50, "--weights", "zh=0.75,en=0.25")
    call("change", run, "--at-step", 50, "--weights", "zh=0.5,en=0.5")
    lines = call("history", run).splitlines()
    assert "from step 50 on: replaced before it took effect; changed by hand" in lines
    assert "step 50 to 100: batch 8; changed by hand" in lines


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--at-step", 16, "--weights", "en=0.5,zh=0.5"], "--at-step 16: .* has trained step 20 already"),
        (["--at-step", 20, "--weights", "en=0.5,zh=0.5"], "--at-step 20: .* edited config"),
        (["--at-step", 21], "give either --weights or --config"),
        (["--at-step", 21, "--weights", "en=1", "--config", "x.yaml"], "give either --weights or --config"),
        (["--at-step", 21, "--weights", "en=0.5,fr=0.5"], "--weights name en, fr; the run's groups are en, zh"),
        (["--at-step", 21, "--weights", "en=1"], "name each once"),
        (["--at-step", 21, "--weights", "en=0.5,en=0.5"], "--weights 'en=0.5': give every group once"),
        (["--at-step", 21, "--weights", "en=0.5,zh=nan"], "--weights 'zh=nan'"),
        (["--at-step", 21, "--weights", "en=-1,zh=2"], "--weights 'en=-1'"),
        (["--at-step", 21, "--weights", "en=1,zh=1e-50"], "--weights 'en=1,zh=1e-50': .* is not a number from 1e-40"),
        (["--at-step", 21, "--weights", "half"], "--weights 'half'"),
        (["--at-step", 21, "--weights", "en=0.5,zh=0.6"], r"--weights sum to 1\.1, not 1"),
        (["--at-step", 21, "--weights", "en=1,zh=0"], r"sources\.novels: max_epochs 5 is reached at step 79 of 100"),
        (["--at-step", 21, "--config", "nowhere.yaml"], r"nowhere\.yaml: cannot be read"),
    ],
)
def test_what_cannot_be_changed_is_refused(run: Path, options: list[object], words: str) -> None:
    before = (run / "ledger.json").read_bytes()
    with pytest.raises(UserError, match=words) as caught:
        call("change", run, *options)
    assert "\n" not in str(caught.value)
    assert (run / "ledger.json").read_bytes() == before


def test_the_same_mix_again_is_refused_and_an_earlier_step_too(run: Path) -> None:
    call("change", run, "--at-step", 50, "--weights", "zh=0.75,en=0.25")
    with pytest.raises(UserError, match="the mix that the run has already"):
        call("change", run, "--at-step", 60, "--weights", "zh=0.75,en=0.25")
    with pytest.raises(UserError, match="a mix from step 30 on comes after one from step 50 on"):
        call("change", run, "--at-step", 30, "--weights", "zh=0.5,en=0.5")


def test_a_folder_that_is_no_run_is_named(tmp_path: Path) -> None:
    for command in (["change", tmp_path, "--at-step", 3], ["history", tmp_path], ["diff", tmp_path, tmp_path]):
        with pytest.raises(UserError, match=r"ledger\.json: No such file"):
            call(*command)


def test_differences(run: Path, tmp_path: Path) -> None:
    assert call("diff", run, run / "ledger.json") == "identical\n"
    other = tmp_path / "other.json"
    en, zh = entry().groups
    groups = (replace(en, weights=tuple(weights_from_decimals([1, 1]))), zh)
    manifests = {"wiki": "a", "novels": "b", "wiki_zh": "changed"}
    schedule = chatflow("steps", ["0.9", "0.1"], ["0.1", "0.9"], 50)
    changed = replace(entry(), batch_size=16, groups=groups, manifests=manifests, schedule=schedule)
    write_ledger(other, [changed, replace(changed, first_step=30, why="later")])
    assert call("diff", run, other, code=1).splitlines() == [
        "entry 1: batch_size: 8, in the second 16",
        "entry 1: schedule: at 50 steps: en 0.5 zh 0.5, in the second en 0.1 zh 0.9",
        "entry 1: source wiki: weight 0.75, in the second 0.5",
        "entry 1: source novels: weight 0.25, in the second 0.5",
        "entry 1: source wiki_zh: manifest c, in the second changed",
        "entry 2: only in the second: from step 30 on: en 0.9 to 0.1 zh 0.1 to 0.9, batch 16 (later)",
    ]
    more = replace(
        entry(),
        groups=(*entry().groups, GroupSpec("code", (SourceSpec("c", 5, 5),), (ONE,))),
        schedule=chatflow("tokens", [1, 0, 0], [0, 0, 1], 50),
        manifests=entry().manifests | {"c": "d"},
    )
    write_ledger(other, [more])
    assert call("diff", run, other, code=1).splitlines() == [
        "entry 1: groups: en, zh, in the second en, zh, code",
        "entry 1: source c: only in the second",
    ]
