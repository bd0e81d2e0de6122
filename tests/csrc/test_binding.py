"""The operations' checks: whatever is wrong with the arguments is one line, and changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megaflow.kernels import adamw, grad_norm

BF16, FP32, INT16 = torch.bfloat16, torch.float32, torch.int16


@pytest.fixture(autouse=True)
def _library() -> None:
    if error := adamw.library_error():
        pytest.skip(f"the optimizer library {error}")


def both(dtype: torch.dtype) -> list[torch.Tensor]:
    return [torch.ones(4, dtype=dtype), torch.ones(3, dtype=dtype)]


def arguments() -> dict[str, Any]:
    """Of a call that would be right."""
    lists = {"params": BF16, "masters": FP32, "grads": BF16, "exp_avg": FP32, "exp_avg_sq": FP32}
    scalars = {name: torch.zeros(()) for name in ("steps", "grad_scale", "skip")}
    numbers = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
    return {**{name: both(dtype) for name, dtype in lists.items()}, **scalars, **numbers}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"grads": []}, "there are 0 grads and 2 params"),
        ({"exp_avg": [torch.zeros(4)]}, "there are 1 exp_avg and 2 params"),
        ({"masters": [torch.zeros(4), torch.zeros(5)]}, r"masters\[1\] has 5 elements and params\[1\] has 3"),
        ({"exp_avg_sq": [torch.zeros(2), torch.zeros(3)]}, r"exp_avg_sq\[0\] has 2 elements and params\[0\] has 4"),
        ({"exp_avg_sq": [torch.zeros(8)[::2], torch.zeros(3)]}, r"exp_avg_sq\[0\] is not contiguous"),
        ({"exp_avg": both(BF16)}, "exp_avg is bfloat16 and exp_avg_sq is float32"),
        ({"exp_avg": [torch.zeros(4), torch.zeros(3).bfloat16()]}, r"exp_avg\[1\] is bfloat16 and exp_avg\[0\] is fl"),
        ({"grads": both(torch.float16)}, "grads must be float32 or bfloat16, not float16"),
        ({"params": both(torch.float64)}, "params must be float32 or bfloat16, not float64"),
        ({"params": both(FP32)}, r"params\[0\] is float32, so masters\[0\] must be the same tensor"),
        ({"masters": both(BF16)}, "must be float32, or int16 remainders, not bfloat16"),
        ({"exp_avg": both(INT16), "exp_avg_sq": both(INT16)}, "exp_avg must be float32 or bfloat16, not int16"),
        ({"steps": torch.zeros((), dtype=torch.int64)}, "steps must be one float32, not 1 of another dtype"),
        ({"grad_scale": torch.ones(2)}, "grad_scale must be one float32, not 2 of float32"),
        ({"skip": torch.zeros((), dtype=torch.float64)}, "skip must be one float32, not 1 of float64"),
        ({"beta1": 1.0}, r"beta1 must be in \[0, 1\), not 1"),
        ({"beta2": -0.5}, r"beta2 must be in \[0, 1\), not -0.5"),
    ],
)
def test_wrong_arguments_are_one_line_and_change_nothing(changed: dict[str, Any], message: str) -> None:
    wrong = {**arguments(), **changed}
    tensors = [tensor for value in wrong.values() if isinstance(value, list) for tensor in value]
    before = [tensor.clone() for tensor in tensors]
    with pytest.raises(RuntimeError, match=f"^megaflow::adamw: .*{message}.*$"):
        adamw.csrc(**wrong)
    assert all(map(torch.equal, tensors, before))


def test_the_right_arguments_are_accepted() -> None:
    right = arguments()
    adamw.csrc(**right)
    assert not torch.equal(right["masters"][0], torch.ones(4))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ([torch.ones(3).half()], "tensors must be float32 or bfloat16, not float16"),
        ([torch.ones(3), torch.ones(3).bfloat16()], r"tensors\[1\] is bfloat16 and tensors\[0\] is float32"),
        ([torch.ones(3), torch.ones(6)[::2]], r"tensors\[1\] is not contiguous"),
    ],
)
def test_wrong_tensors_have_no_norm(tensors: list[torch.Tensor], message: str) -> None:
    with pytest.raises(RuntimeError, match=f"^megaflow::squared_norm: {message}$"):
        grad_norm.csrc(tensors)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["masters", "grads", "steps", "skip"])
def test_tensors_of_two_devices_are_refused(name: str) -> None:
    wrong = arguments()
    for key, value in wrong.items():
        if key != name and not isinstance(value, float):
            wrong[key] = [x.cuda() for x in value] if isinstance(value, list) else value.cuda()
    with pytest.raises(RuntimeError, match=f"adamw: {name}.* is on cpu and .* are on cuda:0"):
        adamw.csrc(**wrong)
