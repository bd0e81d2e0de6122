"""The kernels' benchmark: its floors against numbers computed by hand, and all of it rehearsed on tiny shapes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import kernels as benchmark
from benchmarks import kernels_floors as floors
from benchmarks.kernels import Job, measure, measure_all
from benchmarks.kernels_attention import packed_documents, whole_sequences
from benchmarks.kernels_floors import Ceilings, Work
from benchmarks.kernels_ops import rms_norm
from benchmarks.kernels_problem import OURS, Contender, Problem, Run, distance, same
from benchmarks.kernels_report import draw, lines_of, markdown
from benchmarks.kernels_specs import REHEARSAL, Sizes, Spec, specs
from benchmarks.kernels_timing import FEWEST, GpuTimer, HostTimer, Times
from benchmarks.worker import JobDied

H200 = Ceilings(4.3, 790.0)
FIRST = Sizes().models[0]
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("work", "megabytes", "ms"),
    [
        (floors.rms_norm(16384, 4096, False)["forward"], 268, 0.062),
        (floors.rms_norm(16384, 4096, True)["forward"], 537, 0.125),
        (floors.rms_norm(16384, 4096, False)["backward"], 403, 0.094),
        (floors.rms_norm(16384, 4096, True)["backward"], 537, 0.125),
        (floors.rotary(16384, 4096)["backward"], 537, 0.125),
        (floors.swiglu(16384, 11008)["forward"], 1082, 0.252),
        (floors.swiglu(16384, 11008)["backward"], 1804, 0.419),
        (floors.cross_entropy(16384, 32000)["forward + backward"], 2097, 0.488),
        (floors.cross_entropy(16384, 55296)["forward + backward"], 3624, 0.843),
        (floors.embedding(16384, 4096, 32000)["backward"], 396, 0.092),
        (floors.adamw(6_738_415_616, False)["step"], 188_676, 43.9),
        (floors.adamw(6_738_415_616, True)["step"], 175_199, 40.7),
        (floors.squared_norm(6_738_415_616, 2)["norm"], 13_477, 3.13),
        (floors.squared_norm(6_738_415_616, 4)["norm"], 26_954, 6.27),
    ],
)
def test_bytes_and_their_floors(work: Work, megabytes: float, ms: float) -> None:
    assert work.bound == "bytes"
    assert round(work.bytes / 1e6) == megabytes
    assert work.floor_ms(H200) == pytest.approx(ms, rel=0.01)


def test_shards_move_a_third_more_than_a_whole_vocabulary() -> None:
    for vocabulary, megabytes in ((32000, 3146), (55296, 5436)):
        parts = floors.shard_cross_entropy(16384, vocabulary // 8)
        assert round(8 * sum(part.bytes for part in parts.values()) / 1e6) == megabytes


@pytest.mark.parametrize(
    ("work", "tflop", "ms"),
    [
        (floors.attention(whole_sequences(FIRST), 32, 128)["forward"], 0.550, 0.70),
        (floors.attention(whole_sequences(FIRST), 32, 128)["backward"], 1.374, 1.74),
        (floors.linear_cross_entropy(16384, 4096, 32000)["forward + backward"], 12.88, 16.3),
        (floors.linear_cross_entropy(16384, 4096, 55296)["forward + backward"], 22.27, 28.2),
    ],
)
def test_flop_and_their_floors(work: Work, tflop: float, ms: float) -> None:
    assert work.bound == "flops"
    assert work.flops / 1e12 == pytest.approx(tflop, rel=1e-3)
    assert work.floor_ms(H200) == pytest.approx(ms, rel=0.01)


def test_a_product_that_moves_too_much_is_bound_by_memory() -> None:
    work = Work(4.3e9, 790e9, "flops")
    assert work.floor_ms(H200) == pytest.approx(1.0)
    assert Work(2 * 4.3e9, 790e9, "flops").floor_ms(H200) == pytest.approx(2.0)


def test_packed_documents_fill_the_sequences_and_cross_no_edge() -> None:
    lengths = packed_documents(FIRST)
    edges = torch.tensor([0, *lengths]).cumsum(0)
    assert set(range(0, 16385, 4096)) <= set(edges.tolist())
    assert 8 < len(lengths) < 40
    assert lengths == packed_documents(FIRST)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("results")
    benchmark.main(budget=300, only=None, quick=True, out=path, inline=True, name=None)
    return path


@pytest.fixture(scope="module")
def result(out: Path) -> dict[str, Any]:
    (path,) = out.glob("kernels-rehearsal-*.json")
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def test_megaflow_is_measured_in_every_phase_of_everything(result: dict[str, Any]) -> None:
    assert list(result["problems"]) == [spec.name for spec in specs(REHEARSAL)]
    for spec in specs(REHEARSAL):
        runs = result["problems"][spec.name]["runs"]
        assert list(runs[OURS]) == list(spec.works)
        for run in runs[OURS].values():
            assert 0 < run["low"] <= run["ms"] <= run["high"]
            assert run["error"] < 4e-3


def test_peers_are_measured_or_said_why_not(result: dict[str, Any]) -> None:
    for name, peers in {
        "rms_norm, 7B": {"F.rms_norm", "Liger", "torch eager"},
        "attention, causal, 7B": {"SDPA cuDNN", "SDPA flash", "varlen_attn"},
        "linear + cross-entropy, V 96, 7B": {"Liger", "Liger, fp32 sums", "torch eager"},
        "adamw, fp32 master": {"torch AdamW(fused), fp32 gradients, bf16 copies"},
    }.items():
        row = result["problems"][name]
        assert peers <= {*row["runs"], *row["failed"]}
        assert not set(row["runs"]) & set(row["failed"])
    assert result["problems"]["attention, causal, 7B"]["failed"]["megaflow triton"].endswith("it needs CUDA")
    assert "torch eager" in result["problems"]["rotary in place, 13B"]["runs"]


def test_tables_and_picture_say_that_it_was_a_rehearsal(out: Path, result: dict[str, Any]) -> None:
    (table,) = out.glob("kernels-rehearsal-*.md")
    assert "a rehearsal on a CPU with tiny shapes, no figures" in table.read_text()
    (picture,) = out.glob("kernels-rehearsal-*.png")
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert result["rehearsal"]


def made_up() -> dict[str, Any]:
    times = {"low": 0.1, "high": 0.2, "runs": 9, "error": 1e-3}
    ours, peer = {"forward": {"ms": 0.125, **times}}, {"forward": {"ms": 0.25, **times}}
    work = {"bytes": 4.3e8, "flops": 1e8, "bound": "bytes", "intensity": 0.23}
    row = {"works": {"forward": work}, "runs": {OURS: ours, "Peer": peer}, "failed": {"Other": "ImportError: no"}}
    heading = {"date": "2026-01-01", "rehearsal": False, "device": "A GPU", "python": "3", "cuda": "13", "versions": {}}
    ceilings = {"copy_tb": 4.3, "matmul_tflops": 790.0}
    return {**heading, "ceilings": ceilings, "problems": {"op": {**row, "again": ours}}}


def test_the_table_has_shares_of_the_floor_ratios_and_reasons() -> None:
    text = markdown(made_up())
    assert "| op: forward | 430 MB | 0.100 | 0.125 (0.100 ... 0.200) | 80 % | 3.44 TB/s | Peer 0.250 (2.00 x) |" in text
    assert "- Other: ImportError: no (op)" in text
    assert "op: forward 1.000" in text
    (line,) = lines_of(made_up())
    assert line.peers == {"Peer": 0.25}


def test_a_picture_of_few_rows_is_drawn(tmp_path: Path) -> None:
    draw(made_up(), tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def wrong_norm(x: torch.Tensor) -> torch.Tensor:
    return x * 1.02


def test_wrong_results_are_not_timed() -> None:
    x = torch.ones(8)
    problem = Problem({"forward": [x]}, [])
    right = Contender("right", lambda: {"forward": Run(lambda: x * 1.001, same)})
    assert measure(problem, right, CPU, 0.001)["forward"]["error"] == pytest.approx(1e-3, rel=1e-2)
    for change in (wrong_norm, lambda x: x * torch.nan, lambda x: x[:4]):
        wrong = Contender("wrong", partial(lambda change: {"forward": Run(lambda: change(x), same)}, change))
        with pytest.raises(AssertionError):
            measure(problem, wrong, CPU, 0.001)


def test_what_a_call_overwrites_is_made_anew_before_every_run() -> None:
    x, seen = torch.zeros(1), []
    call: Callable[[], Any] = lambda: seen.append(float(x.add_(1)))  # noqa: E731
    times = HostTimer().measure(call, lambda: x.zero_(), 0.0)
    assert seen == [1.0] * times.runs
    assert Times.of([1.0, 2.0, 3.0]).ms == 2.0


class Stream:
    """The order in which a GPU would do things, and its clock."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.now = 0.0

    def event(self, enable_timing: bool) -> Any:
        stream, event = self, type("Event", (), {})()
        event.record = lambda: (setattr(event, "time", stream.now), stream.log.append("event"))
        event.elapsed_time = lambda end: end.time - event.time
        return event


