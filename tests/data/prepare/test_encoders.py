"""Another library in place of the tokenizer's own: refused where its ids are others, else the same corpus."""

from __future__ import annotations

import importlib.metadata
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from megaflow.data.corpus.manifest import EncoderInfo
from megaflow.data.prepare import encode, readers
from megaflow.data.prepare.encode import PrepareOptions, encode_chunk
from megaflow.data.prepare.encoders import EncoderName, differences, load_encoder, own_encoder
from megaflow.data.prepare.prepare import prepare_corpus
from megaflow.data.prepare.readers import Chunk, read_chunks
from megaflow.data.prepare.templates import COMPARED, ExampleFormat, chosen
from megaflow.data.tokenizer import PROBE_TEXTS, load_tokenizer
from megaflow.errors import UserError

DEMO = Path(__file__).parents[3] / "configs" / "demo"
TEXT = ExampleFormat("text", ("text",))
LIBRARIES: tuple[EncoderName, ...] = ("tokenizers", "gigatoken")
TIED = "甲乙丙"
"""Of which "甲乙" and "乙丙" are pieces of one score: the left one is right, the other has the smaller id."""


@pytest.fixture(scope="module")
def tied_model(tmp_path_factory: pytest.TempPathFactory, sp_model: Path) -> Path:
    """A model to which pieces were added, all with score 0, as vocabularies are enlarged in the field."""
    model = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    model.ParseFromString(sp_model.read_bytes())
    for piece in ("乙丙", "甲乙", "甲", "乙", "丙"):
        model.pieces.add(piece=piece, score=0.0)
    path = tmp_path_factory.mktemp("tied") / "tied.model"
    path.write_bytes(model.SerializeToString())
    return path


@pytest.fixture(params=LIBRARIES)
def library(request: pytest.FixtureRequest) -> EncoderName:
    pytest.importorskip(request.param)
    return request.param


