"""Step times that others have published, for the planner to reproduce.

Four rows are fitted, one parameter each; all others are held out. A GPT model is given as the LLaMA model of equal
matrix products: a feed-forward layer of 4 H without gate is one of 8 / 3 H with it. What the sources leave open, which
`Practice` a row has and sequence parallelism where they name none, is our reading, and the same for a whole source.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from megaflow.config import ModelConfig
from megaflow.planning.cluster import GPUS, Cluster
from megaflow.planning.layout import Job, Layout
from megaflow.planning.step import StepModel
from megaflow.planning.work import Practice

SOURCES = {
    "dgxc": "NVIDIA/dgxc-benchmarking on GitHub, README_*.md of llama3.1 (70B: commit 8f5cbb3), nemo_megatron (175B: "
    "commit 0b71cfd) and nemotron, NeMo 24.09 to 24.12",
    "nemo": "NVIDIA NeMo performance summary, NeMo 24.07; commit 070a0bb of NVIDIA/NeMo, "
    "docs/source/performance/performance_summary.md",
    "flagperf": "FlagOpen/FlagPerf on GitHub, training/nvidia/{llama2_70B-megatron,llama2_7b-megatron-deepspeed,"
    "llama3_70B-megatron}/README.md",
    "korthikanti": "Korthikanti et al., arXiv 2205.05198, table 5, after a summary of it, not read in the paper itself",
    "qi": "Qi et al., arXiv 2401.10241, tables 3 and 4; the vocabulary is not given: 50304 is taken",
}

NEMO = Practice(overlaps_tensor=True, overlaps_context=True, fuses_gradients=True, flash_backward=2.5, fused_loss=False)
"""NeMo of 2024: Transformer Engine's kernels and its overlapped collectives."""
FP8 = replace(NEMO, linear_speed=1.7)
"""The same with fp8 in the layers' matrix products; the speed is fitted."""
MEGATRON = Practice(fuses_gradients=True, flash_backward=2.5, fused_loss=False, traffic=3.4)
"""Megatron-LM of the time before: flash attention, unfused norms; the traffic is fitted."""
MEGATRON_2022 = Practice(fuses_gradients=True, flash=False, fused_loss=False)
"""Fused softmax and bias kernels, no flash attention."""


@dataclass(frozen=True)
class Row:
    """A published step time."""

    name: str
    source: str
    """A key of `SOURCES`."""
    job: Job
    layout: Layout
    gpu: str
    practice: Practice
    seconds: float
    fits: str | None
    """The parameter that this row was fitted with; none: held out."""

    @cached_property
    def predicted(self) -> float:
        """Seconds of a step by the planner."""
        cluster = Cluster(GPUS[self.gpu], self.layout.gpus)
        return StepModel(self.job, cluster, self.practice).estimate(self.layout).seconds

    @property
    def miss(self) -> float:
        """The prediction's relative error."""
        return self.predicted / self.seconds - 1


def _model(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, vocab: int) -> ModelConfig:
    return ModelConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        vocab_size=vocab,
    )


def _gpt(hidden: int, layers: int, heads: int, vocab: int) -> ModelConfig:
    return _model(hidden, round(hidden / 3) * 8, layers, heads, heads, vocab)


LLAMA2_7B = _model(4096, 11008, 32, 32, 32, 32000)
LLAMA2_13B = _model(5120, 13824, 40, 40, 40, 32000)
LLAMA2_70B = _model(8192, 28672, 80, 64, 8, 32000)
LLAMA3_8B = _model(4096, 14336, 32, 32, 8, 128256)
LLAMA3_70B = _model(8192, 28672, 80, 64, 8, 128256)
LLAMA3_405B = _model(16384, 53248, 126, 128, 8, 128256)
GPT_175B = _gpt(12288, 96, 96, 51200)
NEMOTRON_15B = _model(6144, 16384, 32, 48, 8, 256000)
NEMOTRON_340B = _model(18432, 49152, 96, 96, 8, 256000)


