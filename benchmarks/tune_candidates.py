"""Configurations that an attention kernel of `tuned.json` could be launched with, and what a compiler makes of them."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from triton.runtime.jit import JITFunction

from benchmarks.aot import examine, offline
from benchmarks.worker import one_line
from megaflow.kernels.attention import Segments
from megaflow.kernels.tuned import table

CHOICES: dict[str, tuple[int, ...]] = {
    "BLOCK_M": (32, 64, 128),
    "BLOCK_N": (32, 64, 128),
    "STAGES": (1, 2, 3, 4, 5),
    "num_warps": (4, 8),
    "num_stages": (1, 2, 3, 4),
}
"""Values of what a configuration may have; anything else stays as it is in the table."""
SPECIALISED = "COMPUTE_REGISTERS"
"""A configuration with this gives its warps different work: their number is the kernel's own."""
SHARED_MEMORY = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448}
"""Bytes that a block may have, by compute capability."""
TOKENS, SEQUENCES, WIDTH = 4096, 4, 4096
"""Of a sequence, of a micro-batch, and channels of all heads."""

Config = dict[str, int]


def known_arch(kernel: str, arch: int) -> str:
    """The compute capability in the table whose configurations a GPU takes."""
    listed = [int(known) for known in table()[kernel]]
    return str(max((known for known in listed if known <= arch), default=min(listed)))


def current(kernel: str, head_dim: int, arch: int) -> Config | None:
    """What the table says now; None for a head size that the kernel is not for."""
    return table()[kernel][known_arch(kernel, arch)].get(str(head_dim))


def candidates(config: Config) -> list[Config]:
    """All combinations of the choices for what a configuration has, itself first."""
    varied = [key for key in config if key in CHOICES and not (key == "num_warps" and SPECIALISED in config)]
    found = [config]
    for values in itertools.product(*(CHOICES[key] for key in varied)):
        candidate = {**config, **dict(zip(varied, values, strict=True))}
        if candidate != config:
            found.append(candidate)
    return found


def use(kernel: str, head_dim: int, arch: int, config: Config) -> None:
    """Launches of this process take the configuration from here on."""
    known = known_arch(kernel, arch)
    table()[kernel][str(arch)] = {**table()[kernel][known], str(head_dim): config}


def operation(kernel: str) -> Callable[..., torch.Tensor]:
    """The attention of whose kernels this is one: `flash_forward` is one of `attention.flash.flash`."""
    family = kernel.partition("_")[0]
    found: Callable[..., torch.Tensor] = getattr(
        importlib.import_module(f"megaflow.kernels.attention.{family}"), family
    )
    return found


def is_kernel(function: Any, kernel: str) -> bool:
    """Whether a function of Triton is that kernel: `keys_kernel` of `hopper_*.py` is hopper_backward_keys."""
    family, _, rest = kernel.partition("_")
    module = function.__module__.rpartition(".")[2]
    return module.startswith(family) and rest.endswith(function.__name__.removesuffix("_kernel"))


@dataclass(frozen=True)
class Outcome:
    """What the compiler made of a candidate."""

    config: Config
    registers: int = 0
    """Of a thread."""
    spills: int = 0
    """Bytes of a thread in local memory."""
    shared: int = 0
    """Bytes of a block."""
    dropped: str | None = None
    """Why it is not timed."""

    def rank(self) -> tuple[bool, int, int, int]:
        """In the order that a dry run prints: what survived, then what leaves most of a multiprocessor free."""
        return (self.dropped is not None, self.spills, self.registers, self.shared)


def compile_candidate(kernel: str, head_dim: int, arch: int, config: Config) -> Outcome:
    """The kernel with a configuration, for a GPU that need not be there; in a process without an interpreter."""
    use(kernel, head_dim, arch, config)
    heads = WIDTH // head_dim
    x = torch.empty(TOKENS, SEQUENCES, 3 * heads, head_dim, dtype=torch.bfloat16, device="meta")
    edges = torch.empty(SEQUENCES + 1, dtype=torch.int32, device="meta")
    segments = Segments.documents(edges, TOKENS, TOKENS * SEQUENCES)
    try:
        with offline(arch) as launches:
            compile_only = JITFunction.run

            def only_this(self: Any, *args: Any, **options: Any) -> Any:
                return compile_only(self, *args, **options) if is_kernel(self.fn, kernel) else None

            JITFunction.run = only_this  # offline() puts the real one back
            out = operation(kernel)(heads, segments, x.requires_grad_("backward" in kernel))
            if "backward" in kernel:
                out.backward(torch.empty_like(out))
        ((name, shown, code),) = launches
        found = examine(name, shown, code, arch)
    except Exception as error:
        return Outcome(config, dropped=f"does not compile: {one_line(error)}")
    dropped = None
    if found.spills:
        dropped = f"spills {found.spills} bytes"
    elif found.shared > SHARED_MEMORY.get(arch, 101_376):
        dropped = f"needs {found.shared} bytes of shared memory"
    return Outcome(config, found.registers, found.spills, found.shared, dropped)
