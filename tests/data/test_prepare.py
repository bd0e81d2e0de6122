"""`megaflow prepare`: what it writes of which input, and what it refuses."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from megaflow.data import encode, readers
from megaflow.data.corpus import Corpus
from megaflow.data.encode import PrepareOptions
from megaflow.data.prepare import prepare_corpus
from megaflow.data.templates import ExampleFormat, Kind, Loss, check_template
from megaflow.data.tokenizer import load_tokenizer
from megaflow.data.writer import CorpusWriter
from megaflow.errors import UserError
from megaflow.tools.prepare import KindChoice, LossChoice, prepare
from tests.data.corpora import document_starts

TEXT = ExampleFormat("text", ("text",))
WORDS = ["hello", "world", "今天", "天气", "the cat", "sat", "on", "mat 3.14", "公园", "\n"]


def texts(count: int) -> list[str]:
    """Different texts of different lengths."""
    random = np.random.default_rng(5)
    return [f"{i} " + " ".join(random.choice(WORDS, size=random.integers(1, 40))) for i in range(count)]


def write_jsonl(path: Path, records: list[Any]) -> Path:
    data = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()
    path.write_bytes(zstandard.compress(data) if path.suffix == ".zst" else data)
    return path


def documents(prefix: Path, model: Path) -> list[str]:
    """The texts of a corpus; checks that each begins and ends as a document does."""
    tokenizer = load_tokenizer(model)
    corpus = Corpus.open(prefix)
    found = []
    for start, stop in itertools.pairwise(document_starts(corpus)):
        ids = corpus.tokens(start, stop).tolist()
        assert ids[0] == tokenizer.start_id
        assert ids[-1] == tokenizer.eos_id
        found.append(tokenizer.decode(ids))
    return found


@pytest.fixture
def options(sp_model: Path) -> PrepareOptions:
    return PrepareOptions(TEXT, "en", str(sp_model), heldout=0.2)


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


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.zst", "a.parquet", "a.txt", "a.txt.zst"])
def test_input_formats_hold_the_same(
    tmp_path: Path, sp_model: Path, options: PrepareOptions, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "READ_BYTES", 7)  # lines and frames are cut anywhere
    monkeypatch.setattr(readers, "PARQUET_ROWS", 3)
    written = [text.replace("\n", " ") for text in texts(20)]
    path = tmp_path / name
    if name == "a.parquet":
        pyarrow.parquet.write_table(pyarrow.table({"n": list(range(20)), "text": written}), path)
    elif ".txt" in name:
        data = "\n".join(written).encode()
        halves = (data[:100], data[100:])  # two frames
        path.write_bytes(b"".join(map(zstandard.compress, halves)) if name.endswith("zst") else data)
    else:
        write_jsonl(path, [{"text": text} for text in written])
    prepare_corpus(tmp_path / "c", [path], replace(options, heldout=0.0, txt_per_line=True))
    assert sorted(documents(tmp_path / "c", sp_model)) == sorted(written)
    assert not (tmp_path / "c.heldout.json").exists()


def test_a_txt_file_is_a_document(tmp_path: Path, sp_model: Path, options: PrepareOptions) -> None:
    (tmp_path / "a.txt").write_text("\ufeffone\n\ntwo\n", encoding="utf-8")
    (tmp_path / "b.txt").write_text("three")
    prepare_corpus(tmp_path / "c", [tmp_path / "a.txt", tmp_path / "b.txt"], replace(options, heldout=0.0))
    assert sorted(documents(tmp_path / "c", sp_model)) == ["one\n\ntwo\n", "three"]


def example_options(model: Path, kind: Kind, template: str, loss: Loss = "all", plain: float = 0.0) -> PrepareOptions:
    fields = ("en", "zh") if kind == "parallel" else ("instruction", "input", "output")
    return PrepareOptions(
        ExampleFormat(kind, fields, template, loss, plain), "en-zh", str(model), seq_length=64, heldout=0.1
    )


PAIRS = [{"en": f"the cat {i}", "zh": f"今天{i}"} for i in range(200)]


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


BAD = [
    (b"{", "not JSON"),
    (b"[1]", "not a JSON object"),
    (b"[" * 100_000, "not JSON"),
    (b"\xff", "not UTF-8"),
    (b'{"txt": "a"}', "no field text"),
    (b'{"text": 5}', "field text is not a string"),
    (b'{"text": " "}', "field text is empty"),
    (b'{"text": "\\ud800"}', "field text holds half a surrogate pair"),
]


@pytest.mark.parametrize(("line", "reason"), BAD)
def test_bad_lines_are_counted_and_named(
    tmp_path: Path, options: PrepareOptions, line: bytes, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "CHUNK_BYTES", 500)  # lines are counted over chunks
    good = [json.dumps({"text": text}).encode() for text in texts(99)]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join([*good[:40], line, *good[40:]]))
    report = prepare_corpus(tmp_path / "c", [path], options)
    assert report.bad == [f"{path}:41: {reason}"]
    assert report.manifest is not None
    assert report.manifest.bad_records == 1
    path.write_bytes(b"\n".join([line, *good[:50], line, *good[50:98]]))
    with pytest.raises(UserError, match=r"2 of 100 records.*--max-bad 0\.01") as caught:
        prepare_corpus(tmp_path / "d", [path], options)
    assert f"{path}:1: {reason}" in str(caught.value)
    assert [found.name for found in tmp_path.glob("*d.*")] == [".tmp-d.work"]  # for a greater --max-bad
    assert prepare_corpus(tmp_path / "d", [path], replace(options, max_bad=0.02)).num_bad == 2
    assert not list(tmp_path.glob(".tmp-*"))


def cut_zst(path: Path) -> Path:
    path.write_bytes(zstandard.compress(b'{"text": "a"}\n' * 50)[:-3])
    return path


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda d: d / "absent.jsonl", "no such file"),
        (lambda d: d, "is a folder"),
        (lambda d: write_jsonl(d / "a.csv", []), "unknown kind of file"),
        (lambda d: write_jsonl(d / "a.zst", []), "unknown kind of file"),
        (lambda d: cut_zst(d / "a.jsonl.zst"), "cut short"),
        (lambda d: Path(write_jsonl(d / "a.jsonl", [1])).rename(d / "b.jsonl.zst"), "not valid zstd"),
        (lambda d: write_jsonl(d / "a.parquet", [1]), "cannot be read as Parquet"),
        (lambda d: write_jsonl(d / "empty.jsonl", []), "no documents"),
    ],
)
def test_wrong_inputs_are_named(
    tmp_path: Path, options: PrepareOptions, make: Callable[[Path], Path], message: str
) -> None:
    path = make(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        prepare_corpus(tmp_path / "c", [path], options)
    assert "\n" not in str(caught.value)
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(("c", ".tmp-"))]


def test_parquet_without_the_column(tmp_path: Path, options: PrepareOptions) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"n": [1]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet: no column text; it has n"):
        prepare_corpus(tmp_path / "c", [tmp_path / "a.parquet"], options)


def test_an_existing_corpus_is_kept_unless_told(tmp_path: Path, sp_model: Path, options: PrepareOptions) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts(60)])
    prepare_corpus(tmp_path / "c", [path], options)
    with pytest.raises(UserError, match="--overwrite"):
        prepare_corpus(tmp_path / "c", [path], options)
    prepare_corpus(tmp_path / "c", [path], replace(options, heldout=0.0, overwrite=True))
    assert len(documents(tmp_path / "c", sp_model)) == 60
    assert not list(tmp_path.glob("c.heldout*"))


@pytest.mark.parametrize("stage", ["add_documents", "complete", "_write_index"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interruption_leaves_no_corpus_but_the_work_done(
    tmp_path: Path,
    options: PrepareOptions,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    stage: str,
    error: type[BaseException],
) -> None:
    def fail(*_: Any) -> None:
        raise error

    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts(60)])
    monkeypatch.setattr(CorpusWriter, stage, fail)
    with pytest.raises(UserError if error is OSError else error):
        prepare_corpus(tmp_path / "c", [path], options)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".tmp-c.work", "a.jsonl"]
    assert "60 records are kept in" in capsys.readouterr().err


def test_a_kill_while_a_corpus_is_replaced_leaves_no_mix(
    tmp_path: Path, sp_model: Path, options: PrepareOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Old documents must never be trained on where new ones are held out, nor the other way round."""
    options = replace(options, overwrite=True)
    for name in ("new", "old"):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"text": f"{name} {i}"} for i in range(40)])

    def state() -> str:
        if not (tmp_path / "c.json").exists():
            return "none"
        texts = documents(tmp_path / "c", sp_model) + documents(tmp_path / "c.heldout", sp_model)
        (name,) = {text.split()[0] for text in texts}
        assert sorted(texts) == sorted(f"{name} {i}" for i in range(40))
        return name

    def prepare_killed_after(steps: int) -> None:
        def counted(change: Callable[..., Any]) -> Callable[..., Any]:
            def run(*arguments: Any, **named: Any) -> Any:
                nonlocal steps
                steps -= 1
                if steps < 0:  # nor does anything tidy up afterwards
                    raise SystemExit
                return change(*arguments, **named)

            return run

        with monkeypatch.context() as patched, contextlib.suppress(SystemExit):
            patched.setattr(os, "replace", counted(os.replace))
            patched.setattr(Path, "unlink", counted(Path.unlink))
            prepare_corpus(tmp_path / "c", [tmp_path / "new.jsonl"], options)

    states = []
    for steps in range(40):
        prepare_corpus(tmp_path / "c", [tmp_path / "old.jsonl"], options)
        assert not list(tmp_path.glob(".tmp-*"))  # of the last one killed
        prepare_killed_after(steps)
        states.append(state())
    assert [name for name, _ in itertools.groupby(states)] == ["old", "none", "new"]


