"""Collectives of the cut layers: as few as can be, and started before the products that they can hide under."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric_memory
import torch.multiprocessing as multiprocessing
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megaflow.config import ModelConfig
from megaflow.config_parallel import ParallelConfig
from megaflow.errors import UserError
from megaflow.kernels import blocks
from megaflow.kernels.dispatch import select_ops
from megaflow.model.init import initialise
from megaflow.model.llama import Llama
from megaflow.model.recompute import Recompute, recompute_layers
from megaflow.parallel import collectives, symmetric
from megaflow.parallel.layers import ColumnParallelLinear, DeferredGradients, RowParallelLinear
from megaflow.parallel.mesh import ParallelContext
from tests.distributed import run_ranks
from tests.tiny import make_batch, tiny_config, tiny_model

NAMES = {
    "aten.mm.default": "product",
    "aten.silu.default": "silu",
    "aten.mm.out": "product of the loss",
    "aten.addmm.out": "product of the loss",
}


class Events(TorchDispatchMode):
    """What one of two tensor-parallel ranks does, alone: the other's parts are like its own."""

    def __init__(self) -> None:
        super().__init__()
        self.log: list[str] = []
        """Products and SwiGLU's silu, and where each collective is started and waited for."""
        self.sizes: list[int] = []
        """Numbers in the whole tensor of each collective."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if str(func) in NAMES:
            self.log.append(NAMES[str(func)])
        return func(*args, **(kwargs or {}))

    def all_gather(self, out: Tensor, x: Tensor, **_: Any) -> Work:
        out.view(-1, *x.shape).copy_(x.expand(2, *x.shape))
        return Work(self, "all_gather", out)

    def reduce_scatter(self, out: Tensor, x: Tensor, **_: Any) -> Work:
        out.copy_(x[: len(out)])
        return Work(self, "reduce_scatter", x)

    def all_reduce(self, x: Tensor, **_: Any) -> Work:
        return Work(self, "all_reduce", x)

    def of_losses(self, outs: list[Tensor], x: Tensor, **_: Any) -> None:
        for out in outs:
            out.copy_(x)
        self.log.append("start losses")

    def count(self) -> Counter[str]:
        """Collectives so far."""
        return Counter(event.removeprefix("start ") for event in self.log if event.startswith("start "))


class Work:
    """A collective under way."""

    def __init__(self, events: Events, name: str, whole: Tensor) -> None:
        self.events, self.name = events, name
        events.log.append(f"start {name}")
        events.sizes.append(whole.numel())

    def wait(self) -> None:
        self.events.log.append(f"wait {self.name}")


class Group:
    """Stands for the two ranks."""

    def size(self) -> int:
        return 2


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> Iterator[Events]:
    found = Events()
    monkeypatch.setattr(collectives, "all_gather", found.all_gather)
    monkeypatch.setattr(collectives, "reduce_scatter", found.reduce_scatter)
    monkeypatch.setattr(dist, "all_reduce", found.all_reduce)
    monkeypatch.setattr(dist, "all_gather", found.of_losses)
    with found:
        yield found


def context(sequence_parallel: bool) -> ParallelContext:
    groups = {"tp": cast(dist.ProcessGroup, Group())}
    return ParallelContext(torch.device("cpu"), tp=2, sequence_parallel=sequence_parallel, groups=groups)


ORDER = {
    ("column", False): (
        ["product"],
        ["product", "start all_reduce", "product", "wait all_reduce"],
    ),
    ("column", True): (
        ["start all_gather", "wait all_gather", "product"],
        [
            *("start all_gather", "product", "start reduce_scatter"),
            *("wait all_gather", "product", "wait reduce_scatter"),
        ],
    ),
    ("row", False): (
        ["product", "start all_reduce", "wait all_reduce"],
        ["product", "product"],
    ),
    ("row", True): (
        ["product", "start reduce_scatter", "wait reduce_scatter"],
        ["start all_gather", "wait all_gather", "product", "product"],
    ),
}
"""Kind of layer and sequence parallelism: the events of the forward and of the backward pass."""


@pytest.mark.parametrize(("kind", "sequence_parallel"), ORDER)
def test_collectives_are_under_products(kind: str, sequence_parallel: bool, events: Events) -> None:
    make = ColumnParallelLinear if kind == "column" else RowParallelLinear
    layer = make(8, 12, context(sequence_parallel), torch.float32, DeferredGradients())
    out = layer(torch.randn(4, 3, 8 if kind == "column" else 4, requires_grad=True))
    forward = list(events.log)
    events.log.clear()
    out.backward(torch.ones_like(out))
    assert (forward, events.log) == ORDER[kind, sequence_parallel]


def test_activations_are_made_again_under_the_gather_of_a_gradient(events: Events) -> None:
    model = tiny_model(tiny_config(num_layers=1), context(sequence_parallel=True))
    recompute_layers(model.layers, "selective", 1)
    objective = model.loss(make_batch([[16]], torch.Generator().manual_seed(0))).objective
    events.log.clear()
    objective.backward()
    silu = events.log.index("silu")
    assert events.log[silu - 1] == "start all_gather"
    assert events.log[silu + 1] == "wait all_gather"


@pytest.mark.parametrize(("sequence_parallel", "reduce"), [(False, "all_reduce"), (True, "reduce_scatter")])
def test_the_gradient_of_the_loss_is_summed_under_a_product(
    sequence_parallel: bool, reduce: str, events: Events, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last one of the last block of tokens; it is waited for in the backward pass."""
    monkeypatch.setattr(blocks, "BLOCK_BYTES", {"cpu": 1, "cuda": 1})
    model = tiny_model(tiny_config(num_layers=1), context(sequence_parallel))
    objective = model.loss(make_batch([[256]], torch.Generator().manual_seed(0))).objective
    block = ["product of the loss", "start losses", "product of the loss"]
    assert events.log[-9:] == [*block, "product of the loss", *block, f"start {reduce}", "product of the loss"]
    events.log.clear()
    objective.backward()
    assert events.log[0] == f"wait {reduce}"


