"""The training loop: build what a run consists of, then step until the end or a signal."""

from __future__ import annotations

import time
from contextlib import closing

import torch

from megaflow.checkpoint.store import CheckpointStore
from megaflow.data.loader import Loader
from megaflow.kernels.dispatch import select_ops
from megaflow.model.init import initialise, load_hf_weights
from megaflow.model.llama import Llama
from megaflow.model.placement import placement
from megaflow.optim.adamw import AdamW
from megaflow.optim.learning_rate import learning_rate
from megaflow.parallel.gradients import FlatParameters, GradientBuffer
from megaflow.parallel.mesh import ParallelContext, on_main_rank
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


def restore(run: Run, model: Llama, state: TrainState, store: CheckpointStore) -> None:
    """Goes back to the newest sound checkpoint, or sets the initial weights, in the fp32 master first."""
    if state.load(store):
        return
    config = run.config
    master = state.parameters.views(state.optimizer.master)
    if config.model.weights:
        load_hf_weights(model, config.model.weights, into=master)
    else:
        initialise(model, config.train.seed, into=master)
    state.optimizer.copy_master_to_params()


def train(run: Run, ctx: ParallelContext) -> None:
    """Trains until `train.steps`, or until a signal asks to stop; saves a checkpoint either way.

    Every rank of `ctx` calls it. Raises UserError where the run directory or a checkpoint does not fit the config.
    """
    stop = StopSignal()
    config, sampler = run.config, run.sampler
    torch.manual_seed(config.train.seed)
    model, gradients, state = build(run, ctx)
    store = CheckpointStore(run.dir / "checkpoints", ctx, config.checkpoint.keep)
    restore(run, model, state, store)
    if sampler.step >= config.train.steps:
        if ctx.rank == 0:
            print(f"{run.dir} is at step {sampler.step} of {config.train.steps}: nothing left to do", flush=True)
        return

    on_main_rank(ctx, run.begin)
    report = Report(config, state, ctx)
    on_main_rank(ctx, report.open)
    samples = SampleLog(run.dir, sampler.step, ctx) if config.train.log_samples and ctx.tp_rank == 0 else None
    report.say(
        f"{run.describe()}, {state.parameters.flat.numel():,} of them per rank; starts after step {sampler.step}"
    )
    micro_batch_size, boundaries = config.train.micro_batch_size, config.data.document_boundaries
    loader = Loader(sampler, run.sources, ctx.dp, ctx.dp_rank, micro_batch_size, boundaries)
    with closing(report):
        stopping = False
        while sampler.step < config.train.steps and not stopping:
            start = time.perf_counter()
            plan, batches = loader.next_step()
            batches = [batch.to(ctx.device) for batch in batches]
            fetched = time.perf_counter()
            lr = learning_rate(config.optim, plan.step, config.train.steps)
            outcome = train_step(
                model, gradients, state.optimizer, batches, len(run.sources), lr, config.optim.clip, ctx, stop.requested
            )
            stopping = bool(outcome.stop > 0)
            if samples is not None:
                samples.write(plan.step, batches)
            report.add(plan, outcome, time.perf_counter() - start, fetched - start)

            last = stopping or plan.step == config.train.steps
            saving = last or _due(plan.step, config.checkpoint.interval)
            if saving or _due(plan.step, config.train.log_interval):
                report.write(plan, lr, float(outcome.grad_norm))
            if saving:
                report.say(f"step {plan.step}  saved {state.save(store)}")
            if config.train.eval_interval and not stopping and (last or _due(plan.step, config.train.eval_interval)):
                report.evaluation(plan.step, evaluate(model, run.heldouts, config, ctx))


def _due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0
