"""The one table of layouts and features, and choices of it: every pair of features, or all that cuts a run up."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, reduce
from operator import or_
from typing import Any, NamedTuple

from megaflow.config import ModelConfig
from megaflow.config_parallel import ParallelConfig

SEQ_LENGTH = 24
"""Tokens; cp 2, 3 and 4 and tp under sequence parallelism divide it."""


class Grid(NamedTuple):
    """Sizes of a grid of ranks."""

    pp: int
    dp: int
    cp: int
    tp: int

    @property
    def world(self) -> int:
        return self.pp * self.dp * self.cp * self.tp

    def __str__(self) -> str:
        sizes = [f"{name}{size}" for name, size in self._asdict().items() if size > 1]
        return " x ".join(sizes) or "one process"


ONE = Grid(1, 1, 1, 1)
GRIDS = [Grid(*sizes) for sizes in itertools.product(range(1, 5), repeat=4) if Grid(*sizes).world <= 4]

CUTS: dict[str, list[Any]] = {
    "grid": GRIDS,
    "sequence_parallel": [False, True],
    "schedule": ["1f1b", "gpipe", "interleaved", "interleaved 3", "zb_h1", "zb_v"],
    "layers": ["even", "uneven"],
    "zero": [True, False],
    "grad_reduce": ["fp32", "bf16"],
    "micro_batches": [1, 2, 4],
}
"""What cuts up the work, and its values; `legal` says which of them go together."""

KINDS: dict[str, list[Any]] = {
    "recompute": ["none", "selective", "full", "full, every 2nd"],
    "embeddings": ["untied", "tied"],
    "heads": ["grouped", "all"],
    "vocabulary": [199, 256, 130],
    "documents": ["packed", "whole"],
}
"""What goes with everything. Of the vocabularies nothing divides the first; tp 2 divides the second, and 4 too; of the
third the last rank of four has nothing but padding."""

Pair = frozenset[tuple[str, Any]]


class Task(NamedTuple):
    """What is trained, whatever the layout: one process's run of it is what the others must follow."""

    model: str
    """Its config as JSON."""
    sequences: int
    """Of a global batch."""
    documents: str

    @property
    def config(self) -> ModelConfig:
        return ModelConfig.model_validate_json(self.model)


@dataclass(frozen=True)
class Case:
    """One value of every feature."""

    grid: Grid = ONE
    sequence_parallel: bool = False
    schedule: str = "1f1b"
    layers: str = "even"
    zero: bool = True
    grad_reduce: str = "fp32"
    micro_batches: int = 2
    recompute: str = "none"
    embeddings: str = "untied"
    heads: str = "grouped"
    vocabulary: int = 199
    documents: str = "packed"

    def __str__(self) -> str:
        grid, world = self.grid, self.grid.world
        values = [
            str(grid),
            "sp" * self.sequence_parallel,
            self.schedule if grid.pp > 1 or self.schedule != "1f1b" else "",
            self.layers if self.layers == "uneven" else "",
            "zero" * (self.zero and grid.dp * grid.cp > 1),
            f"{self.grad_reduce} sums" if self.grad_reduce == "bf16" else "",
            f"recompute {self.recompute}" if self.recompute != "none" else "",
            self.embeddings if self.embeddings == "tied" else "",
            f"{self.heads} heads" if self.heads == "all" else "",
            f"vocabulary {self.vocabulary}" if self.vocabulary != 199 else "",
            f"{self.documents} documents" if self.documents == "whole" else "",
            f"{self.micro_batches} micro-batches",
        ]
        return f"{world}: " + ", ".join(value for value in values if value)

    @property
    def parallel(self) -> ParallelConfig:
        name, _, chunks = self.schedule.partition(" ")
        settings: dict[str, Any] = {
            "pp": self.grid.pp,
            "cp": self.grid.cp,
            "tp": self.grid.tp,
            "sequence_parallel": self.sequence_parallel,
            "schedule": name,
            "chunks": int(chunks or 0),
            "zero": self.zero,
            "grad_reduce": self.grad_reduce,
        }
        if self.layers == "uneven":
            settings["layers_per_chunk"] = uneven(self.num_layers, self.num_chunks)
        return ParallelConfig(**settings)

    @property
    def num_chunks(self) -> int:
        per_rank = {"interleaved": 2, "interleaved 3": 3, "zb_v": 2}
        return self.grid.pp * per_rank.get(self.schedule, 1)

    @property
    def num_layers(self) -> int:
        return max(3, self.num_chunks)

    @property
    def model(self) -> ModelConfig:
        heads = 12
        grouped = 6 if self.grid.tp == 3 else 4
        return ModelConfig(
            hidden_size=48,
            intermediate_size=72,
            num_layers=self.num_layers,
            num_heads=heads,
            num_kv_heads=heads if self.heads == "all" else grouped,
            vocab_size=self.vocabulary,
            tie_embeddings=self.embeddings == "tied",
            init_std=0.1,
        )

    @property
    def sequences(self) -> int:
        """Of a global batch; every grid's dp and number of micro-batches divides it."""
        return max(8, 4 * self.grid.dp)

    @property
    def task(self) -> Task:
        """What is trained."""
        return Task(self.model.model_dump_json(), self.sequences, self.documents)


