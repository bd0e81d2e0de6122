"""Ranks whose plans differ are found with the first step; checkpoints that the ledger does not lead to are refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from megaflow.checkpoint.store import open_checkpoint
from megaflow.config_parallel import ParallelConfig
from megaflow.data.sampler.groups import GroupSpec, SourceSpec
from megaflow.data.sampler.ledger import LedgerEntry, build_sampler
from megaflow.data.sampler.schedule import ONE, Knot, compile_knots
from megaflow.errors import UserError
from megaflow.parallel.mesh import ParallelContext
from megaflow.train.agreement import DigestCheck, check_history
from megaflow.train.run import Run
from tests.distributed import RankError, run_ranks
from tests.train.runs import MakeConfig, losses, run


def test_ranks_that_differ_are_named_with_the_first_step() -> None:
    def rank_main() -> list[str]:
        ctx, said = ParallelContext.create(ParallelConfig(), "cpu"), []
        for first_wrong in (None, 13, 25):
            check = DigestCheck(ctx)
            for step in range(1, 31):
                wrong = ctx.rank == 2 and first_wrong is not None and step >= first_wrong
                check.add(step, 2**64 - step if wrong else step)
                if step % 10 == 0:
                    try:
                        check.compare()
                    except UserError as error:
                        said.append(f"{step}: {error}")
                        break
        return said

    said = run_ranks(4, rank_main)
    assert all(lines == said[0] for lines in said)
    first, second = said[0]
    assert first.startswith("20: step 13: rank 2 planned other sequences than the other ranks (digest fffffffffffffff3")
    assert second.startswith("30: step 25: rank 2 ")


def test_a_divergence_in_training_is_found_and_not_saved(make_config: MakeConfig) -> None:
    def diverge(rank: int, planned: Run) -> None:
        if rank == 1 and planned.sampler.step == 5:
            planned.sampler._progress.consumed[0] += 1
            planned.sampler.digest ^= 1  # what was planned ahead is dropped

    config = make_config("run", train__log_interval=2)
    with pytest.raises(RankError, match="step 6: rank 1 planned other sequences than the other ranks"):
        run(config, 2, during=diverge)
    assert losses(config)[-1][0] == 6
    assert open_checkpoint(Path(config.run_dir) / "checkpoints").manifest.step == 4


def ledger() -> list[LedgerEntry]:
    groups = tuple(GroupSpec(name, (SourceSpec(name, 100, 10),), (ONE,)) for name in "ab")
    manifests = {"a": "1", "b": "2"}
    first = LedgerEntry(1, compile_knots("steps", [Knot(0, [1, 2])]), 7, 5, 8, groups, manifests, "")
    return [first, LedgerEntry(40, compile_knots("steps", [Knot(0, [3, 2])]), 5, 5, 8, groups, manifests, "")]


def trained(steps: int, path: Path) -> dict[str, Any]:
    """The state after some steps; every seventh is logged at `path`."""
    sampler, lines = build_sampler(ledger()), []
    for _ in range(steps):
        plan = sampler.plan()
        if plan.step % 7 == 0 or plan.step == steps:
            lines.append(json.dumps({"kind": "train", "step": plan.step, "digest": f"{plan.digest:016x}"}))
    path.write_text("\n".join([*lines, '{"kind": "tr']))
    return sampler.state_dict()


@pytest.mark.parametrize("steps", [3, 99, 100, 101, 350])
def test_a_sound_history_passes_logged_or_not(tmp_path: Path, steps: int) -> None:
    state = trained(steps, tmp_path / "metrics.jsonl")
    check_history(ledger(), state, tmp_path / "metrics.jsonl")
    check_history(ledger(), state, tmp_path / "nowhere.jsonl")


@pytest.mark.parametrize("known", [{}, {40: ""}, {250: ""}, {40: "", 250: ""}])
def test_however_far_apart_digests_were_logged_the_checkpoint_s_is_planned_again(
    tmp_path: Path, known: dict[int, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the latest logged a hundred steps before, else the earliest; a wrong one at the start shows at the end."""
    metrics = tmp_path / "metrics.jsonl"
    state = trained(300, metrics)
    sampler = build_sampler(ledger())
    for step in range(1, 301):
        plan = sampler.plan()
        known |= {step: f"{plan.digest:016x}"} if step in known else {}
    lines = [json.dumps({"kind": "train", "step": step, "digest": digest}) for step, digest in known.items()]
    metrics.write_text("\n".join(lines))
    check_history(ledger(), state, metrics)
    with pytest.raises(UserError, match="step 300: the digest in the checkpoint is 0123456789abcdef"):
        check_history(ledger(), state | {"digest": "0123456789abcdef"}, metrics)
    monkeypatch.setattr("megaflow.train.agreement.FURTHEST", 120)
    if 250 in known:
        with pytest.raises(UserError, match="step 300: the digest in the checkpoint"):
            check_history(ledger(), state | {"digest": "0123456789abcdef"}, metrics)
    else:
        check_history(ledger(), state | {"digest": "0123456789abcdef"}, metrics)


@pytest.mark.parametrize("steps", [60, 350])
def test_a_history_that_is_not_the_ledger_s_is_refused(tmp_path: Path, steps: int) -> None:
    metrics = tmp_path / "metrics.jsonl"
    state = trained(steps, metrics)
    counters = copy.deepcopy(state)
    counters["groups"][1]["sources"][0]["consumed"] += 1
    with pytest.raises(UserError, match=f"step {steps}: the checkpoint's counters .* \\(source b\\)"):
        check_history(ledger(), counters, metrics)
    with pytest.raises(UserError, match="the checkpoint's counters"):
        check_history(ledger()[:1], state, metrics)
    with pytest.raises(UserError, match=f"step {steps}: the digest in the checkpoint is 0123456789abcdef"):
        check_history(ledger(), state | {"digest": "0123456789abcdef"}, metrics)
    lines = metrics.read_text().splitlines()
    step = steps // 7 * 7 - 7
    wrong = [json.dumps(json.loads(line) | {"digest": "ff"}) if f'"step": {step},' in line else line for line in lines]
    metrics.write_text("\n".join(wrong))
    with pytest.raises(UserError, match=f"step {step}: the digest logged is ff"):
        check_history(ledger(), state, metrics)
