"""Step time of every way to cut a training step over processes against one process, and its collectives.

    python benchmarks/parallel_cpu.py [--steps N] [--out DIR]

The ranks of a layout are forked and share the machine's cores, one thread each: the CPU time of all says what cutting
costs, the clock what is gained in spite of it. Steps of the layout and of one process take turns, so that a busy
machine slows both alike. All train the same tokens from the same weights, fp32. Collectives of one step are counted on
every rank and compared with the fewest that the layout needs. Writes `parallel_cpu-<date>.json`, `.md` and `.png`.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from datetime import date, timedelta
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from rich.progress import Progress

from megaflow.config import ModelConfig, OptimConfig
from megaflow.config_parallel import ParallelConfig
from megaflow.data.loader import Batch, cut_batch
from megaflow.kernels.dispatch import select_ops
from megaflow.model.chunks import chunks_of
from megaflow.model.init import initialise
from megaflow.model.llama import Llama
from megaflow.model.recompute import Recompute, recompute_layers
from megaflow.optim.adamw import AdamW
from megaflow.parallel.gradients import GradientBuffer
from megaflow.parallel.mesh import ParallelContext
from megaflow.parallel.parameters import FlatParameters
from megaflow.parallel.runner import Pipeline
from megaflow.train.metrics import LOSS, LOSS_TOKENS
from megaflow.train.step import train_step

sys.path.insert(0, str(Path(__file__).parents[1]))  # the folder of benchmarks/, wherever this is started
from benchmarks.collective_counts import Step, counting
from benchmarks.parallel_cpu_report import draw, markdown, summarise
from benchmarks.train_cpu_report import cpu_name

OPTIM = OptimConfig(lr=3e-4)


@dataclass(frozen=True)
class Shape:
    """What is trained in a step: sequences one by one, as micro-batches."""

    model: ModelConfig
    seq_length: int
    sequences: int


def shape(hidden: int, intermediate: int, layers: int, vocab: int, seq_length: int, sequences: int) -> Shape:
    model = ModelConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_layers=layers,
        num_heads=8,
        num_kv_heads=4,
        vocab_size=vocab,
    )
    return Shape(model, seq_length, sequences)


FULL = shape(hidden=128, intermediate=352, layers=8, vocab=4096, seq_length=256, sequences=8)
SMOKE = shape(hidden=32, intermediate=48, layers=8, vocab=199, seq_length=16, sequences=4)


@dataclass(frozen=True)
class Layout:
    """How a step is cut."""

    world: int = 1
    parallel: dict[str, Any] = field(default_factory=dict)
    recompute: Recompute = "none"


ONE = "one process"
LAYOUTS = {
    ONE: Layout(),
    "selective": Layout(recompute="selective"),
    "full": Layout(recompute="full"),
    "dp 2": Layout(2),
    "dp 2, not sharded": Layout(2, {"zero": False}),
    "dp 4": Layout(4),
    "tp 2": Layout(2, {"tp": 2}),
    "tp 2, full": Layout(2, {"tp": 2}, "full"),
    "tp 2 + sp": Layout(2, {"tp": 2, "sequence_parallel": True}),
    "tp 2 + sp, full": Layout(2, {"tp": 2, "sequence_parallel": True}, "full"),
    "tp 4": Layout(4, {"tp": 4}),
    "tp 4 + sp": Layout(4, {"tp": 4, "sequence_parallel": True}),
    "cp 2": Layout(2, {"cp": 2}),
    "cp 2, full": Layout(2, {"cp": 2}, "full"),
    "cp 4": Layout(4, {"cp": 4}),
    "pp 2, gpipe": Layout(2, {"pp": 2, "schedule": "gpipe"}),
    "pp 2, 1f1b": Layout(2, {"pp": 2}),
    "pp 2, interleaved": Layout(2, {"pp": 2, "schedule": "interleaved"}),
    "pp 2, zb_h1": Layout(2, {"pp": 2, "schedule": "zb_h1"}),
    "pp 2, zb_v": Layout(2, {"pp": 2, "schedule": "zb_v"}),
    "pp 4, 1f1b": Layout(4, {"pp": 4}),
    "pp 4, zb_v": Layout(4, {"pp": 4, "schedule": "zb_v"}),
    "dp 2 x tp 2 + sp": Layout(4, {"tp": 2, "sequence_parallel": True}),
    "dp 2 x cp 2": Layout(4, {"cp": 2}),
    "cp 2 x tp 2": Layout(4, {"cp": 2, "tp": 2}),
    "pp 2 x dp 2, 1f1b": Layout(4, {"pp": 2}),
    "pp 2 x cp 2, zb_h1": Layout(4, {"pp": 2, "cp": 2, "schedule": "zb_h1"}),
    "pp 2 x tp 2 + sp, zb_v": Layout(4, {"pp": 2, "tp": 2, "sequence_parallel": True, "schedule": "zb_v"}),
}
TIED = ("pp 2 x dp 2, 1f1b", "pp 2, zb_v", "dp 2 x tp 2 + sp")
"""Layouts whose collectives are counted with tied embeddings too."""


def batches_of(shape: Shape, ctx: ParallelContext) -> list[Batch]:
    """This rank's micro-batches: random tokens, every window a document."""
    size, tokens = shape.seq_length, torch.Generator().manual_seed(1)
    ids = torch.randint(shape.model.vocab_size, (shape.sequences, size + 1), generator=tokens)
    whole = [
        Batch(
            tokens=row[None, :-1].contiguous(),
            labels=row[None, 1:].contiguous(),
            positions=torch.arange(size)[None],
            cu_seqlens=torch.tensor([0, size], dtype=torch.int32),
            max_seqlen=size,
            sources=torch.zeros(1, dtype=torch.int64),
            cards=[(number, 0, number)],
        )
        for number, row in enumerate(ids)
    ]
    return [cut_batch(batch, ctx.cp, ctx.cp_rank) for batch in whole[ctx.dp_rank :: ctx.dp]]


