"""What one layer holds between its forward and its backward pass, exactly, from its shape.

Counted is what the operations of `megaflow.kernels` keep. After Korthikanti et al. (arXiv 2205.05198, section 4), whose
layer has other parts.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from megaflow.config import ModelConfig

STATISTIC = 4
"""Bytes of an fp32 number of a row: the scale of a norm, the log-sum-exp of a head."""


class ActivationBytes(NamedTuple):
    """Bytes on one rank, for one layer and one micro-batch."""

    kept: int
    """From the forward pass to the backward pass: once for every layer and micro-batch under way."""
    working: int
    """What the backward pass of the layer needs beside them at its widest point: tensors computed again and gradients
    of activations, its output's among them, not of weights. Once for the rank. Valid where F is at least 2 H."""


def activation_bytes(
    config: ModelConfig,
    tokens: int,
    *,
    tp: int = 1,
    sequence_parallel: bool = False,
    cp: int = 1,
    recompute: Literal["none", "selective", "full"] = "none",
    precision: Literal["fp32", "bf16"] = "bf16",
    attention: Literal["triton", "sdpa"] = "triton",
) -> ActivationBytes:
    """The activations of one layer for `tokens = B * S / cp`, the tokens of a micro-batch on one rank.

    The input of the layer is counted, its output is not: that is the next one's input. With T tokens, R = T / tp of
    them in norms and residuals under sequence parallelism (else R = T), e bytes a number, h heads and g key-value
    heads of d channels, F the width of SwiGLU:

        norm       R (2 e H + 4)                         sum and normalised sum, scale; twice a layer
        qkv        T e (h + 2 g) d / tp                  rotated in place
        attention  T (e h d + 4 h) / tp                  result, log-sum-exp
        gate_up    T e 2 F / tp
        SwiGLU     T e F / tp

    Nothing computed again, all of these are kept; selective, R (2 e H + 8) + qkv + gate_up; full, R (e H + 4). With
    cp > 1 q and the keys and values of up to `T (2 cp + 1) / 2` tokens, gathered from the other ranks, stand for qkv,
    and attention by sdpa keeps its result twice.

    The backward pass is widest in SwiGLU or in the product gate_up, whose input under sequence parallelism is there
    whole, and its gradient too.
    """
    element = 4 if precision == "fp32" else 2
    rows = tokens // tp if sequence_parallel else tokens
    residual = rows * config.hidden_size * element
    scales = 2 * rows * STATISTIC
    feed_forward = tokens * config.intermediate_size * element // tp
    head = tokens * config.head_dim * element // tp
    groups = config.num_kv_heads * (2 if cp == 1 else 2 * cp + 1)  # of keys and values together
    inputs = (config.num_heads + groups) * head
    results = config.num_heads * (2 if attention == "sdpa" and cp > 1 else 1) * head
    results += STATISTIC * tokens * config.num_heads // tp
    everything = 4 * residual + scales + inputs + results + 3 * feed_forward

    # at gate_up's product: its input, gathered, and the whole gradient of that; then this rank's part of the gradient
    product = 2 * tokens * config.hidden_size * element + residual if sequence_parallel else residual
    if recompute == "selective":
        again = max(3 * feed_forward, residual + product)
        return ActivationBytes(2 * residual + scales + inputs + 2 * feed_forward, residual + again)
    gradients = residual + max(2 * feed_forward, product - feed_forward)
    if recompute == "none":
        return ActivationBytes(everything, gradients)
    return ActivationBytes(residual + scales // 2, everything - residual - scales // 2 + gradients)
