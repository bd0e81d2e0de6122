"""AdamW: every backend against torch.optim.AdamW in fp64, and the C++ one against the reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from megaflow.kernels import adamw
from megaflow.kernels.adamw import join_master, split_master
from megaflow.kernels.backend import Situation

BF16, FP32, REMAINDER = torch.bfloat16, torch.float32, torch.int16
HYPER = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
FUNCTIONS = {backend.name: backend.function for backend in adamw.BACKENDS}
FORMATS = [
    (param, master, grad, moment)
    for param, master in ((FP32, FP32), (BF16, FP32), (BF16, REMAINDER))
    for grad in (FP32, BF16)
    for moment in (FP32, BF16)
]
"""dtypes of parameters, masters, gradients and moments."""

devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
formats = pytest.mark.parametrize("dtypes", FORMATS, ids=lambda dtypes: "-".join(str(d)[6:] for d in dtypes))


def require(name: str, device: str, dtypes: tuple[torch.dtype, ...] = FORMATS[0]) -> None:
    param, master, grad, moment = dtypes
    situation = Situation(torch.device(device), param, grads=grad, masters=master, moments=moment)
    missing = {backend.name: backend.missing for backend in adamw.BACKENDS}[name](situation)
    if missing:
        pytest.skip(f"{name} {missing}")


@dataclass
class State:
    """What a backend is called with, and the masters it began with."""

    params: list[torch.Tensor]
    masters: list[torch.Tensor]
    grads: list[torch.Tensor]
    exp_avg: list[torch.Tensor]
    exp_avg_sq: list[torch.Tensor]
    weights: list[torch.Tensor]

    @classmethod
    def random(cls, lengths: list[int], dtypes: tuple[torch.dtype, ...], device: str = "cpu", offset: int = 0) -> State:
        """Tensors of these lengths that begin `offset` elements behind an allocation's start."""
        param, master, grad, moment = dtypes
        torch.manual_seed(len(lengths))

        def new(values: list[torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
            views = [torch.empty(len(x) + offset, dtype=dtype, device=device)[offset:] for x in values]
            return [view.copy_(x) for view, x in zip(views, values, strict=True)]

        weights = [torch.randn(n) for n in lengths]
        zeros = [torch.zeros(n) for n in lengths]
        masters = new(weights, FP32)
        if master == REMAINDER:
            high, low = zip(*map(split_master, weights), strict=True)
            params, masters = new(list(high), BF16), new(list(low), REMAINDER)
        elif param == BF16:
            params = new([torch.full_like(x, torch.nan) for x in weights], BF16)  # is only written
        else:
            params = masters
        return cls(params, masters, new(zeros, grad), new(zeros, moment), new(zeros, moment), weights)

    def new_grads(self, seed: int) -> None:
        torch.manual_seed(seed)
        for grad in self.grads:
            grad.copy_(torch.randn(len(grad)) * 1e-2)

    def step(self, function: Any, steps: int, scale: float = 1.0, skip: float = 0.0, **changed: float) -> None:
        scalars = (torch.tensor(x, device=self.grads[0].device) for x in (float(steps), scale, skip))
        lists = (self.params, self.masters, self.grads, self.exp_avg, self.exp_avg_sq)
        function(*lists, *scalars, **{**HYPER, **changed})

    def wide(self) -> list[torch.Tensor]:
        """The fp32 masters."""
        pairs = zip(self.params, self.masters, strict=True)
        return [join_master(p, m) if m.dtype == REMAINDER else m for p, m in pairs]

    def is_rounded(self) -> bool:
        """Whether the parameters are the masters, rounded."""
        split = self.masters[0].dtype == REMAINDER
        rounded = [split_master(x)[0] if split else x.to(self.params[0].dtype) for x in self.wide()]
        return same_bits(self.params, rounded)

    def copy(self) -> list[torch.Tensor]:
        lists = (self.params, self.masters, self.exp_avg, self.exp_avg_sq)
        return [tensor.cpu().clone() for tensors in lists for tensor in tensors]


def same_bits(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    integers = {2: torch.int16, 4: torch.int32}
    pairs = zip(a, b, strict=True)
    return all(bool((x.view(i := integers[x.element_size()]) == y.view(i)).all()) for x, y in pairs)


@devices
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("backend", ["csrc", "apex", "torch", "reference"])
@pytest.mark.parametrize("dtypes", [dtypes for dtypes in FORMATS if dtypes[3] == FP32], ids=str)
def test_100_steps_are_those_of_torch(
    backend: str, dtypes: tuple[torch.dtype, ...], weight_decay: float, device: str
) -> None:
    require(backend, device, dtypes)
    state = State.random([1, 7, 8, 1023, 2500], dtypes, device)
    expected = [x.double().requires_grad_() for x in state.weights]
    betas = HYPER["beta1"], HYPER["beta2"]
    optimizer = torch.optim.AdamW(expected, lr=HYPER["lr"], betas=betas, eps=HYPER["eps"], weight_decay=weight_decay)
    for step in range(100):
        scale = 1.0 if step % 3 else 0.37
        state.new_grads(step)
        for x, grad in zip(expected, state.grads, strict=True):
            x.grad = grad.cpu().double() * scale
        optimizer.step()
        state.step(FUNCTIONS[backend], step, scale, weight_decay=weight_decay)
    # torch's fused kernels on the CPU multiply by 1 - lr * weight_decay in fp32, whose error adds up
    limit = 5e-6 if backend == "torch" and weight_decay else 1e-6
    for x, wide in zip(expected, state.wide(), strict=True):
        assert float((wide.cpu() - x.detach()).norm()) < limit * float(x.detach().norm())
    assert state.is_rounded()


@pytest.mark.parametrize("fused", [False, True])
def test_100_steps_are_those_of_torch_in_fp32(fused: bool) -> None:
    require("csrc", "cpu")
    state = State.random([2500], FORMATS[0])
    expected = state.weights[0].clone().requires_grad_()
    optimizer = torch.optim.AdamW([expected], lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0, fused=fused)
    for step in range(100):
        state.new_grads(step)
        expected.grad = state.grads[0].clone()
        optimizer.step()
        state.step(adamw.csrc, step, weight_decay=0.0)
    torch.testing.assert_close(state.params[0], expected.detach(), rtol=1e-6, atol=1e-6)


@formats
@pytest.mark.parametrize("offset", [0, 1, 3, 8])
def test_csrc_is_the_reference(dtypes: tuple[torch.dtype, ...], offset: int) -> None:
    """The moments bit by bit, and the weights but for torch's square root, whose last bit is not always right."""
    require("csrc", "cpu", dtypes)
    lengths = [1, 7, 0, 8, 1023, 16384 + 5] if offset else [1, 7, 0, 8, 1023, 100003]
    ours, reference = (State.random(lengths, dtypes, "cpu", offset) for _ in range(2))
    for step in range(5):
        for state in (ours, reference):
            state.new_grads(step)
        ours.step(adamw.csrc, step, 0.37)
        reference.step(adamw.reference, step, 0.37)
        assert same_bits(ours.exp_avg + ours.exp_avg_sq, reference.exp_avg + reference.exp_avg_sq)
        torch.testing.assert_close(ours.wide(), reference.wide(), rtol=2e-7, atol=1e-9)
        assert ours.is_rounded()


@pytest.mark.gpu
@formats
@pytest.mark.parametrize("offset", [0, 1, 8])
def test_csrc_on_cuda(dtypes: tuple[torch.dtype, ...], offset: int) -> None:
    """Close to the reference on the CPU, and the same bits in two runs."""
    require("csrc", "cuda", dtypes)
    lengths = [1, 7, 0, 8, 1023, 2048, 2049, 16384, 16385, 100003, 2**20 + 24]
    first, again, reference = (State.random(lengths, dtypes, device, offset) for device in ("cuda", "cuda", "cpu"))
    for step in range(5):
        for state, function in ((first, adamw.csrc), (again, adamw.csrc), (reference, adamw.reference)):
            state.new_grads(step)
            state.step(function, step, 0.37)
    assert same_bits(first.copy(), again.copy())
    for x, expected in zip(first.wide(), reference.wide(), strict=True):
        # with moments of bf16, another last bit of an fp32 value is now and then one of 8 bits
        assert float((x.cpu() - expected).norm()) <= (1e-6 if dtypes[3] == FP32 else 2e-5) * float(expected.norm())


@devices
def test_more_tensors_than_a_launch_takes(device: str) -> None:
    require("csrc", device)
    dtypes = (BF16, FP32, BF16, FP32)
    ours, reference = State.random([5] * 200, dtypes, device), State.random([5] * 200, dtypes)
    for state, function in ((ours, adamw.csrc), (reference, adamw.reference)):
        state.new_grads(0)
        state.step(function, 0)
    torch.testing.assert_close([x.cpu() for x in ours.masters], reference.masters, rtol=1e-6, atol=1e-6)


@devices
@formats
@pytest.mark.parametrize("backend", ["csrc", "apex", "torch", "reference"])
def test_a_skipped_step_changes_nothing(backend: str, dtypes: tuple[torch.dtype, ...], device: str) -> None:
    require(backend, device, dtypes)
    state = State.random([1, 1000], dtypes, device)
    state.new_grads(0)
    state.step(FUNCTIONS[backend], 0)
    before = state.copy()
    for grad in state.grads:
        grad.fill_(torch.nan)
    state.step(FUNCTIONS[backend], 1, skip=1.0)
    assert same_bits(state.copy(), before)


@devices
@formats
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_gradient_that_is_not_finite_spoils_its_own_weight_alone(
    bad: float, dtypes: tuple[torch.dtype, ...], device: str
) -> None:
    require("csrc", device, dtypes)
    state = State.random([3000], dtypes, device)
    state.new_grads(0)
    for at in (5, 2999):
        state.grads[0][at] = bad
    state.step(adamw.csrc, 0)
    for tensors in (state.params, state.wide()):  # a NaN must not become a number by rounding
        assert tensors[0].isnan().nonzero().flatten().tolist() == [5, 2999]


@pytest.mark.parametrize("steps", [0, 1, 10, 1000, 10**6])
def test_bias_correction(steps: int) -> None:
    require("csrc", "cpu")
    state = State.random([1], FORMATS[0])
    state.exp_avg[0].fill_(0.1)
    state.exp_avg_sq[0].fill_(0.01)
    state.step(adamw.csrc, steps, beta2=0.999, weight_decay=0.0)
    mean, root = 0.09 / (1 - 0.9 ** (steps + 1)), (0.00999 / (1 - 0.999 ** (steps + 1))) ** 0.5
    expected = float(state.weights[0].double()) - 1e-3 * mean / root
    assert float(state.params[0]) == pytest.approx(expected, abs=1e-7)


SPECIAL = [0x0, 0x80000000, 0x1, 0x80000001, 0x007FFFFF, 0x00008000, 0x80018000, 0x3F808000, 0x3F818000, 0xBF808000]
SPECIAL += [0x3F80FFFF, 0x7F7FFFFF, 0xFF7FFFFF, 0x7F7F8000, 0x7F7F7FFF, 0x3F807FFF, 0x3F808001]


def masters_of_all_kinds() -> torch.Tensor:
    """Signed zeros, denormals, ties and the largest numbers, then random finite ones."""
    torch.manual_seed(0)
    bits = torch.cat((torch.tensor(SPECIAL), torch.randint(0, 2**32, (100_000,)))).to(torch.int32)
    values = bits.view(torch.float32)
    return values[values.isfinite()]


def test_a_master_comes_back_from_its_two_parts() -> None:
    masters = masters_of_all_kinds()
    high, low = split_master(masters)
    assert (high.dtype, low.dtype) == (BF16, REMAINDER)
    assert same_bits([join_master(high, low)], [masters])
    bits = masters.view(torch.int32)
    nearest = masters.bfloat16().view(torch.int16)
    up = ((bits & 0x1FFFF) == 0x8000).short()  # ties that go to even, which is down, otherwise
    assert bool(up.any())
    assert torch.equal(high.view(torch.int16), nearest + up)


def test_infinities_and_nans_keep_their_kind() -> None:
    values = torch.tensor([0x7F800000, 0xFF800000, 0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0x7FC00000]).to(torch.int32)
    high, low = split_master(values.view(torch.float32))
    for x in (high.float(), join_master(high, low)):
        assert x[:2].tolist() == [torch.inf, -torch.inf]
        assert bool(x[2:].isnan().all())


@devices
def test_csrc_splits_masters_in_the_same_way(device: str) -> None:
    dtypes = (BF16, REMAINDER, FP32, FP32)
    require("csrc", device, dtypes)
    masters = masters_of_all_kinds()
    state = State.random([len(masters)], dtypes, device)
    for tensor, part in zip((state.params[0], state.masters[0]), split_master(masters), strict=True):
        tensor.copy_(part)
    before = state.copy()
    state.step(adamw.csrc, 0, lr=0.0)  # joined, not changed, split
    assert same_bits(state.copy(), before)


@pytest.mark.parametrize("backend", ["csrc", "torch", "reference"])
def test_no_tensors_are_no_work(backend: str) -> None:
    require(backend, "cpu")
    scalar = torch.zeros(())
    FUNCTIONS[backend]([], [], [], [], [], scalar, scalar, scalar, **HYPER)
