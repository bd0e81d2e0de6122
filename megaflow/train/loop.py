"""The training loop: build what a run consists of, then step until the end or a signal."""

from __future__ import annotations

import time
from contextlib import closing

import torch

from megaflow.checkpoint.background import CheckpointSaver
from megaflow.checkpoint.store import CheckpointStore
from megaflow.data.loader import Loader
from megaflow.kernels.cross_entropy import Objective
from megaflow.model.chunks import chunks_of
from megaflow.model.init import initialise, load_hf_weights
from megaflow.model.llama import Llama
from megaflow.model.placement import placement
from megaflow.model.recompute import recompute_layers
from megaflow.optim.adamw import AdamW
from megaflow.optim.learning_rate import learning_rate
from megaflow.parallel.gradients import GradientBuffer
from megaflow.parallel.mesh import ParallelContext, on_main_rank
from megaflow.parallel.parameters import FlatParameters
from megaflow.parallel.runner import Pipeline
from megaflow.train.agreement import DigestCheck, check_history
from megaflow.train.changes import take_up_changes
from megaflow.train.evaluate import evaluate
from megaflow.train.metrics import SourceTotals
from megaflow.train.operations import DTYPES, model_dtype, operations
from megaflow.train.report import Report
from megaflow.train.run import Run
from megaflow.train.samples import SampleLog
from megaflow.train.signals import StopSignal
from megaflow.train.state import TrainState
from megaflow.train.step import train_step


def build(run: Run, ctx: ParallelContext) -> tuple[Pipeline, GradientBuffer, TrainState]:
    """This rank's chunks of the model, gradient buffer and state of a run, before its weights are set."""
    config = run.config
    chunks = chunks_of(config.model, config.parallel, config.data.seq_length, ctx.pp_rank)
    objective = Objective(config.train.label_smoothing, config.train.z_loss)
    model = Llama(config.model, ctx, operations(config, ctx.device), model_dtype(config), chunks, objective)
    recompute_layers(model.layers, config.train.recompute, config.train.recompute_interval)
    parameters = FlatParameters(model, config.parallel)
    gradients = GradientBuffer(parameters, ctx, config.parallel, DTYPES[config.optim.gradients])
    optimizer = AdamW(config.optim, parameters, gradients)
    totals = SourceTotals(len(run.sources), ctx)
    state = TrainState(run, placement(config.model, ctx, chunks), parameters, optimizer, totals)
    return Pipeline(model, config.parallel), gradients, state


def restore(run: Run, model: Llama, state: TrainState, store: CheckpointStore, ctx: ParallelContext) -> None:
    """Goes back to the newest sound checkpoint, or sets the initial weights, in the fp32 master first."""
    if state.load(store):
        saved = run.sampler.state_dict()
        on_main_rank(ctx, lambda: check_history(run.ledger, saved, run.dir / "metrics.jsonl"))
        return
    config = run.config
    if config.model.weights:
        load_hf_weights(model, config.model.weights, into=state.optimizer.set_master)
    else:
        initialise(model, config.train.seed, into=state.optimizer.set_master)
    state.optimizer.copy_master_to_params()


def begin(run: Run, state: TrainState, ctx: ParallelContext) -> Report:
    """Makes the run directory fit for the first step and opens its log."""
    edited = run.take_up_edit()
    run.check_layout(ctx.dp)
    on_main_rank(ctx, run.begin)
    report = Report(run.config, state, ctx)
    on_main_rank(ctx, report.open)
    size = f"{state.parameters.numel:,} of them per rank"
    report.say(f"{run.describe()}, {size}; starts after step {run.sampler.step}")
    if edited:
        report.say(edited)
    report.say(run.mix.forecast.summary())
    return report


def train(run: Run, ctx: ParallelContext) -> bool:
    """Trains until `train.steps`, or until a signal or a failed save asks to stop; saves a checkpoint either way.

    Every rank of `ctx` calls it. Returns whether this rank is done: not so where only other ranks were asked to stop.
    Raises UserError where the run directory or a checkpoint does not fit the config, and
    where the ranks' plans differ.
    """
    stop = StopSignal()
    config, sampler = run.config, run.sampler
    torch.manual_seed(config.train.seed)
    pipeline, gradients, state = build(run, ctx)
    store = CheckpointStore(run.dir / "checkpoints", ctx, config.checkpoint.keep)
    restore(run, pipeline.model, state, store, ctx)
    if sampler.step >= config.train.steps:
        if ctx.rank == 0:
            print(f"{run.dir} is at step {sampler.step} of {config.train.steps}: nothing left to do", flush=True)
        return True

    report = begin(run, state, ctx)
    writes_samples = config.train.log_samples and ctx.pp_rank == ctx.cp_rank == ctx.tp_rank == 0
    samples = SampleLog(run.dir, sampler.step, ctx) if writes_samples else None
    digests, stopping, asked = DigestCheck(ctx), False, False
    saver = CheckpointSaver(store, config.checkpoint.asynchronous, report.say, config.parallel.timeout)
    with closing(report), make_loader(run, ctx) as loader, saver:
        while sampler.step < config.train.steps and not stopping:
            start = time.perf_counter()
            plan, batches = loader.next_step()
            digests.add(plan.step, plan.digest)
            batches = [batch.to(ctx.device) for batch in batches]
            fetched = time.perf_counter()
            lr = learning_rate(config.optim, plan.step, config.train.steps)
            leave = stop.requested or saver.failed
            outcome = train_step(pipeline, gradients, state.optimizer, batches, len(run.sources), lr, leave)
            stopping = asked = bool(outcome.stop > 0)
            if samples is not None:
                samples.write(plan.step, batches)
            report.add(plan, outcome, time.perf_counter() - start, fetched - start)

            saving = stopping or plan.step == config.train.steps or _due(plan.step, config.checkpoint.interval)
            if saving or _due(plan.step, config.data.digest_interval):
                digests.compare()
                stopping |= take_up_changes(run, ctx, report.say)
            last = stopping or plan.step == config.train.steps
            saving |= last
            if saving or _due(plan.step, config.train.log_interval):
                report.write(plan, lr, float(outcome.grad_norm))
            if saving:
                state.save(saver)  # raises what the last one failed with
            saver.poll()
            if config.train.eval_interval and not stopping and (last or _due(plan.step, config.train.eval_interval)):
                report.evaluation(plan.step, evaluate(pipeline, run.heldouts, config, ctx))
    state.parameters.wait()  # a rank that leaves in the midst of a collective breaks the others'
    return stop.requested or not asked or sampler.step == config.train.steps


def make_loader(run: Run, ctx: ParallelContext) -> Loader:
    """This rank's batches of the steps ahead; closed by whoever asks for it."""
    config, data = run.config, run.config.data
    return Loader(
        run.sampler,
        run.sources,
        ctx.dp,
        ctx.dp_rank,
        config.train.micro_batch_size,
        data.document_boundaries,
        workers=data.workers,
        prefetch=data.prefetch,
        last_step=config.train.steps,
        pinned=ctx.device.type == "cuda",
        cp=ctx.cp,
        cp_rank=ctx.cp_rank,
    )


def _due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0
