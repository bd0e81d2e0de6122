"""The ids of the sequences each rank really trained on, for audit and for tests of elastic resume."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from megaflow.data.loader import Batch
from megaflow.errors import UserError
from megaflow.parallel.mesh import ParallelContext

SampleId = tuple[int, int, int]


class SampleLog:
    """Writes one line a step to `<run>/samples/from-<first step>.dp<rank>-of-<dp>.jsonl`.

    A line holds the step and `[card, source, epoch, window]` of every sequence this data-parallel rank trained on, by
    micro-batch. Files of launches that started at the same step or later are superseded and removed by the main rank
    before any rank opens its own.
    """

    def __init__(self, run_dir: Path, resumed_step: int, ctx: ParallelContext) -> None:
        path = sample_dir(run_dir) / f"from-{resumed_step:08d}.dp{ctx.dp_rank}-of-{ctx.dp}.jsonl"
        try:
            self.file = path.open("w")
        except OSError as error:
            raise UserError(
                f"{path}: cannot be written ({error.strerror}); mend it or set train.log_samples=false"
            ) from None

    def write(self, step: int, batches: list[Batch]) -> None:
        rows = [
            [
                [card, source, epoch, window]
                for (card, epoch, window), source in zip(b.cards, b.sources.tolist(), strict=True)
            ]
            for b in batches
        ]
        self.file.write(json.dumps({"step": step, "micro_batches": rows}) + "\n")
        self.file.flush()

    def close(self) -> None:
        self.file.close()


def sample_dir(run_dir: Path) -> Path:
    return run_dir / "samples"


def discard_superseded(run_dir: Path, resumed_step: int) -> None:
    """Removes the sample files of launches that started at `resumed_step` or later."""
    sample_dir(run_dir).mkdir(exist_ok=True)
    for path in sample_dir(run_dir).glob("from-*.jsonl"):
        if _first_step(path) >= resumed_step:
            path.unlink()


def read_samples(run_dir: Path) -> dict[int, list[SampleId]]:
    """Step -> (source, epoch, window) of every sequence trained on, in the order of the step's deck.

    A step that was run twice, because a kill lost it, counts as its last launch ran it.
    """
    cards: dict[int, tuple[int, dict[int, SampleId]]] = {}
    for path in sorted(sample_dir(run_dir).glob("from-*.jsonl")):
        launch = _first_step(path)
        for step, found in _lines(path):
            known_launch, known = cards.get(step, (-1, {}))
            cards[step] = (launch, found if known_launch < launch else known | found)
    return {step: [found[card] for card in sorted(found)] for step, (_, found) in sorted(cards.items())}


def _lines(path: Path) -> Iterator[tuple[int, dict[int, SampleId]]]:
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue  # torn by a kill: that step is run again by the next launch
        yield record["step"], {c: (s, e, w) for batch in record["micro_batches"] for c, s, e, w in batch}


def _first_step(path: Path) -> int:
    return int(path.name.removeprefix("from-").split(".")[0])