FEWEST: dict[tuple[bool, str], tuple[dict[str, int], dict[str, int]]] = {
    (False, "none"): ({"all_reduce": 2}, {"all_reduce": 2}),
    (False, "selective"): ({"all_reduce": 2}, {"all_reduce": 2}),
    # out's sum again; that of down goes into no tensor that is made again
    (False, "full"): ({"all_reduce": 2}, {"all_reduce": 3}),
    # backward, the gradients of two outputs and, because only parts are kept, two inputs once more
    (True, "none"): ({"all_gather": 2, "reduce_scatter": 2}, {"all_gather": 4, "reduce_scatter": 2}),
    (True, "selective"): ({"all_gather": 2, "reduce_scatter": 2}, {"all_gather": 4, "reduce_scatter": 2}),
    (True, "full"): ({"all_gather": 2, "reduce_scatter": 2}, {"all_gather": 6, "reduce_scatter": 3}),
}
"""Sequence parallelism and recomputation: the collectives of a layer and micro-batch, forward and backward (Shoeybi et
al., arXiv 1909.08053; Korthikanti et al., arXiv 2205.05198)."""
ENDS = {
    False: ({"all_reduce": 2, "losses": 1}, {}),
    True: ({"reduce_scatter": 2, "all_gather": 1, "losses": 1}, {"all_gather": 1}),
}
"""Those of embedding, head and losses; the head's gradients are computed in its forward pass."""


@pytest.mark.parametrize("deferred", [False, True])
@pytest.mark.parametrize(("sequence_parallel", "kind"), FEWEST)
def test_no_collective_too_many(sequence_parallel: bool, kind: Recompute, deferred: bool, events: Events) -> None:
    layers = 3
    config = tiny_config(num_layers=layers)
    model = tiny_model(config, context(sequence_parallel))
    recompute_layers(model.layers, kind, 1)
    objective = model.loss(make_batch([[16], [5, 11]], torch.Generator().manual_seed(0))).objective
    forward = events.count()
    if deferred:
        with model.deferred.collect() as jobs:
            objective.backward()
        for job in jobs:
            job.run()
    else:
        objective.backward()

    def expected(direction: int) -> Counter[str]:
        of_layer, ends = FEWEST[sequence_parallel, kind][direction], ENDS[sequence_parallel][direction]
        return Counter({name: layers * of_layer.get(name, 0) + ends.get(name, 0) for name in of_layer | ends})

    assert forward == expected(0)
    assert events.count() - forward == expected(1)
    assert set(events.sizes) == {2 * 16 * config.hidden_size}


