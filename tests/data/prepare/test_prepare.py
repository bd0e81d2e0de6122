"""`megaflow prepare`: what it writes of which records, and what it refuses."""

from __future__ import annotations

import itertools
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megaflow.data.corpus.corpus import Corpus
from megaflow.data.prepare import readers
from megaflow.data.prepare.encode import PrepareOptions
from megaflow.data.prepare.prepare import prepare_corpus
from megaflow.data.prepare.templates import Kind, check_template
from megaflow.data.tokenizer import load_tokenizer
from megaflow.errors import UserError
from megaflow.tools.prepare import KindChoice, LossChoice, prepare
from tests.data.corpora import document_starts
from tests.data.preparing import COMMAND, PAIRS, documents, example_options, texts, write_jsonl


def test_text_round_trip_and_counts(tmp_path: Path, sp_model: Path, options: PrepareOptions) -> None:
    written = texts(300)
    report = prepare_corpus(
        tmp_path / "c", [write_jsonl(tmp_path / "a.jsonl", [{"text": t} for t in written])], options
    )
    train, held = documents(tmp_path / "c", sp_model), documents(tmp_path / "c.heldout", sp_model)
    assert sorted(train + held) == sorted(written)
    assert train != [text for text in written if text in set(train)]  # shuffled
    assert 30 < len(held) < 90
    for found, manifest in ((train, report.manifest), (held, report.heldout)):
        assert manifest is not None
        assert manifest.bytes == manifest.loss_bytes == sum(len(text.encode()) for text in found)
        assert manifest.documents == len(found)
        assert manifest.loss_tokens == manifest.tokens - len(found)
        assert manifest.heldout_documents == len(held)
    assert Corpus.open(tmp_path / "c").manifest == report.manifest
    assert not list(tmp_path.glob(".tmp-*"))


def test_held_out_texts_stay_held_out(tmp_path: Path, sp_model: Path, options: PrepareOptions) -> None:
    """Whatever else is in the corpus, in whatever order."""
    written = texts(300)
    held = set()
    for name, chosen, seed in (("a", written, 0), ("b", written[::-1][:200], 9)):
        path = write_jsonl(tmp_path / f"{name}.jsonl", [{"text": text} for text in chosen])
        prepare_corpus(tmp_path / name, [path], replace(options, seed=seed))
        held |= set(documents(tmp_path / f"{name}.heldout", sp_model))
    for name in ("a", "b"):
        assert not held & set(documents(tmp_path / name, sp_model))


def test_any_number_of_workers_gives_the_same_corpus(
    tmp_path: Path, options: PrepareOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "CHUNK_BYTES", 500)
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts(200)])
    reports = [prepare_corpus(tmp_path / f"w{n}", [path], replace(options, workers=n)) for n in (1, 2, 3)]
    assert reports[0].manifest == reports[1].manifest == reports[2].manifest
    for suffix in ("bin", "idx", "json", "heldout.bin", "heldout.idx", "heldout.json"):
        assert len({(tmp_path / f"w{n}.{suffix}").read_bytes() for n in (1, 2, 3)}) == 1


def test_seed_orders_documents(tmp_path: Path, sp_model: Path, options: PrepareOptions) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts(50)])
    orders = []
    for seed in (1, 2):
        prepare_corpus(tmp_path / f"s{seed}", [path], replace(options, seed=seed))
        orders.append(documents(tmp_path / f"s{seed}", sp_model))
    assert sorted(orders[0]) == sorted(orders[1])
    assert orders[0] != orders[1]


