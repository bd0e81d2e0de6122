"""Attention inside documents, by every backend that runs here, against documents one by one in fp64."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from megaflow.kernels import attention
from megaflow.kernels.attention import Segments, libraries, unpack
from megaflow.kernels.attention.flash import flash
from megaflow.kernels.backend import Situation
from megaflow.kernels.dispatch import OPERATIONS
from tests.kernels.conftest import Place
from tests.kernels.numerics import ATTENTION_LIMITS, assert_close, distance, inputs, wide

Pairs = list[tuple[int, int]]
"""Queries and keys of each segment; the queries are the end of the keys."""


def documents(*lengths: int) -> Pairs:
    return [(length, length) for length in lengths]


CASES: dict[str, tuple[Pairs, int]] = {
    "one token": (documents(1), 1),
    "one document": (documents(24), 1),
    "single tokens": (documents(1, 1, 1), 1),
    "short documents": (documents(5, 1, 18), 1),
    "equally long": (documents(12, 12), 2),
    "across blocks": (documents(30, 1, 37, 60), 2),
    "a block each": (documents(64, 64), 2),
    "ends of documents": ([(3, 3), (1, 7), (4, 9), (5, 5), (1, 60), (50, 101)], 1),
}
"""Segments, and how many sequences they lie in."""
HEADS = [(4, 4), (4, 2), (6, 1)]


def edges(pairs: Pairs, device: str) -> Segments:
    """The segments of a case."""
    queries, keys = zip(*pairs, strict=True)
    cu_q, cu_k = (torch.tensor([0, *lengths], device=device).cumsum(0).int() for lengths in (queries, keys))
    return Segments(cu_q, cu_k, max(queries), max(keys), sum(queries), sum(keys))


def expected(q: Tensor, k: Tensor, v: Tensor, pairs: Pairs) -> Tensor:
    """Segment after segment and head after head; all flat."""
    outputs, at_q, at_k = [], 0, 0
    for queries, keys in pairs:
        heads = []
        for head in range(q.shape[1]):
            shared = head * k.shape[1] // q.shape[1]
            own_k, own_v = (x[at_k : at_k + keys, shared] for x in (k, v))
            scores = q[at_q : at_q + queries, head] @ own_k.T / q.shape[-1] ** 0.5
            future = torch.ones_like(scores).triu(keys - queries + 1).bool()
            heads.append(scores.masked_fill(future, -torch.inf).softmax(-1) @ own_v)
        outputs.append(torch.stack(heads, 1))
        at_q, at_k = at_q + queries, at_k + keys
    return torch.cat(outputs)


def flat(x: Tensor) -> Tensor:
    """`[S, B, ...]`, sequence after sequence."""
    return x.transpose(0, 1).flatten(0, 1)


def tensors_of(
    pairs: Pairs, sequences: int, heads: tuple[int, int], head_dim: int, dtype: torch.dtype, device: str
) -> list[Tensor]:
    """One packed tensor where queries and keys are the same tokens, else queries and packed keys and values."""
    queries, keys = (sum(numbers) for numbers in zip(*pairs, strict=True))
    if queries == keys:
        shape = queries // sequences, sequences, heads[0] + 2 * heads[1], head_dim
        return [inputs(shape, dtype, device)]
    shapes = (queries, 1, heads[0], head_dim), (keys, 1, 2 * heads[1], head_dim)
    return [inputs(shape, dtype, device) for shape in shapes]


def check(
    backend: Any,
    pairs: Pairs,
    sequences: int,
    heads: tuple[int, int],
    head_dim: int,
    dtype: torch.dtype,
    device: str = "cpu",
) -> None:
    tensors = tensors_of(pairs, sequences, heads, head_dim, dtype, device)
    segments = edges(pairs, device)
    out = backend(heads[0], segments, *tensors)
    grad = torch.randn(out.shape).to(out)
    grads = torch.autograd.grad(out, tensors, grad)

    packed = [wide(x) for x in tensors]
    out64 = expected(*(flat(x) for x in unpack(heads[0], *packed)), pairs)
    grads64 = torch.autograd.grad(out64, packed, flat(wide(grad)))
    assert out.shape == (*tensors[0].shape[:2], heads[0], head_dim)
    assert_close(flat(out), out64, ATTENTION_LIMITS)
    for found, want in zip(unpack(heads[0], *grads), unpack(heads[0], *grads64), strict=True):
        if float(want.norm()) > 1e-9:
            assert_close(found, want, {dtype: 1.5 * limit for dtype, limit in ATTENTION_LIMITS.items()})
        else:  # of documents of one token the scores have no gradient at all
            assert float(found.detach().double().norm()) < ATTENTION_LIMITS[dtype]


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_plain_backends(backend: str, case: str, heads: tuple[int, int]) -> None:
    check(getattr(attention, backend), *CASES[case], heads, 8, torch.float32)


FLASH = [
    *((case, (2, 1), 16, dtype) for case in CASES for dtype in (torch.float32, torch.bfloat16)),
    *(("across blocks", heads, 24, torch.float16) for heads in ((2, 2), (4, 2))),
    *(("across blocks", (1, 1), head_dim, torch.bfloat16) for head_dim in (64, 80, 128, 256)),
]


@pytest.mark.parametrize(("case", "heads", "head_dim", "dtype"), FLASH)
def test_flash(place: Place, case: str, heads: tuple[int, int], head_dim: int, dtype: torch.dtype) -> None:
    if place.backend == "reference":
        pytest.skip("has tests of its own")
    check(flash, *CASES[case], heads, head_dim, dtype, place.device)


LONG = {
    "one": (documents(4096), 1),
    "of all lengths": (documents(1, 63, 64, 65, 127, 128, 129, 511, 2048, 960), 2),
    "four sequences": (documents(2048, 2048, 1000, 1048, 2048), 4),
    "odd": (documents(1023, 199, 1), 1),
    "segments": ([(512, 512), (512, 4096), (100, 101)], 1),
}


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", LONG)
@pytest.mark.parametrize("backend", [backend.name for backend in OPERATIONS["attention"]])
def test_every_backend_in_full(backend: str, case: str, dtype: torch.dtype, head_dim: int) -> None:
    chosen = next(found for found in OPERATIONS["attention"] if found.name == backend)
    whole = all(queries == keys for queries, keys in LONG[case][0])
    if missing := chosen.missing(Situation(torch.device("cuda"), dtype, head_dim, whole_documents=whole)):
        pytest.skip(missing)
    check(chosen.function, *LONG[case], (4, 2), head_dim, dtype, "cuda")


def test_scores_of_ten_thousand(place: Place) -> None:
    """One weight is 1, or two that are nearly equal share it: fp32 tells scores so large apart to a thousandth."""
    (packed,) = tensors_of(documents(20, 50), 1, (1, 1), 16, torch.float32, place.device)
    large = (packed.detach() * 50).requires_grad_()
    out = place.op("attention")(1, edges(documents(20, 50), place.device), large)
    (grad,) = torch.autograd.grad(out, large, torch.ones_like(out))
    wanted = expected(*(flat(x) for x in unpack(1, wide(large))), documents(20, 50))
    assert distance(flat(out), wanted) < 5e-3
    assert grad.isfinite().all()


def test_gradients_have_equal_bits_every_time(place: Place) -> None:
    pairs, sequences = CASES["across blocks"]
    (packed,) = tensors_of(pairs, sequences, (2, 1), 16, torch.bfloat16, place.device)
    runs = []
    for _ in range(2):
        out = place.op("attention")(2, edges(pairs, place.device), packed)
        runs.append((out, *torch.autograd.grad(out, packed, torch.ones_like(out))))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("case", CASES)
def test_what_a_query_sees_and_what_sees_a_key(case: str) -> None:
    pairs, _ = CASES[case]
    segments = edges(pairs, "cpu")
    visible, at_q, at_k = torch.zeros(segments.queries, segments.keys, dtype=torch.bool), 0, 0
    for queries, keys in pairs:
        visible[at_q : at_q + queries, at_k : at_k + keys] = torch.ones(queries, keys).tril(keys - queries).bool()
        at_q, at_k = at_q + queries, at_k + keys
    key, query = torch.arange(segments.keys), torch.arange(segments.queries)
    begin, end = segments.seen[:, :, None]
    assert torch.equal((begin <= key) & (key < end), visible)
    begin, end = segments.seen_by[:, :, None]
    assert torch.equal((begin <= query) & (query < end), visible.T)
    for ends in (*segments.seen, *segments.seen_by):
        assert (ends.diff() >= 0).all()


@pytest.mark.parametrize(("new", "old"), [(1, 0), (1, 6), (5, 0), (3, 4)])
def test_cached_attention_is_the_end_of_the_whole(new: int, old: int) -> None:
    q, k, v = (torch.randn(old + new, n, 8) for n in (4, 2, 2))
    whole = expected(q.double(), k.double(), v.double(), documents(old + new))
    assert_close(attention.cached_attention(q[old:], k, v), whole[old:])


def varlen_by_reference(q: Tensor, k: Tensor, v: Tensor, **settings: Any) -> tuple[Tensor, None]:
    """In the place of flash-attn's function, as its generations 3 and 4 return it."""
    assert settings.pop("causal") is True
    assert settings.pop("deterministic") is False
    assert set(settings) == {"cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"}
    segments = Segments(**settings, queries=len(q), keys=len(k))
    out = attention.reference(q.shape[1], segments, q[:, None], torch.cat((k, v), dim=1)[:, None])
    return out[:, 0], None


@pytest.mark.parametrize("case", ["across blocks", "ends of documents"])
def test_what_flash_attn_is_called_with(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("flash_attn_interface")
    module.flash_attn_varlen_func = varlen_by_reference  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn_interface", module)
    backend, _ = libraries.FLASH_ATTN_BACKENDS["flash3"]
    check(backend, *CASES[case], (4, 2), 8, torch.float32)


def test_flash_attn_of_another_generation_is_not_taken_for_the_second(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name == "flash_attn" else None)
    assert not libraries.installed("flash_attn")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert libraries.installed("flash_attn")
