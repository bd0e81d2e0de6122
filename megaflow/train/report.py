"""What a run says of itself while it trains: totals over the log interval, one record, one line or progress bar."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from megaflow.config import Config
from megaflow.data.sampler.mix import StepPlan
from megaflow.data.sampler.schedule import ONE
from megaflow.model.flops import flops_per_token
from megaflow.parallel.mesh import ParallelContext
from megaflow.train.hardware import peak_tflops
from megaflow.train.metrics import LOSS, LOSS_TOKENS, SEQUENCES, MetricsLog, mean_loss
from megaflow.train.operations import chosen_backends
from megaflow.train.state import TrainState
from megaflow.train.step import StepOutcome


class Speed:
    """Tokens per second and model FLOP utilisation of one device.

    Two conventions: `mfu` counts the half of the attention matrix a causal model needs, `mfu_full_attention` all of it
    (as PaLM, arXiv 2204.02311, and Megatron do). Document boundaries lower the real work further; neither counts that.
    """

    def __init__(self, config: Config, ctx: ParallelContext) -> None:
        dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
        self.peak, self.peak_name = peak_tflops(ctx.device, dtype, config.train.peak_tflops)
        self.tokens_per_sequence = config.data.seq_length / ctx.world_size
        self.flops = [flops_per_token(config.model, config.data.seq_length, causal) for causal in (True, False)]

    def record(self, seconds: float, data_seconds: float, steps: int, sequences: int) -> dict[str, float]:
        """Rates over `steps` steps that took `seconds`, of which `data_seconds` were waiting for data."""
        rate = self.tokens_per_sequence * sequences / seconds
        causal, full = (rate * flops / 1e12 for flops in self.flops)
        return {
            "step_ms": 1000 * seconds / steps,
            "data_ms": 1000 * data_seconds / steps,
            "tokens_per_second_per_device": rate,
            "tflops": causal,
            "mfu": causal / self.peak,
            "mfu_full_attention": full / self.peak,
        }


class Report:
    """Collects steps on every rank; the main rank writes records and draws progress.

    Sums of the whole run go to `state`, which is saved with checkpoints.
    """

    def __init__(self, config: Config, state: TrainState, ctx: ParallelContext) -> None:
        sampler = state.sampler
        self.config, self.state, self.sampler, self.is_main = config, state, sampler, ctx.rank == 0
        self.ctx = ctx
        self.interval = torch.zeros_like(state.totals.values)
        self.planned, self.shared_out = [0] * len(sampler.groups), 0
        self.corrections, self.steps, self.sequences, self.seconds, self.data_seconds = 0, 0, 0, 0.0, 0.0

    def open(self) -> None:
        """Opens the log and the display; on the main rank only. Raises UserError where the log cannot be written."""
        ctx, step = self.ctx, self.sampler.step
        self.speed = Speed(self.config, ctx)  # here, where the other ranks wait: a measured peak is then one core's own
        self.log = MetricsLog(Path(self.config.run_dir), step, self.config.train.tensorboard)
        self.display = Display(self.config.train.steps, step)
        self.say(f"MFU against {self.speed.peak:.4g} TFLOP/s: {self.speed.peak_name}")
        launch = {
            "torch": torch.__version__,
            "device": ctx.device.type,
            "layout": ctx.layout,
            "kernels": {op: backend for op, backend, _ in chosen_backends(self.config, ctx.device)},
            "peak": {"tflops": self.speed.peak, "name": self.speed.peak_name},
        }
        self.log.write({"kind": "launch", "step": step, "time": time.time(), **launch})

    def say(self, line: str) -> None:
        """Prints a line on the main rank, above the progress bar where there is one."""
        if self.is_main:
            self.display.line(line)

    def add(self, plan: StepPlan, outcome: StepOutcome, seconds: float, data_seconds: float) -> None:
        """Adds a step to the interval. A loss that is not finite counts in its record but not in the run's sums."""
        self.state.totals.values += torch.nan_to_num(outcome.totals, nan=0.0, posinf=0.0, neginf=0.0)
        self.interval += outcome.totals
        self.planned = [total + plan.total * w for total, w in zip(self.planned, plan.weights, strict=True)]
        self.shared_out += plan.total
        self.corrections += plan.corrections
        self.steps += 1
        self.sequences += len(plan.deck.window)
        self.seconds += seconds
        self.data_seconds += data_seconds
        if int(outcome.skipped):
            self.state.skipped_steps += 1
            self.say(f"step {plan.step}  gradient not finite: step skipped, {self.state.skipped_steps} since the first")

    def write(self, plan: StepPlan, lr: float, grad_norm: float) -> None:
        """Writes a record of the steps since the last one, and starts a new interval."""
        if self.is_main:
            record = self._record(plan, lr, grad_norm)
            self.log.write(record)
            self.display.step(record)
        self.interval.zero_()
        self.planned, self.shared_out = [0] * len(self.planned), 0
        self.corrections, self.steps, self.sequences, self.seconds, self.data_seconds = 0, 0, 0, 0.0, 0.0

    def _record(self, plan: StepPlan, lr: float, grad_norm: float) -> dict[str, Any]:
        rows, run_rows = self.interval.tolist(), self.state.totals.values.tolist()
        total = [sum(column) for column in zip(*rows, strict=True)]
        sources = {
            source.name: {
                "loss": mean_loss(row),
                "sequences": round(row[SEQUENCES]),
                "tokens": round(run_row[SEQUENCES]) * self.config.data.seq_length,
                "loss_tokens": round(run_row[LOSS_TOKENS]),
                "epochs": consumed / source.windows,
            }
            for source, row, run_row, consumed in zip(
                self.sampler.sources, rows, run_rows, self.sampler.consumed, strict=True
            )
        }
        return {
            "kind": "train",
            "step": plan.step,
            "time": time.time(),
            "loss": total[LOSS] / max(1, total[LOSS_TOKENS]),
            "lr": lr,
            "grad_norm": grad_norm,
            "skipped_steps": self.state.skipped_steps,
            "tokens": sum(source["tokens"] for source in sources.values()),
            "corrections": self.corrections,
            "digest": f"{plan.digest:016x}",
            "unit": self.config.data.unit,
            "groups": self._groups(rows),
            "sources": sources,
            "speed": self.speed.record(self.seconds, self.data_seconds, self.steps, self.sequences),
        }

    def _groups(self, rows: list[list[float]]) -> dict[str, dict[str, float]]:
        """Planned share of each group over the interval, and the one the ranks' own batches came to, in the run's unit.

        `rows` are the interval's sums of each source.
        """
        column = SEQUENCES if self.config.data.unit == "sequences" else LOSS_TOKENS
        found = {source.name: row[column] for source, row in zip(self.sampler.sources, rows, strict=True)}
        total = max(1.0, sum(found.values()))
        return {
            group.name: {
                "planned": planned / self.shared_out / ONE,
                "achieved": sum(found[source.name] for source in group.sources) / total,
            }
            for group, planned in zip(self.sampler.groups, self.planned, strict=True)
        }

    def evaluation(self, step: int, heldout: Mapping[str, Mapping[str, float]]) -> None:
        """Writes the held-out loss (nats per token) and bits per byte of every source that has held-out documents."""
        if self.is_main and heldout:
            self.log.write({"kind": "heldout", "step": step, "time": time.time(), "sources": heldout})
            found = "  ".join(f"{name} {r['loss']:.3f} ({r['bits_per_byte']:.3f} b/B)" for name, r in heldout.items())
            self.say(f"step {step}  held-out  {found}")

    def close(self) -> None:
        if self.is_main:
            self.log.close()
            self.display.close()