def write(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8")
    return path


def options_of(model: Path, library: EncoderName | None) -> PrepareOptions:
    return PrepareOptions(TEXT, "en", str(model), library, heldout=0.2)


def test_ids_are_the_tokenizers(library: EncoderName) -> None:
    """Names of special tokens in a text, and texts of no tokens, included."""
    tokenizer = load_tokenizer(DEMO / "tokenizer.model")
    found = [json.loads(line)["text"] for line in next(read_chunks(DEMO / "zh.jsonl.zst", "jsonl", ("text",))).records]
    for texts in ([*PROBE_TEXTS, "a<s>b</s> <unk><0x41>", "", "</s>", *found[:50]], [""], []):
        encoded = load_encoder(library, tokenizer)(texts)
        wanted = tokenizer.encode_batch(texts)
        assert encoded.ids.tolist() == [i for ids in wanted for i in ids]
        assert encoded.lengths.tolist() == [len(ids) for ids in wanted]
        assert not differences(encoded, texts, tokenizer)


def test_a_tokenizer_json_is_encoded_as_it_stands(hf_json: Path, tmp_path: Path) -> None:
    """What it would cut, fill up or take for a special token included."""
    pytest.importorskip("gigatoken")
    content = json.loads(hf_json.read_text())
    content["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content))
    tokenizer = load_tokenizer(path)
    texts = [*PROBE_TEXTS, "a<|endoftext|>b", ""]
    assert not differences(load_encoder("gigatoken", tokenizer)(texts), texts, tokenizer)


def test_differences_are_named(tied_model: Path, library: EncoderName) -> None:
    tokenizer = load_tokenizer(tied_model)
    texts = ["甲乙", f"the {TIED}", "乙丙", "", f"{TIED} on"]
    found = differences(load_encoder(library, tokenizer)(texts), texts, tokenizer)
    assert list(found) == [1, 4]
    assert found[1] == "['甲', '乙丙'] where sentencepiece gives ['甲乙', '丙']"
    longer = differences(own_encoder(tokenizer)(texts), [*texts[:4], f"{TIED} on the"], tokenizer)
    assert list(longer) == [4]
    assert longer[4].startswith("[] where")


@pytest.mark.parametrize("workers", [1, 2])
def test_the_gate_refuses_other_ids(
    tmp_path: Path, tied_model: Path, library: EncoderName, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "CHUNK_BYTES", 300)
    texts = [f"{TIED if i in (33, 34) else 'the cat'} {i}" for i in range(50)]
    path = write(tmp_path / "a.jsonl", texts)
    with pytest.raises(UserError) as caught:
        prepare_corpus(tmp_path / "c", [path], replace(options_of(tied_model, library), workers=workers))
    message = str(caught.value)
    assert message.startswith(f"--encoder {library}: not the tokenizer's ids: {path}:34: ")
    assert "['甲', '乙丙', '▁'" in message
    assert "sentencepiece gives ['甲乙', '丙', '▁'" in message
    share = re.search(r"of (\d+) documents compared (\d) \((.*)%\) differ; leave --encoder out$", message)
    assert share is not None
    assert 33 < int(share[1]) < 50  # those of the chunks up to here
    assert int(share[2]) == 2 - (int(share[1]) == 34)
    assert float(share[3]) == pytest.approx(100 * int(share[2]) / int(share[1]), abs=0.05)
    assert not list(tmp_path.glob("c.*"))


def test_the_tokenizers_own_library_passes_where_others_do_not(tmp_path: Path, tied_model: Path) -> None:
    path = write(tmp_path / "a.jsonl", [TIED, "the cat"])
    for name in (None, "sentencepiece"):
        options = replace(options_of(tied_model, name), heldout=0.0, overwrite=True)
        report = prepare_corpus(tmp_path / "c", [path], options)
        assert report.manifest is not None
        assert report.manifest.encoder is None


def test_a_share_of_all_documents_is_compared(
    tmp_path: Path, tied_model: Path, library: EncoderName, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However late they come; the first records are compared all of them."""
    monkeypatch.setattr(readers, "CHUNK_BYTES", 300)
    monkeypatch.setattr(encode, "COMPARED_FIRST", 20)
    texts = [f"{TIED} {i}" for i in range(1000)]
    looked_at = [text for text in texts if chosen(text, COMPARED, 0.01)]
    assert 3 < len(looked_at) < 30
    unseen = [text for text in texts if text not in looked_at]
    start = [f"the cat {i}" for i in range(40)]
    options = options_of(tied_model, library)
    path = write(tmp_path / "a.jsonl", ["", *start, *unseen])
    report = prepare_corpus(tmp_path / "c", [path], options)  # the gate is a sample
    assert report.manifest is not None
    assert report.manifest.encoder is not None
    assert 20 <= report.manifest.encoder.compared < 40
    write(path, [*start, *unseen[:500], looked_at[0], *unseen[500:]])
    with pytest.raises(UserError, match=rf"a\.jsonl:541: {library}"):
        prepare_corpus(tmp_path / "d", [path], options)
    write(path, [*unseen[:3], *start])
    with pytest.raises(UserError, match=r"a\.jsonl:1: "):
        prepare_corpus(tmp_path / "d", [path], options)


def test_the_first_records_are_compared_once(
    tmp_path: Path, sp_model: Path, library: EncoderName, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not again by a preparation that goes on behind them, so that its manifest is the one of a preparation in one."""
    monkeypatch.setattr(readers, "CHUNK_BYTES", 300)
    monkeypatch.setattr(encode, "COMPARED_FIRST", 20)
    monkeypatch.setattr(encode, "COMPARED_SHARE", 0.2)
    path = write(tmp_path / "a.jsonl", [f"the cat {i}" if i % 4 == 0 else " " for i in range(600)])
    path.write_text(path.read_text().replace('{"text": " "}', ""))
    options = options_of(sp_model, library)
    whole = [e.comparison for e in encode.encode_all(read_chunks(path, "jsonl", ("text",)), options)]
    for done in range(len(whole)):
        chunks = list(read_chunks(path, "jsonl", ("text",)))
        before = sum(encode_chunk(chunk, options).records for chunk in chunks[:done])
        assert [e.comparison for e in encode.encode_all(iter(chunks[done:]), options, before)] == whole[done:]


def test_a_corpus_is_the_same_whoever_encodes(tmp_path: Path, sp_model: Path, library: EncoderName) -> None:
    path = write(tmp_path / "a.jsonl", [f"the cat {i} <s> 今天天气" for i in range(100)])
    for name, encoder in (("own", None), ("other", library)):
        report = prepare_corpus(tmp_path / name, [path], options_of(sp_model, encoder))
        assert report.manifest is not None
        if encoder is None:
            assert report.manifest.encoder is None
        else:
            version = importlib.metadata.version(encoder)
            assert report.manifest.encoder == EncoderInfo(library=encoder, version=version, compared=100)
        assert report.manifest.tokenizer.library == "sentencepiece"
    for suffix in ("bin", "idx", "heldout.bin", "heldout.idx"):
        assert (tmp_path / f"own.{suffix}").read_bytes() == (tmp_path / f"other.{suffix}").read_bytes()


def test_encoders_that_cannot_be_are_refused(
    tmp_path: Path, sp_model: Path, hf_json: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"--encoder sentencepiece: .* is a tokenizer\.json"):
        load_encoder("sentencepiece", load_tokenizer(hf_json))
    unigram = tmp_path / "unigram"
    texts = iter(["the cat sat on the mat", "a b c d e f g h i"] * 10)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=texts, model_prefix=str(unigram), vocab_size=30, hard_vocab_limit=False, minloglevel=2
    )
    with pytest.raises(UserError, match="only SentencePiece models of type BPE"):
        load_encoder("tokenizers", load_tokenizer(unigram.with_suffix(".model")))
    monkeypatch.setattr(importlib.metadata, "version", absent)
    path = write(tmp_path / "a.jsonl", ["a"])
    with pytest.raises(UserError, match="--encoder gigatoken: `pip install gigatoken` first"):
        prepare_corpus(tmp_path / "c", [path], options_of(sp_model, "gigatoken"))
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    with pytest.raises(UserError, match=r"--encoder gigatoken: cannot read .*tiny\.model: ") as caught:
        load_encoder("gigatoken", load_tokenizer(sp_model))
    assert "\n" not in str(caught.value)


def absent(name: str) -> str:
    if name == "gigatoken":
        raise importlib.metadata.PackageNotFoundError
    return "1"


def test_the_command_refuses_other_ids(tmp_path: Path, tied_model: Path) -> None:
    """In a conversation, whose first prompt is alike."""
    turns = [("user", "the cat"), ("assistant", "on"), ("user", TIED), ("assistant", "sat")]
    record = {"messages": [{"role": role, "content": content} for role, content in turns]}
    (tmp_path / "a.jsonl").write_text(json.dumps(record))
    arguments = [tmp_path / "c", tmp_path / "a.jsonl", "--tokenizer", tied_model, "--language", "en", "--heldout", "0"]
    arguments += ["--kind", "instruction", "--turns-field", "messages", "--loss", "response", "--seq-length", "128"]
    command = [sys.executable, "-m", "megaflow.tools.cli", "prepare", *map(str, arguments)]
    refused = subprocess.run([*command, "--encoder", "tokenizers"], capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: --encoder tokenizers: not the tokenizer's ids: ")
    assert "of 1 documents compared 1 (100.0%) differ" in refused.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "1 documents" in done.stdout


@pytest.mark.parametrize("library", [None, *LIBRARIES])
def test_a_chunk_may_have_no_documents(sp_model: Path, library: EncoderName | None) -> None:
    pytest.importorskip(library or "sentencepiece")
    for records in ([], [b"{", b" "]):
        encoded = encode_chunk(Chunk("a", 1, "jsonl", records, 0), options_of(sp_model, library), compare_all=True)
        assert len(encoded.tokens) == len(encoded.lengths) == len(encoded.bytes) == len(encoded.heldout) == 0
        assert (encoded.records, encoded.num_bad) == (len(records[:1]), len(records[:1]))
