"""Maps `kernels/` into the package and builds the two libraries of `csrc/`, as far as this machine can.

- `megaflow/_host.so` from `csrc/host/` needs a C++ compiler.
- `megaflow/kernels/_optimizer.so` from `csrc/optimizer/` needs torch to build against, of this environment: install
  with `--no-build-isolation`. Its CUDA half needs nvcc, of CUDA_HOME, on the PATH or in /usr/local/cuda.

What is missing is said in a line, and the installation goes on without it. Metadata and tool settings are in
pyproject.toml. `kernels/` is installed as `megaflow.kernels`: a top-level package of that name would overwrite another
project's.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import shutil
import subprocess
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.modified import newer_group

NVCC_FLAGS = ["-O3", "-std=c++17", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
NVCC_FLAGS += ["-gencode", "arch=compute_80,code=sm_80", "-gencode", "arch=compute_90a,code=sm_90a"]
NVCC_FLAGS += ["-gencode", "arch=compute_90,code=compute_90"]  # PTX, for what comes after


def sources(folder: str, pattern: str) -> list[str]:
    return sorted(str(path) for path in Path("csrc", folder).glob(pattern))


def cuda_runtime(nvcc: str) -> str:
    """The static runtime library, with which the result loads where there is no CUDA.

    nvcc may be a script far from its toolkit, but says in a dry run where it looks for libraries.
    """
    dry_run = subprocess.run([nvcc, "-dryrun", "x.cu"], capture_output=True, text=True, check=True).stderr
    folders = re.findall(r'"-L([^"]+)"', dry_run)
    for folder in folders:
        if (library := Path(folder, "libcudart_static.a")).exists():
            return str(library)
    raise FileNotFoundError(f"no libcudart_static.a in {' or '.join(dict.fromkeys(folders))}, where {nvcc} looks")


class BuildLibraries(build_ext):
    """Compiles plain shared libraries without Python's ABI: one file serves every Python."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + ".so"

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []

    def build_extension(self, ext: Extension) -> None:
        if ext.name.endswith("_optimizer"):
            spec = importlib.util.find_spec("torch")
            if spec is None or spec.origin is None:
                self.warn("no torch in the build environment (--no-build-isolation): the optimizer library is left out")
                return
            torch = Path(spec.origin).parent
            ext.include_dirs = [str(torch / "include")]
            ext.library_dirs = [str(torch / "lib")]
            ext.libraries = ["torch_cpu", "c10", "dl"]
            self.add_cuda(ext)
        super().build_extension(ext)

    def add_cuda(self, ext: Extension) -> None:
        """Adds the CUDA kernels to the extension, where nvcc is found and compiles them."""
        home = os.environ.get("CUDA_HOME")
        path = (
            os.path.join(home, "bin") if home else os.pathsep.join((os.environ.get("PATH", ""), "/usr/local/cuda/bin"))
        )
        nvcc = shutil.which("nvcc", path=path)
        if nvcc is None:
            self.warn(f"the optimizer library has no CUDA kernels: no nvcc in {path}")
            return
        try:
            runtime = cuda_runtime(nvcc)
            objects = [self.compile_cuda(nvcc, Path(source)) for source in sources("optimizer", "*.cu")]
        except (OSError, subprocess.CalledProcessError) as error:
            self.warn(f"the optimizer library has no CUDA kernels: {error}")
            return
        ext.define_macros = [("MEGAFLOW_CUDA", "1")]
        ext.depends += objects
        ext.extra_objects = [*objects, runtime]
        ext.libraries += ["pthread", "rt"]

    def compile_cuda(self, nvcc: str, source: Path) -> str:
        """The object of a source, compiled anew where a source, a header or this file has changed."""
        target = Path("build", "cuda", source.with_suffix(".o").name)
        if newer_group([str(source), *sources("optimizer", "*.h"), __file__], str(target)):
            self.announce(f"compiling {source} with {nvcc}", level=logging.INFO)
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = target.with_suffix(f".{os.getpid()}")  # renamed when whole
            subprocess.run([nvcc, *NVCC_FLAGS, "-c", str(source), "-o", str(partial)], check=True)
            partial.replace(target)
        return str(target)


setup(
    packages=[
        "megaflow",
        "megaflow.checkpoint",
        "megaflow.data",
        "megaflow.data.corpus",
        "megaflow.data.prepare",
        "megaflow.data.sampler",
        "megaflow.kernels",
        "megaflow.kernels.attention",
        "megaflow.model",
        "megaflow.optim",
        "megaflow.parallel",
        "megaflow.planning",
        "megaflow.tools",
        "megaflow.train",
    ],
    package_dir={"megaflow": "megaflow", "megaflow.kernels": "kernels"},
    package_data={"megaflow.kernels": ["*.json"]},
    ext_modules=[
        # both optional: where no compiler is found, their Python twins serve and the log says so
        Extension(
            "megaflow._host",
            sources("host", "*.cpp"),
            depends=sources("host", "*.h"),
            extra_compile_args=["-O3", "-std=c++17"],
            optional=True,
        ),
        Extension(
            "megaflow.kernels._optimizer",
            sources("optimizer", "*.cpp"),
            depends=[*sources("optimizer", "*.h"), *sources("optimizer", "*.cu")],
            # without contraction, every x86 computes the same
            extra_compile_args=["-O3", "-std=c++17", "-fvisibility=hidden", "-fno-math-errno", "-ffp-contract=off"],
            optional=True,
        ),
    ],
    cmdclass={"build_ext": BuildLibraries},
)
