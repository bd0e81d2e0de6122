"""`megaflow doctor`: what this machine has, and what each op will use and why."""

from __future__ import annotations

import importlib.metadata
import platform
from pathlib import Path
from typing import Annotated

import typer

from megaflow.errors import UserError


def doctor(
    precision: Annotated[str, typer.Option(help="fp32 or bf16: the precision the ops would run in")] = "bf16",
    config: Annotated[
        Path | None, typer.Option(help="a config whose ops are shown instead; its precision counts")
    ] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value, for the config")] = None,
) -> None:
    """Show Python, torch, triton, GPUs, both libraries, flash-attn, apex, and the backend of every op."""
    import torch

    from megaflow import __version__
    from megaflow.data import native
    from megaflow.parallel import symmetric

    rows = [
        ("megaflow", __version__),
        ("Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        ("torch", torch.__version__ + (f", CUDA {torch.version.cuda}" if torch.version.cuda else ", CPU build")),
        ("GPU", _gpus()),
        ("host library", native.status()),
        ("optimizer library", _optimizer_library()),
    ]
    rows += _packages()
    rows.append(("", ""))
    rows += [(f"op {op}", f"{backend}: {reason}") for op, backend, reason in _backends(precision, config, overrides)]
    missing = symmetric.missing(2)
    rows.append(("symmetric memory", f"not available: {missing}" if missing else "for parallel.symmetric_memory"))
    width = max(len(name) for name, _ in rows)
    for name, text in rows:
        typer.echo(f"{name:<{width}}  {text}".rstrip())


def _backends(precision: str, path: Path | None, overrides: list[str] | None) -> list[tuple[str, str, str]]:
    import torch

    from megaflow.config_load import load_config
    from megaflow.kernels.dispatch import describe
    from megaflow.train.operations import DTYPES, chosen_backends

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if path is not None:
        try:
            return chosen_backends(load_config(path, overrides, files=False), device)
        except ValueError as error:
            raise UserError(f"kernels: {error}") from None
    if overrides:
        raise UserError(f"{overrides[0]}: overrides are for a config; give --config FILE too")
    if precision not in ("fp32", "bf16"):
        raise UserError(f"--precision {precision}: give fp32 or bf16")
    return describe(device, DTYPES[precision])


def _optimizer_library() -> str:
    import torch

    from megaflow.kernels.adamw import csrc_missing, library_error

    if error := library_error():
        return f"{error}: torch's optimizer serves"
    return "loaded, " + ("without CUDA" if csrc_missing("adamw", torch.device("cuda")) else "with CUDA kernels")


def _gpus() -> str:
    import torch

    if not torch.cuda.is_available():
        return "none: everything runs on the CPU"
    count = torch.cuda.device_count()
    properties = torch.cuda.get_device_properties(0)
    memory = f"{properties.total_memory / 2**30:.0f} GiB"
    return f"{count} x {properties.name}, {memory}, sm_{properties.major}{properties.minor}"


def _packages() -> list[tuple[str, str]]:
    from megaflow.kernels.attention.libraries import FLASH_ATTN, installed

    distributions = {"flash2": "flash-attn", "flash3": "flash-attn-3", "flash4": "flash-attn-4"}
    rows = [("triton", "triton", "triton", "fused kernels on GPUs")]
    for backend, module in FLASH_ATTN.items():
        name = f"flash-attn {backend[-1]}"
        rows.append((name, distributions[backend], module, f"attention {backend} on GPUs, optional"))
    rows.append(("apex", "apex", "amp_C", "NVIDIA's fused optimizers, optional"))
    return [
        (name, _version(distribution) if installed(module) else f"not installed ({purpose})")
        for name, distribution, module, purpose in rows
    ]


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "installed, version unknown"