def uneven(layers: int, chunks: int) -> list[int]:
    """Layers of every chunk, the second one without any and the others as unlike as they go."""
    return [layers + 2 - chunks, 0, *[1] * (chunks - 2)] if chunks > 1 else [layers]


def legal(cuts: Mapping[str, Any]) -> bool:
    """Whether these values of `CUTS` mean something together, and differ from another choice that means the same."""
    grid: Grid = cuts["grid"]
    if cuts["sequence_parallel"] and grid.tp == 1:
        return False
    if grid.dp * grid.cp == 1 and (not cuts["zero"] or cuts["grad_reduce"] == "bf16"):
        return False
    if grid.pp == 1:  # nothing to interleave; split backward passes and two chunks on a rank there are
        return cuts["schedule"] in ("1f1b", "zb_h1", "zb_v") and cuts["layers"] == "even"
    if cuts["schedule"].startswith("interleaved"):
        return cuts["micro_batches"] % grid.pp == 0
    return True


@cache
def legal_cuts() -> list[dict[str, Any]]:
    """All legal choices of `CUTS`."""
    choices = (dict(zip(CUTS, values, strict=True)) for values in itertools.product(*CUTS.values()))
    return [cuts for cuts in choices if legal(cuts)]


def pairs(values: Mapping[str, Any]) -> Iterator[Pair]:
    """The pairs of features that a case stands for; rounded sums are looked at less closely, and stand for their own
    pairs only."""
    rounded = values.get("grad_reduce") == "bf16"
    for pair in itertools.combinations(values.items(), 2):
        if not rounded or ("grad_reduce", "bf16") in pair:
            yield frozenset(pair)


def pairwise() -> list[Case]:
    """Few cases that have every legal pair of features, always the same: greedily the one with most new pairs next."""
    bits: dict[Pair, int] = {}

    def mask(values: Mapping[str, Any]) -> int:
        return sum(1 << bits.setdefault(pair, len(bits)) for pair in pairs(values))

    def union(masks: Iterable[int]) -> int:
        return reduce(or_, masks, 0)

    kinds = [(name, kind) for name, values in KINDS.items() for kind in values]
    choices = [(cuts, mask(cuts), union(mask({**cuts, name: kind}) for name, kind in kinds)) for cuts in legal_cuts()]
    missing = union(reach for _, _, reach in choices)
    missing |= union(mask(dict(pair)) for pair in itertools.combinations(kinds, 2) if pair[0][0] != pair[1][0])
    wanted_by = {kind: union(1 << bit for pair, bit in bits.items() if kind in pair) for kind in kinds}
    cases: list[Case] = []
    while missing:
        scores = [4 * (own & missing).bit_count() + (reach & missing).bit_count() for _, own, reach in choices]
        values = dict(choices[scores.index(max(scores))][0])
        for name, options in KINDS.items():
            gains = [(mask({**values, name: kind}) & missing).bit_count() for kind in options]
            wanted = [(wanted_by[name, kind] & missing).bit_count() for kind in options]
            values[name] = max(zip(gains, wanted, options, strict=True), key=lambda option: option[:2])[2]
        missing &= ~mask(values)
        cases.append(Case(**values))
    return cases


def product() -> list[Case]:
    """Every legal choice of `CUTS`, with values of `KINDS` dealt to them, always the same."""
    dealer = random.Random(0)
    return [Case(**cuts, **{name: dealer.choice(kinds) for name, kinds in KINDS.items()}) for cuts in legal_cuts()]