def test_a_gpu_s_events_stand_around_the_call_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Stream()

    def does(name: str, ms: float) -> Callable[..., None]:
        def call(*_: Any) -> None:
            stream.now += ms
            stream.log.append(name)

        return call

    timer = GpuTimer.__new__(GpuTimer)
    timer.buffer = type("Buffer", (), {"max": does("flush", 0.1)})()
    for name, value in {"Event": stream.event, "_sleep": does("sleep", 1.0), "synchronize": lambda: None}.items():
        monkeypatch.setattr(torch.cuda, name, value, raising=False)
    times = timer.measure(does("call", 0.25), does("prepare", 5.0), 0.0)
    assert (times.ms, times.runs) == (pytest.approx(0.25), FEWEST)
    assert stream.log[:6] == ["prepare", "call"] * 3  # warm-up
    assert stream.log[6:] == ["prepare", "sleep", "flush", "event", "call", "event"] * FEWEST


def test_distance_sees_numbers_that_are_none() -> None:
    assert distance(torch.tensor([1.0, torch.nan]), torch.ones(2)) == float("inf")
    assert distance(torch.zeros(2), torch.zeros(2)) == 0.0


def test_a_problem_whose_process_dies_goes_on_with_the_next_contender(monkeypatch: pytest.MonkeyPatch) -> None:
    jobs: list[Job] = []

    class Dying:
        def __init__(self, *_: Any) -> None: ...
        def close(self) -> None: ...

        def run(self, job: Any, stop: float = 0.0) -> Iterator[dict[str, Any]]:
            if job == "ceilings":
                yield {"ceilings": {}}
                return
            jobs.append(job)
            yield {"meta": {}}
            for name in (OURS, "first", "second"):
                if name not in job.skip:
                    yield {"contender": name}
                    if name == "first":
                        raise JobDied("said nothing")
                    yield {"contender": name, "runs": {"forward": {"ms": 1.0}}, "seconds": 1}

    monkeypatch.setattr(benchmark, "Worker", Dying)
    found: dict[str, Any] = {"problems": {}}
    spec = Spec("rms_norm", floors.rms_norm(4, 8, False), partial(rms_norm, FIRST))
    options = benchmark.Options(rehearsal=True, inline=False, until=float("inf"))
    measure_all({0: spec}, [False, True], found, options, lambda: None)
    row = found["problems"]["rms_norm"]
    assert row["failed"] == {"first": "said nothing"}
    assert list(row["runs"]) == [OURS, "second"]
    assert row["again"] == {"forward": {"ms": 1.0}}  # megaflow, beside the slow ones
    assert [set(job.skip) for job in jobs] == [set(), {OURS, "first"}, {"first", "second"}]


def test_without_time_nothing_is_begun(tmp_path: Path) -> None:
    benchmark.main(budget=-1, only=["swiglu, 7B"], quick=True, out=tmp_path, inline=True, name="late")
    row = json.loads((tmp_path / "late.json").read_text())["problems"]["swiglu, 7B"]
    assert row["failed"] == {"everyone": "no time was left"}
    assert row["runs"] == {}
