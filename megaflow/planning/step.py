"""The time of an optimizer step: the pipeline, what data parallelism adds, the update."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from megaflow.model.flops import flops_per_token
from megaflow.parallel.simulator import Costs
from megaflow.planning.cluster import Cluster
from megaflow.planning.layout import Job, Layout
from megaflow.planning.memory import rank_parameters
from megaflow.planning.pipeline import bubble_seconds, simulated
from megaflow.planning.work import NOTHING, Parts, Practice, Workload

UPDATE_BYTES = 34
"""Bytes moved for every parameter by the gradient norm, AdamW and the rounding to bf16."""


@dataclass(frozen=True)
class Step:
    """Seconds of a step, and where they go."""

    seconds: float
    parts: dict[str, float]
    """Seconds of an average rank by part; they add up to the step."""
    tokens: float
    """Per second and GPU."""
    mfu: float
    """Of the data sheet's peak, in the published convention of `model.flops`."""

    @property
    def bubble(self) -> float:
        """The share of the step in which a rank waits for others of its pipeline."""
        return self.parts["bubble"] / self.seconds

    @property
    def exposed(self) -> float:
        """The share of the step in which a rank waits for communication and does nothing else."""
        kinds = ("tensor parallel", "context parallel", "gradients", "parameters")
        return sum(self.parts[kind] for kind in kinds) / self.seconds


@dataclass(frozen=True)
class StepModel:
    """Times steps of a job on a cluster; what layouts have in common is worked out once."""

    job: Job
    cluster: Cluster
    practice: Practice
    _parts: dict[tuple[object, ...], Parts] = field(default_factory=dict)

    def estimate(self, layout: Layout, exact: bool = True) -> Step:
        """The step of a layout; `exact`: the pipeline by the simulator, else by the closed formulas."""
        workload = Workload(self.job, layout, self.cluster, self.practice)
        key = layout.tp, layout.sequence_parallel, layout.cp, layout.micro_batch, layout.recompute, layout.splits
        if key not in self._parts:
            self._parts[key] = workload.parts()
        parts = self._parts[key]
        chunks = layout.held(self.job)
        micro_batches, message = layout.micro_batches(self.job), workload.message()
        busy, costs = NOTHING, {}
        for held, number in Counter(chunks).items():
            passes = parts.of(held)
            forward, backward_input, backward_weight = (work.seconds for work in passes)
            costs[held] = Costs(forward, backward_input, backward_weight, message)
            for work in passes:
                busy = busy.plus(work, number * micro_batches / layout.pp)
        by_chunk = [costs[held] for held in chunks]
        pipeline = self._pipeline(layout, micro_batches, by_chunk, exact)
        counts = rank_parameters(self.job, layout)
        worst = max(range(layout.pp), key=counts.__getitem__)
        its = [cost for cost, owner in zip(by_chunk, layout.owners, strict=True) if owner == worst]
        gradients, gathered = self._data_parallel(layout, counts[worst], its)
        update = self.cluster.touch(UPDATE_BYTES * counts[worst] / (layout.data if layout.zero else 1))
        seconds = pipeline + gradients + gathered + update
        spent = {
            "matrix products": busy.matmul,
            "attention": busy.attention,
            "element-wise": busy.memory,
            "tensor parallel": busy.tensor,
            "context parallel": busy.context,
            "bubble": max(0.0, pipeline - busy.seconds),
            "gradients": gradients,
            "parameters": gathered,
            "update": update,
        }
        rate = self.job.tokens / seconds / layout.gpus
        flops = flops_per_token(self.job.model, self.job.seq_length, causal=False)
        return Step(seconds, spent, rate, rate * flops / (self.cluster.gpu.tflops * 1e12))

    def _pipeline(self, layout: Layout, micro_batches: int, costs: Sequence[Costs], exact: bool) -> float:
        """Seconds from the first forward to the last weight gradient."""
        by_rank = [0.0] * layout.pp
        for owner, cost in zip(layout.owners, costs, strict=True):
            by_rank[owner] += cost.forward + cost.backward_input + cost.backward_weight
        if layout.pp == 1:
            return micro_batches * by_rank[0]
        if not exact:
            each, message = len(costs), costs[0].communication
            mean = Costs(
                sum(cost.forward for cost in costs) / each + message,
                sum(cost.backward_input for cost in costs) / each + message,
                sum(cost.backward_weight for cost in costs) / each,
            )
            bubble = bubble_seconds(layout, micro_batches, mean)
            if bubble is not None:
                return micro_batches * max(by_rank) + bubble
        return simulated(layout, micro_batches, costs)[0]

    def _data_parallel(self, layout: Layout, held: int, costs: Sequence[Costs]) -> tuple[float, float]:
        """Seconds of gradients and of parameters on their way that one micro-batch's passes do not hide.

        Buckets travel while the last backward and the first forward pass run; the last bucket and the first one have
        nothing to hide under.
        """
        size = 2 if self.job.grad_reduce == "bf16" else 4
        reduced = self.cluster.gather(size * held, layout.data, layout.tp) * (1 if layout.zero else 2)
        gathered = self.cluster.gather(self.job.element * held, layout.data, layout.tp) if layout.zero else 0.0
        bucket = min(1.0, self.job.bucket_mib * 2**20 / 4 / held)
        forward = sum(cost.forward for cost in costs)
        backward = sum(cost.backward_input + cost.backward_weight for cost in costs)
        return max(reduced - backward, reduced * bucket), max(gathered - forward, gathered * bucket)
