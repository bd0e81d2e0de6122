"""The config tree: every setting of a run, typed and documented field by field.

The docstring under a field is its `--help`. Values are checked here one by one and against each other; what depends on
the number of processes is checked by `Config.check_world`. `config_load.py` reads YAML and dotted overrides into it.
"""

from __future__ import annotations

import math
from decimal import Decimal
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from megaflow.errors import UserError

Weight = Annotated[Decimal, Field(ge=0, le=10**9)]
Epochs = Annotated[Decimal, Field(gt=0, le=10**9)]
Positive = Annotated[int, Field(ge=1)]
Size = Annotated[int, Field(ge=1, le=2**20)]
Clock = Literal["steps", "sequences", "tokens", "documents"]


def divisors(number: int) -> list[int]:
    """All divisors of a positive integer, ascending."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def nearest(value: int, choices: list[int]) -> str:
    """The choices next below and next above `value`, for an error message."""
    below = [c for c in choices if c <= value][-1:]
    above = [c for c in choices if c > value][:1]
    return " or ".join(str(c) for c in below + above)


class Section(BaseModel):
    """Base of every section: unknown keys are refused, field docstrings are the help."""

    model_config = ConfigDict(
        extra="forbid", use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False, frozen=True
    )

    @field_validator("*", mode="before")
    @classmethod
    def _no_bool_for_number(cls, value: Any, info: ValidationInfo) -> Any:
        field = cls.model_fields[str(info.field_name)]
        if isinstance(value, bool) and field.annotation is not bool:
            raise ValueError("true or false where another kind of value is meant; give that, in quotes if it is a name")
        return value


class ModelConfig(Section):
    """Shape of a LLaMA-2 model."""

    hidden_size: Size
    """Width of the residual stream."""
    intermediate_size: Size
    """Width of the SwiGLU layer."""
    num_layers: Size
    """Number of transformer layers."""
    num_heads: Size
    """Number of query heads; divides hidden_size."""
    num_kv_heads: Annotated[int, Field(ge=0, le=2**20)] = 0
    """Number of key/value heads (grouped-query attention); 0: as many as num_heads."""
    vocab_size: Annotated[int, Field(ge=0, le=2**24)] = 0
    """Rows of the embedding before padding; 0: the tokenizer's vocabulary."""
    norm_eps: Annotated[float, Field(gt=0)] = 1e-5
    """Epsilon of RMSNorm."""
    rope_theta: Annotated[float, Field(gt=0)] = 10000.0
    """Base of the rotary embedding."""
    tie_embeddings: bool = False
    """Use the input embedding as the output head."""
    init_std: Annotated[float, Field(gt=0)] = 0.02
    """Standard deviation of initial weights; output projections get init_std / sqrt(2 num_layers)."""
    weights: str | None = None
    """Folder with Hugging Face LLaMA safetensors to start from; none: random weights."""

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @model_validator(mode="before")
    @classmethod
    def _all_heads(cls, values: Any) -> Any:
        if isinstance(values, dict) and not values.get("num_kv_heads") and "num_heads" in values:
            return {**values, "num_kv_heads": values["num_heads"]}
        return values

    @model_validator(mode="after")
    def _shape(self) -> Self:
        if self.hidden_size % (2 * self.num_heads):
            raise ValueError(
                f"hidden_size {self.hidden_size} is not an even multiple of num_heads {self.num_heads}; "
                f"nearest num_heads: {nearest(self.num_heads, divisors(max(1, self.hidden_size // 2)))}"
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}; "
                f"nearest num_kv_heads: {nearest(self.num_kv_heads, divisors(self.num_heads))}"
            )
        if self.weights and not Path(self.weights).is_dir():
            raise ValueError(f"weights {self.weights!r} is not a folder; give one with config.json and *.safetensors")
        return self


