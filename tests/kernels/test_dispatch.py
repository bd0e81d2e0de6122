"""Which backend each operation gets, and how a wrong wish is refused."""

from __future__ import annotations

import pytest
import torch

from megaflow.kernels import attention, jit
from megaflow.kernels.adamw import csrc_missing
from megaflow.kernels.backend import Situation
from megaflow.kernels.dispatch import OPERATIONS, describe, select_ops


def test_preferred_backend_that_runs_here_is_chosen() -> None:
    assert select_ops("cpu", torch.float32).attention is attention.sdpa


def test_a_named_backend_wins() -> None:
    assert select_ops("cpu", torch.float32, {"attention": "reference"}).attention is attention.reference


def test_every_operation_is_described_with_its_reason() -> None:
    rows = {op: (backend, reason) for op, backend, reason in describe("cpu", torch.float32, {"rotary": "reference"})}
    assert set(rows) == set(OPERATIONS)
    backend, reason = rows["attention"]
    assert backend == "sdpa"
    assert reason.startswith("triton, hopper, varlen, flash2, flash3, flash4, sdpa_cudnn, sdpa_flash: needs CUDA")
    assert rows["rotary"] == ("reference", "named in the configuration")
    assert rows["swiglu"] == ("reference", "triton: needs CUDA")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"atention": "sdpa"}, "no operation is called 'atention'; there are embedding, rms_norm, rotary, attention, "),
        ({"attention": "flash"}, "attention has no backend 'flash'; there are triton, hopper, varlen, flash2, "),
        ({"attention": "varlen"}, "attention cannot use 'varlen': it needs CUDA; here there are sdpa, reference"),
        ({"rms_norm": "triton"}, "rms_norm cannot use 'triton': it needs CUDA; here there are reference"),
    ],
)
def test_wrong_wishes_name_the_choices(overrides: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        select_ops("cpu", torch.float32, overrides)


def test_every_operation_has_a_reference_that_runs_anywhere() -> None:
    for backends in OPERATIONS.values():
        reference = {backend.name: backend for backend in backends}["reference"]
        assert reference.missing(Situation(torch.device("cpu"), torch.bfloat16)) is None


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Asked about a GPU that is not there."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    return torch.device("cuda")


def test_on_a_gpu_the_project_s_own_kernels_are_preferred(hopper: torch.device) -> None:
    rows = {op: backend for op, backend, _ in describe(hopper, torch.bfloat16, head_dim=128)}
    built = "csrc" if csrc_missing("adamw", hopper) is None else "torch"
    assert rows == dict.fromkeys(OPERATIONS, "triton") | dict.fromkeys(("squared_norm", "adamw"), built)


@pytest.mark.parametrize(
    ("dtype", "head_dim", "expected"),
    [(torch.bfloat16, 512, "sdpa"), (torch.float32, 128, "triton"), (torch.bfloat16, 100, "triton")],
)
def test_the_shape_of_heads_counts(hopper: torch.device, dtype: torch.dtype, head_dim: int, expected: str) -> None:
    rows = {op: backend for op, backend, _ in describe(hopper, dtype, head_dim=head_dim)}
    assert rows["attention"] == expected


def test_cut_documents_are_not_for_every_kernel(hopper: torch.device) -> None:
    with pytest.raises(ValueError, match="attention cannot use 'sdpa_cudnn': it needs whole documents on a rank"):
        select_ops(hopper, torch.bfloat16, {"attention": "sdpa_cudnn"}, head_dim=128, whole_documents=False)


def test_torch_s_kernels_have_limits_of_their_own(hopper: torch.device) -> None:
    assert select_ops(hopper, torch.bfloat16, {"attention": "sdpa_flash"}, head_dim=256)
    with pytest.raises(ValueError, match="'sdpa_cudnn': it needs heads of at most 128 channels"):
        select_ops(hopper, torch.bfloat16, {"attention": "sdpa_cudnn"}, head_dim=256)


def test_without_triton_there_are_torch_s_kernels(hopper: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jit, "triton", None)
    rows = {op: (backend, reason) for op, backend, reason in describe(hopper, torch.bfloat16, head_dim=128)}
    assert rows["rms_norm"] == ("reference", "triton: needs Triton")
    assert rows["attention"][0] == "varlen"


def test_the_optimizer_s_own_library_is_preferred_where_it_was_built() -> None:
    rows = {op: backend for op, backend, _ in describe("cpu", torch.float32)}
    built = csrc_missing("adamw", torch.device("cpu")) is None
    assert (rows["adamw"], rows["squared_norm"]) == (("csrc", "csrc") if built else ("torch", "torch"))


def test_state_that_torch_cannot_keep_is_refused_by_its_optimizer() -> None:
    message = "adamw cannot use 'torch': it needs fp32 masters; here there are "
    with pytest.raises(ValueError, match=message):
        select_ops("cpu", torch.bfloat16, {"adamw": "torch"}, masters=torch.int16)


def test_an_old_gpu_has_no_kernels_for_half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    rows = {op: (backend, reason) for op, backend, reason in describe("cuda", torch.bfloat16, head_dim=128)}
    assert rows["attention"][0] == "sdpa"
    assert rows["rms_norm"] == ("reference", "triton: needs compute capability 8.0")