def test_pairs_go_either_way(tmp_path: Path, sp_model: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", PAIRS)
    found: dict[str, set[str]] = {}
    for template, separator in (("tab", "\t"), ("labelled", "\nzh: "), ("<{source}|{target}>", "|")):
        prefix = tmp_path / template[:3].strip("<{")
        prepare_corpus(prefix, [path], example_options(sp_model, "parallel", template))
        found[template] = {*documents(prefix, sp_model), *documents(Path(f"{prefix}.heldout"), sp_model)}
        assert len(found[template]) == len(PAIRS)
        forward = sum(separator in text and text.index("cat") < text.index("今") for text in found[template])
        assert forward == len(PAIRS) if template.startswith("<") else 60 < forward < 140
    assert found["tab"] >= {"the cat 0\t今天0"} or found["tab"] >= {"今天0\tthe cat 0"}
    assert {"en: the cat 0\nzh: 今天0", "zh: 今天0\nen: the cat 0"} & found["labelled"]
    assert "<the cat 7|今天7>" in found["<{source}|{target}>"]


INSTRUCTIONS = [
    {"instruction": f"translate {i}", "input": "the cat" if i % 2 else "", "output": f"今天 {i}"} for i in range(400)
]


def test_instruction_template_and_plain(tmp_path: Path, sp_model: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", INSTRUCTIONS)
    prepare_corpus(tmp_path / "c", [path], example_options(sp_model, "instruction", "chatflow", plain=0.15))
    found = documents(tmp_path / "c", sp_model) + documents(tmp_path / "c.heldout", sp_model)
    plain = {f"{r['instruction']}\n{r['input']}\n{r['output']}".replace("\n\n", "\n") for r in INSTRUCTIONS}
    templated = {
        f"### Instruction:{r['instruction']}{' ' * bool(r['input'])}{r['input']} ### Response:{r['output']}"
        for r in INSTRUCTIONS
    }
    assert len(found) == len(set(found)) == 400
    assert set(found) <= plain | templated
    assert 35 < len(set(found) & plain) < 90


def test_loss_on_responses_alone(tmp_path: Path, sp_model: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", INSTRUCTIONS)
    report = prepare_corpus(tmp_path / "c", [path], example_options(sp_model, "instruction", "chatflow", "response"))
    tokenizer, corpus = load_tokenizer(sp_model), Corpus.open(tmp_path / "c")
    known = {r["instruction"]: r for r in INSTRUCTIONS}
    loss_tokens = loss_bytes = 0
    for start, stop in itertools.pairwise(document_starts(corpus)):
        ids, mask = corpus.tokens(start, stop), corpus.loss_mask(start, stop)
        prompt, response = tokenizer.decode(ids[1:][~mask[1:]].tolist()), ids[1:][mask[1:]].tolist()
        record = known[prompt.removeprefix("### Instruction:").split(" ###")[0].removesuffix(" the cat")]
        assert response == [*tokenizer.encode(record["output"]), tokenizer.eos_id]
        assert ids[1:][~mask[1:]].tolist() == tokenizer.encode(prompt)
        assert prompt.endswith(" ### Response:")
        loss_tokens += len(response)
        loss_bytes += len(record["output"].encode())
    assert report.manifest is not None
    assert (report.manifest.loss_tokens, report.manifest.loss_bytes) == (loss_tokens, loss_bytes)
    assert report.manifest.bytes > loss_bytes


def test_packs_and_too_long_examples(tmp_path: Path, sp_model: Path) -> None:
    long = {"en": "cat " * 100, "zh": "今"}
    path = write_jsonl(tmp_path / "a.jsonl", [*PAIRS[:50], long, *PAIRS[50:]])
    report = prepare_corpus(tmp_path / "c", [path], example_options(sp_model, "parallel", "tab"))
    assert report.num_too_long == 1
    assert report.too_long[0].startswith(f"{path}:51: ")
    assert report.manifest is not None
    assert report.manifest.too_long == 1
    for name in ("c", "c.heldout"):
        corpus = Corpus.open(tmp_path / name)
        packs = [corpus.pack(index) for index in range(corpus.num_packs)]
        assert all(corpus.document_start(b) - corpus.document_start(a) <= 64 for a, b in packs)
        assert len(packs) == corpus.manifest.packs
        raw = (tmp_path / f"{name}.packs-64").read_bytes()
        assert np.frombuffer(raw, "<u8").tolist() == [0, *(last for _, last in packs)]
    assert len(documents(tmp_path / "c", sp_model)) + len(documents(tmp_path / "c.heldout", sp_model)) == 200


@pytest.mark.parametrize(
    ("kind", "template", "message"),
    [
        ("text", "tab", "--template is for"),
        ("parallel", "chatflow", "{source} exactly once"),
        ("parallel", "{source}", "{target} exactly once"),
        ("parallel", "{source}{target}{target}", "{target} exactly once"),
        ("parallel", "{source}{targett}", "no field targett"),
        ("instruction", "tab", "{instruction} exactly once"),
        ("instruction", "{instruction}{input}{input}{output}", "{input} exactly once"),
    ],
)
def test_wrong_templates_are_refused(kind: Kind, template: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        check_template(kind, template)
    assert message in str(caught.value)


def test_braces_in_a_text_are_text(tmp_path: Path, sp_model: Path) -> None:
    record = {"instruction": "{output} {x}", "input": "{input}", "output": "{instruction}"}
    path = write_jsonl(tmp_path / "a.jsonl", [record])
    prepare_corpus(tmp_path / "c", [path], replace(example_options(sp_model, "instruction", "chatflow"), heldout=0.0))
    assert documents(tmp_path / "c", sp_model) == ["### Instruction:{output} {x} {input} ### Response:{instruction}"]


def run_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", COMMAND, *arguments], capture_output=True, text=True, check=False)


def test_the_command(tmp_path: Path, sp_model: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl.zst", [*PAIRS, {"en": "x"}])
    arguments = [str(tmp_path / "c"), str(path), "--tokenizer", str(sp_model), "--language", "en-zh"]
    done = run_command(*arguments, "--kind", "parallel", "--seq-length", "32", "--workers", "2")
    assert done.returncode == 0, done.stderr
    assert "packs of 32" in done.stdout
    assert "1 of 201 records cannot be used" in done.stderr
    assert f"{path}:201: no field zh" in done.stderr
    assert "--seq-length 32" in Corpus.open(tmp_path / "c").manifest.command
    done = run_command(*arguments, "--kind", "parallel", "--seq-length", "32", "--overwrite", "--seed", str(2**63))
    assert done.returncode == 2
    assert "--seed" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": KindChoice.parallel}, "--kind parallel needs --seq-length"),
        ({"seq_length": 64}, "--kind text takes no --seq-length"),
        ({"loss": LossChoice.response}, "--loss response is for"),
        ({"kind": KindChoice.parallel, "seq_length": 64, "source_field": "zh"}, "not all different"),
        ({"kind": KindChoice.parallel, "seq_length": 64, "inputs": [Path("a.txt.zst")]}, "which .txt has not"),
        ({"kind": KindChoice.instruction, "seq_length": 64, "template": "{output}"}, "{instruction} exactly once"),
        ({"workers": 100_000}, "--workers 100000: at most "),
    ],
)
def test_contradictions_are_refused(tmp_path: Path, sp_model: Path, arguments: dict[str, Any], message: str) -> None:
    inputs = [write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}])]
    with pytest.raises(UserError) as caught:
        prepare(tmp_path / "c", **{"inputs": inputs, "tokenizer": sp_model, "language": "en", **arguments})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_demo_corpus_is_small_and_its_sources_are_named() -> None:
    folder = Path(__file__).parents[3] / "configs" / "demo"
    named = (folder / "SOURCES.md").read_text(encoding="utf-8")
    files = [path for path in folder.iterdir() if path.suffix in (".zst", ".model")]
    assert len(files) == 5
    assert sum(path.stat().st_size for path in files) <= 3_000_000
    assert all(f"`{path.name}`" in named for path in files)
