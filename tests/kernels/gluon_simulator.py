"""Runs Gluon kernels for Hopper on any CPU, and finds what they do wrong: see `gluon_simulator_machine.py`.

The functions of a kernel are compiled once more, with stand-ins for the parts of the language that they use, and with
every call made one that can stop and let other partitions go on.
"""

from __future__ import annotations

import ast
import inspect
import random
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from triton.experimental.gluon._runtime import GluonJITFunction

from tests.kernels.gluon_simulator_language import Hopper, Language, call
from tests.kernels.gluon_simulator_machine import Machine
from tests.kernels.gluon_simulator_values import Descriptor, Pointer


class Stopping(ast.NodeTransformer):
    """Makes all calls of a kernel's function go through `call`, and `x += y` of a tensor no change of the tensor."""

    def __init__(self, without: int | None) -> None:
        self.without = without
        """The line of a statement to leave out."""

    def visit_Expr(self, node: ast.Expr) -> ast.AST:
        return ast.Pass() if node.lineno == self.without else self.generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.decorator_list = []
        for argument in node.args.args:
            argument.annotation = None
        return self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        assert node.value is not None
        return ast.Assign([node.target], self.visit(node.value))

    def visit_AugAssign(self, node: ast.AugAssign) -> ast.AST:
        assert isinstance(node.target, ast.Name)
        return ast.Assign(
            [node.target], ast.BinOp(ast.Name(node.target.id, ast.Load()), node.op, self.visit(node.value))
        )

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        return ast.YieldFrom(ast.Call(ast.Name("call", ast.Load()), [node.func, *node.args], node.keywords))


class Simulator:
    """Launches of one kernel: in the place of the compiled one, `simulator[grid](*args, **options)`."""

    def __init__(self, kernel: Any, seed: int, without: tuple[str, int] | None = None) -> None:
        self.without = without
        self.rng = random.Random(seed)
        self.machine: Machine
        self.program: tuple[int, ...] = ()
        self.grid: tuple[int, ...] = ()
        self.functions: dict[Any, Any] = {}
        self.language = {"gl": Language(self), "tl": Language(self), "hopper": Hopper(self), "call": call}
        self.kernel = self.converted(kernel.fn)
        self.names = list(inspect.signature(kernel.fn).parameters)

    def converted(self, function: Any) -> Any:
        """The function made of stand-ins, and so are those it calls."""
        if function not in self.functions:
            source, line = inspect.getsourcelines(function)
            file = inspect.getfile(function)
            tree = ast.increment_lineno(ast.parse(textwrap.dedent("".join(source))), line - 1)
            without = self.without[1] if self.without is not None and self.without[0] == file else None
            tree = ast.fix_missing_locations(Stopping(without).visit(tree))
            scope = {**function.__globals__, **self.language}
            used = {name.id for name in ast.walk(tree) if isinstance(name, ast.Name)}
            exec(compile(tree, file, "exec"), scope)
            self.functions[function] = scope[function.__name__]
            for name in used:
                if inner := getattr(scope.get(name), "fn", None):
                    scope[name] = self.converted(inner)
        return self.functions[function]

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, **options: Any) -> None:
            self.grid = grid
            arguments = [self._argument(x) for x in args]
            options = {name: value for name, value in options.items() if name in self.names}
            programs = list(np.ndindex(*grid))
            self.rng.shuffle(programs)
            for self.program in programs:
                self.machine = Machine(self.rng)
                with np.errstate(all="ignore"):
                    self.machine.run("the program", call(self.kernel, *arguments, **options))

        return launch

    def _argument(self, x: Any) -> Any:
        if isinstance(x, torch.Tensor):
            return Pointer.of(x)
        return Descriptor(x) if hasattr(x, "block_shape") else x


@contextmanager
def simulated(seed: int, *launchers: ModuleType, without: tuple[str, int] | None = None) -> Iterator[None]:
    """Launches of Gluon kernels by some modules are simulated inside.

    without: file and line of a statement that is left out.
    """
    with pytest.MonkeyPatch.context() as patch:
        for module in launchers:
            for name, value in list(vars(module).items()):
                if isinstance(value, GluonJITFunction) and name.endswith("_kernel"):
                    patch.setattr(module, name, Simulator(value, seed, without))
        yield
