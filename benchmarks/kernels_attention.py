"""Causal attention, one document per sequence and packed documents, for `kernels.py`."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.kernels_problem import OURS, Contender, Model, Problem, Run, compiled, differentiable, tensor
from megaflow.kernels.attention import BACKENDS, Segments, unpack
from megaflow.kernels.backend import Situation
from megaflow.kernels.dispatch import select_ops

MEAN_DOCUMENT = 1000
"""Tokens of a document in the mean, of a window of 4096; lengths are log-normal."""
OWN = ("triton", "hopper")
"""Backends that are megaflow's own kernels."""


def whole_sequences(model: Model) -> list[int]:
    """Lengths of the documents: one to a sequence."""
    return [model.seq_length] * model.sequences


def packed_documents(model: Model) -> list[int]:
    """Lengths of documents one behind the other, cut where a sequence ends; the same every time."""
    generator = torch.Generator().manual_seed(1)
    sigma = 1.0
    mean = MEAN_DOCUMENT * model.seq_length / 4096
    lengths: list[int] = []
    for _ in range(model.sequences):
        left = model.seq_length
        while left:
            drawn = math.exp(math.log(mean) - sigma**2 / 2 + sigma * float(torch.randn((), generator=generator)))
            lengths.append(min(max(int(drawn), 1), left))
            left -= lengths[-1]
    return lengths


def document_of(lengths: Sequence[int], model: Model, device: torch.device) -> Tensor:
    """The number of every token's document, `[B, S]`."""
    numbers = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    return numbers.view(model.sequences, model.seq_length).to(device, torch.int32)


def dense(documents: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of `[B, heads, S, D]` with an explicit mask."""
    position = torch.arange(q.shape[2], device=q.device)
    visible = (documents[:, :, None] == documents[:, None, :]) & (position[:, None] >= position)
    scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
    return scores.masked_fill_(~visible[:, None], float("-inf")).softmax(-1) @ v


def attention(model: Model, lengths_of: Callable[[Model], list[int]], device: torch.device) -> Problem:
    """Queries, keys and values of all heads; three heads are checked."""
    lengths = lengths_of(model)
    heads, dim, rows, length = model.heads, model.head_dim, model.sequences, model.seq_length
    whole = len(lengths) == rows
    situation = Situation(device, torch.bfloat16, head_dim=dim)
    edges = torch.tensor([0, *lengths], device=device).cumsum(0).int()
    documents = document_of(lengths, model, device)
    packed = tensor(device, length, rows, 3 * heads, dim)
    grad = tensor(device, length, rows, heads, dim)
    checked = sorted({0, heads // 2, heads - 1})

    def batch(x: Tensor) -> Tensor:
        """`[B, S, heads, D]` of `[S, B, heads, D]`, contiguous."""
        return x.transpose(0, 1).contiguous()

    apart = [batch(x) for x in unpack(heads, packed)]
    grad_apart = batch(grad)

    def ours(name: str | None) -> dict[str, Run]:
        backends = {backend.name: backend for backend in BACKENDS}
        function = select_ops(device, torch.bfloat16, head_dim=dim).attention
        if name is not None:
            if missing := backends[name].missing(situation):
                raise RuntimeError(f"it {missing}")
            function = backends[name].function

        segments = Segments.documents(edges, max(lengths), model.tokens)  # all layers share what it computes
        return differentiable(
            partial(function, heads, segments),
            [packed],
            [grad],
            outputs=lambda outs: [batch(outs[0])[:, :, checked]],
            gradients=lambda grads: [batch(x)[:, :, checked] for x in unpack(heads, grads[0])],
        )

    def chosen(tensors: Sequence[Tensor], view: Callable[[Tensor], Tensor]) -> list[Tensor]:
        return [view(x)[:, :, checked] for x in tensors]

    def peer(function: Callable[..., Any], to: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor]) -> Any:
        """A function of q, k and v in a layout that is a view of `[B, S, heads, D]`."""
        inputs, results = [to(x) for x in apart], partial(chosen, view=back)
        return differentiable(function, inputs, [to(grad_apart)], outputs=results, gradients=results)

    def flat(x: Tensor) -> Tensor:
        return x.flatten(0, 1)

    def unflat(x: Tensor) -> Tensor:
        return x.unflatten(0, (rows, length))

    def swap(x: Tensor) -> Tensor:
        return x.transpose(1, 2)

    def sdpa(backend: SDPBackend) -> dict[str, Run]:
        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True)

        return peer(run, swap, swap)

    def varlen() -> dict[str, Run]:
        from torch.nn.attention.varlen import varlen_attn

        def run(q: Tensor, k: Tensor, v: Tensor) -> Any:
            return varlen_attn(q, k, v, edges, edges, max(lengths), max(lengths), window_size=(-1, 0))

        return peer(run, flat, unflat)

    def flex() -> dict[str, Run]:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return (documents[b, q] == documents[b, k]) & (q >= k)

        mask = create_block_mask(visible, rows, None, length, length, device=str(device))
        function = compiled(flex_attention)
        return peer(lambda q, k, v: function(q, k, v, block_mask=mask), swap, swap)

    def flash4() -> dict[str, Run]:
        module = importlib.import_module("flash_attn.cute")

        def first(result: Any) -> Tensor:
            out: Tensor = result[0] if isinstance(result, tuple) else result
            return out

        if whole:
            return peer(lambda q, k, v: first(module.flash_attn_func(q, k, v, causal=True)), batch_of, batch_of)
        sizes = {"cu_seqlens_q": edges, "cu_seqlens_k": edges, "max_seqlen_q": max(lengths)}
        sizes["max_seqlen_k"] = max(lengths)
        return peer(lambda q, k, v: first(module.flash_attn_varlen_func(q, k, v, causal=True, **sizes)), flat, unflat)

    def batch_of(x: Tensor) -> Tensor:
        return x

    found = [swap(x)[:, checked].detach().double().requires_grad_() for x in apart]
    out = dense(documents, *found)
    grads = torch.autograd.grad(out, found, swap(grad_apart)[:, checked].double())
    expected = {
        "forward": [swap(out.detach()).float()],
        "backward": [swap(x).float() for x in grads],
    }
    del out, grads
    preferred = next(b.name for b in BACKENDS if b.missing(situation) is None)
    peers = [
        Contender("SDPA cuDNN", partial(sdpa, SDPBackend.CUDNN_ATTENTION)),
        Contender("SDPA flash", partial(sdpa, SDPBackend.FLASH_ATTENTION)),
    ]
    return Problem(
        expected,
        [
            Contender(OURS, partial(ours, None)),
            *(Contender(f"{OURS} {name}", partial(ours, name)) for name in OWN if name != preferred),
            *(peers if whole else []),
            Contender("varlen_attn", varlen),
            Contender("FlashAttention-4", flash4, slow=True),
            Contender("flex_attention", flex, slow=True),
        ],
        meta={"documents": len(lengths), "longest": max(lengths)},
    )
