"""Ranks that were started differently are named on every rank, before they could hang in each other's groups."""

from __future__ import annotations

import contextlib
import io
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megaflow import pretrain
from megaflow.config import Config
from megaflow.config_load import dump_config
from megaflow.errors import UserError
from megaflow.train import launch
from megaflow.train.run import Run, plan_run
from tests.distributed import run_ranks
from tests.train.runs import MakeConfig

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
Change = Callable[[Run, pytest.MonkeyPatch], Run]


def changed(run: Run, section: str, **values: Any) -> Run:
    part = getattr(run.config, section).model_copy(update=values)
    return replace(run, config=run.config.model_copy(update={section: part}))


def another_code(run: Run, patch: pytest.MonkeyPatch) -> Run:
    code = launch._code()
    patch.setattr(launch, "_code", lambda: code | {"megaflow/train/step.py": "0" * 16})
    return run


def another_torch(run: Run, patch: pytest.MonkeyPatch) -> Run:
    patch.setattr(torch, "__version__", "2.11.0+cpu")
    return changed(run, "optim", lr=1.0)  # versions are named first: settings may follow from them


def another_python(run: Run, patch: pytest.MonkeyPatch) -> Run:
    patch.setattr("platform.python_version_tuple", lambda: ("3", "10", "1"))
    return run


def another_variable(run: Run, patch: pytest.MonkeyPatch) -> Run:
    patch.setenv("NCCL_ALGO", "Ring")
    return run


def without_library(run: Run, patch: pytest.MonkeyPatch) -> Run:
    patch.setattr(launch.native, "library", lambda: None)
    return run


def another_mix(run: Run, patch: pytest.MonkeyPatch) -> Run:
    return replace(run, mix=replace(run.mix, ledger=[replace(run.ledger[0], why="another")]))


def another_corpus(run: Run, patch: pytest.MonkeyPatch) -> Run:
    manifests = run.ledger[0].manifests | {"zh_source": "5" * 64}
    return replace(run, mix=replace(run.mix, ledger=[replace(run.ledger[0], manifests=manifests)]))


CASES: dict[str, tuple[Change, str]] = {
    "lr": (lambda run, _: changed(run, "optim", lr=0.5), "optim.lr: {ranks} 0.5, the other ranks 0.003; start every"),
    "tp": (lambda run, _: changed(run, "parallel", tp=3), "parallel.tp: {ranks} 3, the other ranks 1; start every"),
    "null": (lambda run, _: changed(run, "train", peak_tflops=None), "train.peak_tflops: {ranks} none, the other"),
    "run_dir": (
        lambda run, _: replace(run, config=run.config.model_copy(update={"run_dir": "elsewhere"})),
        'run_dir: {ranks} "elsewhere", the other ranks "/',
    ),
    "tokenizer": (lambda run, _: replace(run, tokenizer_sha256="7" * 64), "tokenizer.model: {ranks} 7777777777777777,"),
    "code": (another_code, "megaflow/train/step.py: {ranks} 0000000000000000, the other ranks "),
    "torch": (another_torch, f"torch: {{ranks}} 2.11.0+cpu, the other ranks {torch.__version__}; install"),
    "python": (another_python, "Python: {ranks} 3.10, the other ranks 3.1"),
    "variable": (another_variable, "NCCL_ALGO: {ranks} Ring, the other ranks nothing; give every"),
    "library": (without_library, "_host.so: {ranks} numpy, the other ranks "),
    "ledger": (another_mix, "ledger.json: {ranks} "),
    "corpus": (another_corpus, "source zh_source: {ranks} 5555555555555555, the other ranks "),
}


def said_by_ranks(config: Config, odd: int) -> list[str | None]:
    """What this rank is told where all start alike, then where the odd one differs, case by case."""
    planned, said = plan_run(config, CPU), []
    changes: list[Change] = [lambda run, _: run, *(change for change, _ in CASES.values())]
    for change in changes:
        with pytest.MonkeyPatch.context() as patch:
            run = change(planned, patch) if dist.get_rank() == odd else planned
            try:
                launch.check_alike(run, CPU)
                said.append(None)
            except UserError as error:
                said.append(str(error))
    return said


