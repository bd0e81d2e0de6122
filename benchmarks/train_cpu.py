"""Step time of megaflow against transformers' LLaMA on one CPU, and where megaflow's time goes.

    python benchmarks/train_cpu.py [--steps N] [--threads N] [--out DIR]

Both train the same shape from the same weights on the same tokens in one process, fp32, several micro-batches to a
step: forward, backward, clip, AdamW. Their steps take turns, so that a busy machine slows both alike. Writes
`train_cpu-<date>.json`, `.md` and `.png`.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from rich.progress import Progress
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from megaflow.config import ModelConfig, OptimConfig
from megaflow.config_parallel import ParallelConfig
from megaflow.data.loader import Batch
from megaflow.kernels.dispatch import OPERATIONS, Ops, select_ops
from megaflow.model.flops import num_parameters
from megaflow.model.init import initialise
from megaflow.model.llama import Llama
from megaflow.model.placement import placement
from megaflow.optim.adamw import AdamW
from megaflow.parallel.gradients import GradientBuffer
from megaflow.parallel.mesh import ParallelContext
from megaflow.parallel.parameters import FlatParameters
from megaflow.parallel.runner import Pipeline
from megaflow.train.metrics import LOSS, LOSS_TOKENS
from megaflow.train.step import train_step

sys.path.insert(0, str(Path(__file__).parents[1]))  # the folder of benchmarks/, wherever this is started
from benchmarks.train_cpu_report import class_seconds, cpu_name, draw, markdown, summarise

OPTIM = OptimConfig(lr=3e-4, weight_decay=0.1, clip=1.0)
SCOPES = {"embedding": "other", "rms_norm": "norm", "linear_cross_entropy": "loss"}
"""Operations whose class of the profile has another name."""


@dataclass(frozen=True)
class Shape:
    """What is trained: a model, and how many tokens a step has."""

    name: str
    model: ModelConfig
    seq_length: int
    micro_batch: int = 2
    accumulation: int = 2
    document: float = 150.0
    """Mean length of a document, tokens."""

    @property
    def tokens(self) -> int:
        return self.seq_length * self.micro_batch * self.accumulation


def llama(hidden: int, intermediate: int, layers: int, heads: int, vocab: int) -> ModelConfig:
    return ModelConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        vocab_size=vocab,
    )


SHAPES = [
    Shape("hidden 128, 8 layers", llama(128, 352, 8, 4, 32000), 512),
    Shape("hidden 512, 4 layers", llama(512, 1408, 4, 8, 32000), 512),
]
SMOKE_SHAPES = [Shape("hidden 32, 2 layers", llama(32, 64, 2, 4, 256), 32, document=10.0)]


def make_batches(shape: Shape, documents: bool) -> list[Batch]:
    """The micro-batches of one step: random tokens, one document per window or packed ones of exponential lengths."""
    generator = torch.Generator().manual_seed(1)
    batches = []
    for _ in range(shape.accumulation):
        size = (shape.micro_batch, shape.seq_length)
        starts = torch.rand(size, generator=generator) < (1 / shape.document if documents else 0)
        starts[:, 0] = True
        edges = torch.cat((starts.flatten().nonzero()[:, 0], torch.tensor([starts.numel()])))
        tokens = torch.randint(shape.model.vocab_size, (size[0], size[1] + 1), generator=generator)
        labels = tokens[:, 1:].masked_fill(starts.roll(-1, dims=1), -100)  # a window's last token has no label
        positions = torch.arange(starts.numel()) - edges.repeat_interleave(edges.diff(append=edges[-1:]))
        batches.append(
            Batch(
                tokens=tokens[:, :-1].contiguous(),
                labels=labels,
                positions=positions.view(size),
                cu_seqlens=edges.int(),
                max_seqlen=int(edges.diff().max()),
                sources=torch.zeros(size[0], dtype=torch.int64),
                cards=[(row, 0, row) for row in range(size[0])],
            )
        )
    return batches


class Megaflow:
    """A model, its optimizer and its step as `megaflow/pretrain.py` puts them together."""

    def __init__(self, shape: Shape, ops: Ops) -> None:
        self.ctx = ParallelContext.single()
        self.model = Llama(shape.model, self.ctx, ops)
        initialise(self.model, seed=1)
        parameters = FlatParameters(self.model, ParallelConfig())
        self.gradients = GradientBuffer(parameters, self.ctx, ParallelConfig())
        self.optimizer = AdamW(OPTIM, parameters, self.gradients)
        self.pipeline = Pipeline(self.model, ParallelConfig())

    def step(self, batches: list[Batch]) -> float:
        """One optimizer step; the mean loss before it."""
        outcome = train_step(self.pipeline, self.gradients, self.optimizer, batches, 1, OPTIM.lr, stop=False)
        loss, tokens = outcome.totals[0, [LOSS, LOSS_TOKENS]].tolist()
        return loss / tokens


class Transformers:
    """transformers' model trained as its Trainer does: mean over the step's tokens, clip, torch's AdamW.

    boundaries: attention inside documents, which transformers does where position ids restart; otherwise plain causal.
    """

    def __init__(self, shape: Shape, boundaries: bool, fused: bool) -> None:
        model = shape.model
        settings: dict[str, Any] = {
            "hidden_size": model.hidden_size,
            "intermediate_size": model.intermediate_size,
            "num_hidden_layers": model.num_layers,
            "num_attention_heads": model.num_heads,
            "num_key_value_heads": model.num_kv_heads,
            "vocab_size": model.vocab_size,
            "rms_norm_eps": model.norm_eps,
            "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},
            "max_position_embeddings": shape.seq_length,
            "use_cache": False,
            "attn_implementation": "sdpa",
        }
        self.model = LlamaForCausalLM(LlamaConfig(**settings)).train()
        self.model.load_state_dict(initial_weights(shape))
        parameters = list(self.model.parameters())
        groups = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": OPTIM.weight_decay},
            {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
        ]
        betas = (OPTIM.beta1, OPTIM.beta2)
        self.optimizer = torch.optim.AdamW(groups, lr=OPTIM.lr, betas=betas, eps=OPTIM.eps, fused=fused or None)
        self.boundaries = boundaries

    def step(self, batches: list[Batch]) -> float:
        """One optimizer step; the mean loss before it."""
        tokens = sum(int((batch.labels >= 0).sum()) for batch in batches)
        total = 0.0
        for batch in batches:
            labels = batch.labels.long()
            loss = self.model(
                input_ids=batch.tokens,
                position_ids=batch.positions if self.boundaries else None,
                labels=labels,
                shift_labels=labels,
                num_items_in_batch=tokens,
            ).loss
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), OPTIM.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total


def initial_weights(shape: Shape) -> dict[str, Tensor]:
    """megaflow's initial weights under transformers' names."""
    ctx = ParallelContext.single()
    model = Llama(shape.model, ctx, select_ops("cpu", torch.float32))
    initialise(model, seed=1)
    parameters = dict(model.named_parameters())
    return {
        piece.name: parameters[parameter].detach()[piece.local_slices()]
        for parameter, pieces in placement(shape.model, ctx).items()
        for piece in pieces
    }


RIVALS = {
    "causal": {"transformers": False},
    "packed documents": {"transformers, no boundaries": False, "transformers, boundaries": True},
}
"""Layout, and transformers' ways to train on it: whether attention stays inside documents."""

