"""The scripts for clusters and the commands in their documentation."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch.distributed.run import get_args_parser

from megaflow.config_load import load_config
from megaflow.errors import UserError
from megaflow.pretrain import parse_arguments

ROOT = Path(__file__).parents[1]
SLURM, KUBERNETES = ROOT / "configs/cluster/slurm.sh", ROOT / "configs/cluster/kubernetes.yaml"


def commands(text: str) -> list[list[str]]:
    """The words of each command, lines that end in a backslash joined."""
    lines = text.replace("\\\n", " ").splitlines()
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


def documented() -> list[list[str]]:
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "docs/clusters.md").read_text(), re.DOTALL)
    return [words for block in blocks for words in commands(block)]


def check_settings(config: Path, overrides: list[str]) -> None:
    """A config may name corpora and models that are not here; nothing else may be wrong."""
    lines: list[str] = []
    try:
        load_config(config, overrides)
    except UserError as error:
        lines = str(error).splitlines()
    assert [line for line in lines if not re.search("no file|is not a folder", line)] == []


def check_torchrun(words: list[str]) -> Any:
    """Parses a torchrun command as torchrun and pretrain.py would; torchrun's settings."""
    settings = get_args_parser().parse_args(words)
    assert settings.training_script == "megaflow/pretrain.py"
    given = parse_arguments(settings.training_script_args)
    config = given.config if given.config.exists() else ROOT / "configs/chatflow-70b.yaml"
    check_settings(config, given.overrides)
    return settings


def test_documented_commands_parse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    launches = [check_torchrun(words[1:]) for words in documented() if words[0] == "torchrun"]
    assert [settings.rdzv_backend for settings in launches] == ["c10d", "static"]
    (submitted,) = (words for words in documented() if words[0] == "sbatch")
    assert Path(submitted[3]) == SLURM.relative_to(ROOT)
    check_settings(Path(submitted[4]), submitted[5:])
    names = {word.partition("=")[0] for words in documented() if words[0] == "export" for word in words[1:]}
    assert names == {"OMP_NUM_THREADS", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"}


def test_files_named_in_the_documentation_exist() -> None:
    named = re.findall(r"(?:configs|tests|megaflow)/[\w/.-]+\.(?:sh|yaml|py)", (ROOT / "docs/clusters.md").read_text())
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_the_job_script_asks_for_what_it_needs() -> None:
    text = SLURM.read_text()
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", text, re.MULTILINE))
    assert asked["ntasks-per-node"] == "1"  # one torchrun for each node
    number, seconds = re.fullmatch(r"B:(\w+)@(\d+)", asked["signal"]).groups()  # type: ignore[union-attr]
    assert f"trap stop {number}" in text
    left = int(re.search(r"TORCH_ELASTIC_SHUTDOWN_TIMEOUT=(\d+)", text).group(1))  # type: ignore[union-attr]
    assert left < int(seconds)
    assert "requeue" in asked


def stand_in(folder: Path, name: str, script: str) -> None:
    (folder / name).write_text(f"#!/bin/bash\n{script}\n")
    (folder / name).chmod(0o755)


@pytest.mark.parametrize(
    ("stopped", "state", "requeued"), [(False, "RUNNING", False), (True, "RUNNING", True), (True, "CANCELLED", False)]
)
def test_the_job_script_hands_the_signal_on_and_queues_again(
    stopped: bool, state: str, requeued: bool, tmp_path: Path
) -> None:
    """With stand-ins for SLURM's programs: srun notes its arguments and, where told to stop, takes a while to do so."""
    wait = 'touch started; until [ -n "$told" ]; do sleep 0.05; done; sleep 0.3; touch saved; exit 7'
    stand_in(tmp_path, "srun", f'echo "$@" > launch; trap "told=yes" TERM; {wait if stopped else "exit 5"}')
    stand_in(tmp_path, "scontrol", 'if [ "$1" = show ]; then printf "a1\\na2\\n"; else echo "$@" > requeued; fi')
    stand_in(tmp_path, "squeue", f"echo {state}")
    slurm = {"SLURM_JOB_NODELIST": "a[1-2]", "SLURM_JOB_ID": "31234", "SLURM_JOB_NUM_NODES": "2"}
    environment = {**os.environ, **slurm, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    arguments = ["bash", str(SLURM), str(ROOT / "configs/chatflow-70b.yaml"), "train.steps=7"]
    job = subprocess.Popen(arguments, cwd=tmp_path, env=environment)
    if stopped:
        for _ in range(600):
            if (tmp_path / "started").exists():
                break
            time.sleep(0.05)
        job.send_signal(signal.SIGTERM)
    assert job.wait(60) == (7 if stopped else 5)
    assert (tmp_path / "saved").exists() == stopped
    assert (tmp_path / "requeued").exists() == requeued
    words = (tmp_path / "launch").read_text().split()
    settings = check_torchrun(words[words.index(".venv/bin/torchrun") + 1 :])
    assert (settings.nnodes, settings.rdzv_endpoint) == ("2", "a1:21234")
    assert settings.max_restarts > 0


def test_the_job_script_without_a_config_says_how_it_is_used() -> None:
    done = subprocess.run(["bash", str(SLURM)], capture_output=True, text=True)
    assert done.returncode != 0
    assert "usage: sbatch configs/cluster/slurm.sh CONFIG" in done.stderr


def test_the_kubernetes_job_is_whole() -> None:
    service, job = yaml.safe_load_all(KUBERNETES.read_text())
    name, spec = job["metadata"]["name"], job["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["publishNotReadyAddresses"] is True
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": name}
    assert pod["subdomain"] == service["metadata"]["name"]
    assert (spec["completionMode"], pod["restartPolicy"], spec["podReplacementPolicy"]) == (
        "Indexed",
        "Never",
        "Failed",
    )
    settings = check_torchrun(container["args"])
    assert settings.nnodes == str(spec["completions"]) == str(spec["parallelism"])
    assert int(settings.nproc_per_node) == container["resources"]["limits"]["nvidia.com/gpu"]
    assert settings.rdzv_endpoint == f"{name}-0.{pod['subdomain']}:29500"
    assert settings.max_restarts > 0
    environment = {entry["name"]: entry.get("value") for entry in container["env"]}
    assert environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"
    assert int(environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) < pod["terminationGracePeriodSeconds"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert settings.local_addr == "$(POD_IP)"
    assert environment.keys() >= {"POD_IP"}
