"""The simulator finds planted faults, in a small kernel and in the real ones, whatever happens when."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from torch import Tensor

from megaflow.kernels.attention import (
    hopper_backward,
    hopper_backward_keys,
    hopper_backward_queries,
    hopper_forward,
)
from megaflow.kernels.attention.hopper import hopper as attention
from megaflow.kernels.attention.hopper_gluon import descriptor, gl, hopper, jit, new_barriers
from tests.kernels.gluon_simulator import Simulator, simulated
from tests.kernels.gluon_simulator_machine import Fault
from tests.kernels.interpreter import interpreted
from tests.kernels.numerics import distance
from tests.kernels.test_attention import documents, edges, tensors_of

SIZE, COUNT = 64, 5


@jit
def copy(x, y, smem, barriers, COUNT: gl.constexpr, FAULT: gl.constexpr):
    x_smem, y_smem, _ = smem
    ready, free = barriers
    for number in range(COUNT):
        stage = number % 2
        if FAULT != "room not awaited":
            hopper.mbarrier.wait(free.index(stage), (number // 2 & 1) ^ 1)
        count = x.block_type.nbytes + y.block_type.nbytes
        if FAULT == "bytes that nobody copies":
            count += 16
        if FAULT == "bytes that nobody expects":
            count -= 16
        hopper.mbarrier.expect(ready.index(stage), count)
        row = number * 64
        if FAULT == "copied from outside":
            row += 64 * COUNT + 64
        hopper.tma.async_copy_global_to_shared(x, [row, 0], ready.index(stage), x_smem.index(stage))
        hopper.tma.async_copy_global_to_shared(y, [0, 0], ready.index(stage), y_smem.index(stage))


@jit
def compute(out, sums, smem, barriers, COUNT: gl.constexpr, FAULT: gl.constexpr):
    x_smem, y_smem, out_smem = smem
    ready, free = barriers
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    acc = gl.zeros([64, 64], gl.float32, layout)
    for number in range(COUNT):
        stage = number % 2
        parity = number // 2 & 1
        if FAULT == "wrong parity":
            parity = 1 - parity
        if FAULT != "copy not awaited":
            hopper.mbarrier.wait(ready.index(stage), parity)
        x_smem.index(stage).store(x_smem.index(stage).load(layout) * 2)
        if FAULT != "no fence":
            hopper.fence_async_shared()
        acc = hopper.warpgroup_mma(x_smem.index(stage), y_smem.index(stage).permute((1, 0)), acc, is_async=True)
        if FAULT == "freed too early":
            hopper.mbarrier.arrive(free.index(stage), count=1)
        if FAULT == "used too early":
            acc = acc * 2.0
        if FAULT == "overwritten too early":
            x_smem.index(stage).store(x_smem.index(stage).load(layout))
        if FAULT == "one left in flight":
            acc = hopper.warpgroup_mma_wait(1, deps=[acc])
        if FAULT != "no wait for the product":
            acc = hopper.warpgroup_mma_wait(0, deps=[acc])
        if FAULT == "freed twice":
            hopper.mbarrier.arrive(free.index(stage), count=2)
        if FAULT != "freed too early" and FAULT != "never freed":
            hopper.mbarrier.arrive(free.index(stage), count=1)
    staged = out_smem.index(1 if FAULT == "no such block" else 0)
    staged.store(acc.to(staged.dtype))
    hopper.fence_async_shared()
    hopper.tma.async_copy_shared_to_global(out, [0, 0], staged)
    if FAULT == "changed under the copy":
        staged.store(acc.to(staged.dtype))
    if FAULT != "store not awaited":
        hopper.tma.store_wait(0)
    row = gl.arange(0, 64, gl.SliceLayout(1, layout))
    if FAULT == "stored outside":
        row = row + 1
    gl.store(sums + row, gl.sum(acc, 1), mask=row >= 0)


@jit
def ring_kernel(x, y, out, sums, COUNT: gl.constexpr, FAULT: gl.constexpr):
    """Twice the sum of the products of COUNT blocks with one, and the sums of its rows."""
    x_smem = gl.allocate_shared_memory(x.dtype, [2, 64, 64], x.layout)
    y_smem = gl.allocate_shared_memory(y.dtype, [2, 64, 64], y.layout)
    out_smem = gl.allocate_shared_memory(out.dtype, [1, 64, 64], out.layout)
    smem = (x_smem, y_smem, out_smem)
    barriers = (new_barriers(2, 1), new_barriers(2, 1))
    if FAULT != "barriers not fenced":
        hopper.fence_async_shared()
    functions = [(compute, (out, sums, smem, barriers, COUNT, FAULT)), (copy, (x, y, smem, barriers, COUNT, FAULT))]
    gl.warp_specialize(functions, [1], [24])


def run_ring(fault: str, seed: int) -> float:
    torch.manual_seed(seed)
    x, y, out = (torch.randn(n, 1, 1, SIZE).half() for n in (COUNT * SIZE, SIZE, SIZE))
    sums = torch.full((SIZE,), torch.nan)
    tensors = [descriptor(tensor, SIZE) for tensor in (x, y, out)]
    Simulator(ring_kernel, seed)[(1,)](*tensors, sums, COUNT=COUNT, FAULT=fault)
    want = 2 * torch.einsum("nid,jd->ij", x.double().view(COUNT, SIZE, SIZE), y.double().view(SIZE, SIZE))
    return max(distance(out.view(SIZE, SIZE), want), distance(sums, want.sum(1)))


@pytest.mark.parametrize("seed", range(6))
def test_a_kernel_without_faults(seed: int) -> None:
    assert run_ring("none", seed) < 4e-4


FAULTS = {
    "room not awaited": "is written while|is overwritten while|more arrivals",
    "bytes that nobody copies": "deadlock: .* waits for parity 0 of the barrier .* 16 bytes are missing",
    "bytes that nobody expects": "8192 bytes were copied, but only 8176 expected",
    "copied from outside": r"a block of \[64, 64\] at \[384, 0\] is outside of a tensor of \[320, 64\]",
    "wrong parity": "is read, but nothing|is read before|deadlock",
    "copy not awaited": "is read, but nothing|is read before",
    "no fence": "ordinary stores without fence_async_shared",
    "barriers not fenced": "ordinary stores without fence_async_shared",
    "freed too early": "is written while|is overwritten while",
    "used too early": r"the result of a product of \(64, 64\) and \(64, 64\) is used before its wait",
    "overwritten too early": "is overwritten while it is still being read",
    "one left in flight": "is used before its wait",
    "no wait for the product": "is overwritten while|is used before its wait",
    "freed twice": "more arrivals than the 1 of a phase",
    "never freed": r"deadlock: .* partition 1 \(copy\), line \d+ waits for parity 0 .* phase 0: 1 arrivals",
    "no such block": "there is no block 1",
    "changed under the copy": "is overwritten while it is still being read",
    "store not awaited": "ends without waiting for the copy from block 0",
    "stored outside": "numbers 1 to 64 of a tensor that has 64",
}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found(fault: str, seed: int) -> None:
    with pytest.raises(Fault, match=FAULTS[fault]):
        run_ring(fault, seed)


NEEDLESS = (
    "hopper.mbarrier.wait(turn.",  # only the order of products depends on it
    "hopper.fence_async_shared()  # the next queries",  # of reads before copies the simulator assumes it
)


def steps(module: ModuleType) -> list[tuple[str, int, str]]:
    """File, line and text of all statements of a module's kernels that copy, wait, arrive or fence."""
    lines, _ = inspect.getsourcelines(module)
    found = [node for node in ast.walk(ast.parse("".join(lines))) if isinstance(node, ast.Expr)]
    starts = ("hopper.", "tell(", "fetch(", "await_block(")
    texts = [(module.__file__ or "", node.lineno, lines[node.lineno - 1].strip()) for node in found]
    return [step for step in texts if step[2].startswith(starts) and not step[2].startswith(NEEDLESS)]


