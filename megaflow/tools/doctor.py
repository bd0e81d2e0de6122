"""`megaflow doctor`: what this machine has, and what each op will use and why."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
from typing import Annotated

import typer


def doctor(
    precision: Annotated[str, typer.Option(help="fp32 or bf16: the precision the ops would run in")] = "bf16",
) -> None:
    """Show Python, torch, triton, GPUs, the host library, flash-attn, apex, and the backend of every op."""
    import torch

    from megaflow import __version__
    from megaflow.data import native
    from megaflow.errors import UserError
    from megaflow.kernels.dispatch import describe
    from megaflow.parallel import symmetric

    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    if precision not in dtypes:
        raise UserError(f"--precision {precision}: give fp32 or bf16")
    rows = [
        ("megaflow", __version__),
        ("Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        ("torch", torch.__version__ + (f", CUDA {torch.version.cuda}" if torch.version.cuda else ", CPU build")),
        ("GPU", _gpus()),
        ("host library", native.status()),
    ]
    for name, package, purpose in OPTIONAL:
        rows.append((name, _version(name, package, purpose)))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows.append(("", ""))
    rows += [(f"op {op}", f"{backend}: {reason}") for op, backend, reason in describe(device, dtypes[precision], {})]
    missing = symmetric.missing(2)
    rows.append(("symmetric memory", f"not available: {missing}" if missing else "for parallel.symmetric_memory"))
    width = max(len(name) for name, _ in rows)
    for name, text in rows:
        typer.echo(f"{name:<{width}}  {text}".rstrip())


# distribution, import name, what it would be used for
OPTIONAL = [
    ("triton", "triton", "fused kernels on GPUs"),
    ("flash-attn", "flash_attn", "attention on GPUs, optional"),
    ("apex", "apex.optimizers", "NVIDIA's fused optimizers, optional"),
]


def _gpus() -> str:
    import torch

    if not torch.cuda.is_available():
        return "none: everything runs on the CPU"
    count = torch.cuda.device_count()
    properties = torch.cuda.get_device_properties(0)
    memory = f"{properties.total_memory / 2**30:.0f} GiB"
    return f"{count} x {properties.name}, {memory}, sm_{properties.major}{properties.minor}"


def _version(distribution: str, package: str, purpose: str) -> str:
    try:
        found = importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        found = False
    if not found:
        return f"not installed ({purpose})"
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "installed, version unknown"
