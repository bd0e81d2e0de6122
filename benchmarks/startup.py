"""Start-up of a data path over N windows, in a process of its own so that its peak memory is its own.

    python benchmarks/startup.py KIND N

Kinds: `megaflow` opens a corpus of N windows (sparse files, nothing but headers is read), builds the sampler and plans
the first step; `megatron` builds what megatron-core builds before its first sample: the document index, sample index
and shuffle index of one dataset of N windows and documents (`GPTDataset`), and the blend of N samples over four
(`BlendedDataset`), with megatron-core's own functions; `permutation` is numpy's permutation of N int64, less than which
no stored order takes. Prints JSON: seconds by the clock and on the CPU, and MB by
which the peak exceeded what the process had before.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

SEQ_LENGTH = 4096
BLEND = (0.45, 0.40, 0.10, 0.05)

Part = tuple[str, Callable[[], object]]


def memory_mb(name: str) -> float:
    """`VmRSS`, resident memory now, or `VmHWM`, its peak in this process (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024


def sparse_corpus(prefix: Path, windows: int) -> None:
    """A corpus whose every document is one window, with holes where its data would be."""
    from megaflow.data.corpus.files import HEADER, MAGIC
    from megaflow.data.corpus.manifest import Manifest, TokenizerInfo

    tokens = windows * SEQ_LENGTH
    with prefix.with_suffix(".bin").open("wb") as file:
        file.truncate(2 * tokens)
    with prefix.with_suffix(".idx").open("wb") as file:
        file.write(HEADER.pack(MAGIC, 1, 8, windows, windows + 1))
        file.seek(HEADER.size + 4 * (windows - 1))
        file.write(struct.pack("<i", SEQ_LENGTH))
        file.seek(HEADER.size + 12 * windows - 8)
        file.write(struct.pack("<q", 2 * (tokens - SEQ_LENGTH)))
        file.truncate(HEADER.size + 20 * windows + 8)
    tokenizer = TokenizerInfo(library="none", version="0", sha256="", probe="", vocab_size=32000, eos_id=2, path="")
    counts: dict[str, Any] = {
        "documents": windows,
        "tokens": tokens,
        "loss_tokens": tokens - windows,
        "bytes": 0,
        "loss_bytes": 0,
    }
    manifest = Manifest(kind="text", language="none", tokenizer=tokenizer, shuffle_seed=1, **counts)
    prefix.with_suffix(".json").write_text(manifest.to_json())


def megaflow_parts(windows: int, folder: Path) -> list[Part]:
    """Four groups, of which the first has all the windows but a few."""
    from megaflow.data.sampler.groups import GroupSpec, SourceSpec
    from megaflow.data.sampler.mix import Sampler
    from megaflow.data.sampler.schedule import ONE, Knot, compile_knots
    from megaflow.data.sources import open_source

    sparse_corpus(folder / "corpus", windows)
    schedule = compile_knots("steps", [Knot(0, BLEND)])
    samplers: list[Sampler] = []

    def build() -> None:
        source = open_source("corpus", folder / "corpus", SEQ_LENGTH, seed=1, verify="off")
        specs = [SourceSpec("corpus", source.num_windows, source.documents)]
        specs += [SourceSpec(f"other {k}", 1000, 1000) for k in range(len(BLEND) - 1)]
        groups = [GroupSpec(spec.name, (spec,), (ONE,)) for spec in specs]
        samplers.append(Sampler(1, 1024, SEQ_LENGTH, groups, schedule))

    return [("open and build", build), ("first plan", lambda: samplers[0].plan())]


def megatron_parts(windows: int, folder: Path) -> list[Part]:
    """What `GPTDataset` and `BlendedDataset` build, one after the other; the arrays stay, as they do there."""
    with contextlib.redirect_stdout(sys.stderr):
        gpt = importlib.import_module("megatron.core.datasets.gpt_dataset")
        helpers = importlib.import_module("megatron.core.datasets.helpers")
    lengths = np.random.default_rng(1).integers(SEQ_LENGTH // 2, SEQ_LENGTH * 3 // 2, windows, dtype=np.int32)
    tokens = int(lengths.sum(dtype=np.int64))
    state = np.random.RandomState(1)
    kept: dict[str, np.ndarray] = {}

    def documents() -> None:
        kept["documents"] = gpt._build_document_index(np.arange(windows, dtype=np.int32), 1, state, False)

    def samples() -> None:
        kept["samples"] = helpers.build_sample_idx(lengths, kept["documents"], SEQ_LENGTH, 1, tokens, True, True)

    def shuffle() -> None:
        size = kept["samples"].shape[0] - 1
        kept["shuffle"] = gpt._build_shuffle_index(size, size, state)

    def blend() -> None:
        kept["dataset"], kept["sample"] = np.zeros(windows, np.int16), np.zeros(windows, np.int64)
        helpers.build_blending_indices(kept["dataset"], kept["sample"], list(BLEND), len(BLEND), windows, False)

    return [("document index", documents), ("sample index", samples), ("shuffle index", shuffle), ("blend", blend)]


def permutation_parts(windows: int, folder: Path) -> list[Part]:
    """The order alone."""
    return [("permutation", lambda: np.random.default_rng(1).permutation(windows))]


KINDS: dict[str, Callable[[int, Path], list[Part]]] = {
    "megaflow": megaflow_parts,
    "megatron": megatron_parts,
    "permutation": permutation_parts,
}


def main() -> None:
    kind, windows = sys.argv[1], int(sys.argv[2])
    with tempfile.TemporaryDirectory() as folder:
        parts = KINDS[kind](windows, Path(folder))
        Path("/proc/self/clear_refs").write_text("5")  # the peak so far was of making what is read
        before, cpu, seconds = memory_mb("VmRSS"), time.process_time(), {}
        for name, build in parts:
            start = time.perf_counter()
            build()
            seconds[name] = time.perf_counter() - start
        figures = {"seconds": sum(seconds.values()), "cpu_seconds": time.process_time() - cpu, "parts": seconds}
        print(json.dumps(figures | {"peak_mb": memory_mb("VmHWM") - before}))


if __name__ == "__main__":
    main()
