"""Cross-entropy in place, its objective, and the output projection fused with it; whole and over shards."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megaflow.kernels import backend, blocks, cross_entropy, linear_cross_entropy
from megaflow.kernels.cross_entropy import IGNORED, Loss, Objective, Vocabulary
from tests.kernels.conftest import Place
from tests.kernels.numerics import LIMITS, assert_close, distance, inputs, wide

OBJECTIVES = [Objective(), Objective(z_loss=1e-2), Objective(label_smoothing=0.1), Objective(0.2, 1e-3)]


def expected(logits: Tensor, labels: Tensor, objective: Objective) -> Loss:
    """In plain mathematics, of logits without padding."""
    counted = labels != IGNORED
    loss = F.cross_entropy(logits, labels.long(), reduction="none", ignore_index=IGNORED)
    aim = F.cross_entropy(
        logits, labels.long(), reduction="none", ignore_index=IGNORED, label_smoothing=objective.label_smoothing
    )
    return Loss(aim + objective.z_loss * logits.logsumexp(-1).square() * counted, loss)


def labels_of(rows: int, size: int, device: str) -> Tensor:
    """Some of them ignored."""
    labels = torch.randint(size, (rows,), dtype=torch.int32).to(device)
    labels[::3] = IGNORED
    return labels


def in_place(place: Place) -> Any:
    return cross_entropy.fused if place.backend == "triton" else cross_entropy.reference


def check(place: Place, rows: int, size: int, columns: int, dtype: torch.dtype, objective: Objective) -> None:
    logits, labels = inputs((rows, columns), dtype, place.device, 4.0).detach(), labels_of(rows, size, place.device)
    wide64 = wide(logits[:, :size]).requires_grad_()
    wanted = expected(wide64, labels, objective)
    (wanted_grad,) = torch.autograd.grad(wanted.objective.sum(), wide64)

    given, vocabulary = logits.clone(), Vocabulary(0, size)
    alone = in_place(place)(given, labels, vocabulary, objective, False)
    assert torch.equal(given, logits)
    found = in_place(place)(given, labels, vocabulary, objective, True)
    for one, other, want in zip(found, alone, wanted, strict=True):
        assert one.dtype == torch.float32
        assert torch.equal(one, other)
        assert_close(one, want)
        assert not one[::3].any()
    assert_close(given[:, :size], wanted_grad)
    assert not given[:, size:].any()
    assert not given[::3].any()


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize(("size", "columns"), [(10, 10), (11, 16), (200, 264)])
def test_cross_entropy(place: Place, size: int, columns: int, dtype: torch.dtype, objective: Objective) -> None:
    check(place, 9, size, columns, dtype, objective)


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("cached", [4, 3 * 16])
def test_in_blocks(place: Place, cached: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of rows on a CPU, of columns on a GPU."""
    monkeypatch.setattr(backend, "CACHED_NUMBERS", cached)
    monkeypatch.setattr(cross_entropy, "BLOCK", 16)
    check(place, 9, 75, 80, dtype, Objective(0.1, 1e-3))


