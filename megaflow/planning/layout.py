"""What is trained, and how it is cut over GPUs: the input of every estimate."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate
from typing import Literal, NamedTuple

from megaflow.config import Config, ModelConfig
from megaflow.config_parallel import ParallelConfig
from megaflow.errors import UserError
from megaflow.model.chunks import layers_per_chunk
from megaflow.parallel.schedule import Schedule, chunk_owners, make_schedule

Recompute = Literal["none", "selective", "full"]


@dataclass(frozen=True)
class Job:
    """A model and its batch, however they are cut."""

    model: ModelConfig
    seq_length: int
    global_batch: int
    """Sequences per step."""
    precision: Literal["fp32", "bf16"] = "bf16"
    grad_reduce: Literal["fp32", "bf16"] = "fp32"
    bucket_mib: int = 64
    attention: Literal["triton", "sdpa"] = "triton"
    gradients: Literal["fp32", "bf16"] = "fp32"
    master: Literal["fp32", "remainder"] = "fp32"
    moments: Literal["fp32", "bf16"] = "fp32"

    @classmethod
    def of(cls, config: Config) -> Job:
        """The job that a config describes; UserError when it leaves the vocabulary to the tokenizer."""
        if not config.model.vocab_size:
            raise UserError("model.vocab_size 0: a plan does not read the tokenizer; give model.vocab_size=32000")
        return cls(
            config.model,
            config.data.seq_length,
            config.train.global_batch_size,
            config.train.precision,
            config.parallel.grad_reduce,
            config.parallel.bucket_mib,
            gradients=config.optim.gradients,
            master=config.optim.master,
            moments=config.optim.moments,
        )

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.seq_length * self.global_batch

    @property
    def element(self) -> int:
        """Bytes of a parameter or activation."""
        return 2 if self.precision == "bf16" else 4


class Held(NamedTuple):
    """What a part of the model consists of."""

    layers: int
    recomputed: int
    """Layers of these that the backward pass computes again."""
    embed: bool
    head: bool


@dataclass(frozen=True)
class Layout:
    """One way to cut a job over `gpus` GPUs; the names are those of the config."""

    gpus: int
    tp: int = 1
    sequence_parallel: bool = False
    cp: int = 1
    pp: int = 1
    schedule: str = "1f1b"
    chunks: int = 1
    """Per rank."""
    micro_batch: int = 1
    recompute: Recompute = "none"
    recompute_interval: int = 1
    zero: bool = True
    layers_per_chunk: tuple[int, ...] | None = None

    @classmethod
    def of(cls, config: Config, gpus: int) -> Layout:
        """The layout of a config on so many GPUs; UserError when it does not fit them."""
        config.check_world(gpus)
        parallel = config.parallel
        return cls(
            gpus,
            parallel.tp,
            parallel.sequence_parallel and parallel.tp > 1,
            parallel.cp,
            parallel.pp,
            parallel.schedule,
            parallel.chunks_per_rank,
            config.train.micro_batch_size,
            config.train.recompute,
            config.train.recompute_interval,
            parallel.zero,
            tuple(parallel.layers_per_chunk) if parallel.layers_per_chunk else None,
        )

    @property
    def dp(self) -> int:
        """Replicas of the model."""
        return self.gpus // (self.tp * self.cp * self.pp)

    @property
    def data(self) -> int:
        """Ranks that hold the same weights."""
        return self.dp * self.cp

    @property
    def splits(self) -> bool:
        """Whether weight gradients come later than those of the input."""
        return self.schedule in ("zb_h1", "zb_v")

    @property
    def owners(self) -> tuple[int, ...]:
        """The pipeline rank of every chunk."""
        return chunk_owners(self.schedule, self.pp, self.chunks)

    def held(self, job: Job) -> tuple[Held, ...]:
        """What every chunk holds, by number."""
        counts = self.layers_per_chunk or _layers(job.model, job.seq_length, self.pp, self.schedule, self.chunks)
        return _held(counts, self.recompute_interval if self.recompute != "none" else 0)

    def micro_batches(self, job: Job) -> int:
        """Of a step, for each replica."""
        return job.global_batch // (self.dp * self.micro_batch)

    def made(self, micro_batches: int) -> Schedule:
        """Its schedule, for so many micro-batches."""
        return _made(self.schedule, self.pp, micro_batches, self.chunks)

    def overrides(self, config: Config) -> list[str]:
        """What to add to the command line of a run of `config` to have this layout; nothing when it has it."""
        parallel, train = config.parallel, config.train
        its, fused = parallel.layers_per_chunk, parallel.symmetric_memory
        settings: list[tuple[str, object, object]] = [
            ("parallel.tp", self.tp, parallel.tp),
            ("parallel.sequence_parallel", self.sequence_parallel, parallel.sequence_parallel),
            ("parallel.symmetric_memory", fused and self.sequence_parallel, fused),
            ("parallel.cp", self.cp, parallel.cp),
            ("parallel.pp", self.pp, parallel.pp),
            ("parallel.schedule", self.schedule, parallel.schedule),
            ("parallel.chunks", self.chunks, parallel.chunks_per_rank),
            ("parallel.layers_per_chunk", self.layers_per_chunk, tuple(its) if its else None),
            ("parallel.zero", self.zero, parallel.zero),
            ("train.micro_batch_size", self.micro_batch, train.micro_batch_size),
            ("train.recompute", self.recompute, train.recompute),
            ("train.recompute_interval", self.recompute_interval, train.recompute_interval),
        ]
        return [f"{key}={_yaml(value)}" for key, value, its in settings if value != its]

    @cached_property
    def brief(self) -> str:
        """In a table's column: sizes above 1, and chunks as `pp4x5`."""
        parts = [f"{name}{size}" for name, size in (("tp", self.tp), ("cp", self.cp)) if size > 1]
        if self.pp > 1:
            parts.append(f"pp{self.pp}x{self.chunks}" if self.schedule == "interleaved" else f"pp{self.pp}")
        parts.append(f"dp{self.dp}")
        parts += [f"mb{self.micro_batch}"] if self.micro_batch > 1 else []
        parts += [self.schedule] if self.pp > 1 and self.schedule not in ("1f1b", "interleaved") else []
        return " ".join([*parts, self.recompute] if self.recompute != "none" else parts)

    @cached_property
    def title(self) -> str:
        """In a few words, for messages."""
        parts = [f"tp {self.tp}"] if self.tp > 1 else []
        parts += [f"cp {self.cp}"] if self.cp > 1 else []
        parts += [f"pp {self.pp} {self.schedule}"] if self.pp > 1 else []
        parts += [f"x {self.chunks} chunks"] if self.schedule == "interleaved" else []
        parts += [f"dp {self.dp}", f"micro-batch {self.micro_batch}", f"recompute {self.recompute}"]
        return ", ".join(parts).replace(", x", " x")


def _yaml(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))


@lru_cache(maxsize=32)
def _made(name: str, pp: int, micro_batches: int, chunks: int) -> Schedule:
    """Schedules are large, and layouts that differ in recomputation alone come one after the other."""
    return make_schedule(name, pp, micro_batches, chunks)


@lru_cache(maxsize=4096)
def _layers(model: ModelConfig, seq_length: int, pp: int, schedule: str, chunks: int) -> tuple[int, ...]:
    """Layers of every chunk where the config does not say."""
    section = ParallelConfig.model_construct(pp=pp, schedule=schedule, chunks=chunks)
    return tuple(layers_per_chunk(model, section, seq_length))


@lru_cache(maxsize=4096)
def _held(counts: tuple[int, ...], interval: int) -> tuple[Held, ...]:
    """Chunks of so many layers, every `interval`-th of which is computed again; 0: none."""
    last = len(counts) - 1
    chunks = []
    for number, end in enumerate(accumulate(counts)):
        layers = range(end - counts[number], end)
        again = sum(layer % interval == 0 for layer in layers) if interval else 0
        chunks.append(Held(len(layers), again, number == 0, number == last))
    return tuple(chunks)
