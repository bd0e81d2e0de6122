"""The sampler's promises, one by one, on the ids that one real run logged: killed, moved, its mix changed twice.

Everything expected is worked out here from the configs alone, in fractions: nothing of the planner is asked.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from megaflow.config import Config
from megaflow.config_load import dump_config, parse_config
from megaflow.data.corpus.manifest import read_manifest
from megaflow.tools.data import change
from megaflow.train.samples import read_samples, sample_dir
from tests.train.conftest import SEQ_LENGTH, tiny_config
from tests.train.runs import killed, run

GROUP_OF = {0: "en", 1: "zh", 2: "parallel", 3: "instruction", 4: "en"}
"""Of each source by its flat index; the last one is appended mid-run."""
SHARE = {0: Fraction(1, 4), 4: Fraction(3, 4)}
"""Of the English group, once it has two sources."""
SECOND, THIRD, STEPS = 7, 13, 18
"""First steps of the second and third mix, and the last step."""


@dataclass(frozen=True)
class Row:
    """One logged sequence and where it was trained on."""

    step: int
    rank: int
    ranks: int
    micro_batch: int
    micro_batches: int
    card: int
    source: int
    epoch: int
    window: int

    @property
    def id(self) -> tuple[int, int, int]:
        return self.source, self.epoch, self.window


def edited(config: Config, corpora: dict[str, Path]) -> Config:
    tree = config.model_dump(mode="json")
    tree["data"]["groups"]["en"]["sources"]["en_source"]["weight"] = 1
    tree["data"]["groups"]["en"]["sources"]["more"] = {"path": str(corpora["zh"]), "weight": 3}
    tree["train"]["global_batch_size"] = 12
    return parse_config(tree, "edited")


@pytest.fixture(scope="module")
def logged(corpora: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of a run that was killed, moved and changed while it trained, and of one with the same mixes undisturbed.

    Ranks x micro-batch: 2 x 2, then 4 x 1, then 3 x 4 from the second mix on, 2 x 3 (killed again), 6 x 1 at last.
    """
    folder = tmp_path_factory.mktemp("promises")
    file = folder / "edited.yaml"

    def configured(name: str, micro_batch: int, steps: int = STEPS) -> Config:
        return tiny_config(corpora, folder / name, train__micro_batch_size=micro_batch, train__steps=steps)

    for name, moves in (("moved", True), ("whole", False)):
        if moves:
            killed(configured(name, 2), 2, rank=1, step=6)
            run(configured(name, 1, steps=6), 4)
        else:
            run(configured(name, 4, steps=6))
        config = edited(configured(name, 4), corpora)
        file.write_text(dump_config(config))
        change(Path(config.run_dir), at_step=SECOND, config=file, why="more English, larger batches")
        if moves:
            run(edited(configured(name, 4, steps=10), corpora), 3)
        else:
            run(edited(configured(name, 4, steps=10), corpora))
        change(Path(config.run_dir), at_step=THIRD, weights="en=0.45,zh=0.55,parallel=0,instruction=0", why="off")
        if moves:
            killed(edited(configured(name, 3), corpora), 2, rank=0, step=15)
            run(edited(configured(name, 1), corpora), 6)
        else:
            run(edited(configured(name, 4), corpora))
    return folder / "moved", folder / "whole"


@pytest.fixture(scope="module")
def rows(logged: tuple[Path, Path]) -> list[Row]:
    """Every sequence trained on, by step and card; of a step that was run twice what its last launch ran."""
    found: dict[int, tuple[int, list[Row]]] = {}
    for path in sorted(sample_dir(logged[0]).glob("from-*.jsonl")):
        launch, place, _ = path.name.split(".")
        start, (rank, ranks) = int(launch.removeprefix("from-")), map(int, place.removeprefix("dp").split("-of-"))
        for record in map(json.loads, path.read_text().splitlines()):
            batches = record["micro_batches"]
            these = [
                Row(record["step"], rank, ranks, m, len(batches), *card)
                for m, batch in enumerate(batches)
                for card in batch
            ]
            known, kept = found.get(record["step"], (-1, []))
            found[record["step"]] = (start, these if known < start else kept + these)
    return [row for _, (_, step) in sorted(found.items()) for row in sorted(step, key=lambda row: row.card)]


def by_step(rows: list[Row]) -> Iterator[tuple[int, list[Row]]]:
    for step in range(1, STEPS + 1):
        yield step, [row for row in rows if row.step == step]


def batch_size(step: int) -> int:
    return 8 if step < SECOND else 12


def exact(step: int) -> dict[str, Fraction]:
    """A step's sequences of each group, before rounding: the ramp over 8 steps, then the weights set by hand."""
    if step >= THIRD:
        weights = {
            "en": Fraction(45, 100),
            "zh": Fraction(55, 100),
            "parallel": Fraction(0),
            "instruction": Fraction(0),
        }
    else:
        first = {"en": 5, "zh": 1, "parallel": 4, "instruction": 0}
        last = {"en": 1, "zh": 4, "parallel": 2, "instruction": 3}
        way = Fraction(min(step - 1, 8), 8)
        weights = {name: ((1 - way) * first[name] + way * last[name]) / 10 for name in first}
    return {name: batch_size(step) * weight for name, weight in weights.items()}


