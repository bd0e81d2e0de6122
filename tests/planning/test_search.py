"""The search: what is legal, what is fastest, how it adds up."""

from __future__ import annotations

import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megaflow.config import ModelConfig
from megaflow.config_load import load_config
from megaflow.parallel.schedule import make_schedule
from megaflow.planning import step as planning_step
from megaflow.planning.cluster import GPUS, Cluster
from megaflow.planning.layout import Job, Layout
from megaflow.planning.memory import RESERVED, memory, rank_parameters
from megaflow.planning.pipeline import simulated
from megaflow.planning.published import LLAMA2_7B, LLAMA2_70B
from megaflow.planning.search import REFINED, Wanted, legal, search
from megaflow.planning.step import StepModel
from megaflow.planning.volumes import volumes
from megaflow.planning.work import Practice, Workload

JOB = Job(LLAMA2_7B, 4096, 64)
CLUSTER = Cluster(GPUS["h100"], 16)


def step(layout: Layout, job: Job = JOB, gpu: str = "h100", practice: Practice | None = None) -> float:
    return StepModel(job, Cluster(GPUS[gpu], layout.gpus), practice or Practice()).estimate(layout).seconds


def test_every_layout_is_legal() -> None:
    found = list(legal(JOB, CLUSTER, Wanted()))
    assert len(found) == len(set(found)) > 500
    for layout in found:
        assert layout.tp * layout.cp * layout.pp * layout.dp == 16
        assert layout.micro_batches(JOB) * layout.dp * layout.micro_batch == 64
        make_schedule(layout.schedule, layout.pp, layout.micro_batches(JOB), layout.chunks)
        assert sum(held.layers for held in layout.held(JOB)) == 32
    assert {layout.schedule for layout in found} == {"1f1b", "interleaved", "zb_h1", "zb_v"}


CHATFLOW = Path(__file__).parents[2] / "configs" / "chatflow-7b.yaml"


@pytest.mark.parametrize(
    "own",
    [
        [],
        [
            "parallel.pp=2",
            "parallel.schedule=interleaved",
            "parallel.chunks=3",
            "parallel.layers_per_chunk=[5,5,5,5,5,7]",
        ],
        ["parallel.zero=false", "parallel.symmetric_memory=true", "train.recompute=full", "train.recompute_interval=2"],
    ],
)
def test_the_trainer_takes_every_layout_as_the_overrides_say(own: list[str]) -> None:
    """Whatever layout the config has itself."""
    config = load_config(CHATFLOW, own, files=False)
    found = list(legal(Job.of(config), CLUSTER, Wanted(zero=config.parallel.zero)))
    for layout in random.Random(3).sample(found, 40):
        other = load_config(CHATFLOW, own + layout.overrides(config), files=False)
        assert other.check_world(16) == layout.dp
        assert Layout.of(other, 16) == layout
        assert layout.overrides(other) == []


def test_what_does_not_fit_is_counted_exactly() -> None:
    """The bound of the memory alone would refuse some that fit."""
    cluster, wanted = Cluster(GPUS["a100-40"], 8, node=8), Wanted(micro_batch=8, recompute="full")
    room = cluster.gpu.memory - RESERVED
    found = search(JOB, cluster, 1, wanted)
    layouts = list(legal(JOB, cluster, wanted))
    sizes = [max(rank.total for rank in memory(JOB, layout)) for layout in layouts]
    assert found.fitting == sum(size <= room for size in sizes)
    assert found.too_large == sum(size > room for size in sizes) > 0
    bounds = [max(rank.total for rank in memory(JOB, layout, exact=False)) for layout in layouts]
    assert any(size <= room < bound for size, bound in zip(sizes, bounds, strict=True))
    assert found.nearest is None


def test_the_best_fit_and_are_in_order() -> None:
    job, cluster = Job(LLAMA2_70B, 4096, 64), Cluster(GPUS["h100"], 32)
    found = search(job, cluster, 5, Wanted(micro_batch=1))
    times = [plan.step.seconds for plan in found.best]
    assert times == sorted(times)
    assert len(times) == 5
    for plan in found.best:
        assert plan.memory <= cluster.gpu.memory - RESERVED
        assert plan.layout.micro_batch == 1
        assert sum(plan.step.parts.values()) == pytest.approx(plan.step.seconds, rel=1e-6)
        assert plan.step.tokens * 32 * plan.step.seconds == pytest.approx(job.tokens)
        assert 0.2 < plan.step.mfu < 0.7


def test_nothing_fits_and_the_nearest_is_named() -> None:
    found = search(Job(LLAMA2_70B, 4096, 8), Cluster(GPUS["rtx4090"], 8), 3, Wanted(recompute="full"))
    assert (found.best, found.fitting) == ([], 0)
    assert found.too_large > 10
    assert found.nearest is not None
    assert found.nearest.memory > GPUS["rtx4090"].memory - RESERVED


