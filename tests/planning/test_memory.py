"""The predicted memory of a rank against the storages that a real one holds, item by item."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import pytest
import torch

from megaflow.config import ModelConfig, OptimConfig
from megaflow.config_parallel import ParallelConfig
from megaflow.data.loader import cut_batch
from megaflow.kernels import backend
from megaflow.kernels.dispatch import select_ops
from megaflow.model.chunks import chunks_of
from megaflow.model.init import initialise
from megaflow.model.llama import Llama
from megaflow.model.recompute import recompute_layers
from megaflow.optim.adamw import AdamW
from megaflow.parallel.gradients import GradientBuffer
from megaflow.parallel.mesh import ParallelContext
from megaflow.parallel.parameters import FlatParameters
from megaflow.parallel.runner import Pipeline, _Step
from megaflow.planning.layout import Job, Layout, Recompute
from megaflow.planning.memory import RankMemory, memory
from tests.distributed import run_ranks
from tests.live_bytes import LiveBytes
from tests.tiny import make_batch

MODEL = ModelConfig(
    hidden_size=32,
    intermediate_size=96,
    num_layers=4,
    num_heads=8,
    num_kv_heads=8,
    vocab_size=250,
)
SEQ_LENGTH, MICRO_BATCHES = 32, 4
STEPS = 3
"""Of which the least counts: gloo's threads keep a tensor a moment longer than it is waited for."""
Precision = Literal["fp32", "bf16"]


class Held(NamedTuple):
    """Bytes that a rank really holds, named as in `RankMemory`."""

    weights: int
    master: int
    gradients: int
    moments: int
    kept: int
    """Activations and the gradients of the loss, at the start of a backward pass: the most."""
    peak: int
    """Activations, working memory and the gradients of the loss together at their most."""


def measure(settings: dict[str, Any], precision: Precision, recompute: Recompute, micro_batch: int) -> Held:
    """Steps of a real rank, followed storage by storage."""
    parallel = ParallelConfig.model_validate(settings)
    ctx = ParallelContext.create(parallel, "cpu")
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    chunks = chunks_of(MODEL, parallel, SEQ_LENGTH, ctx.pp_rank)
    model = Llama(MODEL, ctx, select_ops("cpu", dtype), dtype, chunks)
    initialise(model, seed=3)
    recompute_layers(model.layers, recompute, 1)
    parameters = FlatParameters(model, parallel)
    gradients = GradientBuffer(parameters, ctx, parallel)
    optimizer = AdamW(OptimConfig(lr=1e-3), parameters, gradients)
    own = {t.untyped_storage().data_ptr() for t in optimizer.master} - {parameters.flat.untyped_storage().data_ptr()}
    generator = torch.Generator().manual_seed(ctx.dp_rank)
    batches = [make_batch([[SEQ_LENGTH]] * micro_batch, generator, 250) for _ in range(MICRO_BATCHES)]
    batches = [cut_batch(batch, ctx.cp, ctx.cp_rank) for batch in batches]
    kept, peaks = [0] * STEPS, [0] * STEPS
    backward = _Step._backward

    def watched(step: _Step, *args: Any, **kwargs: Any) -> None:
        kept[number] = max(kept[number], live.now)
        backward(step, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, LiveBytes() as live:
        patch.setattr(_Step, "_backward", watched)
        patch.setattr(backend, "CACHED_NUMBERS", 512)  # a CPU's norms work in blocks, here small beside the tensors
        pipeline = Pipeline(model, parallel)
        for number in range(STEPS):
            gradients.zero()
            live.peak = live.now
            pipeline.train(batches, gradients)
            peaks[number] = live.peak
            gradients.finish()
    return Held(
        weights=parameters.flat.nbytes,
        master=sum(t.nbytes for t in optimizer.master) if own else 0,
        gradients=gradients.flat.nbytes,
        moments=sum(t.nbytes for t in (*optimizer.exp_avg, *optimizer.exp_avg_sq)),
        kept=min(kept),
        # a CPU multiplies fp32 copies of a block's logits and of its input, a GPU does not
        peak=min(peaks) - (4 * SEQ_LENGTH * (256 + MODEL.hidden_size) if precision == "bf16" else 0),
    )


CASES = {
    "bf16, full": (1, {}, "bf16", "full", 1),
    "tp, sp, zero": (4, {"tp": 2, "sequence_parallel": True}, "fp32", "none", 1),
    "pp, not zero": (4, {"pp": 2, "zero": False}, "fp32", "selective", 1),
    "interleaved": (2, {"pp": 2, "schedule": "interleaved"}, "fp32", "none", 1),
    "zb_v": (2, {"pp": 2, "schedule": "zb_v"}, "fp32", "none", 1),
    "cp, zero": (2, {"cp": 2}, "fp32", "none", 1),
}


def predicted(
    world: int,
    settings: dict[str, Any],
    precision: Precision,
    recompute: Recompute,
    micro_batch: int,
    exact: bool = True,
) -> list[RankMemory]:
    """What the planner says of every pipeline stage."""
    parallel = ParallelConfig.model_validate(settings)
    layout = Layout(
        world,
        parallel.tp,
        parallel.sequence_parallel,
        parallel.cp,
        parallel.pp,
        parallel.schedule,
        parallel.chunks_per_rank,
        micro_batch,
        recompute,
        zero=parallel.zero,
    )
    batch = MICRO_BATCHES * layout.dp * micro_batch
    return memory(Job(MODEL, SEQ_LENGTH, batch, precision, attention="sdpa"), layout, exact)


@pytest.mark.parametrize("name", CASES)
def test_prediction_is_what_a_rank_holds(name: str) -> None:
    world, *case = CASES[name]
    real: list[Held] = run_ranks(world, measure, *case)
    stages = predicted(world, *case)
    for stage, rank in enumerate(stages):
        held = real[stage * world // len(stages)]
        for item in ("weights", "master", "gradients", "moments"):  # but for the padding of buckets
            assert getattr(rank, item) == pytest.approx(getattr(held, item), rel=0.01), item
        kept = rank.activations + rank.loss + rank.messages
        assert kept == pytest.approx(held.kept, rel=0.05)
        assert kept + rank.working == pytest.approx(held.peak, rel=0.05)
        assert rank.total == pytest.approx(sum(held) - held.kept, rel=0.05)


@pytest.mark.parametrize(
    ("summed", "sent", "bytes_each"), [("fp32", "fp32", 0), ("fp32", "bf16", 2), ("bf16", "fp32", 4)]
)
def test_gradients_that_are_sent_in_another_dtype_are_counted(summed: Any, sent: Any, bytes_each: int) -> None:
    job = Job(MODEL, SEQ_LENGTH, 2, grad_reduce=sent, bucket_mib=1, gradients=summed)
    (rank,) = memory(job, Layout(2))
    assert rank.buckets == 2 * bytes_each * min(2**18, rank.weights // 2)
    (alone,) = memory(job, Layout(1))
    assert alone.buckets == 0


def test_bounds_are_no_less_than_the_exact_count() -> None:
    for world, *case in CASES.values():
        settings, precision, recompute, micro_batch = case
        exact = predicted(world, settings, precision, recompute, micro_batch)
        bounds = predicted(world, settings, precision, recompute, micro_batch, exact=False)
        for one, bound in zip(exact, bounds, strict=True):
            assert one.total <= bound.total <= 1.25 * one.total
