"""Both kinds of tokenizers behind one interface."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import sentencepiece

from megaflow.data.tokenizer import PROBE_TEXTS, load_tokenizer
from megaflow.errors import UserError

TEXTS = ["Hello world", "  two  spaces\nand\ttab", "今天很好 🙂", "12345", "", "é e\u0301 \u200b"]


@pytest.mark.parametrize("text", [*TEXTS, *PROBE_TEXTS])
def test_round_trip(text: str, sp_model: Path, hf_json: Path) -> None:
    for path in (sp_model, hf_json):
        tokenizer = load_tokenizer(path)
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_sentencepiece_is_sentencepiece_itself(sp_model: Path) -> None:
    ours = load_tokenizer(sp_model)
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(sp_model))
    assert ours.encode_batch(TEXTS) == [theirs.encode(text) for text in TEXTS]
    assert (ours.vocab_size, ours.bos_id, ours.eos_id, ours.pad_id) == (theirs.vocab_size(), 1, 2, None)
    assert ours.start_id == 1


def test_pieces_are_as_the_vocabulary_writes_them(sp_model: Path, hf_json: Path) -> None:
    for path, space, text in ((sp_model, "\u2581", "\u2581The\u2581cat"), (hf_json, "\u0120", "The\u0120cat")):
        tokenizer = load_tokenizer(path)
        pieces = tokenizer.pieces(tokenizer.encode("The cat"))
        assert "".join(pieces) == text
        assert any(piece.startswith(space) for piece in pieces)
        assert tokenizer.pieces([]) == []


def test_special_tokens_in_a_text_are_plain_text(sp_model: Path, hf_json: Path) -> None:
    sp, hf = load_tokenizer(sp_model), load_tokenizer(hf_json)
    assert not {sp.bos_id, sp.eos_id} & set(sp.encode("a<s>b</s>"))
    assert hf.eos_id not in hf.encode("a<|endoftext|>b")
    assert hf.decode(hf.encode("a<|endoftext|>b")) == "a<|endoftext|>b"


def test_special_tokens_decode_to_nothing(sp_model: Path, hf_json: Path) -> None:
    for path in (sp_model, hf_json):
        tokenizer = load_tokenizer(path)
        assert tokenizer.decode([tokenizer.start_id, *tokenizer.encode("Hello"), tokenizer.eos_id]) == "Hello"


def test_without_a_begin_token_documents_start_with_the_end_token(hf_json: Path) -> None:
    tokenizer = load_tokenizer(hf_json)
    assert tokenizer.bos_id is None
    assert tokenizer.start_id == tokenizer.eos_id == 0


def test_tokenizer_config_names_the_special_tokens(hf_json: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(hf_json, tmp_path / "tokenizer.json"))
    config = {"eos_token": {"content": "!"}, "bos_token": "H", "pad_token": None}
    path.with_name("tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(path)
    assert tokenizer.eos_id == tokenizer.encode("!")[0]
    assert tokenizer.bos_id == tokenizer.encode("H")[0]
    assert tokenizer.pad_id is None


def test_truncation_and_padding_of_the_file_are_not_applied(hf_json: Path, tmp_path: Path) -> None:
    import tokenizers

    other = tokenizers.Tokenizer.from_file(str(hf_json))
    other.enable_truncation(4)
    other.enable_padding(length=64)
    other.save(str(tmp_path / "tokenizer.json"))
    text = "The cat sat on the mat and looked"
    assert load_tokenizer(tmp_path / "tokenizer.json").encode(text) == load_tokenizer(hf_json).encode(text)


def test_probe_tells_tokenizers_apart(sp_model: Path, hf_json: Path) -> None:
    sp, hf = load_tokenizer(sp_model), load_tokenizer(hf_json)
    assert sp.probe == load_tokenizer(sp_model).probe
    assert sp.probe != hf.probe
    assert sp.sha256 != hf.sha256


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.model", None, "no such tokenizer file"),
        ("bad.model", b"not a model", "not a SentencePiece model"),
        ("bad.json", b"{", "not a Hugging Face tokenizer.json"),
        ("vocab.txt", b"a", "a tokenizer is"),
    ],
)
def test_wrong_files_are_named(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        load_tokenizer(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=f"^{tmp_path}: is a folder; name the .model or tokenizer.json in it"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("text", ["[]", '"eos"', "null", "5"])
def test_a_config_that_is_no_object_is_named(hf_json: Path, tmp_path: Path, text: str) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(hf_json.read_bytes())
    path.with_name("tokenizer_config.json").write_text(text)
    with pytest.raises(UserError, match=r"tokenizer_config\.json: not a JSON object"):
        load_tokenizer(path)
