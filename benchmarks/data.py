"""The data path: windows fetched per second, and tokenising, each against the libraries that others use.

    python benchmarks/data.py [--part windows] [--part tokenizers] [--out DIR]

Contenders take turns in one process on one core. Those whose package is not installed are left out, and said: in a copy
of the environment, `pip install --no-deps megatron-core` and `pip install datasets gigatoken awkward` bring them all.
Writes `data-<date>.json`, `.md` and `.png`; with `--part` the other part is kept as the file of that date has it.
"""

from __future__ import annotations

import os

os.environ |= {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}  # before they load

import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

sys.path.insert(0, str(Path(__file__).parents[1]))  # the folder of benchmarks/, wherever this is started
from benchmarks.data_report import draw, markdown
from benchmarks.data_tokenizers import LIBRARIES, export, read_texts
from benchmarks.data_windows import CONTENDERS, check, make_corpora
from benchmarks.parts import measure_parts, version

TARGET = 30_000
"""Windows of 4096 tokens per second and core."""

DEMO = Path(__file__).parents[1] / "configs" / "demo"
PACKAGES = ("numpy", "torch", "megatron-core", "datasets", "sentencepiece", "tokenizers", "gigatoken")


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    tokens: int = 50_000_000
    seq_length: int = 4096
    micro_batch: int = 8
    turn_seconds: float = 0.5
    turns: int = 15
    texts: int = 10_000
    encodings: int = 7


SMOKE = Sizes(tokens=40_000, seq_length=64, micro_batch=2, turn_seconds=0.01, turns=2, texts=20, encodings=2)

Tick = Callable[[], None]


def measure_windows(sizes: Sizes, tick: Tick) -> dict[str, Any]:
    """Windows per second of every contender that is installed, by the clock and by the CPU, medians over turns.

    Raises AssertionError if what one fetches is wrong.
    """
    rates: dict[str, list[tuple[float, float]]] = {}
    fetchers, missing = {}, {}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        make_corpora(Path(folder), sizes.tokens)
        for name, (package, make) in CONTENDERS.items():
            if package is not None and version(package) is None:
                missing[name] = f"{package} is not installed"
                continue
            fetchers[name] = make(Path(folder), sizes.seq_length, sizes.micro_batch)
            for _ in range(max(1, min(200, 1600 // sizes.micro_batch))):  # files into memory, checksums checked
                fetched = fetchers[name]()
            check(name, fetched)
            rates[name] = []
        for _ in range(sizes.turns):
            for name, fetch in fetchers.items():
                rates[name].append(turn(fetch, sizes))
                tick()
    runs = {}
    for name, turns in rates.items():
        clock, cpu = zip(*turns, strict=True)
        low, median, high = statistics.quantiles(clock, n=4, method="inclusive")
        runs[name] = {"per_second": median, "quartiles": [low, high], "per_cpu_second": statistics.median(cpu)}
    return {
        "seq_length": sizes.seq_length,
        "micro_batch": sizes.micro_batch,
        "megabytes": 4 * sizes.tokens / 1e6,
        "turns": sizes.turns,
        "target": TARGET,
        "runs": runs,
        "missing": missing,
    }


def turn(fetch: Callable[[], object], sizes: Sizes) -> tuple[float, float]:
    """Windows per second by the clock and per second on the CPU, over one turn."""
    start, cpu, windows = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - start < sizes.turn_seconds:
        fetch()
        windows += sizes.micro_batch
    return windows / (time.perf_counter() - start), windows / max(time.process_time() - cpu, 1e-9)


def measure_tokenizers(sizes: Sizes, tick: Tick) -> list[dict[str, Any]]:
    """MB of text per second of each library on the demo's texts, and the share of documents with sentencepiece's ids.

    Every encoding starts from a fresh tokenizer, so that nothing is cached from the one before.
    """
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        export(DEMO / "tokenizer.model", Path(folder))
        for language in ("en", "zh"):
            texts = read_texts(DEMO / f"{language}.jsonl.zst", sizes.texts)
            megabytes = sum(len(text.encode()) for text in texts) / 1e6
            reference = LIBRARIES["sentencepiece"](DEMO / "tokenizer.model", Path(folder))(texts)
            seconds: dict[str, list[tuple[float, float]]] = {
                name: [] for name in LIBRARIES if version(name) is not None
            }
            same = {}
            for _ in range(sizes.encodings):
                for name in seconds:
                    encode = LIBRARIES[name](DEMO / "tokenizer.model", Path(folder))
                    start, cpu = time.perf_counter(), time.process_time()
                    ids = encode(texts)
                    seconds[name].append((time.perf_counter() - start, time.process_time() - cpu))
                    same[name] = 100 * sum(a == b for a, b in zip(ids, reference, strict=True)) / len(texts)
                    tick()
            for name, times in seconds.items():
                clock, on_cpu = zip(*times, strict=True)
                rows.append(
                    {
                        "language": language,
                        "library": name,
                        "megabytes": megabytes,
                        "documents": len(texts),
                        "mb_per_second": megabytes / statistics.median(clock),
                        "mb_per_cpu_second": megabytes / statistics.median(on_cpu),
                        "same_documents": same[name],
                    }
                )
    return rows


PARTS: dict[str, Callable[[Sizes, Tick], Any]] = {"windows": measure_windows, "tokenizers": measure_tokenizers}


def main(
    part: Annotated[list[str] | None, typer.Option(help=f"measure only this ({', '.join(PARTS)})")] = None,
    out: Annotated[Path, typer.Option(help="folder of the results")] = Path("benchmarks/results"),
    smoke: Annotated[bool, typer.Option(help="tiny sizes, to see that it runs")] = False,
) -> None:
    """Measure megaflow's data path on this CPU."""
    torch.set_num_threads(1)
    sizes = SMOKE if smoke else Sizes()
    path = out / f"data-{date.today().isoformat()}.json"
    turns = {"windows": len(CONTENDERS) * sizes.turns, "tokenizers": 2 * len(LIBRARIES) * sizes.encodings}
    parts = {name: (turns[name], partial(measure, sizes)) for name, measure in PARTS.items()}
    result = measure_parts(path, parts, part, PACKAGES)
    path.with_suffix(".md").write_text(markdown(result))
    draw(result, path.with_suffix(".png"))
    typer.echo(markdown(result))
    typer.echo(path)


if __name__ == "__main__":
    typer.run(main)
