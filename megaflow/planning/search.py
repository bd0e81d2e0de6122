"""Every legal layout of a job on a cluster: which fit, and in what order they should be tried."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from megaflow.config_section import divisors
from megaflow.errors import UserError
from megaflow.planning.cluster import Cluster
from megaflow.planning.layout import Job, Layout, Recompute
from megaflow.planning.memory import RESERVED, RankMemory, memory
from megaflow.planning.step import Step, StepModel
from megaflow.planning.work import Practice

MOST_CP = 16
MOST_CHUNKS = 8
MICRO_BATCHES = (1, 2, 4, 8)
KINDS: tuple[Recompute, ...] = ("none", "selective", "full")
REFINED = 4
"""Times the layouts asked for whose steps are simulated, after all were ranked by closed formulas."""


@dataclass(frozen=True)
class Wanted:
    """What the search may choose among; None: everything there is."""

    micro_batch: int | None = None
    recompute: Recompute | None = None
    zero: bool = True

    @classmethod
    def parse(cls, micro_batch: int | None, recompute: str | None, zero: bool) -> Wanted:
        """From a user's words; UserError when they mean nothing."""
        if micro_batch is not None and micro_batch < 1:
            raise UserError(f"micro-batch size {micro_batch}: must be at least 1")
        if recompute not in (None, *KINDS):
            raise UserError(f"recompute {recompute!r}: choose one of {', '.join(KINDS)}")
        return cls(micro_batch, next((kind for kind in KINDS if kind == recompute), None), zero)


@dataclass(frozen=True)
class Plan:
    """A layout and what it costs."""

    layout: Layout
    step: Step
    ranks: list[RankMemory]

    @property
    def fullest(self) -> int:
        """The pipeline rank that holds most."""
        return max(range(len(self.ranks)), key=lambda rank: self.ranks[rank].total)

    @property
    def memory(self) -> int:
        """Bytes of tensors on it."""
        return self.ranks[self.fullest].total


@dataclass(frozen=True)
class Found:
    """What a search found."""

    best: list[Plan]
    """The fastest, in order."""
    fitting: int
    too_large: int
    """Layouts that need more memory than a GPU has."""
    nearest: Plan | None
    """Where none fits, the one that needs least."""


def legal(job: Job, cluster: Cluster, wanted: Wanted) -> Iterator[Layout]:
    """All layouts that the config would accept; tensor-parallel ranks share a node."""
    model, length = job.model, job.seq_length
    for tp in divisors(cluster.node):
        if model.num_kv_heads % tp or model.num_heads % tp or model.intermediate_size % tp or cluster.gpus % tp:
            continue
        for cp in (cp for cp in divisors(cluster.gpus // tp) if cp <= MOST_CP):
            sequence_parallel = tp > 1 and length % (tp * (2 * cp if cp > 1 else 1)) == 0
            if cp > 1 and length % (2 * cp):
                continue
            for pp in (pp for pp in divisors(cluster.gpus // tp // cp) if pp <= model.num_layers):
                base = Layout(cluster.gpus, tp, sequence_parallel, cp, pp, zero=wanted.zero)
                for layout in _batched(job, base, wanted):
                    yield from _scheduled(job, layout)


def _batched(job: Job, base: Layout, wanted: Wanted) -> Iterator[Layout]:
    for micro_batch in MICRO_BATCHES if wanted.micro_batch is None else (wanted.micro_batch,):
        if job.global_batch % (base.dp * micro_batch) == 0:
            for recompute in KINDS if wanted.recompute is None else (wanted.recompute,):
                yield replace(base, micro_batch=micro_batch, recompute=recompute)


def _scheduled(job: Job, layout: Layout) -> Iterator[Layout]:
    """The schedules that exist for it; without a pipeline there is one."""
    yield layout
    pp, layers = layout.pp, job.model.num_layers
    if pp == 1:
        return
    yield replace(layout, schedule="zb_h1")
    if 2 * pp <= layers:
        yield replace(layout, schedule="zb_v", chunks=2)
    if layout.micro_batches(job) % pp == 0:
        for chunks in divisors(-(-layers // pp)):  # chunks of equal length
            if 1 < chunks <= min(layers // pp, MOST_CHUNKS):
                yield replace(layout, schedule="interleaved", chunks=chunks)


def search(
    job: Job, cluster: Cluster, count: int, wanted: Wanted | None = None, practice: Practice | None = None
) -> Found:
    """The `count` fastest layouts that fit, and what did not.

    All are ranked by closed formulas, and what a bound of the memory leaves in doubt is counted exactly; of the first
    ones the pipeline is simulated.
    """
    model = StepModel(job, cluster, practice or Practice())
    room = cluster.gpu.memory - RESERVED
    rough: list[Plan] = []
    too_large: list[tuple[int, Layout]] = []
    for layout in legal(job, cluster, wanted or Wanted()):
        ranks = memory(job, layout, exact=False)
        if _most(ranks) > room and max(rank.state for rank in ranks) <= room:
            ranks = memory(job, layout)
        if _most(ranks) > room:
            too_large.append((_most(ranks), layout))
        else:
            rough.append(Plan(layout, model.estimate(layout, exact=False), ranks))
    rough.sort(key=lambda plan: plan.step.seconds)
    best = [plan_of(model, plan.layout) for plan in rough[: REFINED * count]]
    best.sort(key=lambda plan: plan.step.seconds)
    nearest = min(too_large, key=lambda missed: missed[0])[1] if too_large and not rough else None
    return Found(best[:count], len(rough), len(too_large), plan_of(model, nearest) if nearest else None)


def _most(ranks: list[RankMemory]) -> int:
    return max(rank.total for rank in ranks)


def plan_of(model: StepModel, layout: Layout) -> Plan:
    """A layout's costs, by the simulator."""
    return Plan(layout, model.estimate(layout), memory(model.job, layout))
