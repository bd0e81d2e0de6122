"""Triton's interpreter for the project's kernels, with bf16 mended: it runs on any CPU, one program after the other.

As it comes it takes the bits of bf16 numbers for integers in arithmetic and products, and cuts them off where it should
round. With numpy's own bf16 type in the place of those integers numpy does all of it right.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.jit import JITFunction

import megaflow.kernels
from megaflow.kernels.dispatch import OPERATIONS, Ops

BF16 = np.dtype(ml_dtypes.bfloat16)
numpy_dtype = interpreter._get_np_dtype


class Interpreted(interpreter.InterpretedFunction):
    """A kernel, or a function that kernels call: for those the language is exchanged already.

    As it comes each call of them exchanges it again, for good, and nothing can be compiled any more.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.rewrite()(*args, **kwargs)


def numpy_dtype_with_bf16(dtype: Any) -> np.dtype[Any]:
    return BF16 if dtype.scalar == tl.bfloat16 else numpy_dtype(dtype)


def cast(self: Any, source: Any, dtype: Any, rounding: Any = None) -> Any:
    return interpreter.TensorHandle(source.data.astype(numpy_dtype_with_bf16(dtype)), dtype.scalar)


def kernel_modules() -> list[Any]:
    """All modules with functions of Triton: those of `megaflow.kernels`, and its own library."""
    found = pkgutil.walk_packages(megaflow.kernels.__path__, "megaflow.kernels.")
    names = [module.name for module in found if not module.name.rpartition(".")[2].startswith("_")]
    return [tl, tl.standard, *map(importlib.import_module, names)]


@contextmanager
def interpreted() -> Iterator[None]:
    """Launches of Triton kernels are interpreted inside."""
    with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        patch.setattr(interpreter, "_get_np_dtype", numpy_dtype_with_bf16)
        patch.setattr(interpreter.InterpreterBuilder, "cast_impl", cast)
        patch.setattr(interpreter.InterpreterBuilder, "create_fp_to_fp", cast)
        for module in kernel_modules():
            for name, value in list(vars(module).items()):
                if type(value) is JITFunction:  # not its subclass of Gluon, which the interpreter does not know
                    patch.setattr(module, name, Interpreted(value.fn))
        stack.callback(interpreter._patch_lang(tl.standard.sum.fn).restore)  # what Triton's own library calls
        yield


def triton_ops() -> Ops:
    """The model's operations on the project's Triton kernels, wherever they run, and the optimizer's in plain torch."""
    named = {name: {backend.name: backend.function for backend in found} for name, found in OPERATIONS.items()}
    return Ops(**{name: backends.get("triton", backends["reference"]) for name, backends in named.items()})
