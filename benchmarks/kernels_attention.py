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


def batch_first(x: Tensor) -> Tensor:
    """`[B, S, heads, D]` of `[S, B, heads, D]`, contiguous."""
    return x.transpose(0, 1).contiguous()


def same(x: Tensor) -> Tensor:
    return x


def swap(x: Tensor) -> Tensor:
    """Between `[B, S, heads, D]` and `[B, heads, S, D]`."""
    return x.transpose(1, 2)


class Inputs:
    """Queries, keys and values of all heads and the output's gradient; three heads of the results are checked."""

    def __init__(self, model: Model, lengths: list[int], device: torch.device) -> None:
        shape = model.seq_length, model.sequences
        self.model, self.lengths, self.heads, self.dim = model, lengths, model.heads, model.head_dim
        self.edges = torch.tensor([0, *lengths], device=device).cumsum(0).int()
        self.documents = document_of(lengths, model, device)
        self.packed = tensor(device, *shape, 3 * self.heads, self.dim)
        self.grad = tensor(device, *shape, self.heads, self.dim)
        self.checked = sorted({0, self.heads // 2, self.heads - 1})
        self.apart = [batch_first(x) for x in unpack(self.heads, self.packed)]
        self.grad_apart = batch_first(self.grad)

    def expected(self) -> dict[str, list[Tensor]]:
        """In fp64, of the checked heads."""
        found = [swap(x)[:, self.checked].detach().double().requires_grad_() for x in self.apart]
        out = dense(self.documents, *found)
        grads = torch.autograd.grad(out, found, swap(self.grad_apart)[:, self.checked].double())
        return {"forward": [swap(out.detach()).float()], "backward": [swap(x).float() for x in grads]}

    def chosen(self, tensors: Sequence[Tensor], view: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """The checked heads of tensors of which `view` is `[B, S, heads, D]`."""
        return [view(x)[:, :, self.checked] for x in tensors]


def ours(given: Inputs, name: str | None) -> dict[str, Run]:
    """A backend of megaflow, on the packed tensor; None: the one that `dispatch` chooses."""
    device = given.packed.device
    function = select_ops(device, torch.bfloat16, head_dim=given.dim).attention
    if name is not None:
        backend = next(backend for backend in BACKENDS if backend.name == name)
        if missing := backend.missing(Situation(device, torch.bfloat16, head_dim=given.dim)):
            raise RuntimeError(f"it {missing}")
        function = backend.function
    # all layers of a model share what the segments compute
    segments = Segments.documents(given.edges, max(given.lengths), given.model.tokens)
    return differentiable(
        partial(function, given.heads, segments),
        [given.packed],
        [given.grad],
        outputs=lambda outs: given.chosen(outs, batch_first),
        gradients=lambda grads: given.chosen(unpack(given.heads, grads[0]), batch_first),
    )


def peer(
    given: Inputs, function: Callable[..., Any], to: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor]
) -> dict[str, Run]:
    """A function of q, k and v in a layout that is a view of `[B, S, heads, D]`."""
    inputs, results = [to(x) for x in given.apart], partial(given.chosen, view=back)
    return differentiable(function, inputs, [to(given.grad_apart)], outputs=results, gradients=results)


def flat_peer(given: Inputs, function: Callable[..., Any]) -> dict[str, Run]:
    """A function of q, k and v `[T, heads, D]`."""
    shape = given.model.sequences, given.model.seq_length
    return peer(given, function, lambda x: x.flatten(0, 1), lambda x: x.unflatten(0, shape))


def sdpa(given: Inputs, backend: SDPBackend) -> dict[str, Run]:
    """One of torch's kernels, on whole sequences."""

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    return peer(given, run, swap, swap)


def varlen(given: Inputs) -> dict[str, Run]:
    """torch's flash attention over documents."""
    from torch.nn.attention.varlen import varlen_attn

    edges, longest = given.edges, max(given.lengths)
    return flat_peer(given, lambda q, k, v: varlen_attn(q, k, v, edges, edges, longest, longest, window_size=(-1, 0)))


def flex(given: Inputs) -> dict[str, Run]:
    """torch's compiled attention under a block mask, whose making is not timed."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    documents, length = given.documents, given.model.seq_length

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (documents[b, q] == documents[b, k]) & (q >= k)

    mask = create_block_mask(visible, len(documents), None, length, length, device=str(documents.device))
    function = compiled(flex_attention)
    return peer(given, lambda q, k, v: function(q, k, v, block_mask=mask), swap, swap)


def flash4(given: Inputs) -> dict[str, Run]:
    """FlashAttention-4."""
    module = importlib.import_module("flash_attn.cute")

    def first(result: Any) -> Tensor:
        out: Tensor = result[0] if isinstance(result, tuple) else result
        return out

    if len(given.lengths) == given.model.sequences:
        return peer(given, lambda q, k, v: first(module.flash_attn_func(q, k, v, causal=True)), same, same)
    longest = max(given.lengths)
    sizes = {"cu_seqlens_q": given.edges, "cu_seqlens_k": given.edges, "max_seqlen_q": longest, "max_seqlen_k": longest}
    return flat_peer(given, lambda q, k, v: first(module.flash_attn_varlen_func(q, k, v, causal=True, **sizes)))


def attention(model: Model, lengths_of: Callable[[Model], list[int]], device: torch.device) -> Problem:
    """Causal attention inside documents of the lengths."""
    given = Inputs(model, lengths_of(model), device)
    situation = Situation(device, torch.bfloat16, head_dim=model.head_dim)
    preferred = next(backend.name for backend in BACKENDS if backend.missing(situation) is None)
    whole = [
        Contender("SDPA cuDNN", partial(sdpa, given, SDPBackend.CUDNN_ATTENTION)),
        Contender("SDPA flash", partial(sdpa, given, SDPBackend.FLASH_ATTENTION)),
    ]
    return Problem(
        given.expected(),
        [
            Contender(OURS, partial(ours, given, None)),
            *(Contender(f"{OURS} {name}", partial(ours, given, name)) for name in OWN if name != preferred),
            *(whole if len(given.lengths) == model.sequences else []),
            Contender("varlen_attn", partial(varlen, given)),
            Contender("FlashAttention-4", partial(flash4, given), slow=True),
            Contender("flex_attention", partial(flex, given), slow=True),
        ],
        meta={"documents": len(given.lengths), "longest": max(given.lengths)},
    )