Step = Callable[[list[Batch]], float]


def measure(
    contenders: dict[str, Step], batches: list[Batch], steps: int, tick: Callable[[], None]
) -> dict[str, dict[str, Any]]:
    """Seconds by the clock and on the CPU of every step after the first, of all contenders in turn, and their losses.

    Raises AssertionError if two that compute the same did not begin with the same loss, 1e-5 relative.
    """
    runs: dict[str, dict[str, Any]] = {name: {"seconds": [], "cpu_seconds": [], "losses": []} for name in contenders}
    for _ in range(steps + 1):
        for name, step in contenders.items():
            start, cpu_start = time.perf_counter(), time.process_time()
            loss = step(batches)
            runs[name]["seconds"].append(time.perf_counter() - start)
            runs[name]["cpu_seconds"].append(time.process_time() - cpu_start)
            runs[name]["losses"].append(loss)
            tick()
    expected = runs["megaflow"]["losses"][0]
    for name, run in runs.items():
        run["seconds"], run["cpu_seconds"] = run["seconds"][1:], run["cpu_seconds"][1:]  # the first one warms up
        difference = abs(run["losses"][0] / expected - 1)
        assert "no boundaries" in name or difference < 1e-5, f"{name}: first loss differs by {difference:.1e}"
    return runs