@pytest.mark.parametrize("odd", [1, 0])
def test_what_differs_is_named_on_every_rank(make_config: MakeConfig, odd: int) -> None:
    said = run_ranks(3, said_by_ranks, make_config("run"), odd)
    assert all(lines == said[0] for lines in said)
    first, *others = said[0]
    assert first is None
    wrong = [
        (name, line)
        for (name, (_, words)), line in zip(CASES.items(), others, strict=True)
        if line is None or words.format(ranks=f"rank {odd} has") not in line or "\n" in line
    ]
    assert wrong == []


def test_the_machine_is_named_where_there_are_several() -> None:
    facts = [{kind: {"x": value} for kind in launch.REMEDIES} for value in "aba"]
    line = launch.difference(facts, ["one", "two", "one"])
    assert line is not None
    assert line.startswith("x: rank 1 on two has b, the other ranks a; install the same")
    line = launch.difference([*facts, facts[1], facts[1]], ["one"] * 5)
    assert str(line).startswith("x: ranks 0, 2 have a, the other ranks b; install the same")
    assert launch.difference(facts[:1], ["one"]) is None


def alone(config_file: Path) -> tuple[int, str]:
    """What the first of two processes ends with when the other one does not come."""
    said = io.StringIO()
    dist.destroy_process_group()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(said):
        environment = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        for name, value in environment.items():
            patch.setenv(name, value)
        patch.setattr(sys, "argv", ["pretrain.py", "--config", str(config_file), "parallel.timeout=1"])
        code = pretrain.main()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # for whoever started this rank
    return code, said.getvalue()


def test_a_process_that_waits_in_vain_for_the_others_says_so(make_config: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(dump_config(make_config("run")))
    ((code, said),) = run_ranks(1, alone, tmp_path / "config.yaml")
    assert code == 2
    (line,) = said.splitlines()
    assert line.startswith("error: cannot join the other processes (MASTER_ADDR=127.0.0.1 MASTER_PORT=")
    assert "RANK=0 WORLD_SIZE=2): Timed out after" in line
    assert "1/2 clients joined; start all WORLD_SIZE of them" in line


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_two_processes_with_other_layouts_leave_with_one_line(make_config: MakeConfig, tmp_path: Path) -> None:
    """Started as torchrun starts them; without the comparison they would wait for each other's groups."""
    config = make_config("run")
    (tmp_path / "config.yaml").write_text(dump_config(config))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [
        subprocess.Popen(
            [
                sys.executable,
                "megaflow/pretrain.py",
                "--config",
                str(tmp_path / "config.yaml"),
                f"parallel.tp={1 + rank}",
            ],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        for rank in range(2)
    ]
    try:
        out, err = ranks[0].communicate(timeout=100)
        assert ranks[0].returncode == 2, err
        assert out == ""
        assert err.startswith("error: parallel.tp: rank 1 has 2, the other ranks 1; start every rank with the same ")
        assert len(err.splitlines()) == 1
        ranks[1].terminate()  # as torchrun does
        ranks[1].communicate(timeout=100)
        assert not Path(config.run_dir).exists()
    finally:
        for process in ranks:
            process.kill()
            process.wait()


def test_other_initial_weights_under_the_same_name_are_noticed(make_config: MakeConfig, tmp_path: Path) -> None:
    run, file = plan_run(make_config("run"), CPU), tmp_path / "model.safetensors"
    run = changed(run, "model", weights=str(tmp_path))
    found = []
    for content in (b"base" * 9, b"base" * 9, b"chat" * 9, b"base" * 9 + b"more"):
        file.write_bytes(content)
        found.append(launch.facts_of(run, CPU))
    hosts = ["one"] * 2
    assert launch.difference(found[:2], hosts) is None
    for other in found[2:]:
        line = launch.difference([found[0], other], hosts)
        assert str(line).startswith(f"weights {file}: rank 1 has ")
        assert str(line).endswith("; give every machine the same files")
