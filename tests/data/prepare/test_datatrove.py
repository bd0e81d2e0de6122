"""The datatrove step, run by datatrove's local executor in a process of its own."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import zstandard

from megaflow.data.corpus.corpus import Corpus
from megaflow.data.corpus.merge import MergeOptions, merge_corpora
from megaflow.data.corpus.prefixes import expand
from megaflow.data.prepare.encode import PrepareOptions
from megaflow.data.prepare.prepare import prepare_corpus
from megaflow.data.prepare.templates import ExampleFormat
from megaflow.data.tokenizer import load_tokenizer
from tests.data.conftest import SAMPLE
from tests.data.corpora import document_starts

pytestmark = pytest.mark.skipif(importlib.util.find_spec("datatrove") is None, reason="datatrove is not installed")

PIPELINE = """
import os, signal, sys
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.filters import LambdaFilter
from datatrove.pipeline.readers import JsonlReader
from megaflow.data.prepare.datatrove import PrepareStep
from megaflow.data.prepare.encode import PrepareOptions
from megaflow.data.prepare.templates import ExampleFormat

folder, tokenizer, kind, tasks, killed = sys.argv[1:]
options = dict(language="x", tokenizer=tokenizer, heldout=0.1, seed=3)
if kind == "text":
    reader = JsonlReader(f"{folder}/in")
    options |= dict(format=ExampleFormat(kind="text", fields=("text",)))
    text_field = "text"
else:
    reader = JsonlReader(f"{folder}/in", text_key="zh")
    form = ExampleFormat(kind="parallel", fields=("en", "zh"), template="tab", loss="response")
    options |= dict(format=form, seq_length=64)
    text_field = "zh"

def keep(document):
    if killed == "killed" and "17" in document.text:
        os.killpg(0, signal.SIGKILL)
    return "drop" not in document.text

