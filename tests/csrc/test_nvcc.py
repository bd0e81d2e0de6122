"""What nvcc makes of the kernels: registers, spills, and how wide the accesses of the vector loops are."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[2] / "csrc" / "optimizer"
FLAGS = ["-O3", "-std=c++17", "-Xptxas", "-v,-warn-spills,-warn-lmem-usage"]
BYTES = {"float": 4, "megaflow::bf16": 2}
PER_THREAD = 8
"""Elements that a thread has in flight."""


def search_path() -> str:
    """That of setup.py, then the tools that triton carries."""
    folders = [Path(os.environ.get("CUDA_HOME", "/nowhere"), "bin"), os.environ["PATH"], Path("/usr/local/cuda/bin")]
    if spec := importlib.util.find_spec("triton"):
        folders.append(Path(str(spec.origin)).parent / "backends" / "nvidia" / "bin")
    return os.pathsep.join(map(str, folders))


def run(program: str, *arguments: str | Path) -> str:
    """What a program says, errors and warnings first."""
    path = search_path()
    if (found := shutil.which(program, path=path)) is None:
        pytest.skip(f"no {program}")
    command = [found, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "PATH": path})
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr + done.stdout


@dataclass
class Kernel:
    name: str
    accesses: list[str]
    """Loads and stores of global memory, in order, as `LDG.128`."""
    registers: int

    def vector_loop(self) -> list[str]:
        """From the first access of 8 bytes or more to the last."""
        wide = [i for i, access in enumerate(self.accesses) if not access.endswith(".32")]
        return self.accesses[wide[0] : wide[-1] + 1]


def compiled(source: str, architecture: str, folder: Path) -> tuple[list[Kernel], str]:
    """The kernels of a file, and what the assembler said."""
    cubin = folder / f"{source}.{architecture}.cubin"
    log = run("nvcc", *FLAGS, f"-arch={architecture}", "-cubin", SOURCES / source, "-o", cubin)
    registers = dict(re.findall(r"entry function '(\w+)'.*?Used (\d+) registers", log, re.DOTALL))
    kernels = []
    for text in run("cuobjdump", "-sass", cubin).split("Function : ")[1:]:
        mangled = text.split()[0]
        found = re.findall(r"\b(LDG|STG)\.E((?:\.\w+)*) ", text)
        widths = [next((w for w in ("128", "64") if w in suffix.split(".")), "32") for _, suffix in found]
        accesses = [f"{kind}.{width}" for (kind, _), width in zip(found, widths, strict=True)]
        kernels.append(Kernel(run("c++filt", mangled), accesses, int(registers[mangled])))
    return kernels, log


def expected_accesses(kernel: str) -> Counter[str]:
    """Of the vector loop of an AdamW kernel, from the types in its name."""
    found = re.search(r"Format<([\w:]+), \(megaflow::Master\)(\d), ([\w:]+)>", kernel)
    assert found, kernel
    grad, master, moment = BYTES[found[1]], int(found[2]), BYTES[found[3]]
    weights = {0: {4: "rw"}, 1: {2: "w", 4: "rw"}, 2: {2: "rw"}}[master]
    arrays = [(grad, "r"), (moment, "rw"), (moment, "rw"), *weights.items()]
    if master == 2:
        arrays.append((2, "rw"))  # the remainder
    width = 8 if all(size == 2 for size, _ in arrays) else 4
    counts: Counter[str] = Counter()
    for size, way in arrays:
        for kind, letter in (("LDG", "r"), ("STG", "w")):
            counts[f"{kind}.{8 * size * width}"] += (letter in way) * PER_THREAD // width
    return +counts


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a"])
def test_adamw(architecture: str, tmp_path: Path) -> None:
    kernels, log = compiled("adamw.cu", architecture, tmp_path)
    assert not re.search(r"warning|[1-9]\d* bytes (stack|spill)", log), log
    assert len(kernels) == 12
    for kernel in kernels:
        assert kernel.registers <= 64, kernel.name  # four blocks of 256 threads on a multiprocessor
        assert Counter(kernel.vector_loop()) == expected_accesses(kernel.name), kernel.name
        loads = [access.startswith("LDG") for access in kernel.vector_loop()]
        assert loads.index(False) >= 0.6 * sum(loads), kernel.name  # in flight before the first store


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a"])
def test_grad_norm(architecture: str, tmp_path: Path) -> None:
    kernels, log = compiled("grad_norm.cu", architecture, tmp_path)
    assert not re.search(r"warning|[1-9]\d* bytes (stack|spill)", log), log
    chunks = [kernel for kernel in kernels if "chunk_kernel" in kernel.name]
    assert (len(kernels), len(chunks)) == (3, 2)
    for kernel in chunks:
        assert kernel.registers <= 32, kernel.name  # four blocks of 512 threads
        loads = [access for access in kernel.accesses if access == "LDG.128"]
        assert len(loads) >= 4, kernel.name
        assert len(loads) % 4 == 0, kernel.name
