"""Tokenizers: SentencePiece models and Hugging Face `tokenizer.json` files behind one small interface."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

from megaflow.errors import UserError

PROBE_TEXTS = (
    "Hello world",
    "  Two  spaces,\ttab\nand a new line.",
    "It's 2024: 3.14159 + 1,000,000 = ?",
    "今天天气很好，我们去公园散步吧。",
    "大语言模型（LLM）在2023年迅速发展。",
    "La façade naïve coûte 12 €; größer, señor, Čáhput.",
    "Привет, мир! مرحبا こんにちは 안녕하세요",
    "def f(x):\n    return x ** 2  # 平方",
    "🙂 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 e\u0301",
    "### Instruction:翻译 translate ### Response:",
)
"""What the probe encodes: spaces, digits, several scripts, code, emoji. Changing it changes every probe."""

BOS_NAMES = ("<s>", "<|begin_of_text|>", "<|startoftext|>", "[BOS]", "<bos>")
EOS_NAMES = ("</s>", "<|end_of_text|>", "<|endoftext|>", "[EOS]", "<eos>")
PAD_NAMES = ("<pad>", "[PAD]", "<|pad|>", "<|finetune_right_pad_id|>")


class Tokenizer(ABC):
    """Text to ids and back. `encode` adds no begin or end token and treats special tokens in a text as plain text.

    Attributes: `vocab_size`, `bos_id` and `pad_id` (None where the tokenizer has none), `eos_id`, `library` and its
    `version`, `sha256` of the file, `path`.
    """

    library: str
    vocab_size: int
    bos_id: int | None
    eos_id: int
    pad_id: int | None

    def __init__(self, path: Path) -> None:
        self.path = path
        self.version = importlib.metadata.version(self.library)
        self.sha256 = hashlib.sha256(path.read_bytes()).hexdigest()

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, on the calling thread."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; begin, end and padding tokens give nothing."""

    @abstractmethod
    def pieces(self, ids: Sequence[int]) -> list[str]:
        """Each id as the vocabulary writes it."""

    def encode(self, text: str) -> list[int]:
        """Ids of `text`."""
        return self.encode_batch([text])[0]

    @property
    def start_id(self) -> int:
        """The token a document starts with: begin-of-sequence, or end-of-sequence in vocabularies that have no other.

        Every token of the text is thereby predicted from something, which keeps bits per byte exact.
        """
        return self.eos_id if self.bos_id is None else self.bos_id

    @property
    def probe(self) -> str:
        """Hash of the ids of `PROBE_TEXTS`: equal for two tokenizers exactly when they split those texts alike."""
        ids = json.dumps(self.encode_batch(PROBE_TEXTS), separators=(",", ":"))
        return hashlib.sha256(ids.encode()).hexdigest()[:16]


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece `.model`, read by sentencepiece itself (as LLaMA's must be to give LLaMA's ids)."""

    library = "sentencepiece"

    def __init__(self, path: Path) -> None:
        import sentencepiece

        super().__init__(path)
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError) as error:
            raise UserError(f"{path}: not a SentencePiece model") from error
        self.vocab_size = self._processor.vocab_size()
        bos, eos, pad = (self._processor.bos_id(), self._processor.eos_id(), self._processor.pad_id())
        if eos < 0:
            raise UserError(f"{path}: the model has no end-of-sequence token; train it with eos_id set")
        self.eos_id = eos
        self.bos_id = bos if bos >= 0 else None
        self.pad_id = pad if pad >= 0 else None

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return self._processor.encode(list(texts), out_type=int, num_threads=1)

    def decode(self, ids: Sequence[int]) -> str:
        return self._processor.decode([int(i) for i in ids])

    def pieces(self, ids: Sequence[int]) -> list[str]:
        return [self._processor.id_to_piece(int(i)) for i in ids]


class HuggingFaceTokenizer(Tokenizer):
    """A Hugging Face `tokenizer.json`.

    The file does not say which tokens begin and end a sequence: `tokenizer_config.json` beside it does, and without one
    the usual names are looked for.
    """

    library = "tokenizers"

    def __init__(self, path: Path) -> None:
        import tokenizers

        super().__init__(path)
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"{path}: not a Hugging Face tokenizer.json") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        named = _special_names(path.with_name("tokenizer_config.json"))
        eos = self._find(named.get("eos_token"), EOS_NAMES)
        if eos is None:
            names = ", ".join(EOS_NAMES)
            raise UserError(
                f"{path}: no end-of-sequence token; name it as eos_token in tokenizer_config.json ({names})"
            )
        self.eos_id = eos
        self.bos_id = self._find(named.get("bos_token"), () if named else BOS_NAMES)
        self.pad_id = self._find(named.get("pad_token"), () if named else PAD_NAMES)

    def _find(self, name: str | None, usual: Sequence[str]) -> int | None:
        for candidate in (name,) if name else usual:
            token = self._tokenizer.token_to_id(candidate)
            if token is not None:
                return token
        return None

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self._tokenizer.encode(text, add_special_tokens=False).ids for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

    def pieces(self, ids: Sequence[int]) -> list[str]:
        return [self._tokenizer.id_to_token(int(i)) or "" for i in ids]


def _special_names(path: Path) -> dict[str, str]:
    """`bos_token`, `eos_token` and `pad_token` as a tokenizer_config.json names them; empty without such a file."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON") from error
    if not isinstance(config, dict):
        raise UserError(f"{path}: not a JSON object; write eos_token and bos_token in one, or remove the file")
    names = {}
    for key in ("bos_token", "eos_token", "pad_token"):
        token = config.get(key)
        if isinstance(token, dict):
            token = token.get("content")
        if isinstance(token, str):
            names[key] = token
    return names


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Read a SentencePiece `.model` or a Hugging Face `tokenizer.json`.

    Raises:
        UserError: no such file, another kind of file, or one without an end-of-sequence token.
    """
    path = Path(path)
    if not path.is_file():
        what = "is a folder; name the .model or tokenizer.json in it" if path.is_dir() else "no such tokenizer file"
        raise UserError(f"{path}: {what}")
    if path.suffix == ".model":
        return SentencePieceTokenizer(path)
    if path.suffix == ".json":
        return HuggingFaceTokenizer(path)
    raise UserError(f"{path}: a tokenizer is a SentencePiece .model or a Hugging Face tokenizer.json")
