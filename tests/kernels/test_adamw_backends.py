"""When each backend of AdamW can run, and how apex is called."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megaflow.kernels import adamw
from megaflow.kernels.backend import Situation
from tests.kernels.test_adamw import BF16, FORMATS, FP32, REMAINDER, State, require


def test_a_missing_or_broken_library_is_stated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = adamw.library_error.__wrapped__
    monkeypatch.setattr(adamw, "LIBRARY_PATH", tmp_path / "_optimizer.so")
    assert load() == "was not built (install with --no-build-isolation and a C++ compiler)"
    (tmp_path / "_optimizer.so").write_bytes(b"not a library")
    assert "cannot be loaded" in str(load())


def missing(name: str, device: str, dtype: torch.dtype, **dtypes: torch.dtype) -> str | None:
    backend = next(backend for backend in adamw.BACKENDS if backend.name == name)
    return backend.missing(Situation(torch.device(device), dtype, **dtypes))


def test_what_backends_lack() -> None:
    require("csrc", "cpu")
    for name in ("csrc", "torch", "reference"):
        assert missing(name, "cpu", BF16) is None
        assert missing(name, "cpu", torch.float16) == "needs parameters of fp32 or bf16"
        assert missing(name, "cpu", BF16, grads=torch.float64) == "needs gradients of fp32 or bf16"
        assert (
            missing(name, "cpu", FP32, masters=REMAINDER)
            == "needs fp32 masters, or int16 remainders of bf16 parameters"
        )
    assert missing("csrc", "cpu", BF16, masters=REMAINDER, grads=BF16, moments=BF16) is None
    assert missing("csrc", "cuda", BF16) in (None, "was built without CUDA")
    assert missing("csrc", "xpu", BF16) == "has no kernels for xpu"
    assert missing("torch", "cpu", BF16, masters=REMAINDER) == "needs fp32 masters"
    assert missing("torch", "cpu", BF16, moments=BF16) == "needs fp32 moments"
    assert missing("apex", "cpu", BF16) == "needs CUDA"


class FakeAmpC(SimpleNamespace):
    """The kernels of NVIDIA's apex, with its arguments, checks and side effects, in plain torch."""

    @staticmethod
    def _adam(
        chunk_size: int,
        noop_flag: torch.Tensor,
        tensor_lists: list[list[torch.Tensor]],
        lr: torch.Tensor,
        beta1: float,
        beta2: float,
        epsilon: float,
        step: torch.Tensor,
        mode: int,
        bias_correction: int,
        weight_decay: float,
        inv_scale: torch.Tensor,
    ) -> None:
        assert isinstance(chunk_size, int)
        assert [x.dtype for x in (noop_flag, step, lr, inv_scale)] == [torch.int32, torch.int32, FP32, FP32]
        assert (mode, bias_correction) == (1, 1)
        if int(noop_flag) == 1:
            return
        correction1, correction2 = 1 - beta1 ** int(step), 1 - beta2 ** int(step)
        for g, p, m, v, *rest in zip(*tensor_lists, strict=True):
            assert g.dtype == p.dtype  # the kernels read both as the gradients' dtype
            assert all(x.dtype == FP32 for x in (m, v, *rest))
            weight = (rest or [p])[0].float()
            scaled = g.float() * inv_scale
            g.copy_(scaled)
            m.copy_(beta1 * m + (1 - beta1) * scaled)
            v.copy_(beta2 * v + (1 - beta2) * scaled * scaled)
            update = m / correction1 / ((v / correction2).sqrt() + epsilon) + weight_decay * weight
            for out in (p, *rest):
                out.copy_(weight - lr * update)

    @staticmethod
    def multi_tensor_adam_capturable(chunk_size: int, noop: Any, lists: list[Any], *rest: Any) -> None:
        assert len(lists) == 4
        FakeAmpC._adam(chunk_size, noop, lists, *rest)

    @staticmethod
    def multi_tensor_adam_capturable_master(chunk_size: int, noop: Any, lists: list[Any], *rest: Any) -> None:
        assert len(lists) == 5
        FakeAmpC._adam(chunk_size, noop, lists, *rest)


@pytest.fixture
def amp_c(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Any], None]]:
    """Puts a module in the place of apex's."""

    def put(module: Any) -> None:
        monkeypatch.setitem(sys.modules, "amp_C", module)
        adamw._amp_c.cache_clear()

    yield put
    adamw._amp_c.cache_clear()


@pytest.mark.parametrize("dtypes", [FORMATS[0], (BF16, FP32, BF16, FP32)], ids=["fp32", "bf16"])
def test_apex_is_called_with_its_own_arguments(dtypes: tuple[torch.dtype, ...], amp_c: Callable[[Any], None]) -> None:
    amp_c(FakeAmpC())
    ours, reference = State.random([1, 700], dtypes), State.random([1, 700], dtypes)
    for step in range(20):
        for state, function in ((ours, adamw.apex), (reference, adamw.reference)):
            state.new_grads(step)
            state.step(function, step, 0.37, skip=float(step == 10))
    for x, expected in zip(ours.wide(), reference.wide(), strict=True):
        # it leaves scaled gradients behind, after they were used
        assert float((x - expected).norm()) < 1e-6 * float(expected.norm())


def test_when_apex_can_run(amp_c: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch) -> None:
    amp_c(FakeAmpC())
    assert missing("apex", "cuda", FP32) is None
    assert missing("apex", "cuda", BF16, grads=BF16) is None
    assert missing("apex", "cuda", BF16, grads=FP32) == "needs gradients of the parameters' dtype"
    assert missing("apex", "cuda", BF16, grads=BF16, masters=REMAINDER) == "needs fp32 masters"
    assert missing("apex", "cuda", FP32, moments=BF16) == "needs fp32 moments"
    without = "needs NVIDIA's apex, built with its CUDA extensions"
    amp_c(SimpleNamespace(multi_tensor_adam=None))  # of before it had these kernels
    assert missing("apex", "cuda", FP32) == without
    monkeypatch.setitem(sys.modules, "apex", SimpleNamespace())  # PyPI's, which has no kernels
    amp_c(None)
    assert missing("apex", "cuda", FP32) == without
