"""The `parallel` section: how the model, its optimizer state and the batch are cut over processes."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from megaflow.config_section import Positive, Section, Size


class ParallelConfig(Section):
    """How the model is cut over processes; data parallelism takes what pp, cp and tp leave."""

    tp: Size = 1
    """Tensor-parallel processes: each holds a part of every layer."""
    sequence_parallel: bool = False
    """Cut norms and residuals along the sequence over the tensor-parallel processes."""
    symmetric_memory: bool = False
    """Fuse products with their collectives over NVLink, under sequence parallelism; `megaflow doctor` says where."""
    cp: Size = 1
    """Context-parallel processes: each holds a part of every sequence."""
    pp: Size = 1
    """Pipeline-parallel processes: each holds some of the layers."""
    schedule: Literal["gpipe", "1f1b", "interleaved", "zb_h1", "zb_v"] = "1f1b"
    """Order of forward and backward passes over the pipeline; `megaflow plan --draw` shows it."""
    chunks: Annotated[int, Field(ge=0, le=2**10)] = 0
    """Parts of the model per pipeline process; 0: as few as the schedule has."""
    layers_per_chunk: list[Annotated[int, Field(ge=0)]] | None = None
    """Layers of every chunk, from the first to the last; none: so that all chunks cost about the same."""
    zero: bool = True
    """Shard the optimizer state over the data- and context-parallel processes (ZeRO-1)."""
    grad_reduce: Literal["fp32", "bf16"] = "fp32"
    """What gradients are summed in between processes; bf16 halves the traffic and rounds."""
    bucket_mib: Positive = 64
    """MiB of fp32 gradients that are reduced together, under the backward pass."""
    timeout: Annotated[int, Field(ge=1, le=10**6)] = 600
    """Seconds until a collective that does not finish ends the run."""

    @model_validator(mode="after")
    def _pipeline(self) -> Self:
        fewest = 2 if self.schedule in ("interleaved", "zb_v") else 1
        if self.schedule == "interleaved" and self.chunks == 1:
            raise ValueError("chunks 1 with schedule interleaved; give at least 2, or choose 1f1b")
        if self.schedule != "interleaved" and self.chunks not in (0, fewest):
            raise ValueError(f"chunks {self.chunks} with schedule {self.schedule}, which has {fewest}; leave it out")
        if self.layers_per_chunk is not None and len(self.layers_per_chunk) != self.num_chunks:
            raise ValueError(
                f"layers_per_chunk has {len(self.layers_per_chunk)} numbers for {self.num_chunks} chunks (pp x "
                "chunks); give one for each"
            )
        return self

    @model_validator(mode="after")
    def _symmetric_memory(self) -> Self:
        if self.symmetric_memory and not (self.sequence_parallel and self.tp > 1):
            raise ValueError("symmetric_memory true without sequence_parallel over tp; set both, or leave it out")
        return self

    @property
    def chunks_per_rank(self) -> int:
        """Parts of the model that a pipeline process holds."""
        return self.chunks or (2 if self.schedule in ("interleaved", "zb_v") else 1)

    @property
    def num_chunks(self) -> int:
        """Parts that the model is cut into along its depth."""
        return self.pp * self.chunks_per_rank

    @property
    def replica(self) -> int:
        """Processes that share one replica of the model."""
        return self.pp * self.cp * self.tp