LocalPipelineExecutor(
    pipeline=[reader, LambdaFilter(keep), PrepareStep(f"{folder}/out/c", PrepareOptions(**options), text_field)],
    tasks=int(tasks),
    start_method="fork",
    logging_dir=f"{folder}/logs",
).run()
"""


def run_pipeline(folder: Path, tokenizer: Path, kind: str, tasks: int, killed: str = "") -> int:
    """Run the pipeline on the files of `folder/in`; the exit status."""
    arguments = [str(argument) for argument in (folder, tokenizer, kind, tasks, killed)]
    done = subprocess.run(
        [sys.executable, "-c", PIPELINE, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        start_new_session=True,  # it kills its process group
    )
    assert done.returncode == 0 or killed, done.stderr
    return done.returncode


def write_inputs(folder: Path) -> list[Path]:
    """Two files of 30 records that serve as texts and as pairs, two of them to be dropped by the filter."""
    paths = []
    for shard in range(2):
        paths.append(folder / "in" / f"{shard}.jsonl")
        paths[-1].parent.mkdir(exist_ok=True)
        rows = [{"en": f"{shard} {i} {SAMPLE[i % 3]}"[:30], "zh": SAMPLE[3 + i % 2][:5] + f"{i}"} for i in range(30)]
        rows = [{**row, "text": row["en"] + row["zh"]} for row in rows]
        rows.insert(7, {"en": "drop", "zh": "drop", "text": "drop this"})
        paths[-1].write_text("".join(json.dumps(row) + "\n" for row in rows))
    return paths


def prepare(prefix: Path, inputs: list[Path], tokenizer: Path, kind: str) -> None:
    """What the pipeline makes, made without datatrove."""
    for path in inputs:
        path.write_text("".join(line for line in path.read_text().splitlines(True) if "drop" not in line))
    options = PrepareOptions(
        format=ExampleFormat(kind="text", fields=("text",))
        if kind == "text"
        else ExampleFormat(kind="parallel", fields=("en", "zh"), template="tab", loss="response"),
        seq_length=None if kind == "text" else 64,
        language="x",
        tokenizer=str(tokenizer),
        heldout=0.1,
        seed=3,
    )
    prepare_corpus(prefix, inputs, options)


def files(prefix: Path) -> dict[str, bytes]:
    """Content by suffix."""
    return {path.name.removeprefix(prefix.name): path.read_bytes() for path in prefix.parent.glob(f"{prefix.name}.*")}


@pytest.mark.parametrize("kind", ["text", "parallel"])
def test_one_task_writes_what_prepare_writes(tmp_path: Path, sp_model: Path, kind: str) -> None:
    inputs = write_inputs(tmp_path)
    run_pipeline(tmp_path, sp_model, kind, 1)
    prepare(tmp_path / "out" / "expected", inputs, sp_model, kind)
    assert files(tmp_path / "out" / "c-00000") == files(tmp_path / "out" / "expected")
    assert {".bin", ".json", ".heldout.bin"} <= set(files(tmp_path / "out" / "expected"))


def test_two_tasks_a_killed_one_run_again_and_the_merge(tmp_path: Path, sp_model: Path) -> None:
    write_inputs(tmp_path)
    assert run_pipeline(tmp_path, sp_model, "text", 2, "killed") != 0
    assert not list((tmp_path / "out").glob("c*"))
    run_pipeline(tmp_path, sp_model, "text", 2)
    out = tmp_path / "out"
    assert not list(out.glob(".tmp-*"))
    written = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    run_pipeline(tmp_path, sp_model, "text", 2)
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == written
    before = files(out / "c-00001")
    shutil.rmtree(tmp_path / "logs")
    run_pipeline(tmp_path, sp_model, "text", 2)
    assert files(out / "c-00001") == before
    assert all(path.stat().st_mtime_ns > time for path, time in written.items())
    merge_corpora(out / "all", expand(str(out / "c-*")), MergeOptions())
    tokenizer, texts = load_tokenizer(sp_model), []
    for prefix in (out / "all", out / "all.heldout"):
        corpus = Corpus.open(prefix, "full")
        starts = document_starts(corpus)
        texts += [tokenizer.decode(corpus.tokens(a, b).tolist()) for a, b in pairwise(starts)]
    expected = [f"{s} {i} {SAMPLE[i % 3]}"[:30] + SAMPLE[3 + i % 2][:5] + f"{i}" for s in range(2) for i in range(30)]
    assert sorted(texts) == sorted(expected)


def test_the_recipe_runs(tmp_path: Path, sp_model: Path) -> None:
    guide = Path(__file__).parents[3] / "docs" / "datatrove.md"
    script = re.search(r"```python\n(.*?)```", guide.read_text(), re.DOTALL)
    assert script
    inputs = tmp_path / "configs" / "demo"
    inputs.mkdir(parents=True)
    shutil.copy(sp_model, inputs / "tokenizer.model")
    texts = [{"text": SAMPLE[3] * length} for length in range(1, 41)]
    pairs = [{"en": f"{i} {SAMPLE[1]}", "zh": f"{SAMPLE[4]}{i}"} for i in range(40)]
    for name, rows in (("zh", texts), ("parallel", pairs)):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (inputs / f"{name}.jsonl.zst").write_bytes(zstandard.compress(lines.encode()))
    (tmp_path / "make_corpora.py").write_text(script[1])
    subprocess.run(
        [sys.executable, "make_corpora.py", "local"], cwd=tmp_path, check=True, capture_output=True, timeout=60
    )
    kept = {}
    for prefix in ("zh-00000", "pairs-00000"):
        manifest = Corpus.open(tmp_path / "corpora" / prefix, "full").manifest
        kept[prefix] = manifest.documents + manifest.heldout_documents
    assert kept == {"zh-00000": sum(len(row["text"]) >= 200 for row in texts), "pairs-00000": 40}


def test_shards_of_more_tasks_are_not_mixed_in(tmp_path: Path, sp_model: Path) -> None:
    write_inputs(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "c-00002.json").write_text("{}")
    assert run_pipeline(tmp_path, sp_model, "text", 2, "refused") != 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["c-00002.json"]


def test_without_datatrove_it_says_so() -> None:
    script = "import sys; sys.modules['datatrove'] = None\nimport megaflow.data.prepare.datatrove"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert "UserError: datatrove is not installed; pip install 'megaflow[datatrove]'" in done.stderr