STEPS = [step for module in (hopper_forward, hopper_backward_keys, hopper_backward_queries) for step in steps(module)]


def results(seed: int, without: tuple[str, int] | None = None) -> list[Tensor]:
    """What the real kernels compute, maybe without one of their statements; memory they do not write is NaN."""
    torch.manual_seed(0)
    pairs = documents(330, 1)  # more blocks than there is room for
    packed = tensors_of(pairs, 1, (2, 1), 128, torch.float16, "cpu")
    with interpreted(), simulated(seed, hopper_forward, hopper_backward, without=without):
        out = attention(2, edges(pairs, "cpu"), *packed)
        return [out, *torch.autograd.grad(out, packed, torch.ones_like(out))]


@pytest.fixture(scope="module")
def undisturbed() -> Iterator[list[Tensor]]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills memory that is not initialised
    yield results(0)
    torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize(("file", "line", "text"), STEPS, ids=lambda value: str(value).rpartition("/")[2])
def test_no_step_of_the_real_kernels_can_be_left_out(
    undisturbed: list[Tensor], file: str, line: int, text: str
) -> None:
    try:
        disturbed = results(line, (file, line))
    except Fault:
        return
    assert not all(torch.equal(x, y) for x, y in zip(disturbed, undisturbed, strict=True)), f"nobody misses {text}"


def test_results_do_not_depend_on_what_happens_when(undisturbed: list[Tensor]) -> None:
    for seed in range(1, 5):
        assert all(torch.equal(x, y) for x, y in zip(results(seed), undisturbed, strict=True))