def scoped(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function under a name that the profiler shows."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with torch.profiler.record_function(f"scope:{SCOPES.get(name, name)}"):
            return function(*args, **kwargs)

    return call


def profile(shape: Shape, batches: list[Batch]) -> dict[str, float]:
    """Seconds of one step of megaflow by class of operation, each with its backward."""
    ops = select_ops("cpu", torch.float32)
    ops = replace(ops, **{name: scoped(name, getattr(ops, name)) for name in OPERATIONS})
    ours = Megaflow(shape, ops)
    for holder, method in ((ours.optimizer, "step"), (ours.gradients, "zero"), (ours.gradients, "squared_norm")):
        setattr(holder, method, scoped("optimizer", getattr(holder, method)))
    ours.step(batches)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        ours.step(batches)
    return class_seconds(profiler.events())


def fastest_optimizer(shape: Shape) -> dict[str, float]:
    """Seconds of an optimizer step of torch's AdamW with each of its settings, the faster one first."""
    seconds = {}
    for name, fused in (("fused", True), ("default", False)):
        theirs = Transformers(shape, boundaries=False, fused=fused)
        for parameter in theirs.model.parameters():
            parameter.grad = torch.ones_like(parameter)
        times = []
        for _ in range(4):
            start = time.perf_counter()
            theirs.optimizer.step()
            times.append(time.perf_counter() - start)
        seconds[name] = min(times)
    return dict(sorted(seconds.items(), key=lambda item: item[1]))


def run_shape(shape: Shape, steps: int, tick: Callable[[], None]) -> dict[str, Any]:
    """All contenders on both layouts of one shape, and the profile of megaflow's."""
    optimizers = fastest_optimizer(shape)
    fused = next(iter(optimizers)) == "fused"
    layouts = {}
    for layout, rivals in RIVALS.items():
        batches = make_batches(shape, documents=layout == "packed documents")
        contenders: dict[str, Step] = {"megaflow": Megaflow(shape, select_ops("cpu", torch.float32)).step}
        for name, boundaries in rivals.items():
            contenders[name] = Transformers(shape, boundaries, fused).step
        runs = measure(contenders, batches, steps, tick)
        summarise(runs, shape.tokens)
        layouts[layout] = {
            "documents": sum(len(batch.cu_seqlens) - 1 for batch in batches),
            "runs": runs,
            "profile": profile(shape, batches),
        }
        tick()
    return {
        "name": shape.name,
        "model": shape.model.model_dump(mode="json"),
        "parameters": num_parameters(shape.model),
        "seq_length": shape.seq_length,
        "micro_batch": shape.micro_batch,
        "accumulation": shape.accumulation,
        "adamw_seconds": optimizers,
        "layouts": layouts,
    }


def main(
    steps: Annotated[int, typer.Option(min=2, help="measured steps of each contender")] = 8,
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0: torch's choice")] = 0,
    out: Annotated[Path, typer.Option(help="folder of the results")] = Path("benchmarks/results"),
    smoke: Annotated[bool, typer.Option(help="a tiny shape, to see that it runs")] = False,
) -> None:
    """Measure megaflow's training step against transformers' on this CPU."""
    if threads:
        torch.set_num_threads(threads)
    shapes = SMOKE_SHAPES if smoke else SHAPES
    result: dict[str, Any] = {
        "date": date.today().isoformat(),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
        "steps": steps,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "shapes": [],
    }
    turns = sum(len(rivals) + 1 for rivals in RIVALS.values()) * (steps + 1) + len(RIVALS)
    with Progress(disable=not sys.stdout.isatty()) as progress:
        for shape in shapes:
            task = progress.add_task(shape.name, total=turns)
            result["shapes"].append(run_shape(shape, steps, partial(progress.advance, task)))
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"train_cpu-{result['date']}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    path.with_suffix(".md").write_text(markdown(result))
    draw(result, path.with_suffix(".png"))
    typer.echo(markdown(result))
    typer.echo(path)


if __name__ == "__main__":
    typer.run(main)