def _row(
    name: str,
    source: str,
    model: ModelConfig,
    seq_length: int,
    batch: int,
    gpus: int,
    seconds: float,
    gpu: str = "h100",
    practice: Practice = NEMO,
    fits: str | None = None,
    **cut: Any,
) -> Row:
    """`chunks` above 1 means interleaved; layers are cut evenly, tp comes with sequence parallelism, as in Megatron."""
    pp, chunks = cut.get("pp", 1), cut.get("chunks", 1)
    cut.setdefault("schedule", "interleaved" if chunks > 1 else "1f1b")
    cut.setdefault("sequence_parallel", cut.get("tp", 1) > 1)
    cut.setdefault("layers_per_chunk", (model.num_layers // (pp * chunks),) * (pp * chunks))
    return Row(name, source, Job(model, seq_length, batch), Layout(gpus, **cut), gpu, practice, seconds, fits)


def rows() -> list[Row]:
    """All of them."""
    return [*_dgxc(), *_llama2(), *_flagperf(), *_a100()]


def _dgxc() -> list[Row]:
    """H100, bf16 and fp8, weak scaling."""
    found = []
    mid: dict[str, Any] = {"tp": 4, "pp": 4, "cp": 2, "chunks": 5}
    large: dict[str, Any] = {"tp": 8, "pp": 9, "cp": 2, "chunks": 7}
    gpt: dict[str, Any] = {"tp": 4, "pp": 8, "chunks": 12}
    small: dict[str, Any] = {"tp": 4, "micro_batch": 4}
    big: dict[str, Any] = {"tp": 8, "pp": 8, "chunks": 12}
    runs: list[tuple[str, ModelConfig, int, dict[str, Any], dict[int, tuple[int, float, float]]]] = [
        ("Llama 3.1 8B", LLAMA3_8B, 8192, {"cp": 2}, {8: (128, 12.91, 9.67), 128: (2048, 13.10, 9.82)}),
        ("Llama 3.1 70B", LLAMA3_70B, 8192, mid, {64: (128, 14.61, 10.46), 2048: (4096, 14.84, 10.99)}),
        ("Llama 3.1 405B", LLAMA3_405B, 8192, large, {576: (252, 17.20, 11.24), 2304: (1008, 17.62, 12.35)}),
        ("GPT-3 175B", GPT_175B, 2048, gpt, {128: (256, 8.309, 5.626), 2048: (4096, 8.49, 5.96)}),
        ("Nemotron-4 15B", NEMOTRON_15B, 4096, small, {16: (64, 2.812, 2.039), 2048: (8192, 2.887, 2.12)}),
        ("Nemotron-4 340B", NEMOTRON_340B, 4096, big, {128: (32, 4.61, 3.16), 2048: (512, 4.84, 3.49)}),
    ]
    for name, model, length, cut, times in runs:
        for gpus, (batch, bf16, fp8) in times.items():
            first = name == "Llama 3.1 70B" and gpus == 64
            for kind, practice, seconds in (("bf16", NEMO, bf16), ("fp8", FP8, fp8)):
                fits = {"bf16": "matmul of H100", "fp8": "linear_speed of fp8"}[kind] if first else None
                label = f"{name} {kind}"
                found.append(
                    _row(label, "dgxc", model, length, batch, gpus, seconds, practice=practice, fits=fits, **cut)
                )
    return found


def _llama2() -> list[Row]:
    """LLaMA-2 on H100 in NeMo, which is published in fp8 only."""
    runs: list[tuple[str, ModelConfig, int, int, dict[str, Any]]] = [
        ("7B", LLAMA2_7B, 8, 16847, {}),
        ("13B", LLAMA2_13B, 16, 8646, {"pp": 4, "chunks": 10}),
        ("70B", LLAMA2_70B, 64, 1707, {"tp": 4, "pp": 4, "chunks": 20}),
    ]
    return [
        _row(f"LLaMA-2 {size} fp8", "nemo", model, 4096, 128, gpus, 128 * 4096 / rate / gpus, practice=FP8, **cut)
        for size, model, gpus, rate, cut in runs
    ]


def _flagperf() -> list[Row]:
    """bf16 in Megatron-LM and its derivatives, without overlapped collectives."""
    old: dict[str, Any] = {"practice": MEGATRON, "sequence_parallel": False}
    seventy = (LLAMA2_70B, 4096, 44, 32)
    return [
        _row("LLaMA-2 70B", "flagperf", *seventy, 44 * 4096 / 791.37 / 32, "h800", fits="traffic", tp=4, pp=8, **old),
        _row("LLaMA-2 70B", "flagperf", *seventy, 44 * 4096 / 641.93 / 32, "h800", tp=8, pp=4, **old),
        _row("LLaMA-2 7B", "flagperf", LLAMA2_7B, 4096, 64, 8, 64 * 4096 / 2868 / 8, "a100-40", tp=4, **old),
        _row(
            "Llama 3 70B",
            "flagperf",
            LLAMA3_70B,
            8192,
            512,
            64,
            512 * 8192 / 851 / 64,
            practice=MEGATRON,
            tp=8,
            pp=4,
            recompute="selective",
        ),
    ]


def _a100() -> list[Row]:
    """GPT models on A100 in Megatron-LM, without flash attention."""
    found = []
    for size, hidden, layers, heads, seconds, gpus, batch, cut in (
        ("22B", 6144, 48, 64, 1.10, 8, 4, {"micro_batch": 4}),
        ("175B", 12288, 96, 96, 13.75, 64, 64, {"pp": 8, "chunks": 3}),
        ("530B", 20480, 105, 128, 37.83, 280, 280, {"pp": 35, "chunks": 3}),
        ("1T", 25600, 128, 160, 71.49, 512, 512, {"pp": 64}),
    ):
        found.append(
            _row(
                f"GPT {size}",
                "korthikanti",
                _gpt(hidden, layers, heads, 51200),
                2048,
                batch,
                gpus,
                seconds,
                "a100",
                MEGATRON_2022,
                "matmul of A100" if size == "175B" else None,
                tp=8,
                recompute="selective",
                **cut,
            )
        )
    for size, hidden, layers, heads, pp, micro, counts, rates in (
        ("1.5B", 2304, 22, 24, 8, 6, (24, 64), ((12.9, 14.2), (11.8, 13.6), (13.1, 13.9))),
        ("6.2B", 4096, 30, 32, 8, 3, (24, 64), ((3.88, 4.20), (3.50, 4.03), (4.01, 4.19))),
        ("14.6B", 5120, 46, 40, 16, 1, (48, 128), ((1.61, 1.76), (1.40, 1.64), (1.54, 1.66))),
        ("28.3B", 6144, 62, 48, 32, 1, (96, 256), ((0.87, 0.96), (0.76, 0.88), (0.82, 0.90))),
    ):
        each = (layers + 2) // pp
        for schedule, by_count in zip(("zb_h1", "1f1b", "interleaved"), rates, strict=True):
            ends = (each - 1, *(each,) * (pp - 2), each - 1)
            single = (0, *(1,) * layers, 0)
            for count, rate in zip(counts, by_count, strict=True):
                found.append(
                    _row(
                        f"GPT {size}, {count} micro-batches",
                        "qi",
                        _gpt(hidden, layers, heads, 50304),
                        1024,
                        count * micro,
                        pp,
                        count * micro / rate / pp,
                        "a100",
                        MEGATRON_2022,
                        pp=pp,
                        schedule=schedule,
                        chunks=each if schedule == "interleaved" else 1,
                        micro_batch=micro,
                        layers_per_chunk=single if schedule == "interleaved" else ends,
                    )
                )
    return found
