"""Puts together what the parts of `gpu_check.sh` found, and says whether each of them is good.

python benchmarks/gpu_check.py losses KERNELS.jsonl PLAIN.jsonl TRAIN.json     compares two runs' losses
python benchmarks/gpu_check.py report PARTS.tsv OUT                           writes OUT/gpu_check.json
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "triton", "numpy", "liger-kernel", "quack-kernels", "flash-attn-4", "cut-cross-entropy")
FIRST, MEAN = 0.005, 0.03
"""By which share two runs' losses may differ: the first, and in the mean over all steps."""
OWN = ("tests/kernels/", "tests/csrc/", "tests.kernels.", "tests.csrc.")
"""Tests that must be collected wherever there is a GPU."""


def losses_of(path: Path) -> list[float]:
    """The training losses of a run, step by step."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [record["loss"] for record in records if record["kind"] == "train"]


def compare_losses(kernels: list[float], plain: list[float]) -> dict[str, Any]:
    """Both, how far apart they are as shares of the plain ones, and what is wrong with that (None: nothing)."""
    wrong = None
    apart = [abs(a - b) / abs(b) for a, b in zip(kernels, plain, strict=False)]
    if not plain or len(kernels) != len(plain):
        wrong = f"{len(kernels)} and {len(plain)} steps"
    elif not all(value == value for value in (*kernels, *plain)):
        wrong = "a loss is not a number"
    elif apart[0] > FIRST:
        wrong = f"the first losses are {100 * apart[0]:.2f} % apart"
    elif sum(apart) / len(apart) > MEAN:
        wrong = f"losses are {100 * sum(apart) / len(apart):.2f} % apart in the mean"
    return {"kernels": kernels, "plain": plain, "apart": apart, "wrong": wrong}


def losses(kernels: Path, plain: Path, out: Path) -> bool:
    """Compares the losses of two runs; whether they agree."""
    result = compare_losses(losses_of(kernels), losses_of(plain))
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(result["wrong"] or f"{len(result['plain'])} losses agree, the last {result['kernels'][-1]:.3f}")
    return result["wrong"] is None


def count_tests(path: Path, gpus: int) -> dict[str, Any]:
    """Numbers of tests by outcome, files left out with their reasons, and what is wrong (None: nothing).

    A file whose import lacks a package is left out, unless it tests kernels.
    """
    if not path.exists():
        return {"wrong": "no tests ran"}
    found = {"passed": 0, "failed": 0, "skipped": 0}
    failed: list[str] = []
    left_out: dict[str, str] = {}
    skipped: dict[str, int] = {}
    for case in ElementTree.parse(path).getroot().iter("testcase"):
        name = f"{case.get('classname') or ''}.{case.get('name')}".strip(".")
        trouble = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
        if trouble is None:
            found["passed"] += 1
        elif trouble.tag == "skipped":
            found["skipped"] += 1
            reason = trouble.get("message") or ""
            skipped[reason] = skipped.get(reason, 0) + 1
        elif (package := _missing_package(trouble)) and not name.startswith(OWN):
            left_out[name] = f"needs {package}"
        else:
            found["failed"] += 1
            failed.append(name)
    wrong = None
    if found["failed"]:
        wrong = f"{found['failed']} tests failed, {failed[0]} among them"
    elif gpus and not found["passed"]:
        wrong = "no test ran on the GPU"
    elif not sum(found.values()):
        wrong = "there were no tests"
    return {**found, "failures": failed[:50], "left out": left_out, "skipped for": skipped, "wrong": wrong}


def _missing_package(trouble: ElementTree.Element) -> str | None:
    """What a file could not import."""
    said = re.search(r"ModuleNotFoundError: No module named '([\w.]+)'", trouble.text or "")
    collected = "collection" in (trouble.get("message") or "")
    return said[1] if said and collected and not said[1].startswith(("megaflow", "benchmarks", "tests")) else None


def parts_of(path: Path) -> dict[str, dict[str, int]]:
    """Exit status and seconds of every part."""
    rows = [line.split("\t") for line in path.read_text().splitlines()]
    return {name: {"status": int(status), "seconds": int(seconds)} for name, status, seconds in rows}


def assemble(parts: dict[str, dict[str, int]], out: Path, device: dict[str, Any]) -> dict[str, Any]:
    """The result of all parts, from the files that they left in a folder; `failed` says which were not good."""
    tests = count_tests(out / "gpu-tests.xml", device["gpus"])
    failed = {name: f"exit status {part['status']}" for name, part in parts.items() if part["status"]}
    if "tests" in parts:
        status = parts["tests"]["status"]
        if status in (124, 137):
            failed["tests"] = tests["wrong"] or "stopped at its time limit"
        elif tests["wrong"]:
            failed["tests"] = tests["wrong"]
        elif status == 1:  # pytest also fails for files that are left out
            failed.pop("tests")
    for name in ("build", "prepare", "tests", "sanitize", "train", "kernels"):
        if name not in parts:
            failed[name] = "did not run"
    found = {name: _read(out / f"{name}.json") for name in ("sanitize", "train", "kernels")}
    if device["gpus"] and "kernels" in parts:
        unmeasured = _unmeasured(found["kernels"])
        if unmeasured:
            failed["kernels"] = unmeasured
    return {
        "rehearsal": not device["gpus"],
        "failed": failed,
        "parts": parts,
        **device,
        "tests": tests,
        "sanitize": found["sanitize"],
        "training": {key: (found["train"] or {}).get(key) for key in ("wrong", "kernels", "plain")},
    }


def _unmeasured(kernels: Any) -> str | None:
    """What megaflow itself was not measured on, other than for want of time."""
    if not kernels or not kernels["problems"]:
        return "nothing was measured"
    for name, row in kernels["problems"].items():
        reason = row["failed"].get("megaflow") or row["failed"].get("inputs")
        if reason and reason != "no time was left":
            return f"{name}: {reason}"
    return None


def _read(path: Path) -> Any:
    return json.loads(path.read_text()) if path.exists() else None


def device_of() -> dict[str, Any]:
    """Versions, the GPUs and their driver."""
    gpus = torch.cuda.device_count()
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.strip() if gpus else ""
    except (OSError, subprocess.TimeoutExpired) as error:
        said = f"nvidia-smi: {error}"
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "gpus": gpus,
        "device": torch.cuda.get_device_name() if gpus else None,
        "driver": said or None,
        "kernel": platform.release(),
        "versions": {"python": platform.python_version(), "cuda": torch.version.cuda, **versions},
    }


def report(parts: Path, out: Path) -> bool:
    """Writes OUT/gpu_check.json; whether all parts are good."""
    result = assemble(parts_of(parts), out, device_of())
    beside = out / "gpu_check.part"
    beside.write_text(json.dumps(result, indent=1) + "\n")
    beside.replace(out / "gpu_check.json")
    counts = {key: result["tests"].get(key) for key in ("passed", "failed", "skipped")}
    print(f"{result['device'] or 'no GPU: a rehearsal'}; tests {counts}")
    for name, why in result["failed"].items():
        print(f"FAILED {name}: {why}")
    return not result["failed"]


def main() -> int:
    """Exit code 0 where everything is good. Needs nothing but torch, whatever else is missing."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, paths in {"losses": ("kernels", "plain", "out"), "report": ("parts", "out")}.items():
        subparser = commands.add_parser(name)
        for path in paths:
            subparser.add_argument(path, type=Path)
    given = vars(parser.parse_args())
    return 0 if (losses if given.pop("command") == "losses" else report)(**given) else 1


if __name__ == "__main__":
    sys.exit(main())
