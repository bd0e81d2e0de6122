"""That all ranks were started alike: one exchange before any group is made, which ranks that differ would hang in."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import socket
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import megaflow
import megaflow.kernels
from megaflow.data import native
from megaflow.errors import UserError
from megaflow.train.agreement import name_ranks
from megaflow.train.operations import chosen_backends
from megaflow.train.run import Run

Facts = dict[str, dict[str, str]]
"""By kind, as in `REMEDIES`: what must be the same on all ranks, and what it is on this one."""

REMEDIES = {
    "versions": "install the same on every machine",
    "code": "install the same megaflow on every machine, and start all ranks from it",
    "config": "start every rank with the same --config and overrides",
    "environment": "give every rank the same environment and kernels",
    "data": "give every machine the same files",
    "ledger": "it was changed while they read it, or run_dir is not one folder to all machines: launch the run again",
}
"""How to mend each kind, in the order of comparing: what comes first may be why the rest differs."""

FILE_START = 2**20
"""Bytes of a file of initial weights that are compared: names and shapes of its tensors, and values of the first."""

VARIABLES = (
    "CUBLAS_WORKSPACE_CONFIG",
    "NVIDIA_TF32_OVERRIDE",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
    "NCCL_ALGO",
    "NCCL_PROTO",
)
"""Environment variables that choose how sums are rounded, or which messages ranks expect of each other."""


def check_alike(run: Run, device: torch.device) -> None:
    """Compares what the ranks of the default process group were started with; collective.

    Raises:
        UserError: on every rank, naming the first thing that differs, and on which ranks. What most have is taken to be
            right.
    """
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (socket.gethostname(), facts_of(run, device)))
    if found := difference([facts for _, facts in everyone], [host for host, _ in everyone]):
        raise UserError(found)


def facts_of(run: Run, device: torch.device) -> Facts:
    """What this rank was started with."""
    config = run.config
    manifests: dict[str, str] = {}
    for entry in run.ledger:
        manifests |= entry.manifests
    backends = {f"backend of {op}": name for op, name, _ in chosen_backends(config, device)}
    ledger = json.dumps([entry.to_json() for entry in run.ledger])
    return {
        "versions": {"Python": ".".join(platform.python_version_tuple()[:2]), "torch": torch.__version__},
        "code": _code(),
        "environment": {"device": device.type, **backends, **{name: os.environ.get(name, "") for name in VARIABLES}},
        "config": _flat(config.model_dump(mode="json")),
        "data": {
            f"tokenizer {config.data.tokenizer}": run.tokenizer_sha256[:16],
            **{f"source {name}": digest[:16] for name, digest in manifests.items()},
            **(_weights(Path(config.model.weights)) if config.model.weights else {}),
        },
        "ledger": {f"{run.dir}/ledger.json": _digest(ledger.encode())},
    }


def difference(everyone: list[Facts], hosts: list[str]) -> str | None:
    """One line on the first thing that differs between ranks, if any does."""
    for kind, remedy in REMEDIES.items():
        for name in dict.fromkeys(name for facts in everyone for name in facts[kind]):
            found = [facts[kind].get(name, "none") for facts in everyone]
            (usual, _), *_ = Counter(found).most_common(1)
            others = [rank for rank, value in enumerate(found) if value != usual]
            if others:
                where = f"{name_ranks(others)} on {hosts[others[0]]}" if len(set(hosts)) > 1 else name_ranks(others)
                has = "has" if len(others) == 1 else "have"
                ours, theirs = (_short(value) for value in (found[others[0]], usual))
                return f"{name}: {where} {has} {ours}, the other ranks {theirs}; {remedy}"
    return None


def _code() -> dict[str, str]:
    """Digests of the trainer's files, and of the library that serves it."""
    digests = {}
    for package in (megaflow, megaflow.kernels):
        folder = Path(str(package.__file__)).parent
        for path in sorted(folder.glob("**/*.py")):
            name = f"{package.__name__.replace('.', '/')}/{path.relative_to(folder)}"
            digests[name] = _digest(path.read_bytes())
    loaded = native.library() is not None
    return digests | {native.LIBRARY_PATH.name: _digest(native.LIBRARY_PATH.read_bytes()) if loaded else "numpy"}


def _weights(folder: Path) -> dict[str, str]:
    """Digests of the sizes of the files of initial weights, and of how they begin."""
    digests = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with path.open("rb") as file:
                digests[f"weights {path}"] = _digest(str(path.stat().st_size).encode() + file.read(FILE_START))
        except OSError as error:
            digests[f"weights {path}"] = str(error.strerror)
    return digests


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Dotted keys and their values as JSON; a null is "none", as a key that is missing."""
    found: dict[str, str] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = "none" if value is None else json.dumps(value, ensure_ascii=False)
    return found


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _short(value: str) -> str:
    text = value or "nothing"
    return text if len(text) <= 60 else text[:57] + "..."
