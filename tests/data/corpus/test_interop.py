"""Corpora go to and from other tools: megatron-core and datatrove read ours, `data merge` reads theirs.

Their code runs in child processes: it may start threads, and it is slow to import.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from megaflow.data.corpus.corpus import Corpus
from megaflow.data.corpus.merge import MergeOptions, merge_corpora
from megaflow.data.prepare.encode import PrepareOptions
from megaflow.data.prepare.prepare import prepare_corpus
from megaflow.data.prepare.templates import ExampleFormat
from megaflow.data.tokenizer import load_tokenizer
from megaflow.errors import UserError
from tests.data.conftest import SAMPLE
from tests.data.corpora import document_starts, write_corpus

megatron = pytest.mark.skipif(importlib.util.find_spec("megatron") is None, reason="megatron-core is not installed")
datatrove = pytest.mark.skipif(importlib.util.find_spec("datatrove") is None, reason="datatrove is not installed")


def run_script(script: str, *arguments: object) -> str:
    """Run Python code in a process of its own; its output."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def documents(corpus: Corpus) -> list[list[int]]:
    starts = document_starts(corpus)
    return [corpus.tokens(a, b).tolist() for a, b in pairwise(starts)]


@pytest.fixture
def ours(tmp_path: Path, sp_model: Path) -> Path:
    """A small corpus of this project."""
    (tmp_path / "in.jsonl").write_text(
        "".join(json.dumps({"text": f"{i} {t}"}) + "\n" for i, t in enumerate(SAMPLE * 5))
    )
    options = PrepareOptions(
        format=ExampleFormat(kind="text", fields=("text",)), language="en", tokenizer=str(sp_model), heldout=0
    )
    prepare_corpus(tmp_path / "ours", [tmp_path / "in.jsonl"], options)
    return tmp_path / "ours"


MEGATRON = """
import json, sys
import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
folder, *prefixes = sys.argv[1:]
datasets = [IndexedDataset(prefix) for prefix in prefixes]
for dataset in datasets:
    assert dataset.document_indices.tolist() == list(range(len(dataset) + 1))
print(json.dumps([[dataset[i].tolist() for i in range(len(dataset))] for dataset in datasets]))
for name in ("int32", "uint16", "int64", "int16"):
    builder = IndexedDatasetBuilder(f"{folder}/{name}.bin", dtype=getattr(np, name))
    builder.add_document(torch.tensor([1, 5, 6, 7, 2]), [3, 2])  # a document of two sequences
    builder.add_item(torch.tensor([1, 9, 2]))
    builder.end_document()
    builder.end_document()  # an empty one
    builder.add_document(torch.tensor([8, 9]), [2])
    builder.finalize(f"{folder}/{name}.idx")
builder = IndexedDatasetBuilder(f"{folder}/modes.bin", dtype=np.int32, multimodal=True)
builder.add_document(torch.tensor([1, 5, 6, 7, 2]), [3, 2], modes=[0, 1])
builder.finalize(f"{folder}/modes.idx")
builder = IndexedDatasetBuilder(f"{folder}/added.bin", dtype=np.int32)
builder.add_index(f"{folder}/int32")
builder.add_index(f"{folder}/int32")
builder.finalize(f"{folder}/added.idx")
"""


