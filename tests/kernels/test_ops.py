"""Every operation against plain mathematics in fp64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megaflow.kernels import attention, cross_entropy, norm, rotary, swiglu

LIMITS = {torch.float32: 2e-6, torch.bfloat16: 3.5e-3}


def distance(out: torch.Tensor, expected: torch.Tensor) -> float:
    return float((out.detach().double() - expected.detach()).norm() / expected.detach().norm())


def close(out: torch.Tensor, expected: torch.Tensor) -> bool:
    return distance(out, expected) < LIMITS[out.dtype]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("shape", [(1, 8), (3, 5, 40), (199, 56)])
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = (torch.randn(shape) * 3).to(dtype)
    weight = torch.rand(shape[-1]).to(dtype)
    wide = x.double()
    expected = wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    assert close(norm.reference(x, weight, 1e-5), expected)


@pytest.mark.parametrize("dtype", LIMITS)
def test_swiglu(dtype: torch.dtype) -> None:
    gate_up = torch.randn(7, 2 * 12).to(dtype)
    gate, up = gate_up.double().chunk(2, -1)
    assert distance(swiglu.reference(gate_up), gate * torch.sigmoid(gate) * up) < 2 * LIMITS[dtype]


def test_rotary_turns_pairs_by_their_angle() -> None:
    positions = torch.tensor([0, 1, 2, 0, 4095])
    q, k = torch.randn(5, 4, 16), torch.randn(5, 2, 16)
    angles = positions[:, None].double() * 10000.0 ** (-torch.arange(8).double() / 8)
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]
    for x, out in zip((q, k), rotary.reference(q, k, *rotary.rotary_tables(positions, 16, 10000.0)), strict=True):
        turned = torch.complex(x[..., :8].double(), x[..., 8:].double()) * turn
        assert distance(out, torch.cat((turned.real, turned.imag), -1)) < 5e-5  # fp32 angles of up to 4095 radians


def test_rotary_scores_depend_on_distance_only() -> None:
    q, k = torch.randn(1, 1, 16), torch.randn(1, 1, 16)

    def score(at: int, to: int) -> float:
        rows = [rotary.rotary_tables(torch.tensor([position]), 16, 10000.0) for position in (at, to)]
        return float((rotary.reference(q, k, *rows[0])[0] * rotary.reference(q, k, *rows[1])[1]).sum())

    assert score(9, 4) == pytest.approx(score(25, 20), rel=1e-4)
    assert score(9, 4) != pytest.approx(score(9, 5), rel=1e-2)


DOCUMENTS = [[1], [24], [1, 1, 1], [5, 1, 18], [2] * 12, [16, 8]]


def separate_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """Each document on its own, in fp64, with the heads one by one."""
    outputs = []
    for a, b, c in zip(q.double().split(lengths), k.double().split(lengths), v.double().split(lengths), strict=True):
        heads = []
        for head in range(q.shape[1]):
            shared = head * k.shape[1] // q.shape[1]
            scores = a[:, head] @ b[:, shared].T / q.shape[-1] ** 0.5
            future = torch.ones_like(scores).triu(1).bool()
            heads.append(scores.masked_fill(future, -torch.inf).softmax(-1) @ c[:, shared])
        outputs.append(torch.stack(heads, 1))
    return torch.cat(outputs)


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("lengths", DOCUMENTS)
@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_attention_stays_inside_documents(backend: str, lengths: list[int], heads: tuple[int, int]) -> None:
    total = sum(lengths)
    inputs = [torch.randn(total, n, 8, requires_grad=True) for n in (heads[0], heads[1], heads[1])]
    edges = torch.tensor([0, *lengths]).cumsum(0).int()
    weight = torch.randn(total, heads[0], 8)

    out = getattr(attention, backend)(*inputs, edges, edges, max(lengths), max(lengths))
    grads = torch.autograd.grad((out * weight).sum(), inputs)
    expected = separate_attention(*inputs, lengths)
    expected_grads = torch.autograd.grad((expected * weight).sum(), inputs)

    assert close(out, expected)
    for grad, want in zip(grads, expected_grads, strict=True):
        # with documents of one token the scores have no gradient at all
        assert float((grad - want).norm()) < 5e-6 * (1 + float(want.norm()))


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
@pytest.mark.parametrize("lengths", DOCUMENTS)
def test_varlen_attention(lengths: list[int], heads: tuple[int, int]) -> None:
    inputs = [
        torch.randn(sum(lengths), n, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for n in (heads[0], heads[1], heads[1])
    ]
    edges = torch.tensor([0, *lengths], device="cuda").cumsum(0).int()
    out = attention.varlen(*inputs, edges, edges, max(lengths), max(lengths))
    grads = torch.autograd.grad(out.float().square().sum(), inputs)
    expected = separate_attention(*inputs, lengths)
    expected_grads = torch.autograd.grad(expected.square().sum(), inputs)
    assert distance(out, expected) < 3.5e-3
    for grad, want in zip(grads, expected_grads, strict=True):
        assert float((grad.double() - want).norm()) < 1e-2 * (1 + float(want.norm()))


SEGMENTS = [
    [(3, 3)],
    [(1, 7), (4, 9), (5, 5)],
    [(1, 1), (1, 2), (6, 7), (8, 8), (2, 20)],
]
"""Queries and keys; the queries are the end of the keys."""


def separate_segments(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pairs: list[tuple[int, int]]) -> torch.Tensor:
    """The ends of documents whose other queries are nobody's."""
    outputs, at_q, at_k = [], 0, 0
    for queries, keys in pairs:
        own, whole = slice(at_q, at_q + queries), slice(at_k, at_k + keys)
        others = q.new_zeros(keys - queries, *q.shape[1:])
        outputs.append(separate_attention(torch.cat((others, q[own])), k[whole], v[whole], [keys])[keys - queries :])
        at_q, at_k = at_q + queries, at_k + keys
    return torch.cat(outputs)