class SourceConfig(Section):
    """One tokenised corpus."""

    path: str
    """Prefix of the corpus written by `megaflow prepare`: <path>.bin, <path>.idx, <path>.json."""
    weight: Weight = Decimal(1)
    """Share of the group's sequences, relative to the group's other sources; 0 leaves the source out."""
    max_epochs: Epochs | None = None
    """Cap: a run that would read the source more often is refused; none: the group's."""

    @field_validator("path")
    @classmethod
    def _files(cls, path: str) -> str:
        missing = [path + suffix for suffix in (".bin", ".idx", ".json") if not Path(path + suffix).is_file()]
        if missing:
            raise ValueError(f"no file {missing[0]}; write the corpus with `megaflow prepare {path} ...`")
        return path


class GroupConfig(Section):
    """A language group: the unit the schedule gives ratios to."""

    sources: Annotated[dict[str, SourceConfig], Field(min_length=1)]
    """Name of each source to its corpus; the name is part of the source's identity and of its order."""
    weights: Literal["explicit", "proportional", "temperature", "unimax"] = "explicit"
    """Shares of the sources: their `weight`; their sizes in sequences; size ** (1 / temperature); or UniMax (arXiv
    2304.09151): alike, but no source beyond its max_epochs over the run."""
    temperature: Annotated[Decimal, Field(gt=0, le=1000)] | None = None
    """For weights temperature: 1 is proportional, more is flatter."""
    max_epochs: Epochs | None = None
    """Cap on the epochs of each source that gives none itself."""

    @model_validator(mode="after")
    def _some_weight(self) -> Self:
        if not any(source.weight for source in self.sources.values()):
            raise ValueError("every source of the group has weight 0; give one a positive weight")
        if self.weights != "explicit":
            odd = [name for name, source in self.sources.items() if source.weight not in (0, 1)]
            if odd:
                raise ValueError(
                    f"weights {self.weights} are computed from sizes, but {odd[0]} has weight "
                    f"{self.sources[odd[0]].weight}; leave it out"
                )
        if (self.temperature is not None) != (self.weights == "temperature"):
            raise ValueError("`temperature` and `weights: temperature` go together; give both or neither")
        uncapped = [name for name in self.sources if self.cap(name) is None]
        if self.weights == "unimax" and uncapped:
            raise ValueError(f"weights unimax needs max_epochs, of the group or of source {uncapped[0]}")
        return self

    def cap(self, source: str) -> Decimal | None:
        """Largest number of epochs of a source."""
        own = self.sources[source].max_epochs
        return self.max_epochs if own is None else own


class KnotConfig(Section):
    """Group weights at one moment of the run."""

    at: Annotated[int, Field(ge=0)]
    """Moment, in units of the schedule's clock."""
    weights: dict[str, Weight]
    """Ratio of every group; they sum to 1."""
    pacing: Literal["const", "linear", "cosine", "step", "root", "geometric"] = "linear"
    """How the weights travel here from the previous knot."""


class ScheduleConfig(Section):
    """Group ratios over the run: either `initial` to `final` (ChatFlow, arXiv 2405.10626) or a list of knots."""

    clock: Clock = "tokens"
    """What `grow` and knots count: steps, sequences, tokens or documents consumed by all ranks together."""
    initial: dict[str, Weight] | None = None
    """ChatFlow: ratios at the start; they sum to 1."""
    final: dict[str, Weight] | None = None
    """ChatFlow: ratios once the ramp has ended; they sum to 1."""
    grow: Annotated[int, Field(ge=1)] | None = None
    """ChatFlow's T_grow, length of the ramp in the clock's units; none: grow_fraction of the run."""
    grow_fraction: Annotated[Decimal, Field(gt=0, le=1)] = Decimal("0.6")
    """Length of the ramp as a share of the run, when `grow` is not given."""
    lambda0: Annotated[Decimal, Field(ge=0, lt=1)] = Decimal(0)
    """ChatFlow's lambda_0: how far along the ramp the run starts."""
    knots: list[KnotConfig] | None = None
    """Any other schedule: weights at moments, in ascending order; the first at 0, the last is held."""

    def mixes(self) -> list[tuple[str, dict[str, Decimal]]]:
        """Every set of ratios in the schedule with the key it stands under."""
        if self.knots is not None:
            return [(f"knots[{i}].weights", knot.weights) for i, knot in enumerate(self.knots)]
        return [("initial", self.initial or {}), ("final", self.final or {})]

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        ramp = self.initial is not None and self.final is not None
        if ramp == (self.knots is not None) or (self.initial is None) != (self.final is None):
            raise ValueError("has neither or both of its forms; give either `initial` and `final`, or `knots`")
        if ramp and self.grow is None and self.clock == "documents":
            raise ValueError("the documents clock needs `grow`; the run's length in documents is not known beforehand")
        if self.knots is not None:
            moments = [knot.at for knot in self.knots]
            if not moments or moments[0] != 0 or any(b <= a for a, b in pairwise(moments)):
                raise ValueError(f"knots must ascend from 0; they are at {moments}")
        for key, weights in self.mixes():
            total = sum(weights.values())
            if total != 1:
                raise ValueError(f"{key} sum to {total}, not 1; scale them, or change one by {1 - total}")
        return self


