"""AdamW (Loshchilov and Hutter, Decoupled Weight Decay Regularization, arXiv 1711.05101) on lists of tensors.

Weights come in three forms: fp32 parameters that are their own masters, bf16 parameters beside fp32 masters, or bf16
parameters beside int16 remainders, which together are the fp32 masters (`split_master`) in 2 bytes less. Moments are
fp32 or bf16. With beta2 = 0.999 a second moment in bf16 never falls, since a change of 1 part in 1000 is rounded away;
0.95 is small enough.
"""

from __future__ import annotations

import functools
import importlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw as torch_adamw

from megaflow.kernels.backend import Backend, Situation

LIBRARY_PATH = Path(__file__).with_name("_optimizer.so")
"""What `csrc/optimizer/` is built into; it registers `torch.ops.megaflow.adamw` and `squared_norm`."""

APEX_CHUNK = 65536
"""Elements of a block of apex's kernels, as in its `multi_tensor_applier`."""

PIECE = 2**24
"""Numbers that are split or joined at a time: on a GPU they take memory that nobody planned for."""

WIDE = (torch.float32, torch.bfloat16)


def split_master(master: Tensor) -> tuple[Tensor, Tensor]:
    """An fp32 tensor as bf16 and int16 remainder of the same shape: its bits are `(bf16 bits << 16) + remainder`.

    The bf16 is the fp32 rounded to nearest, ties away from zero. `join_master` gives back every bit, except that every
    NaN becomes the same one.
    """
    bits = torch.where(master.isnan(), 0x7FC00000, master.view(torch.int32))
    high = (bits + 0x8000) >> 16
    return high.to(torch.int16).view(torch.bfloat16), (bits - (high << 16)).to(torch.int16)


def join_master(param: Tensor, remainder: Tensor) -> Tensor:
    """The fp32 tensor of which `split_master` made a bf16 tensor and an int16 remainder."""
    return ((param.view(torch.int16).int() << 16) + remainder.int()).view(torch.float32)