def segment_edges(pairs: list[tuple[int, int]], device: str = "cpu") -> list[torch.Tensor]:
    """Edges of queries and of keys."""
    return [torch.tensor([0, *lengths], device=device).cumsum(0).int() for lengths in zip(*pairs, strict=True)]


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("pairs", SEGMENTS)
@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_attention_of_segments_that_end_their_keys(
    backend: str, pairs: list[tuple[int, int]], heads: tuple[int, int]
) -> None:
    longest = max(pair[0] for pair in pairs), max(pair[1] for pair in pairs)
    edges = segment_edges(pairs)
    queries, keys = (int(edge[-1]) for edge in edges)
    shapes = (queries, heads[0], 8), (keys, heads[1], 8), (keys, heads[1], 8)
    inputs = [torch.randn(shape, requires_grad=True) for shape in shapes]
    weight = torch.randn(queries, heads[0], 8)

    out = getattr(attention, backend)(*inputs, *edges, *longest)
    grads = torch.autograd.grad((out * weight).sum(), inputs)
    expected = separate_segments(*inputs, pairs)
    expected_grads = torch.autograd.grad((expected * weight).sum(), inputs)

    assert close(out, expected)
    for grad, want in zip(grads, expected_grads, strict=True):
        assert float((grad - want).norm()) < 5e-6 * (1 + float(want.norm()))


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
@pytest.mark.parametrize("pairs", SEGMENTS)
def test_varlen_attention_of_segments(pairs: list[tuple[int, int]], heads: tuple[int, int]) -> None:
    longest = max(pair[0] for pair in pairs), max(pair[1] for pair in pairs)
    edges = segment_edges(pairs, "cuda")
    queries, keys = (int(edge[-1]) for edge in edges)
    shapes = (queries, heads[0], 64), (keys, heads[1], 64), (keys, heads[1], 64)
    inputs = [torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True) for shape in shapes]
    out = attention.varlen(*inputs, *edges, *longest)
    grads = torch.autograd.grad(out.float().square().sum(), inputs)
    expected = separate_segments(*inputs, pairs)
    expected_grads = torch.autograd.grad(expected.square().sum(), inputs)
    assert distance(out, expected) < 3.5e-3
    for grad, want in zip(grads, expected_grads, strict=True):
        assert float((grad.double() - want).norm()) < 1e-2 * (1 + float(want.norm()))


@pytest.mark.parametrize(("new", "old"), [(1, 0), (1, 6), (5, 0), (3, 4)])
def test_cached_attention_is_the_end_of_the_whole(new: int, old: int) -> None:
    q, k, v = (torch.randn(old + new, n, 8) for n in (4, 2, 2))
    whole = separate_attention(q, k, v, [old + new])
    assert close(attention.cached_attention(q[old:], k, v), whole[old:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("width", "valid"), [(10, 10), (16, 11)])
@pytest.mark.parametrize("cached", [4, 3 * 16, 2**18])
def test_cross_entropy(
    width: int, valid: int, dtype: torch.dtype, cached: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cross_entropy, "CACHED_LOGITS", cached)
    logits = (torch.randn(9, width) * 4).to(dtype).requires_grad_()
    labels = torch.randint(valid, (9,))
    labels[::3] = -100
    weight = torch.rand(9)

    wide = logits.detach().double()[:, :valid].requires_grad_()
    expected = F.cross_entropy(wide, labels, reduction="none")
    (expected_grad,) = torch.autograd.grad((expected * weight).sum(), wide)
    losses = cross_entropy.reference(logits, labels, 0, valid)
    (grad,) = torch.autograd.grad((losses * weight).sum(), logits)

    assert losses.dtype == torch.float32
    assert close(losses, expected.detach())
    assert distance(grad[:, :valid], expected_grad) < LIMITS[dtype]
    assert not grad[:, valid:].any()
    assert not losses[::3].any()
    assert not grad[::3].any()


@pytest.mark.parametrize("scale", [1e4, 1e-4])
def test_cross_entropy_of_extreme_logits_is_finite(scale: float) -> None:
    logits = (torch.randn(5, 12) * scale).requires_grad_()
    losses = cross_entropy.reference(logits, torch.arange(5), 0, 12)
    losses.sum().backward()
    assert losses.isfinite().all()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_cross_entropy_of_ignored_tokens_only() -> None:
    logits = torch.randn(4, 12, requires_grad=True)
    losses = cross_entropy.reference(logits, torch.full((4,), -100), 0, 12)
    losses.sum().backward()
    assert not losses.any()
    assert logits.grad is not None
    assert not logits.grad.any()
