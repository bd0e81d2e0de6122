"""The programs as a user starts them."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megaflow import pretrain
from megaflow.kernels.dispatch import OPERATIONS
from tests.distributed import RankError, run_ranks

ROOT = Path(__file__).parents[1]
TOKENIZER = str(ROOT / "configs" / "demo" / "tokenizer.model")


def start(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=variables, timeout=120)


def test_help_of_every_command_needs_no_torch() -> None:
    script = """
import sys
from typer.testing import CliRunner
from megaflow.tools.cli import app
for command in ("prepare", "config", "doctor", "plot", "generate", "export", "data"):
    result = CliRunner().invoke(app, [command, "--help"])
    assert result.exit_code == 0 and "Usage" in result.output, command
heavy = {"torch", "transformers", "matplotlib", "pyarrow", "numpy"} & set(sys.modules)
assert not heavy, heavy
"""
    done = start("-c", script)
    assert done.returncode == 0, done.stderr


def test_doctor_names_every_op_and_accelerator() -> None:
    done = start("-m", "megaflow.tools.cli", "doctor", "--precision", "fp32")
    assert done.returncode == 0, done.stderr
    names = ("Python", "torch", "GPU", "host library", "optimizer library", "triton", "flash-attn", "apex")
    ops = [f"op {op}" for op in OPERATIONS]
    assert [
        name for name in (*names, *ops) if not any(line.startswith(name) for line in done.stdout.splitlines())
    ] == []


def test_doctor_shows_what_a_run_would_use() -> None:
    done = start("-m", "megaflow.tools.cli", "doctor", "--config", "configs/demo.yaml", "kernels.attention=reference")
    assert done.returncode == 0, done.stderr
    rows = dict(line.split(maxsplit=2)[1:] for line in done.stdout.splitlines() if line.startswith("op "))
    assert rows["attention"] == "reference: named in the configuration"


def test_pretrain_help_lists_the_settings() -> None:
    done = start("megaflow/pretrain.py", "--help")
    assert done.returncode == 0
    assert "optim.lr" in done.stdout
    assert "Peak learning rate" in done.stdout


@pytest.mark.parametrize("rank", [0, 1])
def test_a_wrong_config_is_one_line_said_once_and_exit_code_2(rank: int, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("run_dir: x\nmodle: {}\n")
    done = start(
        "megaflow/pretrain.py",
        "--config",
        str(tmp_path / "c.yaml"),
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE="2",
    )
    assert done.returncode == 2
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert "Traceback" not in done.stderr
    if rank == 0:
        assert any("modle: unknown key; did you mean 'model'?" in line for line in lines)
        assert all(line.startswith("error: ") for line in lines)
    else:
        assert lines == []


def left_alone(folder: Path) -> None:
    """Rank 1 leaves while rank 0 waits for it in a collective; what rank 0's program then does and says."""

    def join_and_train(*_: object) -> None:
        if dist.get_rank() == 1:
            os._exit(2)
        dist.all_reduce(torch.ones(1))

    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(said):
        patch.setattr(sys, "argv", ["pretrain.py", "--config", "any.yaml"])
        patch.setattr(pretrain, "load_config", lambda *_: None)
        patch.setattr(pretrain, "prepare", lambda _: (None, None))
        patch.setattr(pretrain, "join_and_train", join_and_train)
        code = pretrain.main()
    (folder / "said").write_text(f"{code} {said.getvalue()}")


def test_a_rank_that_is_left_alone_says_so_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(RankError):
        run_ranks(2, left_alone, tmp_path)
    said = (tmp_path / "said").read_text()
    assert said == "1 error: rank 0: another rank has left; its own line, or torchrun's summary, says why\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("plot", "nowhere"), "nowhere/metrics.jsonl"),
        (("config", "nowhere.yaml"), "nowhere.yaml"),
        (("generate", "nowhere", "--prompt", "x"), "nowhere"),
        (("export", "nowhere", "out"), "nowhere"),
        (("data", "inspect", "a" * 300), "File name too long"),
        (
            ("prepare", "out", "nowhere.jsonl", "--tokenizer", TOKENIZER, "--language", "en"),
            "nowhere.jsonl",
        ),
        (("doctor", "--precision", "fp8"), "fp8"),
        (("doctor", "optim.lr=1"), "--config"),
        (("doctor", "--config", "configs/demo.yaml", "kernels.adamw=apex"), "needs CUDA"),
    ],
)
def test_commands_refuse_in_one_line(arguments: tuple[str, ...], words: str) -> None:
    done = start("-m", "megaflow.tools.cli", *arguments)
    assert done.returncode == 2
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: ")


def test_config_prints_what_it_reads_back(tmp_path: Path) -> None:
    listed = start("-m", "megaflow.tools.cli", "config")
    assert listed.returncode == 0
    assert "data.schedule.grow_fraction" in listed.stdout