class Trainer:
    """A rank's part of a step, as `megaflow/pretrain.py` puts it together."""

    def __init__(self, shape: Shape, layout: Layout, ctx: ParallelContext) -> None:
        parallel = ParallelConfig(**layout.parallel)
        chunks = chunks_of(shape.model, parallel, shape.seq_length, ctx.pp_rank)
        model = Llama(shape.model, ctx, select_ops("cpu", torch.float32), chunks=chunks)
        recompute_layers(model.layers, layout.recompute, 1)
        initialise(model, seed=1)
        self.ctx = ctx
        self.parameters = FlatParameters(model, parallel)
        self.gradients = GradientBuffer(self.parameters, ctx, parallel)
        self.optimizer = AdamW(OPTIM, self.parameters, self.gradients)
        self.pipeline = Pipeline(model, parallel)
        self.batches = batches_of(shape, ctx)
        self.needed = Step(
            shape.model, parallel, layout.recompute, chunks, len(self.batches), shape.seq_length, sources=1
        ).fewest(ctx)

    def step(self) -> dict[str, Any]:
        """CPU seconds of a step on this rank, and the mean loss before it."""
        start = time.process_time()
        outcome = train_step(self.pipeline, self.gradients, self.optimizer, self.batches, 1, OPTIM.lr, stop=False)
        self.parameters.wait()
        loss, tokens = outcome.totals[0, [LOSS, LOSS_TOKENS]].tolist()
        return {"cpu_seconds": time.process_time() - start, "loss": loss / tokens}

    def count(self) -> dict[str, Any]:
        """Collectives of a step on this rank, made and needed, by kind and group."""
        with counting(self.ctx) as made:
            self.step()
        return {
            name: {f"{kind}, {group}": asdict(calls) for (kind, group), calls in sorted(counts.items())}
            for name, counts in (("made", made), ("needed", self.needed))
        }


class Ranks:
    """The forked ranks of a layout, which idle until they are told what to do. Use as a context manager."""

    def __init__(self, shape: Shape, layout: Layout) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="ranks-")
        self.pipes: list[Connection] = []
        self.processes: list[Any] = []
        fork = multiprocessing.get_context("fork")
        for rank in range(layout.world):
            ours, theirs = fork.Pipe()
            process = fork.Process(
                target=_rank, args=(shape, layout, rank, Path(self.folder.name) / "store", theirs), daemon=True
            )
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def each(self, method: str) -> list[dict[str, Any]]:
        """What a method of `Trainer` gives on every rank."""
        for pipe in self.pipes:
            pipe.send(method)
        return [pipe.recv() for pipe in self.pipes]

    def step(self) -> dict[str, Any]:
        """Seconds by the clock until the last rank is through, CPU seconds of all, and the loss."""
        start = time.perf_counter()
        ranks = self.each("step")
        seconds = time.perf_counter() - start
        return {
            "seconds": seconds,
            "cpu_seconds": sum(rank["cpu_seconds"] for rank in ranks),
            "loss": ranks[0]["loss"],
        }

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        self.folder.cleanup()