class DataConfig(Section):
    """What the run is trained on."""

    tokenizer: str
    """SentencePiece .model or Hugging Face tokenizer.json that the corpora were prepared with."""
    seq_length: Annotated[int, Field(ge=2, le=2**24)]
    """Tokens per sequence."""
    groups: Annotated[dict[str, GroupConfig], Field(min_length=1)]
    """Language groups, in order, each with its sources."""
    schedule: ScheduleConfig
    """Ratios of the groups over the run."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of the sample order."""
    verify: Literal["off", "lazy", "full"] = "lazy"
    """Checksums of the corpora: none, each 16 MiB block before its first use, or everything at launch."""
    digest_interval: Positive = 100
    """Steps between two comparisons of the ranks' plans, and two looks at ledger.json for a changed mix."""
    document_boundaries: bool = True
    """Attention and positions restart at each document; false: plain causal attention over the whole sequence."""

    @field_validator("tokenizer")
    @classmethod
    def _tokenizer_file(cls, path: str) -> str:
        if not Path(path).is_file():
            raise ValueError(f"no file {path}; give a SentencePiece .model or a tokenizer.json")
        return path

    @model_validator(mode="after")
    def _names(self) -> Self:
        for key, weights in self.schedule.mixes():
            if set(weights) != set(self.groups):
                raise ValueError(
                    f"schedule.{key} name {sorted(weights)}, the groups are {sorted(self.groups)}; name each group once"
                )
        names = [name for group in self.groups.values() for name in group.sources]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"source {twice[0]!r} stands in two groups; source names are unique in a run")
        return self


class TrainConfig(Section):
    """Length, batch and precision of the run."""

    steps: Annotated[int, Field(ge=1, le=2**40)]
    """Optimizer steps."""
    global_batch_size: Annotated[int, Field(ge=1, le=2**20)]
    """Sequences per optimizer step, over all ranks."""
    micro_batch_size: Size
    """Sequences per forward pass on one rank."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Parameters and activations; bf16 keeps fp32 master weights, moments and gradient sums."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of the initial weights."""
    log_interval: Positive = 1
    """Steps between two lines of metrics."""
    eval_interval: Annotated[int, Field(ge=0)] = 0
    """Steps between two held-out evaluations; one follows the last step too. 0: none."""
    eval_sequences: Positive = 64
    """Held-out sequences per source in one evaluation, at most."""
    log_samples: bool = False
    """Write the id of every sequence trained on to <run>/samples/."""
    tensorboard: bool = True
    """Write TensorBoard events to <run>/tensorboard/."""
    peak_tflops: Annotated[float, Field(gt=0)] | None = None
    """Peak of one device for MFU, TFLOP/s; none: the data sheet's for a known GPU, else a matmul measured at launch."""