@megatron
def test_megatron_core_reads_ours_and_merge_reads_what_it_writes(tmp_path: Path, ours: Path, sp_model: Path) -> None:
    write_corpus(tmp_path / "wide", [5, 1, 9], dtype=np.dtype("<i4"))
    read = json.loads(run_script(MEGATRON, tmp_path, ours, tmp_path / "wide"))
    assert read == [documents(Corpus.open(prefix)) for prefix in (ours, tmp_path / "wide")]
    options = MergeOptions(tokenizer=str(sp_model), language="en")
    expected = [[1, 5, 6, 7, 2], [1, 9, 2], [8, 9]]
    for name in ("int32", "uint16", "int64", "int16"):
        report = merge_corpora(tmp_path / f"out-{name}", [str(tmp_path / name)], options)
        assert documents(Corpus.open(tmp_path / f"out-{name}", "full")) == expected
        assert (report.documents, report.no_start, report.no_end, report.empty) == (3, 1, 1, 1)
    prefixes = [str(tmp_path / name) for name in ("added", "modes", "uint16")]
    merge_corpora(tmp_path / "all", prefixes, MergeOptions(str(sp_model), "en", add_special=True))
    merged = Corpus.open(tmp_path / "all", "full")
    expected[-1] = [1, 8, 9, 2]
    assert documents(merged) == [*expected, *expected, expected[0], *expected]
    tokenizer = load_tokenizer(sp_model)
    assert merged.manifest.bytes == sum(len(tokenizer.decode(ids).encode()) for ids in documents(merged))


DATATROVE_WRITES = """
import sys
from datatrove.data import Document
from datatrove.pipeline.tokens import DocumentTokenizer, MegatronDocumentTokenizer
folder, tokenizer, texts = sys.argv[1], sys.argv[2], sys.argv[3:]
common = dict(tokenizer_name_or_path=tokenizer, eos_token="<|endoftext|>")
for step in (
    MegatronDocumentTokenizer(folder, save_filename="mega", **common),
    DocumentTokenizer(folder, save_filename="plain", shuffle_documents=False, **common),
):
    for _ in step.run((Document(text=text, id=str(i)) for i, text in enumerate(texts)), 0, 1) or ():
        pass
"""


@datatrove
def test_merge_reads_what_datatrove_writes(tmp_path: Path, hf_json: Path) -> None:
    run_script(DATATROVE_WRITES, tmp_path, hf_json, *SAMPLE)
    tokenizer = load_tokenizer(hf_json)
    expected = [[*tokenizer.encode(text), tokenizer.eos_id] for text in SAMPLE]
    for name in ("mega_00000_tokens", "plain_00000_unshuffled"):
        report = merge_corpora(
            tmp_path / "out", [str(tmp_path / name)], MergeOptions(str(hf_json), "en", overwrite=True)
        )
        merged = Corpus.open(tmp_path / "out", "full")
        assert documents(merged) == expected
        assert merged.manifest.bytes == sum(len(text.encode()) for text in SAMPLE)
        assert (report.no_start, report.no_end, report.empty) == (len(SAMPLE), 0, 0)


DATATROVE_READS = """
import json, sys
from datatrove.utils.dataset import DatatroveFileDataset
dataset = DatatroveFileDataset(sys.argv[1], seq_len=15, token_size=2)
print(json.dumps([dataset[i]["input_ids"].tolist() for i in range(len(dataset))]))
"""


@datatrove
def test_datatrove_reads_our_tokens(ours: Path) -> None:
    corpus = Corpus.open(ours)
    windows = json.loads(run_script(DATATROVE_READS, f"{ours}.bin"))
    assert windows == corpus.tokens(0, len(windows) * 16).reshape(-1, 16).tolist()
    assert len(windows) == corpus.num_tokens // 16


def test_ids_outside_the_vocabulary_are_refused(tmp_path: Path, ours: Path, sp_model: Path, hf_json: Path) -> None:
    Path(f"{ours}.json").unlink()
    with pytest.raises(UserError, match="give --tokenizer"):
        merge_corpora(tmp_path / "out", [str(ours)], MergeOptions())
    merge_corpora(tmp_path / "out", [str(ours)], MergeOptions(str(sp_model), "en"))
    assert int(np.fromfile(f"{ours}.bin", "<u2").max()) >= load_tokenizer(hf_json).vocab_size
    with pytest.raises(UserError, match=r"ours.bin: token \d+ is id \d+, outside the vocabulary of"):
        merge_corpora(tmp_path / "other", [str(ours)], MergeOptions(str(hf_json), "en"))
    assert not list(tmp_path.glob("*other*"))
