"""The training loop: build what a run consists of, then step until the end or a signal."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist

from megaflow.checkpoint.store import CheckpointStore
from megaflow.data.loader import Loader
from megaflow.data.sources import open_heldouts
from megaflow.kernels.dispatch import select_ops
from megaflow.model.init import initialise, load_hf_weights
from megaflow.model.llama import Llama
from megaflow.model.placement import placement
from megaflow.optim.adamw import AdamW
from megaflow.optim.learning_rate import learning_rate
from megaflow.parallel.gradients import FlatParameters, GradientBuffer
from megaflow.parallel.mesh import ParallelContext
from megaflow.train.evaluate import evaluate
from megaflow.train.metrics import SourceTotals
from megaflow.train.report import Report
from megaflow.train.run import Run
from megaflow.train.samples import SampleLog
from megaflow.train.signals import StopSignal
from megaflow.train.state import TrainState
from megaflow.train.step import train_step


def build(run: Run, ctx: ParallelContext) -> tuple[Llama, GradientBuffer, TrainState]:
    """Model, gradient buffer and state of a run, before its weights are set."""
    config = run.config
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    model = Llama(config.model, ctx, select_ops(ctx.device, dtype, config.kernels), dtype)
    parameters = FlatParameters(model)
    gradients = GradientBuffer(parameters, ctx)
    optimizer = AdamW(config.optim, parameters.flat, gradients.flat, parameters.decay_numel)
    totals = SourceTotals(len(run.sources), ctx.device)
    return model, gradients, TrainState(run, placement(config.model, ctx), parameters, optimizer, totals)


def train(run: Run, ctx: ParallelContext) -> None:
    """Trains until `train.steps`, or until a signal asks to stop; saves a checkpoint either way.

    Every rank of `ctx` calls it. Raises UserError where the run directory or a checkpoint does not fit the config.
    """
    stop = StopSignal()
    config, sampler = run.config, run.sampler
    torch.manual_seed(config.train.seed)
    model, gradients, state = build(run, ctx)
    optimizer = state.optimizer
    store = CheckpointStore(run.dir / "checkpoints", ctx, config.checkpoint.keep)
    if not state.load(store):
        if config.model.weights:
            load_hf_weights(model, config.model.weights)
        else:
            initialise(model, config.train.seed)
        optimizer.copy_params_to_master()
    if sampler.step >= config.train.steps:
        if ctx.rank == 0:
            print(f"{run.dir} is at step {sampler.step} of {config.train.steps}: nothing left to do", flush=True)
        return

    if ctx.rank == 0:
        run.begin()
    if ctx.world_size > 1:
        dist.barrier()
    loader = Loader(
        sampler, run.sources, ctx.dp, ctx.dp_rank, config.train.micro_batch_size, config.data.document_boundaries
    )
    heldouts = open_heldouts(run.sources, config.data.seq_length)
    report = Report(config, state, ctx)
    samples = SampleLog(run.dir, sampler.step, ctx) if config.train.log_samples and ctx.tp_rank == 0 else None
    report.say(
        f"{run.describe()}; starts after step {sampler.step}; {state.parameters.flat.numel():,} parameters per rank"
    )

    stopping = False
    while sampler.step < config.train.steps and not stopping:
        start = time.perf_counter()
        plan, batches = loader.next_step()
        batches = [batch.to(ctx.device) for batch in batches]
        fetched = time.perf_counter()
        lr = learning_rate(config.optim, plan.step, config.train.steps)
        outcome = train_step(
            model, gradients, optimizer, batches, len(run.sources), lr, config.optim.clip, ctx, stop.requested
        )
        stopping = bool(outcome.stop > 0)
        if samples is not None:
            samples.write(plan.step, batches)
        report.add(plan, outcome, lr, time.perf_counter() - start, fetched - start)

        last = stopping or plan.step == config.train.steps
        if config.train.eval_interval and (
            plan.step % config.train.eval_interval == 0 or plan.step == config.train.steps
        ):
            report.evaluation(plan.step, evaluate(model, heldouts, config, ctx))
        if last or (config.checkpoint.interval and plan.step % config.checkpoint.interval == 0):
            path = state.save(store)
            report.say(f"step {plan.step}  saved {path}")
    report.close()
    if samples is not None:
        samples.close()
    if ctx.world_size > 1:
        dist.barrier()