def test_leftovers_of_another_name_are_kept(tmp_path: Path, options: PrepareOptions) -> None:
    for name in ("c.bin", "c.heldout.idx", "c.packs-64", "c.d.bin", "cc.bin", "c.packs-x"):
        (tmp_path / f".tmp-{name}").touch()
    prepare_corpus(tmp_path / "c", [write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}])], replace(options, heldout=0.0))
    assert sorted(path.name for path in tmp_path.glob(".tmp-*")) == [".tmp-c.d.bin", ".tmp-c.packs-x", ".tmp-cc.bin"]


@pytest.mark.parametrize("workers", ["1", "2"])
def test_sigterm_leaves_no_rubbish(tmp_path: Path, sp_model: Path, workers: str) -> None:
    line = json.dumps({"text": "hello world " * 1000}) + "\n"
    (tmp_path / "a.jsonl").write_text(line * 5000)
    arguments = [str(tmp_path / "c"), str(tmp_path / "a.jsonl"), "--tokenizer", str(sp_model), "--language", "en"]
    with subprocess.Popen([sys.executable, "-c", COMMAND, *arguments, "--workers", workers]) as process:
        spool = tmp_path / ".tmp-c.work" / "tokens"
        while process.poll() is None and not (spool.exists() and spool.stat().st_size):
            time.sleep(0.01)
        process.terminate()
        assert process.wait() == 128 + 15
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("file/x", "cannot be written"),
        (".", "not a corpus's name"),
        ("..", "not a corpus's name"),
        ("/", "not a corpus's name"),
        ("/proc/x", "cannot be written"),
        ("x" * 300, "cannot be written"),
        ("folder", r"folder\.bin: is a folder"),
        ("packed", r"packed\.heldout\.packs-16: is a folder"),
    ],
)
def test_places_that_cannot_be_written_are_named(
    tmp_path: Path, sp_model: Path, monkeypatch: pytest.MonkeyPatch, out: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    Path("folder.bin").mkdir()
    Path("packed.heldout.packs-16").mkdir()
    path = write_jsonl(Path("a.jsonl"), PAIRS)
    before = sorted(Path().iterdir())
    with pytest.raises(UserError, match=message) as caught:
        prepare_corpus(out, [path], replace(example_options(sp_model, "parallel", "tab"), seq_length=16))
    assert str(caught.value).startswith(out)
    assert "\n" not in str(caught.value)
    assert sorted(Path().iterdir()) == before


def test_a_full_disk_is_an_error(tmp_path: Path, options: PrepareOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(CorpusWriter, "add_documents", full)
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts(60)])
    with pytest.raises(UserError, match=r"c: cannot be written \(No space left on device\)"):
        prepare_corpus(tmp_path / "c", [path], options)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".tmp-c.work", "a.jsonl"]


