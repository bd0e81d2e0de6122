from __future__ import annotations

import json

import pytest

from megaflow.data.ledger import LedgerEntry, build_sampler, read_ledger, write_ledger
from megaflow.data.mix import GroupSpec, SourceSpec
from megaflow.data.schedule import chatflow, weights_from_decimals
from megaflow.errors import UserError


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


def test_only_runs_with_one_mix_are_read():
    with pytest.raises(UserError, match="2 entries"):
        build_sampler([entry(), entry()])
