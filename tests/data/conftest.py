"""Tokenizers small enough to train for the tests."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import sentencepiece
import tokenizers

from megaflow.data.prepare.encode import PrepareOptions
from tests.data.preparing import TEXT

SAMPLE = [
    "Hello world, this is a small text about nothing at all.",
    "The cat sat on the mat and looked at the moon.",
    "It's 2024: 3.14159 + 1,000,000 = ?",
    "今天天气很好，我们去公园散步吧。",
    "他在城市里工作，每天坐车回家。",
    "### Instruction:translate this ### Response:翻译这个",
]


@pytest.fixture(scope="session")
def sp_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece BPE model with LLaMA's options and 400 pieces."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SAMPLE * 5),
        model_writer=model,
        model_type="bpe",
        vocab_size=400,
        character_coverage=0.98,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
    )
    path = tmp_path_factory.mktemp("tokenizer") / "tiny.model"
    path.write_bytes(model.getvalue())
    return path


@pytest.fixture(scope="session")
def hf_json(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE tokenizer.json without a begin-of-sequence token."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SAMPLE, trainer)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


@pytest.fixture
def options(sp_model: Path) -> PrepareOptions:
    """Of a preparation of texts, a fifth of them held out."""
    return PrepareOptions(TEXT, "en", str(sp_model), heldout=0.2)
