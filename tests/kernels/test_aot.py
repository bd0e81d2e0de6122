"""Every kernel compiled for GPUs that are not there, and compared with what was committed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks.aot import Compiled, compile_all, offline
from benchmarks.kernels_aot import ARCHS, faults, read_baseline, regressions
from megaflow.kernels import cross_entropy
from megaflow.kernels.cross_entropy import Objective, Vocabulary
from megaflow.kernels.tuned import table
from tests.kernels.interpreter import interpreted, triton_ops

ROOT = Path(__file__).parents[2]
ROW = Compiled("norm.forward_kernel", 90, "4096 w8 s3", 32, 0, 32, {32: 1, 128: 6}, {128: 4}, "", 0)


def test_no_kernel_is_worse_than_in_the_baseline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In processes of their own, at once: the compiler takes a core for half a minute for each GPU."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(ROOT / "build" / "triton")}
    command = [sys.executable, "-m", "benchmarks.kernels_aot", "--arch"]
    logs = [tmp_path / f"{arch}.txt" for arch in ARCHS]
    running = []
    for arch, log in zip(ARCHS, logs, strict=True):
        with log.open("w") as file:
            process = subprocess.Popen([*command, str(arch)], cwd=ROOT, env=environment, stdout=file, stderr=file)
            running.append(process)
    codes = [process.wait(timeout=170) for process in running]
    with capsys.disabled():  # the table belongs in the log of every run
        for log in logs:
            print(f"\n{log.read_text()}")
    assert codes == [0, 0], "\n".join(log.read_text()[-2000:] for log in logs)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"registers": 41}, "41 registers, 32 before"),
        ({"shared": 64}, "64 bytes of shared memory, 32 before"),
        ({"loads": {32: 2, 128: 5}}, "2 accesses narrower than 16 bytes, 1 before"),
        ({"stores": {64: 1, 128: 3}}, "2 accesses narrower than 16 bytes, 1 before"),
        ({"products": "HMMA"}, "products by HMMA, nothing before"),
    ],
)
def test_what_is_worse_is_named(change: dict[str, object], line: str) -> None:
    found = regressions({"norm": replace(ROW, **change)}, {"norm": asdict(ROW)})  # type: ignore[arg-type]
    assert found == [f"norm: {line}"]


def test_what_is_better_or_nearly_equal_passes() -> None:
    assert regressions({"norm": replace(ROW, registers=40, loads={128: 6})}, {"norm": asdict(ROW)}) == []


def test_kernels_that_come_and_go_are_named() -> None:
    assert regressions({"new": ROW}, {"old": asdict(ROW)}) == ["old: is no longer launched", "new: is new"]


def test_faults_that_no_baseline_excuses() -> None:
    assert faults({"norm": ROW}) == []
    assert faults({"norm": replace(ROW, spills=8)}) == ["norm: 8 bytes of spills"]
    assert faults({"norm": replace(ROW, loads={32: 6})}) == ["norm: nothing is read 16 bytes at a time"]
    assert faults({"attention, 128": ROW}) == ["attention, 128: no matrix instruction"]


def test_what_was_interpreted_can_be_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter puts back what it exchanges: on a GPU, interpreted tests and others share a process."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    x, weight = torch.randn(3, 64), torch.ones(64)
    with interpreted():
        triton_ops().rms_norm(x, x, weight, 1e-5)
    ((_, row),) = compile_all(
        {"norm": partial(triton_ops().rms_norm, *(x.to("meta"),) * 2, weight.to("meta"), 1e-5)}, 90
    )
    assert (row.kernel, row.spills) == ("norm.forward_kernel", 0)


def test_the_labels_logit_is_read_before_any_warp_writes_over_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The interpreter runs one warp after another: only the machine code shows this order."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    logits, labels = torch.empty(8, 32000, dtype=torch.bfloat16, device="meta"), torch.empty(8, device="meta").int()
    with offline(90) as launches:
        cross_entropy.fused(logits, labels, Vocabulary(0, 32000), Objective(), gradient=True)
    ((_, _, kernel),) = launches
    accesses = re.findall(r"bar\.sync|ld\.global\.b16|st\.global\.v4", kernel.asm["ptx"])
    label = accesses.index("ld.global.b16")
    assert accesses[label : label + 3] == ["ld.global.b16", "bar.sync", "st.global.v4"]


def test_the_baseline_has_both_gpus() -> None:
    assert {row["arch"] for row in read_baseline().values()} == set(ARCHS)


def test_gpus_without_the_shared_memory_of_data_centres_take_configurations_that_fit() -> None:
    """99 KiB of a block on sm_86, sm_89 and sm_120: the first two take those of sm_80, the third the same."""
    assert all(row["shared"] <= 99 * 1024 for row in read_baseline().values() if row["arch"] == 80)
    assert all(archs["120"] == archs["80"] for archs in table().values() if "80" in archs)
