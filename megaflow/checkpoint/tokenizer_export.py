"""A run's tokenizer as Hugging Face files that AutoTokenizer reads as they are, giving the same ids.

transformers guesses at a bare SentencePiece `tokenizer.model` and guesses wrong for LLaMA's, so the model is spelled
out as a `tokenizer.json`.
"""

from __future__ import annotations

import base64
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import tokenizers
from sentencepiece import sentencepiece_model_pb2

from megaflow.data.tokenizer import PROBE_TEXTS, Tokenizer, load_tokenizer
from megaflow.errors import UserError

SPACE = "\u2581"
BPE = 2  # TrainerSpec.ModelType
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4  # ModelProto.SentencePiece.Type
PROBES = (
    *PROBE_TEXTS,
    " leading, double  and trailing spaces  ",
    "line\nbreaks\n\n\tand tabs\r\n        eight spaces",
    "emoji \U0001f600 \U0001f469\u200d\U0001f4bb, rare \U00020bb7 \u0f40 \u2192 \ufb01 \u3000 \uff21\uff22\uff23",
)

logger = logging.getLogger(__name__)


def export_tokenizer(source: str | Path, out: str | Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and special_tokens_map.json for a tokenizer file into `out`.

    Args:
        source: a SentencePiece BPE `.model`, which is copied too, or a Hugging Face `tokenizer.json`.

    Raises:
        UserError: for a file that is neither, or one that tokenizer.json cannot express.
    """
    source, out = Path(source), Path(out)
    ours = load_tokenizer(source)
    if source.suffix == ".json":
        shutil.copyfile(source, out / "tokenizer.json")
    else:
        shutil.copyfile(source, out / "tokenizer.model")
        model = read_model(source)
        if ties(model):
            logger.warning(
                "%s: some pieces share a score; SentencePiece merges those from the left, tokenizer.json cannot: "
                "AutoTokenizer will give other ids here and there, tokenizer.model the right ones",
                source,
            )
        text = json.dumps(tokenizer_json(model, source), ensure_ascii=False)
        (out / "tokenizer.json").write_text(text, encoding="utf-8")
    theirs = tokenizers.Tokenizer.from_file(str(out / "tokenizer.json"))
    check_ids(ours, theirs)
    ids = {"bos_token": ours.bos_id, "eos_token": ours.eos_id, "pad_token": ours.pad_id}
    special = {name: theirs.id_to_token(i) for name, i in ids.items() if i is not None}
    if theirs.token_to_id("<unk>") is not None:
        special["unk_token"] = "<unk>"
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # a LLaMA class would rebuild the tokenizer its own way
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
        **special,
    }
    for name, content in (("tokenizer_config.json", config), ("special_tokens_map.json", special)):
        (out / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def check_ids(ours: Tokenizer, theirs: tokenizers.Tokenizer) -> None:
    """Refuse an export that gives other ids on texts in many scripts."""
    for text, ids in zip(PROBES, ours.encode_batch(PROBES), strict=True):
        if theirs.encode(text, add_special_tokens=False).ids != ids:
            raise UserError(f"{ours.path}: tokenizer.json cannot express this tokenizer: {text!r} gets other ids")


def read_model(path: Path) -> Any:
    """Parse a SentencePiece model (a ModelProto)."""
    model = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    try:
        model.ParseFromString(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except Exception as error:  # protobuf's DecodeError lives where its backend does
        raise UserError(f"{path}: not a SentencePiece model") from error
    if not model.pieces or model.trainer_spec.model_type != BPE:
        raise UserError(f"{path}: only SentencePiece models of type BPE can be written as tokenizer.json")
    return model


def ties(model: Any) -> bool:
    """Whether pieces share a score, so that the merges alone do not say which of two comes first."""
    scores = [p.score for p in model.pieces if p.type == NORMAL and p.piece.strip(SPACE)]
    return len(set(scores)) < len(scores)


def merges(pieces: list[Any]) -> list[list[str]]:
    """The pairs a BPE vocabulary can be built by, the best first.

    SentencePiece merges the neighbours whose union scores highest; every way to split a piece in two is one such pair.
    """
    ids = {p.piece: i for i, p in enumerate(pieces) if p.type in (NORMAL, USER_DEFINED)}
    ranked = sorted(ids, key=lambda piece: -pieces[ids[piece]].score)
    return [
        [left, right]
        for piece in ranked
        for left, right in sorted(
            ((piece[:i], piece[i:]) for i in range(1, len(piece)) if piece[:i] in ids and piece[i:] in ids),
            key=lambda pair: (ids[pair[0]], ids[pair[1]]),
        )
    ]


def normalizer(spec: Any) -> dict[str, Any]:
    """SentencePiece's normalisation: character map, extra spaces, leading space, spaces as U+2581."""
    steps: list[dict[str, Any]] = []
    if spec.precompiled_charsmap:
        charsmap = base64.b64encode(spec.precompiled_charsmap).decode()
        steps.append({"type": "Precompiled", "precompiled_charsmap": charsmap})
    if spec.remove_extra_whitespaces:
        steps.append({"type": "Strip", "strip_left": True, "strip_right": True})
        steps.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})
    if spec.add_dummy_prefix:
        steps.append({"type": "Prepend", "prepend": SPACE})
    steps.append({"type": "Replace", "pattern": {"String": " "}, "content": SPACE})
    return {"type": "Sequence", "normalizers": steps}


def tokenizer_json(model: Any, path: Path) -> dict[str, Any]:
    """The content of tokenizer.json for a SentencePiece BPE model, with bos before each text as LLaMA has it."""
    pieces = list(model.pieces)
    vocab = {p.piece: i for i, p in enumerate(pieces)}
    if len(vocab) != len(pieces):
        raise UserError(f"{path}: has the same piece twice, which tokenizer.json cannot express")
    decoder: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if model.normalizer_spec.add_dummy_prefix:
        decoder.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    flags = {"single_word": False, "lstrip": False, "rstrip": False}
    added = [
        {"id": i, "content": p.piece, **flags, "normalized": False, "special": p.type != USER_DEFINED}
        for i, p in enumerate(pieces)
        if p.type in (UNKNOWN, CONTROL, USER_DEFINED)
    ]
    spec = model.trainer_spec
    bos = pieces[spec.bos_id].piece if spec.bos_id >= 0 else None
    text: list[dict[str, Any]] = [{"Sequence": {"id": "A", "type_id": 0}}]
    second: list[dict[str, Any]] = [{"Sequence": {"id": "B", "type_id": 1}}]
    first = [{"SpecialToken": {"id": bos, "type_id": 0}}] if bos else []
    again = [{"SpecialToken": {"id": bos, "type_id": 1}}] if bos else []
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": normalizer(model.normalizer_spec),
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": first + text,
            "pair": first + text + again + second,
            "special_tokens": {bos: {"id": bos, "ids": [vocab[bos]], "tokens": [bos]}} if bos else {},
        },
        "decoder": {"type": "Sequence", "decoders": decoder},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": pieces[spec.unk_id].piece,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": spec.byte_fallback,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": merges(pieces),
        },
    }
