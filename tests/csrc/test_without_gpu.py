"""The C++ of csrc/optimizer without torch and without a GPU: its headers, and its CUDA kernels run on the CPU.

What this cannot show is what hardware does: races between warps, and speed.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
SOURCES = ROOT / "csrc" / "optimizer"
SANITIZED = ["-std=c++17", "-g1", "-fno-sanitize-recover=all", f"-I{SOURCES}"]


def run(program: Path, *arguments: str | Path) -> None:
    """Compiles and runs it; the last thing it says is why it failed."""
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    for command in (["g++", *SANITIZED, *map(str, arguments), "-o", str(program)], [str(program)]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert done.stdout == "passed\n"


def test_packing_and_number_formats(tmp_path: Path) -> None:
    run(tmp_path / "headers", "-fsanitize=address,undefined", HERE / "headers.cpp")


def test_cuda_kernels_on_the_cpu(tmp_path: Path) -> None:
    """Under sanitizers: nothing is read or written beside the tensors, or not aligned."""
    run(
        tmp_path / "emulated",
        "-fsanitize=address,undefined",
        "-fno-strict-aliasing",  # a thread's words are arrays of other types, as in CUDA
        "-ffp-contract=off",
        "-Wno-unknown-pragmas",
        f"-I{HERE / 'emulation'}",
        "-xc++",
        *(SOURCES / name for name in ("adamw.cu", "grad_norm.cu", "adamw_cpu.cpp", "grad_norm_cpu.cpp")),
        HERE / "emulated.cpp",
    )
