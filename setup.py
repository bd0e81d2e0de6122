"""Maps `kernels/` into the package and builds the host library of `csrc/` where a C++ compiler is found.

Metadata and tool settings are in pyproject.toml. `kernels/` is installed as `megaflow.kernels`: a top-level package of
that name would overwrite another project's.
"""

from __future__ import annotations

from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

HOST_SOURCES = sorted(str(path) for path in Path("csrc").glob("*.cpp"))


class BuildHostLibrary(build_ext):
    """Compiles a plain shared library without Python's ABI, loaded through ctypes: one file serves every Python."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + ".so"

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []


setup(
    packages=[
        "megaflow",
        "megaflow.checkpoint",
        "megaflow.data",
        "megaflow.data.corpus",
        "megaflow.data.prepare",
        "megaflow.data.sampler",
        "megaflow.kernels",
        "megaflow.model",
        "megaflow.optim",
        "megaflow.parallel",
        "megaflow.planning",
        "megaflow.tools",
        "megaflow.train",
    ],
    package_dir={"megaflow": "megaflow", "megaflow.kernels": "kernels"},
    ext_modules=[
        # optional: where no compiler is found, the numpy twins serve and the log says so
        Extension(
            "megaflow._host",
            HOST_SOURCES,
            depends=["csrc/host.h"],
            extra_compile_args=["-O3", "-std=c++17"],
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildHostLibrary},
)
