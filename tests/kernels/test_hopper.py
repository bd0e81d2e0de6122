"""The attention kernels for Hopper: simulated against documents one by one in fp64, compiled, and on a GPU."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.aot import TOOLS, examine, offline
from megaflow.kernels import jit
from megaflow.kernels.attention import Segments, hopper_backward, hopper_forward, unpack
from megaflow.kernels.attention.flash import flash
from megaflow.kernels.attention.hopper import hopper, hopper_missing
from megaflow.kernels.attention.hopper_gluon import LARGEST
from megaflow.kernels.backend import Situation
from megaflow.kernels.tuned import table
from tests.kernels.gluon_simulator import simulated
from tests.kernels.interpreter import interpreted
from tests.kernels.numerics import ATTENTION_LIMITS, assert_close, distance, wide
from tests.kernels.test_attention import LONG, Pairs, documents, edges, expected, flat, tensors_of

CASES: dict[str, tuple[Pairs, int]] = {
    "one token": (documents(1), 1),
    "one document": (documents(300), 1),
    "whole blocks": (documents(128, 128), 1),
    "odd documents": (documents(1, 63, 65, 128, 1, 90, 2), 1),
    "several sequences": (documents(256, 130, 1, 125), 2),
    "ends of documents": ([(3, 3), (1, 7), (100, 250), (5, 5), (1, 129), (70, 70)], 1),
    "the end of a document": ([(64, 448)], 1),
}
"""Segments, and how many sequences they lie in."""


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Memory of new tensors is full of NaN; the same random numbers every time."""
    torch.manual_seed(0)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


def run(function: Any, heads: int, pairs: Pairs, tensors: list[Tensor]) -> tuple[list[Tensor], Tensor]:
    """The output, flat, and the gradients of queries, keys and values; and the gradient of the output."""
    out = function(heads, edges(pairs, str(tensors[0].device)), *tensors)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(out)
    grads = torch.autograd.grad(out, tensors, grad)
    return [flat(out), *unpack(heads, *grads)], flat(grad)


def check(pairs: Pairs, heads: tuple[int, int], tensors: list[Tensor], found: list[Tensor], grad: Tensor) -> None:
    packed = [wide(x) for x in tensors]
    out = expected(*(flat(x) for x in unpack(heads[0], *packed)), pairs)
    grads = torch.autograd.grad(out, packed, wide(grad))
    for x, want in zip(found, (out, *unpack(heads[0], *grads)), strict=True):
        if float(want.detach().norm()) > 1e-9:
            assert_close(x, want, ATTENTION_LIMITS)
        else:  # of documents of one token the scores have no gradient at all
            assert float(x.detach().double().norm()) < ATTENTION_LIMITS[x.dtype]


SIMULATED = [
    *((case, (2, 1), 64, torch.bfloat16) for case in CASES),
    *((case, (1, 1), 128, torch.float16) for case in CASES),
    ("odd documents", (6, 2), 64, torch.float16),
    ("several sequences", (4, 2), 128, torch.bfloat16),
    ("ends of documents", (3, 3), 128, torch.bfloat16),
]


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(("case", "heads", "head_dim", "dtype"), SIMULATED)
def test_simulated(case: str, heads: tuple[int, int], head_dim: int, dtype: torch.dtype, seed: int) -> None:
    pairs, sequences = CASES[case]
    tensors = tensors_of(pairs, sequences, heads, head_dim, dtype, "cpu")
    with interpreted(), simulated(seed, hopper_forward, hopper_backward):
        found, grad = run(hopper, heads[0], pairs, tensors)
    check(pairs, heads, tensors, found, grad)


@pytest.mark.parametrize("together", [1, 2])
def test_some_heads_after_others(monkeypatch: pytest.MonkeyPatch, together: int) -> None:
    pairs = documents(200, 60)
    tensors = tensors_of(pairs, 1, (3, 3), 64, torch.float16, "cpu")
    monkeypatch.setattr(hopper_forward, "CACHE", together * 2 * 260 * 64 * 2)
    with interpreted(), simulated(0, hopper_forward, hopper_backward):
        found, grad = run(hopper, 3, pairs, tensors)
    check(pairs, (3, 3), tensors, found, grad)


