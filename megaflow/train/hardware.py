"""Peak arithmetic rate of the device, for model FLOP utilisation."""

from __future__ import annotations

import re
import time

import torch

# dense bf16 tensor-core peaks of the data sheets, TFLOP/s; the first that stands in the device's name counts
DATA_SHEET_TFLOPS = [
    ("B200", 2250.0),
    ("H200", 989.0),
    ("H100 PCIe", 756.0),
    ("H100 NVL", 835.0),
    ("H100", 989.0),
    ("A100", 312.0),
    ("L40S", 362.0),
    ("L4", 121.0),
    ("RTX 4090", 165.0),
]


def peak_tflops(device: torch.device, dtype: torch.dtype, given: float | None) -> tuple[float, str]:
    """The peak of one device in TFLOP/s and its name: given in the config, of the data sheet, or a measured matmul."""
    if given is not None:
        return given, "train.peak_tflops"
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        for model, peak in DATA_SHEET_TFLOPS:
            if re.search(rf"\b{model}\b", name):
                return peak, f"{name} data sheet, bf16 dense"
    return measured_matmul(
        device, dtype
    ), f"matmul measured on this {device.type} in {str(dtype).removeprefix('torch.')}"


def measured_matmul(device: torch.device, dtype: torch.dtype) -> float:
    """TFLOP/s of the best of twenty square matrix products."""
    size = 8192 if device.type == "cuda" else 768
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(20):
        start = time.perf_counter()
        product = a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    del product
    return 2 * size**3 / best / 1e12