def _rank(shape: Shape, layout: Layout, rank: int, store: Path, pipe: Connection) -> None:
    """Body of a forked rank, until it is killed."""
    torch.set_num_threads(1)
    ctx = ParallelContext.single()
    if layout.world > 1:
        files = dist.FileStore(str(store), layout.world)
        dist.init_process_group("gloo", store=files, rank=rank, world_size=layout.world, timeout=timedelta(minutes=10))
        ctx = ParallelContext.create(ParallelConfig(**layout.parallel), "cpu")
    trainer = Trainer(shape, layout, ctx)
    while True:
        pipe.send(getattr(trainer, pipe.recv())())


def measure(
    shape: Shape, layout: Layout, one: Ranks, loss: float, steps: int, tick: Callable[[], None]
) -> dict[str, Any]:
    """Steps of the layout and of one process in turn, after one that warms up, and the layout's collectives.

    Raises AssertionError where its first loss is not `loss`, that of one process, 1e-5 relative.
    """
    with Ranks(shape, layout) as ranks:
        first = ranks.step()["loss"]
        assert abs(first / loss - 1) < 1e-5, f"{layout}: the first loss is {first}, of one process {loss}"
        turns: dict[str, list[dict[str, Any]]] = {"one process": [], "layout": []}
        for _ in range(steps):
            turns["one process"].append(one.step())
            turns["layout"].append(ranks.step())
            tick()
        return {"world": layout.world, **summarise(turns), "ranks": ranks.each("count")}


def tied(shape: Shape) -> Shape:
    """The same with tied embeddings."""
    return replace(shape, model=shape.model.model_copy(update={"tie_embeddings": True}))


def count(shape: Shape, layout: Layout) -> dict[str, Any]:
    """The collectives of a layout alone."""
    with Ranks(shape, layout) as ranks:
        return {"world": layout.world, "ranks": ranks.each("count")}


def main(
    steps: Annotated[int, typer.Option(min=2, help="measured steps of each layout")] = 8,
    layout: Annotated[list[str] | None, typer.Option(help="a layout to measure; all, if not given")] = None,
    out: Annotated[Path, typer.Option(help="folder of the results")] = Path("benchmarks/results"),
    smoke: Annotated[bool, typer.Option(help="a tiny shape, to see that it runs")] = False,
) -> None:
    """Measure, write the results and print the tables."""
    chosen = layout or list(LAYOUTS)
    if unknown := set(chosen) - set(LAYOUTS):
        raise typer.BadParameter(f"{min(unknown)!r} is none of {'; '.join(LAYOUTS)}")
    torch.set_num_threads(1)
    shape = SMOKE if smoke else FULL
    result: dict[str, Any] = {
        "date": date.today().isoformat(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "steps": steps,
        "model": shape.model.model_dump(mode="json"),
        "seq_length": shape.seq_length,
        "sequences": shape.sequences,
        "layouts": {},
    }
    with Progress(disable=not sys.stdout.isatty()) as progress, Ranks(shape, LAYOUTS[ONE]) as one:
        task, loss = progress.add_task("steps", total=steps * len(chosen)), one.step()["loss"]
        for name in chosen:
            tick = partial(progress.advance, task)
            result["layouts"][name] = measure(shape, LAYOUTS[name], one, loss, steps, tick)
        result["tied"] = {name: count(tied(shape), LAYOUTS[name]) for name in TIED if name in chosen}
    result["load_average_after"] = round(os.getloadavg()[0], 2)
    out.mkdir(parents=True, exist_ok=True)
    stem = out / f"parallel_cpu-{result['date']}"
    stem.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    stem.with_suffix(".md").write_text(markdown(result))
    draw(result, stem.with_suffix(".png"))
    print(markdown(result))


if __name__ == "__main__":
    typer.run(main)