@pytest.mark.gpu
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize(("rows", "size"), [(1023, 32000), (199, 55296), (1, 49953)])
def test_cross_entropy_in_full(rows: int, size: int, dtype: torch.dtype, objective: Objective) -> None:
    check(Place("triton", "cuda"), rows, size, -(-size // 128) * 128, dtype, objective)


@pytest.mark.gpu
def test_more_logits_than_32_bits_can_count() -> None:
    rows, size = 65536, 55296
    logits = torch.zeros(rows, size, dtype=torch.bfloat16, device="cuda")
    labels = torch.full((rows,), IGNORED, device="cuda")
    labels[-1] = 5
    losses = cross_entropy.fused(logits, labels, Vocabulary(0, size), Objective(), True)
    assert_close(losses.loss[-1:], torch.full((1,), size, dtype=torch.float64).log())
    assert float(logits[-1, 5]) == pytest.approx(-1.0)
    assert not logits[:-1].any()


@pytest.mark.parametrize("scale", [1e4, 1e-4])
def test_extreme_logits_are_finite(place: Place, scale: float) -> None:
    logits, labels = torch.randn(5, 12, device=place.device) * scale, torch.arange(5, device=place.device)
    wanted = expected(logits.double(), labels, Objective())
    found = in_place(place)(logits, labels, Vocabulary(0, 12), Objective(), True)
    assert_close(found.loss, wanted.loss)
    assert logits.isfinite().all()


def test_ignored_tokens_only(place: Place) -> None:
    logits, labels = torch.randn(4, 12, device=place.device), torch.full((4,), IGNORED, device=place.device)
    found = in_place(place)(logits, labels, Vocabulary(0, 12), Objective(0.1, 1e-2), True)
    assert not found.objective.any()
    assert not found.loss.any()
    assert not logits.any()


class Group:
    """Ranks that compute one after the other: the first time each one's statistics are taken, the second time given."""

    def __init__(self, size: int) -> None:
        self.statistics: list[Tensor] = []
        self.ranks = size

    def size(self) -> int:
        return self.ranks

    def all_gather(self, shards: list[Tensor], own: Tensor, group: Any) -> None:
        if len(self.statistics) < self.ranks:
            self.statistics.append(own.clone())
            return
        for shard, statistics in zip(shards, self.statistics, strict=True):
            shard.copy_(statistics)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("size", [40, 33, 17])
def test_over_shards(place: Place, size: int, objective: Objective, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of which the last ones may be padding in part or, in the third case, altogether."""
    rows, ranks, width = 7, 5, 8
    logits, labels = torch.randn(rows, ranks * width, device=place.device) * 3, labels_of(rows, size, place.device)
    wide64 = wide(logits[:, :size]).requires_grad_()
    wanted = expected(wide64, labels, objective)
    (wanted_grad,) = torch.autograd.grad(wanted.objective.sum(), wide64)
    group = Group(ranks)
    monkeypatch.setattr(dist, "all_gather", group.all_gather)
    for last in (False, True):
        parts = [part.clone() for part in logits.split(width, dim=1)]
        for rank, part in enumerate(parts):
            vocabulary = Vocabulary(rank * width, size, cast(dist.ProcessGroup, group))
            found = in_place(place)(part, labels, vocabulary, objective, last)
            if last:
                for one, want in zip(found, wanted, strict=True):
                    assert_close(one, want)
    gradient = torch.cat(parts, dim=1)
    assert_close(gradient[:, :size], wanted_grad)
    assert not gradient[:, size:].any()


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("rows", [1, 128, 300])
def test_linear_cross_entropy(place: Place, rows: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """In up to three blocks, the last one shorter."""
    monkeypatch.setattr(blocks, "BLOCK_BYTES", {"cpu": 1, "cuda": 1})
    check_linear(place, rows, 64, 40, 37, dtype, 1.0)


def check_linear(
    place: Place, rows: int, hidden: int, columns: int, size: int, dtype: torch.dtype, factor: float
) -> None:
    objective = Objective(0.1, 1e-3)
    x, weight = inputs((rows, hidden), dtype, place.device), inputs((columns, hidden), dtype, place.device, 0.2)
    labels = labels_of(rows, size, place.device)
    labels[0] = 3
    taken: list[Tensor] = []
    op = place.op("linear_cross_entropy")
    total = op(x, weight, labels, Vocabulary(0, size), objective, taken.append)
    (factor * total.objective).backward()

    x64, weight64 = wide(x), wide(weight)
    wanted = expected(x64 @ weight64[:size].T, labels, objective)
    (factor * wanted.objective.sum()).backward()
    assert x64.grad is not None
    assert weight64.grad is not None
    assert weight.grad is None
    assert taken[0].dtype == torch.float32
    # a block's logits and their gradient are rounded to the dtype: two roundings more than of a result
    limits = {dtype: 3 * limit for dtype, limit in LIMITS.items()}
    assert distance(total.objective, wanted.objective.sum()) < limits[dtype]
    assert distance(total.losses, wanted.loss) < limits[dtype]
    assert x.grad is not None
    assert_close(x.grad, x64.grad, limits)
    assert distance(taken[0], weight64.grad) < limits[dtype]
    assert not taken[0][size:].any()


@pytest.mark.gpu
@pytest.mark.parametrize("size", [32000, 55296])
def test_linear_cross_entropy_in_full(size: int) -> None:
    check_linear(Place("triton", "cuda"), 5000, 4096, size, size, torch.bfloat16, 1.0)


@pytest.mark.parametrize("factor", [0.25, 1.0])
def test_gradients_are_scaled_by_that_of_the_objective(place: Place, factor: float) -> None:
    check_linear(place, 30, 16, 12, 12, torch.float32, factor)


def test_autograd_has_the_gradient_of_the_weight_that_nobody_takes(place: Place) -> None:
    x, weight = inputs((5, 16), torch.float32, place.device), inputs((12, 16), torch.float32, place.device)
    labels = torch.arange(5, device=place.device)
    total = place.op("linear_cross_entropy")(x, weight, labels, Vocabulary(0, 12), Objective())
    found = torch.autograd.grad(total.objective, (x, weight))
    x64, weight64 = wide(x), wide(weight)
    wanted = torch.autograd.grad(F.cross_entropy(x64 @ weight64.T, labels, reduction="sum"), (x64, weight64))
    for one, want in zip(found, wanted, strict=True):
        assert_close(one, want)
    assert not total.losses.requires_grad


def test_no_gradient_is_computed_that_nobody_wants(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_cross_entropy, "_add_product", lambda *_: pytest.fail("a gradient of the weight"))
    x, weight = inputs((5, 16), torch.float32, place.device), inputs((12, 16), torch.float32, place.device)
    with torch.no_grad():
        total = place.op("linear_cross_entropy")(
            x, weight, torch.arange(5, device=place.device), Vocabulary(0, 12), Objective()
        )
    assert not total.objective.requires_grad
    logits = x.detach() @ weight.detach().T
    assert torch.allclose(total.losses, F.cross_entropy(logits, torch.arange(5, device=place.device), reduction="none"))