@torch.no_grad()
def reference(
    params: list[Tensor],
    masters: list[Tensor],
    grads: list[Tensor],
    exp_avg: list[Tensor],
    exp_avg_sq: list[Tensor],
    steps: Tensor,
    grad_scale: Tensor,
    skip: Tensor,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """One step on lists of tensors `[n]`, in place; all on one device, so that nothing waits for the host.

    Args:
        params: fp32 or bf16.
        masters: of fp32 params the same tensors; of bf16 ones fp32, or int16 remainders. bf16 params are written only.
            An fp32 master is rounded to nearest even; a remainder's parameter is rounded as `split_master` does.
        grads: fp32 or bf16; some backends leave scaled gradients behind.
        exp_avg: first moments, fp32 or bf16.
        exp_avg_sq: second moments, of the same dtype.
        steps: taken before, an fp32 scalar, for the bias correction; the caller counts.
        grad_scale: fp32 scalar that multiplies the gradients: the clip factor.
        skip: fp32 scalar; where it is 1 nothing changes, where it is 0 this is an ordinary step.
        lr: learning rate of this step.
        eps: is added to the root of the corrected second moment.
        weight_decay: decoupled; a step takes `lr * weight_decay` of the weight.
    """
    bias1, bias2 = (1 - beta ** (steps.double() + 1) for beta in (beta1, beta2))
    step_size, inv_bias2_sqrt = (lr / bias1).float(), bias2.rsqrt().float()
    keep = skip != 0
    for param, master, grad, m, v in zip(params, masters, grads, exp_avg, exp_avg_sq, strict=True):
        split = master.dtype == torch.int16
        weight = join_master(param, master) if split else master
        g = grad.float() * grad_scale
        new_m = m.float() * beta1 + g * (1 - beta1)
        new_v = v.float() * beta2 + g * (1 - beta2) * g
        new = weight - (step_size * (new_m / (new_v.sqrt() * inv_bias2_sqrt + eps)) + weight * (lr * weight_decay))
        new_param, new_master = split_master(new) if split else (new.to(param.dtype), new)
        for old, value in ((master, new_master), (param, new_param), (m, new_m), (v, new_v)):
            old.copy_(torch.where(keep, old, value.to(old.dtype)))


@torch.no_grad()
def csrc(
    params: list[Tensor],
    masters: list[Tensor],
    grads: list[Tensor],
    exp_avg: list[Tensor],
    exp_avg_sq: list[Tensor],
    steps: Tensor,
    grad_scale: Tensor,
    skip: Tensor,
    **hyperparameters: float,
) -> None:
    """`reference` by the kernels of `csrc/optimizer/`: every byte is read and written once, 72 tensors a launch.

    Raises:
        RuntimeError: in one line, for tensors that are not contiguous or whose sizes, dtypes or devices do not fit.
    """
    state = exp_avg, exp_avg_sq, steps, grad_scale, skip
    torch.ops.megaflow.adamw(params, masters, grads, *state, **hyperparameters)


@torch.no_grad()
def apex(
    params: list[Tensor],
    masters: list[Tensor],
    grads: list[Tensor],
    exp_avg: list[Tensor],
    exp_avg_sq: list[Tensor],
    steps: Tensor,
    grad_scale: Tensor,
    skip: Tensor,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """`reference` by the kernels of NVIDIA's apex (`FusedAdam(capturable=True, adam_w_mode=True)`).

    Of them the capturable ones, which read step, scale and the flag not to run from the device.
    """
    if not params:
        return
    lists, kernel = [grads, params, exp_avg, exp_avg_sq], "multi_tensor_adam_capturable"
    if params[0].dtype != torch.float32:
        lists, kernel = [*lists, masters], "multi_tensor_adam_capturable_master"
    decoupled, bias_correction = 1, 1
    getattr(_amp_c(), kernel)(
        APEX_CHUNK,
        skip.int().reshape(1),
        lists,
        torch.full((1,), lr, dtype=torch.float32, device=steps.device),
        beta1,
        beta2,
        eps,
        (steps + 1).int().reshape(1),
        decoupled,
        bias_correction,
        weight_decay,
        grad_scale.float().reshape(1),
    )


@torch.no_grad()
def fused_torch(
    params: list[Tensor],
    masters: list[Tensor],
    grads: list[Tensor],
    exp_avg: list[Tensor],
    exp_avg_sq: list[Tensor],
    steps: Tensor,
    grad_scale: Tensor,
    skip: Tensor,
    **hyperparameters: float,
) -> None:
    """`reference` by torch's fused AdamW on fp32 masters, which are then copied into bf16 parameters.

    Its gradients must be fp32: bf16 ones are copied, one tensor at a time.
    """
    together = all(grad.dtype == torch.float32 for grad in grads)
    for part in [slice(None)] if together else [slice(i, i + 1) for i in range(len(grads))]:
        torch_adamw(
            masters[part],
            [grad.float() for grad in grads[part]],
            exp_avg[part],
            exp_avg_sq[part],
            [],
            list(steps.repeat(len(masters[part])).unbind()),
            fused=True,
            grad_scale=grad_scale.reciprocal(),
            found_inf=skip,
            amsgrad=False,
            maximize=False,
            **hyperparameters,  # type: ignore[arg-type]
        )
    for param, master in zip(params, masters, strict=True):
        if param is not master:
            param.copy_(master)


@functools.cache
def library_error() -> str | None:
    """Loads the library of `csrc/optimizer/`, once: None, or why that was not possible."""
    if not LIBRARY_PATH.exists():
        return "was not built (install with --no-build-isolation and a C++ compiler)"
    try:
        torch.ops.load_library(str(LIBRARY_PATH))
    except (OSError, RuntimeError) as error:
        return f"cannot be loaded ({error})"
    return None


def csrc_missing(operation: str, device: torch.device) -> str | None:
    """What the library lacks to run `torch.ops.megaflow.<operation>` on a device."""
    if error := library_error():
        return error
    if torch._C._dispatch_has_kernel_for_dispatch_key(f"megaflow::{operation}", device.type.upper()):
        return None
    return "was built without CUDA" if device.type == "cuda" else f"has no kernels for {device.type}"


def _csrc_missing(situation: Situation) -> str | None:
    return _formats(situation) or csrc_missing("adamw", situation.device)


def _apex_missing(situation: Situation) -> str | None:
    if situation.device.type != "cuda":
        return "needs CUDA"
    if _amp_c() is None:
        return "needs NVIDIA's apex, built with its CUDA extensions"
    if situation.grads != situation.dtype:
        return "needs gradients of the parameters' dtype"
    return _formats(situation) or _fp32_state(situation)


def _torch_missing(situation: Situation) -> str | None:
    return _formats(situation) or _fp32_state(situation)


def _formats(situation: Situation) -> str | None:
    """What `reference` does not do either."""
    formats = {"parameters": situation.dtype, "gradients": situation.grads, "moments": situation.moments}
    for name, dtype in formats.items():
        if dtype not in WIDE:
            return f"needs {name} of fp32 or bf16"
    if situation.masters != torch.float32 and (situation.masters, situation.dtype) != (torch.int16, torch.bfloat16):
        return "needs fp32 masters, or int16 remainders of bf16 parameters"
    return None


def _fp32_state(situation: Situation) -> str | None:
    if situation.masters != torch.float32:
        return "needs fp32 masters"
    return "needs fp32 moments" if situation.moments != torch.float32 else None


@functools.cache
def _amp_c() -> Any:
    """The module of NVIDIA's apex with the kernels, or None. PyPI's project named apex is another and has none."""
    try:
        module = importlib.import_module("amp_C")
    except ImportError:
        return None
    kernels = ("multi_tensor_adam_capturable", "multi_tensor_adam_capturable_master")
    return module if all(hasattr(module, kernel) for kernel in kernels) else None


BACKENDS = (
    Backend("csrc", csrc, _csrc_missing),
    Backend("apex", apex, _apex_missing),
    Backend("torch", fused_torch, _torch_missing),
    Backend("reference", reference, _formats),
)
