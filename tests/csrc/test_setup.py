"""What setup.py builds and says where a compiler, torch or nvcc is missing or fails. Compilers are imitated."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BUILD = "import runpy, sys; {}; sys.argv = ['setup.py', 'build_ext']; runpy.run_path('setup.py')"
NO_TORCH = "sys.modules['torch'] = None"
COMPILER = """#!/bin/sh
# writes the file behind -o, and its arguments beside it
while [ $# -gt 0 ]; do [ "$1" = -o ] && out=$2; all="$all $1"; shift; done
mkdir -p "$(dirname "$out")" && echo "$all" > "$out"
"""
NVCC = """#!/bin/sh
[ "$1" = -dryrun ] && { echo '#$ LIBRARIES=  "-LTOOLKIT/stubs" "-LTOOLKIT"' >&2; exit 0; }
echo called >> TOOLKIT/calls
"""


def program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IEXEC)
    return path


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """What is needed to build, in a folder of its own."""
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    shutil.copy(ROOT / "setup.py", tmp_path)
    program(tmp_path / "c++", COMPILER)
    return tmp_path


def build(tree: Path, cuda_home: Path, first: str = "pass", compiler: str | None = None) -> str:
    """Builds and returns what was said; a compiler's arguments are in what it made."""
    environment = {**os.environ, "CXX": compiler or str(tree / "c++"), "CUDA_HOME": str(cuda_home)}
    command = [sys.executable, "-c", BUILD.format(first)]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def library(tree: Path, name: str) -> str | None:
    """The link command of a library, if it was made."""
    found = list(tree.glob(f"build/lib*/megaflow/{name}"))
    return found[0].read_text() if found else None


def toolkit(tree: Path, nvcc: str = NVCC + COMPILER.removeprefix("#!/bin/sh")) -> Path:
    home = tree / "toolkit"
    program(home / "bin" / "nvcc", nvcc.replace("TOOLKIT", str(home)))
    (home / "libcudart_static.a").touch()
    return home


def test_without_nvcc_the_library_is_for_the_cpu(tree: Path) -> None:
    said = build(tree, tree / "nowhere")
    assert f"the optimizer library has no CUDA kernels: no nvcc in {tree}/nowhere/bin" in said
    link = library(tree, "kernels/_optimizer.so")
    assert link is not None
    assert "-ltorch_cpu -lc10" in link
    assert "cuda" not in link
    assert "-DMEGAFLOW_CUDA" not in said


def test_nvcc_that_fails_is_said_and_not_fatal(tree: Path) -> None:
    said = build(tree, toolkit(tree, "#!/bin/sh\n[ $1 = -dryrun ] && echo '\"-LTOOLKIT\"' >&2 || exit 3\n"))
    assert "the optimizer library has no CUDA kernels: Command" in said
    assert "returned non-zero exit status 3" in said
    assert "cuda" not in str(library(tree, "kernels/_optimizer.so"))


def test_a_toolkit_without_its_runtime_is_said(tree: Path) -> None:
    home = toolkit(tree)
    (home / "libcudart_static.a").unlink()
    assert f"no CUDA kernels: no libcudart_static.a in {home}/stubs or {home}, where" in build(tree, home)
    assert library(tree, "kernels/_optimizer.so") is not None


def test_nvcc_runs_when_its_sources_change_and_only_then(tree: Path) -> None:
    home = toolkit(tree)
    said = build(tree, home)
    assert "-DMEGAFLOW_CUDA=1" in said
    link = str(library(tree, "kernels/_optimizer.so"))
    assert f"build/cuda/adamw.o build/cuda/grad_norm.o {home}/libcudart_static.a" in link
    calls = home / "calls"
    assert len(calls.read_text().splitlines()) == 2
    build(tree, home)
    assert len(calls.read_text().splitlines()) == 2
    later = calls.stat().st_mtime + 10
    os.utime(tree / "csrc" / "optimizer" / "adamw.cu", (later, later))
    build(tree, home)
    assert len(calls.read_text().splitlines()) == 3


def test_kernels_join_a_library_built_without_them(tree: Path) -> None:
    build(tree, tree / "nowhere")
    build(tree, toolkit(tree))
    assert "build/cuda/adamw.o" in str(library(tree, "kernels/_optimizer.so"))


def test_without_torch_the_rest_is_built(tree: Path) -> None:
    said = build(tree, tree / "nowhere", NO_TORCH)
    assert "no torch in the build environment (--no-build-isolation): the optimizer library is left out" in said
    assert library(tree, "_host.so") is not None
    assert library(tree, "kernels/_optimizer.so") is None


def test_without_a_compiler_nothing_is_built(tree: Path) -> None:
    said = build(tree, tree / "nowhere", compiler="/nowhere/c++")
    for name in ("_host", "kernels._optimizer"):
        assert f'building extension "megaflow.{name}" failed: ' in said
    assert library(tree, "_host.so") is None