def test_denominators() -> None:
    pairs = documents(1, 150, 3)
    q, k, v = unpack(2, *tensors_of(pairs, 1, (2, 2), 64, torch.bfloat16, "cpu"))
    segments = edges(pairs, "cpu")
    with simulated(0, hopper_forward):
        _, lse = hopper_forward.hopper_forward(segments, q, k, v)
    scores = torch.einsum("qhd,khd->hqk", flat(wide(q)), flat(wide(k))).detach() / 8
    begin, end = segments.seen[:, :, None]
    key = torch.arange(segments.keys)
    want = scores.masked_fill(~((begin <= key) & (key < end)), -torch.inf).logsumexp(-1) / torch.log(torch.tensor(2.0))
    assert distance(lse, want) < 1e-5


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((64, 1, 3, 128), torch.float32),
        ((64, 1, 3, 80), torch.bfloat16),
        ((64, 2, 3, 64), torch.bfloat16),
        ((64, 1, 3, 65), torch.bfloat16),
    ],
    ids=["single precision", "other heads", "sequences within a block", "rows that copies cannot begin at"],
)
def test_the_plain_kernels_take_what_these_cannot(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    called = []
    monkeypatch.setattr(importlib.import_module(hopper.__module__), "flash", lambda *args: called.append(args))
    packed = torch.zeros(shape, dtype=dtype)[..., : shape[-1] // 16 * 16]
    segments = Segments.documents(torch.tensor([0, 64], dtype=torch.int32), 64, 64)
    assert hopper(1, segments, packed) is None
    assert called == [(1, segments, packed)]


def test_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(
        device: str = "cuda", dtype: torch.dtype = torch.bfloat16, head_dim: int | None = 128, length: int = 4096
    ) -> str | None:
        return hopper_missing(Situation(torch.device(device), dtype, head_dim, length))

    assert missing("cpu") == "needs CUDA"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert missing() is None
    assert missing(head_dim=None) is None
    assert missing(dtype=torch.float32) == "needs bf16 or fp16"
    assert missing(head_dim=96) == "needs heads of 64 or 128 channels"
    assert missing(length=4000) == "needs sequences whose length on a rank is a multiple of 128"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    assert missing() == "needs compute capability 9.0 exactly"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(jit.triton, "__version__", "3.9.0")
    assert missing() == "needs Triton 3.6, 3.7 or 3.8, whose Gluon they are written in"
    monkeypatch.setattr(jit, "triton", None)
    assert missing() == "needs Triton"


def test_importing_needs_no_gluon() -> None:
    code = "import sys; sys.modules['triton.experimental.gluon'] = None; import megaflow.kernels.dispatch"
    code += "; from megaflow.kernels.attention.hopper_gluon import gluon; assert gluon is None"
    command(sys.executable, "-c", code)


def test_sequences_that_suit_are_whole_blocks() -> None:
    sizes = [shape for name, archs in table().items() if "hopper" in name for shape in archs["90"].values()]
    assert len(sizes) == 6
    assert all(LARGEST % shape[name] == 0 for shape in sizes for name in ("BLOCK_M", "BLOCK_N"))


COMPILED = [(128, 8, torch.bfloat16), (64, 64, torch.float16)]


def examine_compiled(head_dim: int, kv_heads: int, dtype: torch.dtype) -> None:
    """Compiles the kernels for launches on tensors without memory, and asserts what the machine code must have."""
    heads = 4096 // head_dim
    x = torch.empty(4096, 4, heads + 2 * kv_heads, head_dim, dtype=dtype, device="meta", requires_grad=True)
    segments = Segments.documents(torch.empty(5, dtype=torch.int32, device="meta"), 4096, 4 * 4096)
    with offline(90) as launches:
        out = hopper(heads, segments, x)
        out.backward(torch.empty_like(out))
    kernels = [launch for launch in launches if "hopper" in launch[0]]
    assert len(kernels) == 3
    for name, config, kernel in kernels:
        found = examine(name, config, kernel, 90)
        assert (found.spills, found.products) == (0, "HGMMA"), found
        with TemporaryDirectory() as folder:
            source, binary = Path(folder, "code.ptx"), Path(folder, "code.cubin")
            source.write_text(kernel.asm["ptx"])
            said = command(TOOLS / "ptxas", "-v", "--gpu-name=sm_90a", source, "-o", binary)
            code = command(TOOLS / "nvdisasm", "-c", binary)
        assert "Potential Performance Loss" not in said, said  # products one after the other, or setmaxnreg ignored
        assert "USETMAXREG.TRY_ALLOC.CTAPOOL UP0, 0xf0" in code  # 240 registers
        assert "UTMALDG" in code
        assert "UTMASTG" in code
        products, waits = (len(re.findall(rf"\b{name}\b", code)) for name in ("HGMMA", "WARPGROUP.DEPBAR"))
        assert products > 2 * waits
        # most exponentials are worked out between a wait that leaves a product in flight and the next
        hidden = re.findall(r"WARPGROUP.DEPBAR.LE gsb0, 0x1(.*?)WARPGROUP.DEPBAR", code, re.DOTALL)
        assert sum(part.count("MUFU.EX2") for part in hidden) > 0.6 * code.count("MUFU.EX2")


def command(*arguments: str | Path) -> str:
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_compiled() -> None:
    """Without spills, with registers moved to the warps that compute, copies by blocks, and products left in flight."""
    code = f"from {__name__} import *\nfor case in COMPILED: examine_compiled(*case)"
    command(sys.executable, "-c", code)  # a process in which nothing has been interpreted: that changes the language


GPU = [(case, heads, d, t) for case in LONG for heads in ((4, 4), (4, 2)) for d in (64, 128) for t in ATTENTION_LIMITS]


@pytest.mark.gpu
@pytest.mark.parametrize(("case", "heads", "head_dim", "dtype"), [x for x in GPU if x[3] != torch.float32])
def test_on_a_gpu(case: str, heads: tuple[int, int], head_dim: int, dtype: torch.dtype) -> None:
    """Against fp64 and the plain kernels; with equal bits every time."""
    if missing := hopper_missing(Situation(torch.device("cuda"), dtype, head_dim)):
        pytest.skip(missing)
    pairs, sequences = LONG[case]
    tensors = tensors_of(pairs, sequences, heads, head_dim, dtype, "cuda")
    found, grad = run(hopper, heads[0], pairs, tensors)
    check(pairs, heads, tensors, found, grad)
    again, _ = run(hopper, heads[0], pairs, tensors)
    assert all(torch.equal(x, y) for x, y in zip(found, again, strict=True))
    twin, _ = run(flash, heads[0], pairs, tensors)
    for x, y in zip(found, twin, strict=True):
        assert distance(x, y.double()) < 1.5 * ATTENTION_LIMITS[dtype]