def groups(rows: list[Row]) -> Counter[str]:
    return Counter(GROUP_OF[row.source] for row in rows)


EPSILON = Fraction(1, 2**20)
"""What compiling weights to 32 bits may add to a step's share."""


def test_g0_batches_are_exact(rows: list[Row]) -> None:
    for step, found in by_step(rows):
        assert [row.card for row in found] == list(range(batch_size(step)))


def test_g1_every_step_follows_the_schedule(rows: list[Row]) -> None:
    for step, found in by_step(rows):
        for name, share in exact(step).items():
            assert math.floor(share - EPSILON) <= groups(found)[name] <= math.ceil(share + EPSILON), (step, name)
            assert share > 0 or groups(found)[name] == 0
        english = [row for row in found if GROUP_OF[row.source] == "en"]
        for source, share in SHARE.items() if step >= SECOND else ():
            count = sum(row.source == source for row in english)
            assert abs(count - share * len(english)) < 1, (step, source)


def test_g2_nothing_drifts(rows: list[Row]) -> None:
    due: Counter[str] = Counter()
    for step, _ in by_step(rows):
        due.update(exact(step))  # type: ignore[arg-type]
        got = groups([row for row in rows if row.step <= step])
        assert all(abs(got[name] - due[name]) <= Fraction(12, 10) for name in due), step


@pytest.mark.parametrize("per_micro_batch", [False, True])
def test_g3_g4_every_rank_and_micro_batch_has_the_ratios(rows: list[Row], per_micro_batch: bool) -> None:
    layouts = set()
    for _, found in by_step(rows):
        ranks, micro_batches = found[0].ranks, found[0].micro_batches
        layouts.add((ranks, micro_batches))
        parts = [(r, m) for r in range(ranks) for m in range(micro_batches if per_micro_batch else 1)]
        for place in parts:
            part = [row for row in found if (row.rank, row.micro_batch if per_micro_batch else 0) == place]
            assert len(part) == len(found) // len(parts)
            for key in (lambda row: row.source, lambda row: GROUP_OF[row.source]):
                whole, mine = Counter(map(key, found)), Counter(map(key, part))
                assert all(abs(mine[k] - Fraction(whole[k], len(parts))) < 1 for k in whole)
    assert layouts >= {(4, 2), (3, 1), (6, 2)}


def test_g5_the_order_is_that_of_a_run_left_alone(logged: tuple[Path, Path], rows: list[Row]) -> None:
    assert {step: [row.id for row in found] for step, found in by_step(rows)} == read_samples(logged[1])


def test_g6_g8_every_window_once_an_epoch(rows: list[Row], corpora: dict[str, Path]) -> None:
    """Through every change: a source's epochs follow one another, whole, without a window twice or missed."""
    ended = 0
    for source, group in GROUP_OF.items():
        manifest = read_manifest(Path(f"{corpora['zh' if source == 4 else group]}.json"))
        windows = manifest.packs or manifest.tokens // SEQ_LENGTH
        mine = [row for row in rows if row.source == source]
        assert [row.epoch for row in mine] == [i // windows for i in range(len(mine))]
        for epoch in range(len(mine) // windows + 1):
            of_epoch = [row.window for row in mine if row.epoch == epoch]
            assert len(set(of_epoch)) == len(of_epoch) <= windows
            assert all(0 <= window < windows for window in of_epoch)
            ended += len(of_epoch) == windows
    assert ended  # at least one epoch came to its end


def test_g7_the_logged_digests_are_those_of_the_ids(logged: tuple[Path, Path], rows: list[Row]) -> None:
    records = map(json.loads, (logged[0] / "metrics.jsonl").read_text().splitlines())
    known = {record["step"]: record["digest"] for record in records if record["kind"] == "train"}
    assert sorted(known) == list(range(1, STEPS + 1))
    digest = hashlib.blake2b((0).to_bytes(8, "little"), digest_size=8).digest()
    names = list(dict.fromkeys(GROUP_OF.values()))
    for step, found in by_step(rows):
        members: dict[str, list[int]] = {name: [] for name in names}
        for source, group in GROUP_OF.items():
            if source != 4 or step >= SECOND:
                members[group].append(source)
        numbers: list[Any] = [step]
        numbers += [sum(row.source == source for row in found) for name in names for source in members[name]]
        for row in found:
            group = GROUP_OF[row.source]
            numbers += [names.index(group), members[group].index(row.source), row.epoch, row.window]
        digest = hashlib.blake2b(
            digest + b"".join(number.to_bytes(8, "little") for number in numbers), digest_size=8
        ).digest()
        assert digest.hex() == known[step], step
