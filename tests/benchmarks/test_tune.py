"""The tuner without a GPU: what it enumerates and drops, and that it writes its table as it should."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import typer
from triton.runtime.interpreter import InterpretedFunction

from benchmarks import tune, tune_timing
from benchmarks.sanitize import kernels
from benchmarks.tune import format_table, groups, read_ranking, score, write_winner
from benchmarks.tune_candidates import CHOICES, Outcome, candidates, current, is_kernel
from benchmarks.tune_timing import Group, Job, time_group, time_job
from benchmarks.worker import JobDied
from megaflow.kernels.attention import Segments
from megaflow.kernels.tuned import TABLE, table
from tests.kernels.interpreter import interpreted

ROOT = Path(__file__).parents[2]


def test_candidates_vary_what_the_configuration_has() -> None:
    config = {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2}
    found = candidates(config)
    assert found[0] == config
    assert len(found) == len({json.dumps(x) for x in found}) == 3 * 3 * 2 * 4
    special = {"BLOCK_M": 128, "STAGES": 2, "COMPUTE_REGISTERS": 240, "other": 1, "num_warps": 4}
    for x in candidates(special):
        assert (x["num_warps"], x["COMPUTE_REGISTERS"], x["other"]) == (4, 240, 1)
    assert len(candidates(special)) == len(CHOICES["BLOCK_M"]) * len(CHOICES["STAGES"])


def test_every_kernel_of_the_table_is_tuned_for_its_head_sizes() -> None:
    found = groups(None, None, 90)
    assert set(found) == {Group(name, dim) for name in table() for dim in (64, 128, 256) if current(name, dim, 90)}
    assert {group.kernel for group in found} == set(table())
    with pytest.raises(typer.BadParameter, match="'flash' is not in the table"):
        groups(["flash"], None, 90)


def test_each_name_in_the_table_is_one_kernel() -> None:
    found = {}
    for place in kernels(gluon=True):
        module, name = place.split(".")
        function = SimpleNamespace(__module__=f"megaflow.kernels.attention.{module}", __name__=name)
        found |= {(kernel, place): None for kernel in table() if is_kernel(function, kernel)}
    assert [kernel for kernel, _ in sorted(found)] == sorted(table())
    assert ("flash_forward", "flash_forward.forward_kernel") in found


DRY_RUN = """
from pathlib import Path
from benchmarks import tune, tune_candidates
tune_candidates.CHOICES = {"BLOCK_M": (64, 128), "num_warps": (4,), "num_stages": (2, 4)}
tune.main(["flash_forward"], [256], True, 90, None, 60, 2, Path(%r), Path("/dev/null"))
"""


def test_a_dry_run_ranks_what_neither_spills_nor_needs_too_much_memory(tmp_path: Path) -> None:
    # a process in which nothing has been interpreted: that changes the language
    command = [sys.executable, "-c", DRY_RUN % str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("tune-ranked-*.json")
    outcomes = [Outcome(**x) for x in json.loads(path.read_text())["groups"]["flash_forward/256"]["compiled"]]
    assert outcomes[0].config == current("flash_forward", 256, 90)
    assert outcomes[0].dropped is None
    dropped = {x.dropped.split()[0] for x in outcomes if x.dropped}
    assert "spills" in dropped
    assert all((x.spills > 0) == (x.dropped or "").startswith("spills") for x in outcomes)
    assert all(0 < x.registers <= 255 and x.shared > 0 for x in outcomes)
    assert "<- present" in done.stdout
    ranking = read_ranking(path, [Group("flash_forward", 256), Group("flash_forward", 64)], 90)
    assert ranking == {Group("flash_forward", 256): outcomes}
    with pytest.raises(typer.BadParameter, match="made for compute capability 90, this is 80"):
        read_ranking(path, [Group("flash_forward", 256)], 80)


def test_the_table_is_written_as_it_was() -> None:
    assert format_table(json.loads(TABLE.read_text())) == TABLE.read_text()


def test_a_winner_changes_one_line(tmp_path: Path) -> None:
    path = tmp_path / "tuned.json"
    path.write_text(TABLE.read_text())
    write_winner(path, Group("flash_forward", 128), 90, {"BLOCK_M": 256, "num_warps": 8})
    before, after = TABLE.read_text().splitlines(), path.read_text().splitlines()
    changed = [(old, new) for old, new in zip(before, after, strict=True) if old != new]
    ((_, new),) = changed
    assert new == '   "128": {"BLOCK_M": 256, "num_warps": 8},'
    assert [x.name for x in tmp_path.iterdir()] == ["tuned.json"]


def test_a_new_gpu_gets_an_entry_beside_the_others(tmp_path: Path) -> None:
    path = tmp_path / "tuned.json"
    path.write_text(TABLE.read_text())
    write_winner(path, Group("flash_forward", 128), 100, {"BLOCK_M": 256})
    found, old = json.loads(path.read_text()), json.loads(TABLE.read_text())
    entry = found["flash_forward"].pop("100")
    assert found == old
    assert entry == old["flash_forward"]["90"] | {"128": {"BLOCK_M": 256}}


class Timed:
    """In the place of a worker: candidates whose processes die, and the times of the others."""

    def __init__(self, deadly: set[int], late: float = 0.0) -> None:
        self.deadly, self.late = deadly, late
        self.started = 0

    def run(self, job: Job) -> Iterator[dict[str, Any]]:
        self.started += 1
        for number, config in enumerate(job.configs):
            yield {"number": number}
            if config["BLOCK_M"] in self.deadly:
                raise JobDied("said nothing for 60 seconds")
            time.sleep(self.late)
            yield {"number": number, "causal": {"ms": 1.0}, "packed": {"ms": config["BLOCK_M"]}}


def rows_of(worker: Timed, until: float = float("inf")) -> list[dict[str, Any]]:
    configs = [{"BLOCK_M": n} for n in (5, 3, 7, 2)]
    return time_group(worker, Job(Group("flash_forward", 64), 90, configs[0], configs), until)  # type: ignore[arg-type]


def test_candidates_behind_a_deadly_one_are_timed() -> None:
    worker = Timed({3, 7})
    rows = rows_of(worker)
    assert [score(row) for row in rows] == [6.0, float("inf"), float("inf"), 3.0]
    assert rows[1]["dropped"] == "said nothing for 60 seconds"
    assert worker.started == 3


def test_candidates_without_time_are_said_to_be() -> None:
    rows = rows_of(Timed(set(), late=0.05), time.time() + 0.02)
    assert [row.get("dropped") for row in rows] == [None, *["no time was left"] * 3]


class Event:
    """A GPU's event without a GPU."""

    def __init__(self, enable_timing: bool) -> None: ...

    def record(self) -> None:
        self.time = time.perf_counter()

    def elapsed_time(self, end: Event) -> float:
        return 1e3 * (end.time - self.time)