def test_only_the_best_are_simulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of thousands of layouts; those that closed formulas do not cover come to a few."""
    calls = []

    def counted(*args: Any) -> Any:
        calls.append(args)
        return simulated(*args)

    monkeypatch.setattr(planning_step, "simulated", counted)
    found = search(Job(LLAMA2_70B, 4096, 2048), Cluster(GPUS["h100"], 1024), 4, Wanted(micro_batch=1))
    assert found.best[0].layout.gpus == 1024
    assert found.fitting + found.too_large > 1000
    assert len(calls) < 100 + REFINED * 4


def test_parameters_of_all_ranks_are_those_of_the_model() -> None:
    padded = ModelConfig(**(LLAMA2_7B.model_dump() | {"vocab_size": 31999, "tie_embeddings": True}))
    for model, embeddings in ((LLAMA2_7B, 2), (padded, 2)):  # tied: the last stage has a copy
        layers = 32 * (4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096)
        layout = Layout(8, tp=2, pp=4)
        counts = rank_parameters(Job(model, 4096, 8), layout)
        norms = (2 * 32 + 1) * 4096
        assert 2 * sum(counts) == layers + norms - 32 * 2 * 4096 + embeddings * 32000 * 4096 + norms
    one = rank_parameters(Job(padded, 4096, 8), Layout(4, pp=4, schedule="zb_v", chunks=2))
    assert sum(one) == layers + 4096 + 32000 * 4096  # first and last chunk on one rank


def test_what_costs_time() -> None:
    """Directions that must hold whatever the efficiencies."""
    base = Layout(16, tp=8, sequence_parallel=True, micro_batch=1)
    assert step(base, gpu="h800") > step(base)
    assert step(base, gpu="a100") > 2 * step(base)
    assert step(replace(base, recompute="selective")) > step(base)
    assert step(replace(base, recompute="full")) > step(replace(base, recompute="selective"))
    assert step(base, practice=Practice(overlaps_tensor=True)) < step(base)
    pipeline = Layout(16, pp=8, micro_batch=1)
    assert step(replace(pipeline, schedule="zb_h1")) < step(pipeline)
    assert step(replace(pipeline, schedule="interleaved", chunks=2)) < step(pipeline)
    both = replace(base, tp=4, pp=2)  # a split backward has nothing to run its collectives under
    one, split = (StepModel(JOB, CLUSTER, Practice()).estimate(cut) for cut in (both, replace(both, schedule="zb_h1")))
    assert split.parts["tensor parallel"] > 1.2 * one.parts["tensor parallel"]
    slow = replace(CLUSTER.gpu, network=CLUSTER.gpu.network / 100)
    data = Layout(16, micro_batch=4)
    times = [StepModel(JOB, replace(CLUSTER, gpu=gpu), Practice()).estimate(data) for gpu in (CLUSTER.gpu, slow)]
    assert times[1].parts["gradients"] > 10 * times[0].parts["gradients"]
    sharded, whole = (StepModel(JOB, CLUSTER, Practice()).estimate(replace(data, zero=zero)) for zero in (True, False))
    assert whole.parts["update"] == pytest.approx(16 * sharded.parts["update"])
    assert whole.parts["update"] > 0.05


def test_an_all_reduce_has_one_product_to_run_under() -> None:
    """Without sequence parallelism; with it a reduce-scatter and an all-gather have one each."""
    base = Layout(8, tp=8)
    slow = replace(CLUSTER.gpu, link=CLUSTER.gpu.link / 4)
    exposed = {}
    for sp in (False, True):
        work = Workload(JOB, replace(base, sequence_parallel=sp), Cluster(slow, 8))
        collective = work._collective()
        compute = [work._product(4096, size / 8, gathers=True).forward.matmul for size in (3 * 4096, 2 * 11008)]
        assert all(collective > seconds for seconds in compute)
        wanted = sum(2 * collective - (2 if sp else 1) * seconds for seconds in compute)
        exposed[sp] = work.layer(recomputed=False).backward_input.tensor
        assert exposed[sp] == pytest.approx(wanted + (2 * collective if sp else 0))  # rows gather the gradient
    assert exposed[False] < exposed[True]


def test_volumes() -> None:
    sent = volumes(JOB, Layout(16, tp=2, sequence_parallel=True, pp=2, micro_batch=2))
    residual = 2 * 4096 * 4096 * 2
    assert sent["tensor parallel"] == 8 * 16 * 10 * residual / 2
    assert sent["pipeline"] == 8 * 2 * 1 / 2 * residual / 2
    held = max(rank_parameters(JOB, Layout(16, tp=2, pp=2)))
    assert sent["gradients"] == pytest.approx(4 * held * 3 / 4)
    assert sent["parameters"] == pytest.approx(2 * held * 3 / 4)
    assert sent["context parallel"] == 0
    cut = Layout(16, cp=2, micro_batch=2)
    keys = 2 * 2 * 4096 * 4096 * 2 / 2  # both, half of them from the other rank
    assert volumes(JOB, cut)["context parallel"] == 4 * 32 * 2 * keys
    again = replace(cut, recompute="full", recompute_interval=2)
    assert volumes(JOB, again)["context parallel"] == 4 * 32 * 2.5 * keys


def test_no_torch_is_imported() -> None:
    modules = "megaflow.planning.report, megaflow.planning.drawing, megaflow.tools.plan"
    code = f"import sys, {modules}; print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout == "False\n"