class OptimConfig(Section):
    """AdamW (arXiv 1711.05101) and its learning rate."""

    lr: Annotated[float, Field(gt=0)]
    """Peak learning rate."""
    min_lr: Annotated[float, Field(ge=0)] = 0.0
    """Learning rate at the end of the decay."""
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """Decay after warm-up; wsd (warm-up, stable, decay) holds lr and decays linearly over the last decay_steps."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps of linear warm-up from 0."""
    decay_steps: Annotated[int, Field(ge=0)] = 0
    """wsd only: steps of the final decay."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """Decoupled weight decay of matrices; norm weights have none."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay of the first moment."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """Decay of the second moment."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """Term added to the root of the second moment."""
    clip: Annotated[float, Field(ge=0)] = 1.0
    """Largest global gradient norm; 0: no clipping."""

    @model_validator(mode="after")
    def _rates(self) -> Self:
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr {self.min_lr} is above lr {self.lr}; give at most {self.lr}")
        if self.decay_steps and self.schedule != "wsd":
            raise ValueError(f"decay_steps is for schedule wsd, not {self.schedule}; leave it out or choose wsd")
        if self.schedule == "wsd" and not self.decay_steps:
            raise ValueError("schedule wsd needs decay_steps; give the length of its final decay")
        return self


class ParallelConfig(Section):
    """How the model is cut over processes; data parallelism takes what tensor parallelism leaves."""

    tp: Size = 1
    """Tensor-parallel processes per model replica."""
    sequence_parallel: bool = False
    """Cut norms and residuals along the sequence over the tensor-parallel processes."""
    timeout: Positive = 600
    """Seconds until a collective that does not finish ends the run."""


class CheckpointConfig(Section):
    """What is saved, and where a run starts from."""

    interval: Annotated[int, Field(ge=0)] = 0
    """Steps between two checkpoints; one follows the last step too. 0: that one only."""
    keep: Annotated[int, Field(ge=2)] = 2
    """Newest checkpoints kept."""


class Config(Section):
    """A run."""

    run_dir: str
    """Folder of the run: config, ledger, metrics, samples, checkpoints. A run found there is resumed."""
    model: ModelConfig
    """Shape of the model."""
    data: DataConfig
    """Sources, ratios, sequence length."""
    train: TrainConfig
    """Steps, batch, precision."""
    optim: OptimConfig
    """Optimizer and learning rate."""
    parallel: ParallelConfig = ParallelConfig()
    """Tensor and sequence parallelism."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Saving and resuming."""
    kernels: dict[str, str] = {}
    """Op to backend, where the automatic choice is not wanted; `megaflow doctor` lists them."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        model, parallel, optim = self.model, self.parallel, self.optim
        shared = {"num_heads": model.num_heads, "num_kv_heads": model.num_kv_heads}
        for name, size in {**shared, "intermediate_size": model.intermediate_size}.items():
            if size % parallel.tp:
                choices = [d for d in divisors(model.num_kv_heads) if model.intermediate_size % d == 0]
                raise ValueError(
                    f"parallel.tp {parallel.tp} does not divide model.{name} {size}; "
                    f"nearest tp: {nearest(parallel.tp, choices)}"
                )
        if parallel.sequence_parallel and self.data.seq_length % parallel.tp:
            raise ValueError(
                f"data.seq_length {self.data.seq_length} is not a multiple of parallel.tp {parallel.tp}, which "
                f"sequence_parallel needs; nearest: {self.data.seq_length // parallel.tp * parallel.tp}"
            )
        if optim.warmup_steps + optim.decay_steps > self.train.steps:
            raise ValueError(
                f"optim.warmup_steps {optim.warmup_steps} + optim.decay_steps {optim.decay_steps} exceed train.steps "
                f"{self.train.steps}; shorten them"
            )
        return self

    def check_world(self, world_size: int) -> int:
        """Checks the layout against the number of processes and returns the data-parallel size.

        Raises UserError when tp does not divide world_size or dp x micro-batch does not divide the global batch.
        """
        tp, batch, micro = self.parallel.tp, self.train.global_batch_size, self.train.micro_batch_size
        if world_size % tp:
            raise UserError(
                f"parallel.tp: {tp} does not divide the {world_size} processes; nearest tp: "
                f"{nearest(tp, divisors(world_size))}"
            )
        per_pass = world_size // tp * micro
        if batch % per_pass:
            choices = [c for c in (batch // per_pass * per_pass, (batch // per_pass + 1) * per_pass) if c]
            raise UserError(
                f"train.global_batch_size: {batch} is not a multiple of dp x micro_batch_size = {world_size // tp} x "
                f"{micro}; nearest: {nearest(batch, choices)}"
            )
        return world_size // tp
