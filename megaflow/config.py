"""The config tree: every setting of a run, typed and documented field by field.

The docstring under a field is its `--help`. Values are checked here one by one and against each other; what depends on
the number of processes is checked by `Config.check_world`. `config_load.py` reads YAML and dotted overrides into it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationInfo, model_validator

from megaflow.config_data import DataConfig
from megaflow.config_parallel import ParallelConfig
from megaflow.config_section import Positive, Section, Size, divisors, looks_at_files, nearest
from megaflow.errors import UserError
from megaflow.parallel.schedule import make_schedule


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
    def _shape(self, info: ValidationInfo) -> Self:
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
        if self.weights and looks_at_files(info) and not Path(self.weights).is_dir():
            raise ValueError(f"weights {self.weights!r} is not a folder; give one with config.json and *.safetensors")
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
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations computed again in the backward pass instead of kept: selective, those of attention, norms and SwiGLU;
    full, all but the layers' inputs."""
    recompute_interval: Positive = 1
    """Recompute every k-th layer only."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the target that is spread evenly over the vocabulary (arXiv 1512.00567); reported losses are without."""
    z_loss: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the squared log of the softmax's denominator (arXiv 2204.02311), which keeps logits small."""
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
    gradients: Literal["fp32", "bf16"] = "fp32"
    """What gradients are summed in over micro-batches; bf16 only with train.precision bf16."""
    master: Literal["fp32", "remainder"] = "fp32"
    """Master weights of bf16 parameters: fp32 beside them or, in 2 bytes less, the 16 bits that they lack of it."""
    moments: Literal["fp32", "bf16"] = "fp32"
    """What AdamW's moments are kept in."""

    @model_validator(mode="after")
    def _rates(self) -> Self:
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr {self.min_lr} is above lr {self.lr}; give at most {self.lr}")
        if self.decay_steps and self.schedule != "wsd":
            raise ValueError(f"decay_steps is for schedule wsd, not {self.schedule}; leave it out or choose wsd")
        if self.schedule == "wsd" and not self.decay_steps:
            raise ValueError("schedule wsd needs decay_steps; give the length of its final decay")
        return self


class CheckpointConfig(Section):
    """What is saved, and where a run starts from."""

    interval: Annotated[int, Field(ge=0)] = 0
    """Steps between two checkpoints; one follows the last step too. 0: that one only."""
    keep: Annotated[int, Field(ge=2)] = 2
    """Newest checkpoints kept."""
    asynchronous: bool = True
    """Write in the background from a copy in host memory; a step waits for the copy only."""


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
    """Tensor, pipeline, context and data parallelism."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Saving and resuming."""
    kernels: dict[str, str] = Field(default_factory=dict)
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
        # under cp each process takes two parts of every sequence, one from each half
        parts = (2 * parallel.cp if parallel.cp > 1 else 1) * (parallel.tp if parallel.sequence_parallel else 1)
        if self.data.seq_length % parts:
            raise ValueError(
                f"data.seq_length {self.data.seq_length} is not a multiple of {parts}, which parallel.cp, tp and "
                f"sequence_parallel need; nearest: {self.data.seq_length // parts * parts or parts}"
            )
        if parallel.layers_per_chunk is not None and sum(parallel.layers_per_chunk) != model.num_layers:
            raise ValueError(
                f"parallel.layers_per_chunk adds up to {sum(parallel.layers_per_chunk)}, but model.num_layers is "
                f"{model.num_layers}; give every layer to one chunk"
            )
        if parallel.num_chunks > 1 and model.num_layers < parallel.num_chunks:
            raise ValueError(
                f"parallel: {parallel.num_chunks} chunks (pp x chunks) for model.num_layers {model.num_layers}; take a "
                "smaller pp"
            )
        if self.train.precision == "fp32" and (optim.gradients, optim.master) != ("fp32", "fp32"):
            key = "gradients" if optim.gradients != "fp32" else "master"
            raise ValueError(f"optim.{key} {getattr(optim, key)} is for train.precision bf16; set it to fp32")
        if optim.warmup_steps + optim.decay_steps > self.train.steps:
            raise ValueError(
                f"optim.warmup_steps {optim.warmup_steps} + optim.decay_steps {optim.decay_steps} exceed train.steps "
                f"{self.train.steps}; shorten them"
            )
        return self

    def check_world(self, world_size: int) -> int:
        """Checks the layout against the number of processes and returns the data-parallel size.

        Raises UserError when pp x cp x tp does not divide world_size, dp x micro-batch does not divide the global
        batch, or the schedule does not exist for that many micro-batches.
        """
        parallel, batch, micro = self.parallel, self.train.global_batch_size, self.train.micro_batch_size
        if world_size % parallel.replica:
            product = "tp" if parallel.replica == parallel.tp else f"pp x cp x tp = {parallel.replica}"
            raise UserError(
                f"parallel.tp: {parallel.tp} does not divide the {world_size} processes; nearest tp: "
                f"{nearest(parallel.tp, divisors(world_size))}"
                if product == "tp"
                else f"parallel: {product} does not divide the {world_size} processes; start a multiple of "
                f"{parallel.replica}, or change pp, cp or tp"
            )
        dp = world_size // parallel.replica
        per_pass = dp * micro
        if batch % per_pass:
            choices = [c for c in (batch // per_pass * per_pass, (batch // per_pass + 1) * per_pass) if c]
            raise UserError(
                f"train.global_batch_size: {batch} is not a multiple of dp x micro_batch_size = {dp} x "
                f"{micro}; nearest: {nearest(batch, choices)}"
            )
        try:
            make_schedule(parallel.schedule, parallel.pp, batch // per_pass, parallel.chunks_per_rank)
        except UserError as error:
            raise UserError(
                f"train.global_batch_size: {batch} with dp x micro_batch_size = {dp} x {micro}: {error}"
            ) from None
        return dp
