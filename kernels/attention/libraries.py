"""Attention kernels of torch and of flash-attn, where they are installed."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from megaflow.kernels.attention.reference import flatten, restore, sdpa
from megaflow.kernels.attention.segments import Segments
from megaflow.kernels.backend import Situation

HALF = (torch.bfloat16, torch.float16)
FLASH_ATTN = {"flash2": "flash_attn", "flash3": "flash_attn_interface", "flash4": "flash_attn.cute"}
"""Our name of each generation of flash-attn, and the module that has its `flash_attn_varlen_func`."""


def varlen(heads: int, segments: Segments, *tensors: Tensor) -> Tensor:
    """Attention by torch's flash attention over segments of varying length."""
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = flatten(heads, *tensors)
    shared = q.shape[1] // k.shape[1]
    if shared > 1:  # torch 2.11 takes no grouped heads here
        k, v = k.repeat_interleave(shared, dim=1), v.repeat_interleave(shared, dim=1)
    edges = segments.cu_seqlens_q, segments.cu_seqlens_k, segments.max_seqlen_q, segments.max_seqlen_k
    # a window without end to the left and of none to the right is causal, counted from the end of each segment's keys
    out = varlen_attn(q, k, v, *edges, window_size=(-1, 0))
    assert isinstance(out, Tensor)
    return restore(out, tensors[0])


def forced_sdpa(backends: list[SDPBackend], heads: int, segments: Segments, *tensors: Tensor) -> Tensor:
    """`sdpa` by the first of torch's kernels that can; left to itself it takes FlashAttention-2 on every GPU."""
    with sdpa_kernel(backends, set_priority=True):
        return sdpa(heads, segments, *tensors)


# cuDNN takes no documents of a single token
sdpa_cudnn = partial(forced_sdpa, [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION])
sdpa_flash = partial(forced_sdpa, [SDPBackend.FLASH_ATTENTION])


def sdpa_missing(largest_head: int, situation: Situation) -> str | None:
    """What torch's kernels lack."""
    if not situation.whole_documents:
        return "needs whole documents on a rank"  # the mask for their ends is not among those it knows
    return kernel_missing(largest_head, 80, situation)


def flash_attn(module: str, heads: int, segments: Segments, *tensors: Tensor) -> Tensor:
    """Attention by the `flash_attn_varlen_func` of a module; its backward pass is deterministic if torch shall be."""
    q, k, v = flatten(heads, *tensors)
    out: Any = importlib.import_module(module).flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q=segments.cu_seqlens_q,
        cu_seqlens_k=segments.cu_seqlens_k,
        max_seqlen_q=segments.max_seqlen_q,
        max_seqlen_k=segments.max_seqlen_k,
        causal=True,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return restore(out if isinstance(out, Tensor) else out[0], tensors[0])


def flash_attn_missing(module: str, capability: int, situation: Situation) -> str | None:
    """What a generation of flash-attn lacks; it needs at least this compute capability, 90 for 9.0."""
    return kernel_missing(256, capability, situation) or (None if installed(module) else f"needs {module}")


def kernel_missing(largest_head: int, capability: int, situation: Situation) -> str | None:
    """What any kernel for half precision lacks."""
    if situation.device.type != "cuda":
        return "needs CUDA"
    if situation.dtype not in HALF:
        return "needs bf16 or fp16"
    major, minor = torch.cuda.get_device_capability(situation.device)
    if 10 * major + minor < capability:
        return f"needs compute capability {capability / 10:.1f}"
    if situation.head_dim is not None and (situation.head_dim % 8 or situation.head_dim > largest_head):
        return f"needs heads of at most {largest_head} channels, a multiple of 8"
    return None


def installed(module: str) -> bool:
    """Whether a module can be imported; of flash-attn, whether it is the generation that is looked for."""
    try:
        found = importlib.util.find_spec(module)
    except ModuleNotFoundError:  # of the package that should have it
        return False
    # flash-attn 4 brings a package flash_attn without the functions of flash-attn 2
    return found is not None and (module != "flash_attn" or importlib.util.find_spec("flash_attn_2_cuda") is not None)


FLASH_ATTN_BACKENDS: dict[str, tuple[Callable[..., Tensor], Callable[[Situation], str | None]]] = {
    name: (partial(flash_attn, module), partial(flash_attn_missing, module, 90 if name == "flash3" else 80))
    for name, module in FLASH_ATTN.items()
}