def fused_on_rank() -> tuple[list[float], Counter[str]]:
    """Deviation of losses and gradients on fused products from the plain path, and how often each was called."""
    calls: Counter[str] = Counter()

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return function(*args, **kwargs)

        return call

    library = torch.library.Library("symm_mem", "IMPL")
    for name in symmetric.OPS:  # what torch ships to say what the ops compute
        library.impl(name, counted(name, getattr(symmetric_memory, f"_{name}_fallback")), "CPU")
    ctx = ParallelContext.create(ParallelConfig(tp=2, sequence_parallel=True), "cpu")
    batch = make_batch([[16], [5, 11]], torch.Generator().manual_seed(0))
    plain, fused = (found(tiny_model(ctx=c), batch) for c in (ctx, replace(ctx, symmetric_memory=True)))
    return [float((a - b).norm() / b.norm()) for a, b in zip(fused, plain, strict=True)], calls


def found(model: Llama, batch: Any) -> list[Tensor]:
    objective, losses = model.loss(batch)
    return [losses, *torch.autograd.grad(objective, list(model.parameters()))]


def test_fused_products_compute_the_same() -> None:
    for deviations, calls in run_ranks(2, fused_on_rank):
        assert max(deviations) < 1e-5
        assert calls == {"fused_all_gather_matmul": 4, "fused_matmul_reduce_scatter": 4}  # two layers


def test_fused_products_are_refused_where_they_cannot_be() -> None:
    def create() -> str:
        settings = ParallelConfig(tp=2, sequence_parallel=True, symmetric_memory=True)
        with pytest.raises(UserError) as error:
            ParallelContext.create(settings, "cpu")
        return str(error.value)

    for message in run_ranks(2, create):
        assert message.startswith("parallel.symmetric_memory true: here it needs ")
    with pytest.raises(ValueError, match="symmetric_memory true without sequence_parallel"):
        ParallelConfig(tp=2, symmetric_memory=True)


@pytest.mark.parametrize(
    ("cuda", "gpus", "unreachable", "reason"),
    [
        (False, 0, None, "needs CUDA"),
        (True, 2, None, "needs 4 GPUs on one machine, 2 seen"),
        (True, 4, (1, 3), "needs NVLink between all GPUs, and GPU 1 cannot reach the memory of GPU 3"),
        (True, 4, None, None),
    ],
)
def test_says_why_products_cannot_be_fused(
    cuda: bool, gpus: int, unreachable: tuple[int, int] | None, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda a, b: (a, b) != unreachable)
    assert symmetric.missing(4) == reason


def fused_on_gpu(rank: int, config: ModelConfig, store: Path) -> None:
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", init_method=store.as_uri(), rank=rank, world_size=2, device_id=device)
    ctx = ParallelContext.create(ParallelConfig(tp=2, sequence_parallel=True, symmetric_memory=True), device)
    batch = make_batch([[256], [100, 156]], torch.Generator().manual_seed(0)).to(device)
    results = []
    for context in (ctx, replace(ctx, symmetric_memory=False)):
        model = Llama(config, context, select_ops(device, torch.bfloat16), torch.bfloat16)
        initialise(model, seed=7)
        results.append(found(model, batch))
    for fused, plain in zip(*results, strict=True):
        assert float((fused.float() - plain.float()).norm() / plain.float().norm()) < 2e-2
    dist.destroy_process_group()


@pytest.mark.gpu
def test_fused_products_compute_the_same_on_gpus(tmp_path: Path) -> None:
    if missing := symmetric.missing(2):
        pytest.skip(missing)
    config = tiny_config(hidden_size=256, intermediate_size=512)
    multiprocessing.spawn(fused_on_gpu, (config, tmp_path / "store"), nprocs=2)
