"""How the parts of the check on a GPU are put together, and that a part that is not good is not overlooked."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu_check import assemble, compare_losses, count_tests, losses_of, parts_of

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_check.sh"
NAMES = ("build", "prepare", "tests", "sanitize", "train", "kernels")
PASSED = '<testcase classname="tests.kernels.test_norm" name="test_a"/>'
SKIPPED = '<testcase classname="tests.kernels.test_norm" name="test_b"><skipped message="no CUDA device"/></testcase>'
FAILED = (
    '<testcase classname="tests.kernels.test_norm" name="test_c"><failure message="assert 1">E 1</failure></testcase>'
)


def uncollected(name: str, package: str) -> str:
    text = f"E   ModuleNotFoundError: No module named '{package}'"
    return f'<testcase classname="" name="{name}"><error message="collection failure">{text}</error></testcase>'


def suite(path: Path, *cases: str) -> Path:
    path.write_text(f"<testsuites><testsuite>{''.join(cases)}</testsuite></testsuites>")
    return path


def test_tests_are_counted(tmp_path: Path) -> None:
    found = count_tests(suite(tmp_path / "x.xml", PASSED, PASSED, SKIPPED), gpus=1)
    assert {key: found[key] for key in ("passed", "failed", "skipped", "wrong")} == {
        "passed": 2,
        "failed": 0,
        "skipped": 1,
        "wrong": None,
    }
    assert found["skipped for"] == {"no CUDA device": 1}


def test_on_a_gpu_some_test_must_run(tmp_path: Path) -> None:
    path = suite(tmp_path / "x.xml", SKIPPED)
    assert count_tests(path, gpus=1)["wrong"] == "no test ran on the GPU"
    assert count_tests(path, gpus=0)["wrong"] is None
    assert count_tests(suite(tmp_path / "x.xml"), gpus=0)["wrong"] == "there were no tests"
    assert count_tests(tmp_path / "none.xml", gpus=0)["wrong"] == "no tests ran"


def test_failures_are_named(tmp_path: Path) -> None:
    found = count_tests(suite(tmp_path / "x.xml", PASSED, FAILED), gpus=1)
    assert found["wrong"] == "1 tests failed, tests.kernels.test_norm.test_c among them"


def test_files_that_lack_a_package_are_left_out_unless_they_test_kernels(tmp_path: Path) -> None:
    found = count_tests(suite(tmp_path / "x.xml", PASSED, uncollected("tests.parallel.test_x", "spmd_types")), gpus=1)
    assert found["left out"] == {"tests.parallel.test_x": "needs spmd_types"}
    assert found["wrong"] is None
    for name, package in (("tests.kernels.test_x", "spmd_types"), ("tests.parallel.test_x", "megaflow.kernels")):
        found = count_tests(suite(tmp_path / "x.xml", PASSED, uncollected(name, package)), gpus=1)
        assert found["failed"] == 1


def test_losses_that_agree_and_that_do_not() -> None:
    assert compare_losses([8.0, 7.0], [8.01, 7.1])["wrong"] is None
    assert compare_losses([8.0, 7.0], [8.1, 7.0])["wrong"] == "the first losses are 1.23 % apart"
    assert compare_losses([8.0, 7.0], [8.0, 6.0])["wrong"] == "losses are 8.33 % apart in the mean"
    assert compare_losses([8.0, float("nan")], [8.0, 7.0])["wrong"] == "a loss is not a number"
    assert compare_losses([8.0], [8.0, 7.0])["wrong"] == "1 and 2 steps"
    assert compare_losses([], [])["wrong"] == "0 and 0 steps"


def test_losses_are_read_from_a_run(tmp_path: Path) -> None:
    records = [{"kind": "start"}, {"kind": "train", "loss": 2.5}, {"kind": "eval", "loss": 1.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert losses_of(tmp_path / "metrics.jsonl") == [2.5]


def parts(**statuses: int) -> dict[str, dict[str, int]]:
    return {name: {"status": statuses.get(name, 0), "seconds": 1} for name in NAMES}


@pytest.fixture
def out(tmp_path: Path) -> Path:
    suite(tmp_path / "gpu-tests.xml", PASSED)
    (tmp_path / "train.json").write_text(json.dumps({"wrong": None, "kernels": [1.0], "plain": [1.0]}))
    row = {"runs": {"megaflow": {}}, "failed": {"QuACK": "ImportError"}}
    (tmp_path / "kernels.json").write_text(json.dumps({"problems": {"swiglu": row}}))
    return tmp_path


def failed(out: Path, found: dict[str, dict[str, int]]) -> Any:
    return assemble(found, out, {"gpus": 1, "device": "H200"})["failed"]


def test_all_parts_good(out: Path) -> None:
    (out / "sanitize.json").write_text('{"memcheck": {"status": "skipped", "reason": "Device not supported"}}')
    result = assemble(parts(), out, {"gpus": 1, "device": "H200"})
    assert result["failed"] == {}
    assert not result["rehearsal"]
    assert result["sanitize"]["memcheck"]["reason"] == "Device not supported"
    assert result["tests"]["passed"] == 1


def test_every_part_that_is_not_good_is_named(out: Path) -> None:
    for name in NAMES:
        if name != "tests":  # its exit status is not zero where files are left out
            assert failed(out, parts(**{name: 1})) == {name: "exit status 1"}
        missing = {other: part for other, part in parts().items() if other != name}
        assert failed(out, missing) == {name: "did not run"}
    assert failed(out, parts(tests=1)) == {}
    assert failed(out, parts(tests=4)) == {"tests": "exit status 4"}
    assert failed(out, parts(tests=124)) == {"tests": "stopped at its time limit"}
    suite(out / "gpu-tests.xml", SKIPPED)
    assert failed(out, parts()) == {"tests": "no test ran on the GPU"}


def test_kernels_that_were_not_measured_are_a_failure(out: Path) -> None:
    row = {"runs": {}, "failed": {"megaflow": "AssertionError: error 1e-1"}}
    (out / "kernels.json").write_text(json.dumps({"problems": {"swiglu": row}}))
    assert failed(out, parts()) == {"kernels": "swiglu: AssertionError: error 1e-1"}
    row["failed"] = {"megaflow": "no time was left"}
    (out / "kernels.json").write_text(json.dumps({"problems": {"swiglu": row}}))
    assert failed(out, parts()) == {}
    (out / "kernels.json").write_text(json.dumps({"problems": {}}))
    assert failed(out, parts()) == {"kernels": "nothing was measured"}


def test_parts_are_read_from_the_script_s_table(tmp_path: Path) -> None:
    (tmp_path / "parts.tsv").write_text("build\t0\t31\ntests\t124\t300\n")
    assert parts_of(tmp_path / "parts.tsv") == {
        "build": {"status": 0, "seconds": 31},
        "tests": {"status": 124, "seconds": 300},
    }


def test_the_script_runs_every_part_and_is_sound_shell() -> None:
    assert subprocess.run(["bash", "-n", SCRIPT]).returncode == 0
    text = SCRIPT.read_text()
    assert all(f"\npart {name} " in text for name in NAMES)