def die(*_: Any) -> None:
    """What the kernel does to a process that takes too much memory."""
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_is_an_error(tmp_path: Path, options: PrepareOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts(5)])
    monkeypatch.setattr(encode, "_tokenizer", die)
    with pytest.raises(UserError, match="fewer --workers"):
        prepare_corpus(tmp_path / "c", [path], replace(options, workers=2))
    assert [p.name for p in tmp_path.iterdir()] == ["a.jsonl"]


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


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_blank_lines_are_no_records(tmp_path: Path, options: PrepareOptions, name: str) -> None:
    lines = [(json.dumps({"text": text}) if name == "a.jsonl" else text.replace("\n", " ")) for text in texts(20)]
    (tmp_path / name).write_text("\n\n  \r\n".join(lines) + "\n\t\n")
    report = prepare_corpus(tmp_path / "c", [tmp_path / name], replace(options, heldout=0.0, txt_per_line=True))
    assert (report.records, report.num_bad) == (20, 0)
    (tmp_path / name).write_text("\n\n".join([*lines, "{" if name == "a.jsonl" else "\u3000"]))
    report = prepare_corpus(tmp_path / "d", [tmp_path / name], replace(options, max_bad=0.1, txt_per_line=True))
    assert report.num_bad == 1
    assert report.bad[0].startswith(f"{tmp_path / name}:41: ")  # lines are counted with the blank ones


def test_braces_in_a_text_are_text(tmp_path: Path, sp_model: Path) -> None:
    record = {"instruction": "{output} {x}", "input": "{input}", "output": "{instruction}"}
    path = write_jsonl(tmp_path / "a.jsonl", [record])
    prepare_corpus(tmp_path / "c", [path], replace(example_options(sp_model, "instruction", "chatflow"), heldout=0.0))
    assert documents(tmp_path / "c", sp_model) == ["### Instruction:{output} {x} {input} ### Response:{instruction}"]


COMMAND = "import typer; from megaflow.tools.prepare import prepare; a = typer.Typer(); a.command()(prepare); a()"


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
    folder = Path(__file__).parents[2] / "configs" / "demo"
    named = (folder / "SOURCES.md").read_text(encoding="utf-8")
    files = [path for path in folder.iterdir() if path.suffix in (".zst", ".model")]
    assert len(files) == 5
    assert sum(path.stat().st_size for path in files) <= 3_000_000
    assert all(f"`{path.name}`" in named for path in files)
