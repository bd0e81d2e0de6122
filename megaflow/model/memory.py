"""What one layer holds between its forward and its backward pass, exactly, from its shape.

Counted is what the operations of `megaflow.kernels` keep: the fp32 copies of a norm and the pieces of SwiGLU are
theirs. After Korthikanti et al. (arXiv 2205.05198, section 4), whose layer has other parts.
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
    attention: Literal["varlen", "sdpa"] = "varlen",
) -> ActivationBytes:
    """The activations of one layer for `tokens = B * S / cp`, the tokens of a micro-batch on one rank.

    The input of the layer is counted, its output is not: that is the next one's input. With T tokens, R = T / tp of
    them in norms and residuals under sequence parallelism (else R = T), e bytes a number, h heads and g key-value
    heads of d channels, F the width of SwiGLU:

        norm       R (4 H + 2 e H + 4)                   fp32 input, normalised, result, scale; twice a layer
        qkv        T e (h + 2 g) d / tp
        attention  T (e (2 h + g) d + 4 h) / tp + qkv    rotated q and k, result, log-sum-exp; v is a part of qkv
        gate_up    T e 2 F / tp
        SwiGLU     T e 2 F / tp                          silu(gate) and the result

    Nothing computed again, all of these are kept; selective, 2 e R H + qkv + gate_up; full, e R H. Attention by sdpa
    keeps its result twice; varlen repeats grouped keys and values for every head, and keeps no qkv then. With cp > 1 q
    and the keys and values of up to `T (2 cp + 1) / 2` tokens, gathered from the other ranks, stand for qkv.

    The backward pass is widest at one of three places: SwiGLU; the product gate_up, whose input under sequence
    parallelism is there whole, and its gradient too; the second norm, with what it has in fp32.
    """
    element = 4 if precision == "fp32" else 2
    rows = tokens // tp if sequence_parallel else tokens
    residual = rows * config.hidden_size * element
    norm = rows * (4 * config.hidden_size + 2 * element * config.hidden_size + STATISTIC)
    shared = residual if precision == "fp32" else 0  # a norm keeps its input, or an fp32 copy
    feed_forward = tokens * config.intermediate_size * element // tp
    head = tokens * config.head_dim * element // tp
    heads, inputs = _attention_heads(config, cp, attention)
    everything = 2 * norm + heads * head + STATISTIC * tokens * config.num_heads // tp + 4 * feed_forward

    # at gate_up's product: its input, gathered, and the whole gradient of that; then this rank's part of the gradient
    product = 2 * tokens * config.hidden_size * element + residual if sequence_parallel else residual
    in_norm = rows * config.hidden_size * (12 if precision == "fp32" else 16) - 2 * feed_forward  # gate_up is gone
    if recompute == "selective":
        again = max(4 * feed_forward, norm - shared + max(product, in_norm))
        return ActivationBytes(2 * residual + inputs * head + 2 * feed_forward, residual + again)
    gradients = residual + max(2 * feed_forward, max(product, in_norm) - 2 * feed_forward)  # silu and result are gone
    if recompute == "none":
        return ActivationBytes(everything, gradients)
    return ActivationBytes(residual, everything - shared + gradients)


def _attention_heads(config: ModelConfig, cp: int, attention: str) -> tuple[int, int]:
    """Heads' widths per token that attention keeps, and those of its inputs alone."""
    heads, groups = config.num_heads, config.num_kv_heads
    keys = 2 if cp == 1 else 2 * cp + 1  # of keys and values together, for every token of the rank
    inputs = heads + keys * groups
    if attention == "varlen" and groups < heads:
        return (2 + keys) * heads, inputs
    rotated = heads + groups if cp == 1 else 0
    return inputs + rotated + (2 if attention == "sdpa" else 1) * heads, inputs