@pytest.mark.parametrize("kernel", ["flash_forward", "flash_backward_keys"])
def test_timing_rehearsed_in_the_interpreter(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = [40, 24]
    edges = torch.tensor([0, *lengths]).cumsum(0).int()
    segments = Segments.documents(edges, max(lengths), sum(lengths))
    x, grad = torch.randn(64, 1, 3, 64).requires_grad_(), torch.randn(64, 1, 1, 64)
    monkeypatch.setattr(tune_timing, "inputs", lambda head_dim, packed: (segments, x, grad))
    monkeypatch.setattr(tune_timing, "timer", lambda: SimpleNamespace(buffer=torch.zeros(1)))
    monkeypatch.setattr(tune_timing, "WIDTH", 64)
    monkeypatch.setattr(tune_timing, "RUNS", 3)
    monkeypatch.setattr(tune_timing, "JITFunction", InterpretedFunction)
    for name, value in {"Event": Event, "_sleep": lambda cycles: None, "synchronize": lambda: None}.items():
        monkeypatch.setattr(torch.cuda, name, value, raising=False)
    before = json.dumps(table())
    monkeypatch.setattr(tune_timing, "use", lambda *given: table()[kernel]["80"].update({"fp32-128": given[-1]}))
    present = table()[kernel]["80"]["fp32-128"]
    other = {**present, "BLOCK_M": 16}
    with interpreted():
        messages = list(time_job(Job(Group(kernel, 64), 80, present, [present, other, {"BLOCK_M": 16}])))
    table()[kernel]["80"]["fp32-128"] = present
    assert json.dumps(table()) == before
    assert [message["number"] for message in messages] == [0, 0, 1, 1, 2, 2]
    assert "dropped" in messages[-1]  # a configuration that lacks what the kernel needs
    for message in messages[1:4:2]:
        assert message["packed"]["ms"] > 0
        assert message["causal"]["runs"] == 3
    assert InterpretedFunction.run.__name__ == "run"  # as it was


def test_without_a_gpu_there_is_only_a_ranking() -> None:
    with pytest.raises(typer.BadParameter, match="--rank-only"):
        tune.main(None, None, False, None, None, 1, None, Path("unused"), Path("unused"))
