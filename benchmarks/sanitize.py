"""Runs every kernel once, forward and backward, on small odd shapes, under NVIDIA's compute-sanitizer.

    python benchmarks/sanitize.py --out DIR [--limit SECONDS]    memcheck and racecheck; writes DIR/sanitize.json
    python benchmarks/sanitize.py --run                          the kernels alone, on the GPU that is here

memcheck sees accesses beyond a tensor's end only where every tensor has memory of its own, so there torch's cache of
memory is turned off. A tool that refuses the device, as it does on some virtual machines, is recorded as skipped with
its reason; a finding, a failure and a time-out make the exit code 1.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from triton.runtime.jit import JITFunction

sys.path.insert(0, str(Path(__file__).parents[1]))  # the folder of benchmarks/, wherever this is started
import megaflow.kernels
from megaflow.kernels import (
    adamw,
    attention,
    cross_entropy,
    embedding,
    grad_norm,
    linear_cross_entropy,
    norm,
    rotary,
    swiglu,
)
from megaflow.kernels.attention import Segments
from megaflow.kernels.backend import Backend, Situation
from megaflow.kernels.cross_entropy import Objective, Vocabulary

TOOLS = ("memcheck", "racecheck")
FOUND = 17
"""Exit code of compute-sanitizer for findings."""
REFUSALS = ("Device not supported", "not supported on this", "error 999", "Unable to find", "no CUDA-capable device")
"""In the output of a tool that cannot work on a machine."""
BF16 = torch.bfloat16


def number(device: torch.device, *shape: int, dtype: torch.dtype = BF16) -> Tensor:
    """Random numbers that want a gradient; not a leaf, so that they can be overwritten."""
    return torch.randn(*shape).to(device, dtype).requires_grad_() * 1


def backward(*results: Tensor) -> None:
    """Random gradients, and the backward pass."""
    torch.autograd.backward(results, [torch.randn(result.shape).to(result) for result in results])


def backend(backends: tuple[Backend, ...], name: str = "triton") -> Callable[..., Any]:
    return {found.name: found.function for found in backends}[name]


def norms(device: torch.device) -> None:
    for columns in (1032, 2048):
        total, out = backend(norm.BACKENDS)(
            *(number(device, 5, 1, columns) for _ in range(2)), number(device, columns), 1e-5
        )
        backward(total, out)
        backward(backend(norm.BACKENDS)(number(device, 5, 1, columns), None, number(device, columns), 1e-5)[1])


def rotations(device: torch.device) -> None:
    for head_dim in (80, 128):
        tables = rotary.rotary_tables(torch.arange(7, device=device)[:, None], head_dim, 1e4)
        backward(backend(rotary.BACKENDS)(number(device, 7, 1, 5 * head_dim), 3, *tables))


def activations(device: torch.device) -> None:
    for columns in (24, 2056):
        backward(backend(swiglu.BACKENDS)(number(device, 3, 1, 2 * columns)))


def embeddings(device: torch.device) -> None:
    tokens = torch.tensor([[5, 9], [5, 5], [0, 12]], device=device)
    for start in (None, 5):
        rows = 13 if start is None else 7
        backward(backend(embedding.BACKENDS)(tokens, number(device, rows, 520), start))


def losses(device: torch.device) -> None:
    labels = torch.tensor([3, -100, 1002], device=device)
    for objective in (Objective(), Objective(0.1, 1e-3)):
        whole, shard = Vocabulary(0, 1003), Vocabulary(1003, 1500)
        for gradient in (False, True):
            cross_entropy.fused(number(device, 3, 1003).detach(), labels, whole, objective, gradient)
        logits = number(device, 3, 1003).detach()
        cross_entropy.shard_statistics(logits, labels, shard, objective)
        cross_entropy.shard_gradient(logits, labels, torch.full((3,), 8.0, device=device), shard, objective)
    x, weight = number(device, 3, 40), number(device, 1003, 40)
    total = backend(linear_cross_entropy.BACKENDS)(x, weight, labels, whole, Objective())
    (total.objective * 0.5).backward()  # by a factor that is not 1, the gradients are multiplied


def attend(function: Callable[..., Any], device: torch.device, head_dims: tuple[int, ...]) -> None:
    """Documents that end inside blocks, in one sequence; queries that share keys."""
    lengths = [1, 63, 70, 3]
    edges = torch.tensor([0, *lengths], device=device).cumsum(0).int()
    segments = Segments.documents(edges, max(lengths), sum(lengths))
    for head_dim in head_dims:
        for kv_heads in (1, 2):
            backward(function(2, segments, number(device, sum(lengths), 1, 2 + 2 * kv_heads, head_dim)))


def attentions(device: torch.device) -> None:
    attend(backend(attention.BACKENDS), device, (64, 80, 128))


def hopper_attentions(device: torch.device) -> None:
    attend(backend(attention.BACKENDS, "hopper"), device, (64, 128))


def optimizers(device: torch.device) -> None:
    """Of csrc/: lengths around those of its vectors, and tensors that begin between them."""

    def tensors(dtype: torch.dtype) -> list[Tensor]:
        return [torch.randn(n + 3).to(device, dtype)[k:n] for n, k in ((1, 0), (2, 1), (1027, 3), (4096, 0))]

    for masters in (torch.float32, torch.int16):
        for grads in (torch.float32, BF16):
            weights = [torch.randn(len(x), device=device) for x in tensors(BF16)]
            params = [adamw.split_master(x)[0] for x in weights]
            own = weights if masters == torch.float32 else [adamw.split_master(x)[1] for x in weights]
            m, v = tensors(torch.float32), [x.square() for x in tensors(torch.float32)]
            steps, scale, skip = (torch.tensor(value, device=device) for value in (3.0, 0.5, 0.0))
            hyper = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
            adamw.csrc(params, own, tensors(grads), m, v, steps, scale, skip, **hyper)
            if not math.isfinite(float(grad_norm.csrc(tensors(grads)))):
                raise AssertionError("the norm is not finite")


def cases(device: torch.device) -> dict[str, Callable[[torch.device], None]]:
    """What can run here."""
    found: dict[str, Callable[[torch.device], None]] = {
        "rms_norm": norms,
        "rotary": rotations,
        "swiglu": activations,
        "embedding": embeddings,
        "cross-entropy": losses,
        "attention": attentions,
    }
    hopper = {row.name: row for row in attention.BACKENDS}.get("hopper")
    if hopper is not None and hopper.missing(Situation(device, BF16, 128)) is None:
        found["hopper attention"] = hopper_attentions
    if adamw.csrc_missing("adamw", device) is None:
        found["adamw and norm"] = optimizers
    return found


def kernels(gluon: bool) -> set[str]:
    """Names of all kernels of Triton in `megaflow.kernels`; those in Gluon too, where they can run."""
    found = set()
    for module in pkgutil.walk_packages(megaflow.kernels.__path__, "megaflow.kernels."):
        leaf = module.name.rpartition(".")[2]
        if leaf.startswith("_") or (leaf.startswith("hopper") and not gluon):
            continue
        for name, value in vars(importlib.import_module(module.name)).items():
            if name.endswith("_kernel") and hasattr(value, "fn") and value.fn.__module__ == module.name:
                found.add(f"{leaf}.{name}")
    return found


@contextmanager
def launches(kind: Any = JITFunction) -> Iterator[set[str]]:
    """The names of the kernels that are launched inside."""
    found: set[str] = set()
    run = kind.run

    def noted(self: Any, *args: Any, **options: Any) -> Any:
        found.add(f"{self.fn.__module__.rpartition('.')[2]}.{self.fn.__name__}")
        return run(self, *args, **options)

    kind.run = noted
    try:
        yield found
    finally:
        kind.run = run


def run_all(device: torch.device, say: Callable[[str], None], kind: Any = JITFunction) -> set[str]:
    """Runs every case; the kernels that none of them launched."""
    torch.manual_seed(0)
    chosen = cases(device)
    with launches(kind) as found:
        for name, case in chosen.items():
            case(device)
            if device.type == "cuda":
                torch.cuda.synchronize()
            say(f"{name}: done")
    return kernels("hopper attention" in chosen) - found


def under(tool: str, limit: float, out: Path) -> dict[str, Any]:
    """What a tool of compute-sanitizer says about `--run`; its output is in `sanitize-<tool>.txt`."""
    program = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if program is None:
        return {"status": "skipped", "reason": "compute-sanitizer is not installed"}
    command = [program, "--tool", tool, "--error-exitcode", str(FOUND), sys.executable, __file__, "--run"]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if tool == "memcheck" else dict(os.environ)
    start = time.perf_counter()
    with (out / f"sanitize-{tool}.txt").open("w+") as log:
        try:
            code = subprocess.run(command, stdout=log, stderr=log, env=environment, timeout=limit).returncode
        except subprocess.TimeoutExpired:
            code = None
        log.seek(0)
        text = log.read()
    return {**verdict(code, text, limit), "seconds": round(time.perf_counter() - start, 1)}


def verdict(code: int | None, text: str, limit: float) -> dict[str, Any]:
    """From the exit code (None: it was stopped) and the output of a tool."""
    if code == 0 and "every kernel ran" in text:
        return {"status": "passed"}
    said = [line.strip() for line in text.splitlines() if line.startswith("=========")]  # by the tool
    found = [line for line in said if re.search("Invalid|Race|hazard|Misaligned", line, re.IGNORECASE)]
    refusals = [line for line in said if any(sign in line for sign in REFUSALS)]
    if refusals and not found:
        return {"status": "skipped", "reason": refusals[0]}
    if code is None and not found:
        return {"status": "failed", "reason": f"did not end in {limit:.0f} seconds"}
    return {"status": "failed", "reason": found[0] if found else f"exit code {code}"}


def main(
    run: Annotated[bool, typer.Option(help="run the kernels here, without a tool")] = False,
    out: Annotated[Path, typer.Option(help="folder of the results")] = Path("."),
    limit: Annotated[float, typer.Option(help="seconds that each tool may take")] = 60.0,
) -> None:
    """Check the kernels' memory accesses on this GPU."""
    if not torch.cuda.is_available():
        typer.echo("skipped: there is no GPU")
        if not run:
            out.mkdir(parents=True, exist_ok=True)
            (out / "sanitize.json").write_text(json.dumps({"status": "skipped", "reason": "there is no GPU"}) + "\n")
        return
    if run:
        missed = run_all(torch.device("cuda"), typer.echo)
        if missed:
            typer.echo(f"never launched: {', '.join(sorted(missed))}")
            raise typer.Exit(1)
        typer.echo("every kernel ran")
        return
    out.mkdir(parents=True, exist_ok=True)
    result = {tool: under(tool, limit, out) for tool in TOOLS}
    (out / "sanitize.json").write_text(json.dumps(result, indent=1) + "\n")
    typer.echo(json.dumps(result, indent=1))
    if any(tool["status"] == "failed" for tool in result.values()):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
