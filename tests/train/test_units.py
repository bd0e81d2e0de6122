"""Runs whose ratios are of sequences, and of tokens with loss: what they log, killed and moved."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from megaflow.config import Config
from megaflow.config_load import parse_config
from megaflow.data.sampler.ledger import build_sampler, read_ledger
from megaflow.data.sampler.schedule import ONE
from megaflow.errors import UserError
from megaflow.train.agreement import check_history
from megaflow.train.run import plan_run
from megaflow.train.samples import SampleId, read_samples
from tests.train.runs import MakeConfig, killed, run

MIX = {"en": 0.4, "zh": 0.2, "parallel": 0.2, "instruction": 0.2}


def of_unit(make_config: MakeConfig, name: str, unit: str, **changes: object) -> Config:
    """Constant ratios; the instructions' sequences have few tokens with loss."""
    config = make_config(name, **changes)
    schedule = {"clock": "steps", "knots": [{"at": 0, "weights": MIX}]}
    data = config.data.model_dump(mode="json") | {"unit": unit, "schedule": schedule}
    return parse_config(config.model_dump(mode="json") | {"data": data}, name)


def planned(config: Config) -> dict[int, list[SampleId]]:
    sampler = plan_run(config, torch.device("cpu")).sampler
    plans = [sampler.plan() for _ in range(config.train.steps)]
    columns = ((p.step, p.deck.source.tolist(), p.deck.epoch.tolist(), p.deck.window.tolist()) for p in plans)
    return {step: list(zip(*deck, strict=True)) for step, *deck in columns}


def totals(config: Config) -> tuple[dict[str, float], dict[str, int]]:
    """Achieved shares of the groups over the run, from the records of its intervals; sequences of the sources."""
    lines = (Path(config.run_dir) / "metrics.jsonl").read_text().splitlines()
    records = [record for record in map(json.loads, lines) if record["kind"] == "train"]
    assert {record["unit"] for record in records} == {config.data.unit}
    for record in records:
        assert sum(group["achieved"] for group in record["groups"].values()) == pytest.approx(1)
        assert [g["planned"] for g in record["groups"].values()] == pytest.approx(list(MIX.values()))
    shares: dict[str, float] = dict.fromkeys(MIX, 0)
    amounts, before = [], 0
    for record in records:
        tokens = sum(source["loss_tokens"] for source in record["sources"].values())
        amounts.append(tokens - before if config.data.unit == "loss_tokens" else 1)
        before = tokens
        for name, group in record["groups"].items():
            shares[name] += group["achieved"] * amounts[-1]
    sequences = {name: sum(r["sources"][f"{name}_source"]["sequences"] for r in records) for name in MIX}
    return {name: share / sum(amounts) for name, share in shares.items()}, sequences


def test_each_unit_is_shared_out_as_configured(make_config: MakeConfig) -> None:
    """By sequences the ratios are those of every batch; by tokens with loss, those of the run's labels with loss."""
    by_sequences = of_unit(make_config, "sequences", "sequences", train__log_interval=1)
    by_tokens = of_unit(make_config, "tokens", "loss_tokens", train__log_interval=1)
    for config in (by_sequences, by_tokens):
        run(config)
        assert read_samples(Path(config.run_dir)) == planned(config)
    shares, sequences = totals(by_sequences)
    assert shares == pytest.approx(MIX, abs=0.02)
    assert sequences["instruction"] == pytest.approx(12 * 8 * 0.2, abs=1)
    shares, sequences = totals(by_tokens)
    total = plan_run(by_tokens, torch.device("cpu")).sampler.replay(12)["groups"]
    assert shares == pytest.approx(MIX, abs=0.03)
    assert [abs(group["residual"]) < 32 * ONE for group in total] == [True] * 4
    assert sequences["instruction"] > 1.4 * sequences["zh"]


def test_a_run_by_tokens_killed_and_moved_trains_on_the_same_sequences(make_config: MakeConfig) -> None:
    config = of_unit(make_config, "run", "loss_tokens", train__log_interval=1)
    killed(config, 1, rank=0, step=6)
    killed(config, 2, rank=1, step=10)
    run(of_unit(make_config, "run", "loss_tokens", train__log_interval=1, train__micro_batch_size=4))
    samples = read_samples(Path(config.run_dir))
    assert samples == planned(config)
    assert sorted(samples) == list(range(1, 13))
    shares, _ = totals(config)
    assert shares == pytest.approx(MIX, abs=0.03)


def test_the_mix_of_a_run_by_tokens_may_change(make_config: MakeConfig) -> None:
    config = of_unit(make_config, "run", "loss_tokens")
    run(of_unit(make_config, "run", "loss_tokens", train__steps=5))
    run(of_unit(make_config, "run", "loss_tokens", train__global_batch_size=12), 2)
    assert [entry.batch_size for entry in read_ledger(Path(config.run_dir) / "ledger.json")] == [8, 12]
    assert read_samples(Path(config.run_dir)) == planned(of_unit(make_config, "run", "loss_tokens"))


def test_a_run_keeps_its_unit(make_config: MakeConfig) -> None:
    run(of_unit(make_config, "run", "sequences", train__steps=2))
    with pytest.raises(UserError, match=r"data\.unit: loss_tokens differs from sequences"):
        plan_run(of_unit(make_config, "run", "loss_tokens"), torch.device("cpu"))


def test_saved_counters_that_cannot_be_are_refused(make_config: MakeConfig, tmp_path: Path) -> None:
    """A replay would read the data: sums alone are checked, and the digest logged at the checkpoint's step."""
    begun = plan_run(of_unit(make_config, "run", "loss_tokens"), torch.device("cpu"))
    sampler, metrics = begun.sampler, tmp_path / "metrics.jsonl"
    for _ in range(7):
        plan = sampler.plan()
    record = {"kind": "train", "step": 7, "digest": f"{plan.digest:016x}"}
    metrics.write_text(json.dumps(record) + "\n")
    check_history(begun.ledger, sampler.state_dict(), metrics)
    for key in ("consumed", "residual"):
        state = sampler.state_dict()
        state["groups"][1]["sources"][0][key] += 1
        with pytest.raises(UserError, match="step 7: the checkpoint's counters are not those of 56 sequences"):
            check_history(begun.ledger, state, metrics)
    with pytest.raises(UserError, match=r"step 7: the digest logged is .*, but the checkpoint holds 0123456789abcdef"):
        check_history(begun.ledger, sampler.state_dict() | {"digest": "0123456789abcdef"}, metrics)
    with pytest.raises(ValueError, match="needs the run's sources"):
        build_sampler(begun.ledger).plan()
