"""Compiles Triton kernels ahead of time for GPUs that are not there, and reads what the compiler made of them.

The launches are the real ones: operations run on tensors without memory, and every kernel that they would launch is
compiled for exactly those arguments instead.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
"""cuobjdump and nvdisasm come with Triton."""


SIZES = ("TOKENS", "HEADS", "ROWS", "COLUMNS", "BLOCK", "BLOCK_M", "BLOCK_N")
"""Arguments of kernels that say what a program takes."""


class OfflineDriver:
    """In the place of CUDA's driver: says for which GPU to compile."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # kernels are remembered by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")


@dataclass(frozen=True)
class Compiled:
    """A kernel for one GPU, and what it uses there."""

    kernel: str
    arch: int
    config: str
    """Block sizes, warps and stages it was compiled for."""
    registers: int
    """Of a thread."""
    spills: int
    """Bytes of a thread in local memory."""
    shared: int
    """Bytes of a block in shared memory."""
    loads: dict[int, int]
    """Instructions that read global memory, asynchronous ones too, by the bits that each thread reads."""
    stores: dict[int, int]
    products: str
    """The matrix instruction: HGMMA (wgmma), HMMA, or nothing."""
    bulk: int
    """Instructions that have the copy engine read a block (TMA)."""


@contextmanager
def offline(arch: int) -> Iterator[list[tuple[str, str, Any]]]:
    """Inside, launches compile for compute capability `arch` and do nothing else; each is (name, config, kernel)."""
    found: dict[int, tuple[str, str, Any]] = {}
    launches: list[tuple[str, str, Any]] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        compiled = run(self, *args, grid=grid, warmup=True, **options)
        if id(compiled) not in found:
            name = f"{self.fn.__module__.removeprefix('megaflow.kernels.')}.{self.fn.__name__}"
            found[id(compiled)] = name, _config(options), compiled
            launches.append(found[id(compiled)])
        return compiled

    before = driver._active
    try:
        driver.set_active(OfflineDriver(arch))
        JITFunction.run = compile_only
        yield launches
    finally:
        JITFunction.run = run
        driver._active = before


def _config(options: dict[str, Any]) -> str:
    sizes = "x".join(str(options[key]) for key in SIZES if key in options)
    return f"{sizes} w{options.get('num_warps', 4)} s{options.get('STAGES', options.get('num_stages', 3))}".strip()


def examine(name: str, config: str, kernel: Any, arch: int) -> Compiled:
    """Reads registers, spills, shared memory and instructions out of the machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _run("cuobjdump", "-res-usage", file.name)
        code = _run("nvdisasm", "-c", file.name)
    registers, stack = (int(_find(rf"{item}:(\d+)", usage)) for item in ("REG", "STACK"))
    local = len(re.findall(r"\b(?:LDL|STL)\b", code))
    spills = stack or 4 * local
    matrix = next((name for name in ("HGMMA", "HMMA") if re.search(rf"\b{name}\b", code)), "")
    loads = _widths(r"\b(?:LDG|LDGSTS)\b([.\w]*)", code)
    stores = _widths(r"\bSTG\b([.\w]*)", code)
    bulk = len(re.findall(r"\bUTMALDG\b", code))
    return Compiled(name, arch, config, registers, spills, kernel.metadata.shared, loads, stores, matrix, bulk)


def _widths(pattern: str, code: str) -> dict[int, int]:
    """How many instructions access how many bits."""
    counts: Counter[int] = Counter()
    for suffix in re.findall(pattern, code):
        width = re.search(r"\.(?:BYPASS\.|LTC128B\.)*(128|64|U8|S8|U16|S16)\b", suffix)
        counts[{"U8": 8, "S8": 8, "U16": 16, "S16": 16}.get(width[1], 0) or int(width[1]) if width else 32] += 1
    return dict(sorted(counts.items()))


def _find(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    assert found is not None, f"{pattern} is not in {text!r}"
    return found[1]


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / tool, *arguments], check=True, capture_output=True, text=True).stdout


def compile_all(cases: dict[str, Callable[[], Any]], arch: int) -> list[tuple[str, Compiled]]:
    """What each case launches, compiled and examined."""
    rows = []
    for case, run in cases.items():
        with offline(arch) as launches:
            run()
        rows += [(case, examine(*launch, arch)) for launch in launches]
    return rows
