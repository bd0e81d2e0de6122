"""What runs under compute-sanitizer, in Triton's interpreter; and how the tool's words are taken."""

from __future__ import annotations

import pytest
import torch
from triton.runtime.interpreter import InterpretedFunction

from benchmarks import sanitize
from benchmarks.sanitize import FOUND, run_all, verdict
from tests.kernels.interpreter import interpreted

CPU = torch.device("cpu")


def test_every_kernel_runs() -> None:
    said: list[str] = []
    with interpreted():
        assert run_all(CPU, said.append, InterpretedFunction) == set()
    assert "attention: done" in said


def test_a_kernel_that_no_case_launches_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sanitize, "cases", lambda device: {"swiglu": sanitize.activations})
    with interpreted():
        missed = run_all(CPU, lambda _: None, InterpretedFunction)
    assert {"norm.forward_kernel", "flash_forward.forward_kernel", "embedding.gradient_kernel"} <= missed
    assert not {"swiglu.forward_kernel", "swiglu.backward_kernel"} & missed


@pytest.mark.parametrize(
    ("code", "text", "status", "reason"),
    [
        (0, "every kernel ran\n========= ERROR SUMMARY: 0 errors", "passed", None),
        (0, "nothing", "failed", "exit code 0"),
        (
            FOUND,
            "========= Invalid __global__ write of size 4 bytes",
            "failed",
            "========= Invalid __global__ write of",
        ),
        (FOUND, "========= Error: Potential RAW hazard detected", "failed", "========= Error: Potential RAW hazard"),
        (1, "never launched: norm.forward_kernel", "failed", "exit code 1"),
        (
            1,
            "========= Error: Device not supported. Please",
            "skipped",
            "========= Error: Device not supported. Please",
        ),
        (FOUND, "a kernel prints: Device not supported", "failed", f"exit code {FOUND}"),
        (FOUND, "========= Unable to find it\n========= Invalid __shared__ read", "failed", "========= Invalid __sh"),
        (None, "attention: done", "failed", "did not end in 9 seconds"),
    ],
)
def test_verdicts(code: int | None, text: str, status: str, reason: str | None) -> None:
    found = verdict(code, text, 9)
    assert found["status"] == status
    assert found.get("reason") == reason or found["reason"].startswith(reason)