class Display:
    """A progress bar on a terminal, plain lines elsewhere."""

    def __init__(self, steps: int, done: int) -> None:
        self.steps = steps
        self.console = Console(file=sys.stdout)
        self.bar: Progress | None = None
        if self.console.is_terminal:
            columns = [
                TextColumn("train"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.description}"),
            ]
            self.bar = Progress(*columns, console=self.console)
            self.task = self.bar.add_task("", total=steps, completed=done)
            self.bar.start()

    def step(self, record: Mapping[str, Any]) -> None:
        speed, step = record["speed"], record["step"]
        loss, rate = f"loss {record['loss']:.3f}", f"{speed['tokens_per_second_per_device']:,.0f} tok/s/device"
        if self.bar is not None:  # short, so that the bar keeps its width on a narrow terminal
            self.bar.update(self.task, completed=step, description=f"{loss}  {rate}")
            return
        mix = " ".join(f"{name} {group['achieved']:.2f}" for name, group in record["groups"].items())
        left = (self.steps - step) * speed["step_ms"] / 1000
        self.line(
            f"step {step}/{self.steps}  {loss}  lr {record['lr']:.2e}  norm {record['grad_norm']:.2f}  {rate}  "
            f"MFU {100 * speed['mfu']:.1f} %  {mix}  left {left / 60:.1f} min"
        )

    def line(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)
        self.console.file.flush()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()
