"""The elementwise operations of `kernels.py`: norms, rotary embedding, SwiGLU, and the embedding's gradient."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from benchmarks import kernels_floors as floors
from benchmarks.kernels_floors import Work
from benchmarks.kernels_problem import (
    OURS,
    Contender,
    Model,
    Problem,
    Run,
    compiled,
    differentiable,
    expect,
    liger,
    tensor,
)
from megaflow.kernels.dispatch import select_ops
from megaflow.kernels.rotary import rotary_tables

EPS, THETA = 1e-5, 10000.0


def plain_norm(x: Tensor, weight: Tensor) -> Tensor:
    """As transformers' LLaMA computes it."""
    wide = x.float() if x.dtype != torch.float64 else x
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)).to(x.dtype)


def plain_added_norm(x: Tensor, delta: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = x + delta
    return total, plain_norm(total, weight)


def rms_norm(model: Model, device: torch.device) -> Problem:
    """x `[S, B, H]` and a weight `[H]`."""
    ops = select_ops(device, torch.bfloat16)
    x, grad = (tensor(device, model.seq_length, model.sequences, model.hidden) for _ in range(2))
    inputs = x, 1 + tensor(device, model.hidden, scale=0.1)

    def quack() -> dict[str, Run]:
        norm = importlib.import_module("quack").rmsnorm
        return differentiable(lambda x, weight: norm(x, weight, eps=EPS), inputs, [grad])

    def by_liger() -> dict[str, Run]:
        norm = liger("LigerRMSNormFunction").apply
        return differentiable(lambda x, weight: norm(x, weight, EPS, 0.0, "llama", False), inputs, [grad])

    def by_torch() -> dict[str, Run]:
        return differentiable(lambda x, weight: F.rms_norm(x, weight.shape, weight, EPS), inputs, [grad])

    return Problem(
        expect(plain_norm, inputs, [grad]),
        [
            Contender(OURS, lambda: differentiable(lambda x, w: ops.rms_norm(x, None, w, EPS)[1], inputs, [grad])),
            Contender("F.rms_norm", by_torch),
            Contender("Liger", by_liger),
            Contender("torch eager", lambda: differentiable(plain_norm, inputs, [grad])),
            Contender("QuACK", quack, slow=True),
            Contender("torch.compile", lambda: differentiable(compiled(plain_norm), inputs, [grad]), slow=True),
        ],
    )


def added_rms_norm(model: Model, device: torch.device) -> Problem:
    """x and what is added to it `[S, B, H]`, and a weight `[H]`; both sum and norm have gradients."""
    ops = select_ops(device, torch.bfloat16)
    shape = model.seq_length, model.sequences, model.hidden
    inputs = tensor(device, *shape), tensor(device, *shape), 1 + tensor(device, model.hidden, scale=0.1)
    grads = [tensor(device, *shape) for _ in range(2)]

    def reverse(results: Any) -> Sequence[Tensor]:
        return results[1], results[0]

    def quack() -> dict[str, Run]:
        norm = importlib.import_module("quack").rmsnorm

        def added(x: Tensor, delta: Tensor, weight: Tensor) -> Any:
            return norm(x, weight, residual=delta, eps=EPS, prenorm=True)

        return differentiable(added, inputs, grads[::-1], outputs=reverse)

    def by_liger() -> dict[str, Run]:
        norm = liger("LigerFusedAddRMSNormFunction").apply

        def added(x: Tensor, delta: Tensor, weight: Tensor) -> Any:
            return norm(x, delta, weight, EPS, 0.0, "llama", False)

        return differentiable(added, inputs, grads[::-1], outputs=reverse)

    def by_torch(x: Tensor, delta: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        total = x + delta
        return total, F.rms_norm(total, weight.shape, weight, EPS)

    return Problem(
        expect(plain_added_norm, inputs, grads),
        [
            Contender(OURS, lambda: differentiable(lambda x, d, w: ops.rms_norm(x, d, w, EPS), inputs, grads)),
            Contender("F.rms_norm", lambda: differentiable(by_torch, inputs, grads)),
            Contender("Liger", by_liger),
            Contender("torch eager", lambda: differentiable(plain_added_norm, inputs, grads)),
            Contender("QuACK", quack, slow=True),
            Contender("torch.compile", lambda: differentiable(compiled(plain_added_norm), inputs, grads), slow=True),
        ],
    )


def plain_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """As transformers' LLaMA computes it, of `[B, heads, S, D]`; cos, sin: `[S, D]`."""

    def turned(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat((-second, first), dim=-1) * sin

    return turned(q), turned(k)


def rotary(model: Model, device: torch.device) -> Problem:
    """Queries and keys of one document per sequence: ours side by side with values `[S, B, 3 H]`, others' apart."""
    ops = select_ops(device, torch.bfloat16)
    positions = torch.arange(model.seq_length, device=device)
    cos, sin = rotary_tables(positions[:, None].expand(-1, model.sequences), model.head_dim, THETA)
    packed, grad = (tensor(device, model.seq_length, model.sequences, 3 * model.hidden) for _ in range(2))
    wide_tables = [torch.cat((table[:, 0], table[:, 0]), dim=-1) for table in (cos, sin)]
    tables = [table.bfloat16() for table in wide_tables]

    def apart(x: Tensor) -> list[Tensor]:
        """q and k `[B, heads, S, D]`, each contiguous as `[B, S, heads, D]`."""
        pair = x.unflatten(-1, (3, model.heads, model.head_dim)).unbind(2)[:2]
        return [part.transpose(0, 1).contiguous().transpose(1, 2) for part in pair]

    def ours() -> dict[str, Run]:
        x, g, heads = packed.clone(), grad.clone(), 2 * model.heads
        leaf = packed.clone().requires_grad_()
        kept = leaf * 1
        edge = get_gradient_edge(kept)
        out = ops.rotary(kept, heads, cos, sin)
        return {
            "forward": Run(lambda: ops.rotary(x, heads, cos, sin), apart, lambda: x.copy_(packed)),
            "backward": Run(
                lambda: torch.autograd.grad(out, edge, g, retain_graph=True)[0],
                apart,
                lambda: g.copy_(grad),
            ),
        }

    def plain(rotate: Callable[..., Any]) -> dict[str, Run]:
        return differentiable(lambda q, k: rotate(q, k, *tables), apart(packed), apart(grad))

    def by_liger() -> dict[str, Run]:
        rotate = liger("LigerRopeFunction").apply
        q, k = apart(packed)  # it turns them in place, as ours does
        grads = apart(grad)
        runs = differentiable(lambda q, k: rotate(q, k, tables[0][None], tables[1][None]), [q, k], grads)

        def again(tensors: list[Tensor], source: Tensor) -> None:
            for x, fresh in zip(tensors, apart(source), strict=True):
                x.data.copy_(fresh)

        leaves = [q, k]
        return {
            "forward": runs["forward"]._replace(prepare=lambda: again(leaves, packed)),
            "backward": runs["backward"]._replace(prepare=lambda: again(grads, grad)),
        }

    q, k = apart(packed)
    return Problem(
        expect(lambda q, k: plain_rotary(q, k, *(table.double() for table in wide_tables)), [q, k], apart(grad)),
        [
            Contender(OURS, ours),
            Contender("Liger", by_liger),
            Contender("torch eager", lambda: plain(plain_rotary)),
            Contender("torch.compile", lambda: plain(compiled(plain_rotary)), slow=True),
        ],
    )


def plain_swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def swiglu(model: Model, device: torch.device) -> Problem:
    """Gate and up side by side, `[S, B, 2 F]`; Liger's apart."""
    ops = select_ops(device, torch.bfloat16)
    gate_up = tensor(device, model.seq_length, model.sequences, 2 * model.intermediate)
    grad = tensor(device, model.seq_length, model.sequences, model.intermediate)

    def by_liger() -> dict[str, Run]:
        function = liger("LigerSiLUMulFunction").apply
        parts = [part.contiguous() for part in gate_up.chunk(2, dim=-1)]
        copies = [part.clone() for part in parts]

        def again() -> None:  # its backward pass writes over its inputs
            for part, copy in zip(parts, copies, strict=True):
                part.data.copy_(copy)

        def joined(grads: Any) -> Sequence[Tensor]:
            return [torch.cat(list(grads), dim=-1)]

        return differentiable(lambda a, b: function(a, b), parts, [grad], gradients=joined, prepare=again)

    return Problem(
        expect(plain_swiglu, [gate_up], [grad]),
        [
            Contender(OURS, lambda: differentiable(ops.swiglu, [gate_up], [grad])),
            Contender("Liger", by_liger),
            Contender("torch eager", lambda: differentiable(plain_swiglu, [gate_up], [grad])),
            Contender("torch.compile", lambda: differentiable(compiled(plain_swiglu), [gate_up], [grad]), slow=True),
        ],
    )


def embedding(model: Model, device: torch.device, vocabulary: int) -> Problem:
    """The gradient of a weight `[V, H]` from that of its rows; tokens as frequent as words are (Zipf)."""
    ops = select_ops(device, torch.bfloat16)
    shares = 1 / (torch.arange(vocabulary, device=device) + 2.7)
    tokens = torch.multinomial(shares, model.tokens, replacement=True).view(model.seq_length, model.sequences)
    weight, grad = tensor(device, vocabulary, model.hidden), tensor(device, *tokens.shape, model.hidden)
    wanted = torch.zeros(vocabulary, model.hidden, dtype=torch.float64, device=device)
    wanted.index_add_(0, tokens.flatten(), grad.flatten(0, 1).double())

    def backward(function: Callable[[Tensor], Tensor]) -> dict[str, Run]:
        return {"backward": differentiable(function, [weight], [grad])["backward"]}

    return Problem(
        {"backward": [wanted.float()]},
        [
            Contender(OURS, lambda: backward(lambda weight: ops.embedding(tokens, weight, None))),
            Contender("torch eager", lambda: backward(lambda weight: F.embedding(tokens, weight))),
        ],
        limit=2e-2,
        meta={"most frequent token": int(tokens.flatten().bincount().max())},
    )


def works(model: Model, vocabulary: int) -> dict[str, dict[str, Work]]:
    """Of the problems here."""
    return {
        "rms_norm": floors.rms_norm(model.tokens, model.hidden, residual=False),
        "rms_norm, residual": floors.rms_norm(model.tokens, model.hidden, residual=True),
        "rotary in place": floors.rotary(model.tokens, model.hidden),
        "swiglu": floors.swiglu(model.tokens, model.intermediate),
        "embedding": floors.embedding(model.tokens, model.hidden, vocabulary),
    }
