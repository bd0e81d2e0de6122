"""Weights from sizes, caps on epochs, and the table of a whole run, from the config."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from megaflow.config import Config
from megaflow.config_load import dump_config, parse_config
from megaflow.data.sampler.schedule import ONE
from megaflow.errors import UserError
from megaflow.tools.data import data
from megaflow.train.run import Run, plan_run
from tests.train.runs import MakeConfig, run


def planned(config: Config) -> Run:
    return plan_run(config, torch.device("cpu"))


def with_english(config: Config, corpora: dict[str, Path], more: dict[str, Any], **group: Any) -> Config:
    """The group en with a second, larger source (the Chinese corpus's text); `more` are settings of that source."""
    tree = config.model_dump(mode="json")
    tree["data"]["groups"]["en"]["sources"]["more"] = {"path": str(corpora["zh"])} | more
    tree["data"]["groups"]["en"] |= group
    return parse_config(tree, "changed")


def shares(run: Run) -> dict[str, float]:
    group = run.ledger[-1].groups[0]
    return {source.name: weight / ONE for source, weight in zip(group.sources, group.weights, strict=True)}


def test_weights_from_sizes(make_config: MakeConfig, corpora: dict[str, Path]) -> None:
    config = make_config("run")
    proportional = planned(with_english(config, corpora, {}, weights="proportional"))
    a, b = (source.num_windows for source in (proportional.sources[0], proportional.sources[1]))
    assert shares(proportional) == pytest.approx({"en_source": a / (a + b), "more": b / (a + b)})
    flat = shares(planned(with_english(config, corpora, {}, weights="temperature", temperature=2)))
    assert flat["en_source"] == pytest.approx(a**0.5 / (a**0.5 + b**0.5))
    left_out = with_english(config, corpora, {"weight": 0}, weights="proportional")
    assert shares(planned(left_out)) == {"en_source": 1.0, "more": 0.0}
    english = sum(s.sequences for s in proportional.mix.forecast.sources if s.group == "en")
    cap = Decimal(english // 5) / a
    unimax = planned(with_english(config, corpora, {"max_epochs": 9}, weights="unimax", max_epochs=str(round(cap, 6))))
    assert shares(unimax)["en_source"] == pytest.approx((english // 5) / english, rel=1e-3)
    assert {s.name: s.cap for s in unimax.mix.forecast.sources}["more"] == 9


def test_lengthening_a_run_keeps_the_weights_of_unimax(make_config: MakeConfig, corpora: dict[str, Path]) -> None:
    settings: dict[str, Any] = {"weights": "unimax", "max_epochs": "0.2"}
    short = with_english(make_config("run", train__steps=2), corpora, {}, **settings)
    run(short)
    longer = planned(with_english(make_config("run", train__steps=3), corpora, {}, **settings))
    assert longer.mix.edit is None
    assert longer.ledger == planned(short).ledger


def test_unimax_on_an_edit_shares_what_is_left(make_config: MakeConfig, corpora: dict[str, Path]) -> None:
    """A source read by itself for half the run: its cap has less left, so the other one gets the more of the rest."""
    alone = with_english(make_config("run", train__steps=12), corpora, {"weight": 0})
    size = planned(alone).sources[0].num_windows
    run(with_english(make_config("run", train__steps=6), corpora, {"weight": 0}))
    read = planned(alone).sampler.replay(6)["groups"][0]["sources"][0]["consumed"]
    left = planned(alone).sampler.replay(12)["groups"][0]["sources"][0]["consumed"] - read
    assert left > 4
    cap = Decimal(read + 1) / size
    settings: dict[str, Any] = {"weights": "unimax", "max_epochs": str(round(cap, 6))}
    edited = planned(with_english(make_config("run", train__steps=12), corpora, {"max_epochs": 9}, **settings))
    assert edited.mix.edit is not None
    forecast = {source.name: source.sequences for source in edited.mix.forecast.sources}
    assert forecast["en_source"] == pytest.approx(read + 1, abs=1)
    assert forecast["more"] == pytest.approx(left - 1, abs=1)
    state = planned(alone).sampler.replay(6) | {"digest": "00"}
    edited.continue_from(state, 1)
    edited.take_up_edit()
    assert shares(edited)["en_source"] == pytest.approx(1 / left, abs=0.01)
    whole = planned(with_english(make_config("new", train__steps=12), corpora, {"max_epochs": 9}, **settings))
    assert shares(whole)["en_source"] == 0.5


@pytest.mark.parametrize(
    ("more", "group", "words"),
    [
        ({"weight": 2}, {"weights": "proportional"}, "computed from sizes, but more has weight 2"),
        ({}, {"weights": "temperature"}, "go together"),
        ({}, {"temperature": 2}, "go together"),
        ({}, {"weights": "unimax"}, "unimax needs max_epochs, of the group or of source en_source"),
        ({"max_epochs": 0}, {}, "max_epochs"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    make_config: MakeConfig, corpora: dict[str, Path], more: dict[str, Any], group: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        with_english(make_config("run"), corpora, more, **group)


def test_a_run_that_would_exceed_a_cap_is_refused_before_it_begins(
    make_config: MakeConfig, corpora: dict[str, Path], tmp_path: Path
) -> None:
    config = with_english(make_config("run"), corpora, {}, max_epochs="0.05")
    with pytest.raises(UserError, match=r"data\.groups\.en\.sources\.en_source: max_epochs 0\.05 is reached at step"):
        planned(config)
    assert not Path(config.run_dir).exists()
    file = tmp_path / "config.yaml"
    file.write_text(dump_config(config))
    result = CliRunner().invoke(data, ["plan", str(file)])
    assert isinstance(result.exception, UserError)
    assert "0.05, step" in result.stdout


def test_the_table_of_a_run_is_what_it_trained_on(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config("run", train__steps=6)
    run(config)
    file = tmp_path / "config.yaml"
    file.write_text(dump_config(config))
    before = CliRunner().invoke(data, ["plan", str(file), "run_dir=" + str(tmp_path / "new")])
    after = CliRunner().invoke(data, ["plan", str(file)])
    assert before.exit_code == 0
    assert before.stdout == after.stdout
    sequences = [int(line.split()[2]) for line in before.stdout.splitlines()[1:5]]
    ran = planned(config)
    assert sequences == [s["consumed"] for g in ran.sampler.replay(6)["groups"] for s in g["sources"]]
    assert not (tmp_path / "new").exists()
