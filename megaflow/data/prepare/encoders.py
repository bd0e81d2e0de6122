"""Libraries that tokenise in place of a tokenizer's own, and the comparison that they have to pass.

A SentencePiece model is what sentencepiece makes of it. Others are faster, but where pieces share a score, as those
added to a vocabulary often do, they merge in another order and give other ids.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from megaflow.data.tokenizer import Tokenizer
from megaflow.errors import UserError

EncoderName = Literal["sentencepiece", "tokenizers", "gigatoken"]

SHOWN_PIECES = 4
"""Pieces shown from the first that differs."""


class Ids(NamedTuple):
    """Token ids of texts back to back, and how many each text has."""

    ids: npt.NDArray[np.int32]
    lengths: npt.NDArray[np.int64]

    def of(self, texts: npt.NDArray[np.bool_]) -> Ids:
        """Those of the texts that are True in `texts`."""
        return Ids(self.ids[np.repeat(texts, self.lengths)], self.lengths[texts])


Encode = Callable[[Sequence[str]], Ids]
"""Tokenises on the calling thread; like `Tokenizer.encode_batch`, without special tokens."""


def own_encoder(tokenizer: Tokenizer) -> Encode:
    """The tokenizer itself."""
    return lambda texts: _joined(tokenizer.encode_batch(texts))


def encoder_version(name: EncoderName) -> str:
    """The version of a library that is installed.

    Raises:
        UserError: it is not.
    """
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError as error:
        raise UserError(f"--encoder {name}: `pip install {name}` first, or leave --encoder out") from error


def load_encoder(name: EncoderName, tokenizer: Tokenizer) -> Encode:
    """A library that reads the tokenizer as a `tokenizer.json`, converted from a SentencePiece model if need be.

    Raises:
        UserError: it cannot be loaded, or cannot express the tokenizer.
    """
    if name == "sentencepiece":
        raise UserError(f"--encoder sentencepiece: {tokenizer.path} is a tokenizer.json; leave --encoder out")
    text = json.dumps(_tokenizer_json(tokenizer), ensure_ascii=False)
    try:
        return _tokenizers(text) if name == "tokenizers" else _gigatoken(text)
    except Exception as error:  # of whatever kind the libraries raise
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"--encoder {name}: cannot read {tokenizer.path}: {reason}; leave --encoder out") from error


def _tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """Without special tokens: their names in a text are text."""
    if tokenizer.library == "sentencepiece":
        from megaflow.checkpoint.tokenizer_export import read_model, tokenizer_json

        content = tokenizer_json(read_model(tokenizer.path), tokenizer.path)
    else:
        content = json.loads(tokenizer.path.read_text(encoding="utf-8"))
    added = content.get("added_tokens") or []
    return {**content, "added_tokens": [token for token in added if not token["special"]]}


def _tokenizers(text: str) -> Encode:
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_str(text)
    return lambda texts: _joined([tokenizer.encode(text, add_special_tokens=False).ids for text in texts])


def _gigatoken(text: str) -> Encode:
    import awkward
    import gigatoken

    tokenizer = gigatoken.Tokenizer.from_json(text)

    def encode(texts: Sequence[str]) -> Ids:
        found = tokenizer.encode_batch(list(texts), parallel=False)
        ids = awkward.to_numpy(awkward.flatten(found)).astype(np.int32)
        return Ids(ids, awkward.to_numpy(awkward.num(found)).astype(np.int64))

    return encode


def _joined(ids: Sequence[Sequence[int]]) -> Ids:
    lengths = np.fromiter(map(len, ids), np.int64, len(ids))
    return Ids(np.fromiter(chain.from_iterable(ids), np.int32, int(lengths.sum())), lengths)


def differences(found: Ids, texts: Sequence[str], tokenizer: Tokenizer) -> dict[int, str]:
    """Which of `texts` have other ids in `found` than from the tokenizer itself, and the pieces where that begins."""
    wanted = own_encoder(tokenizer)(texts)
    if np.array_equal(found.lengths, wanted.lengths) and np.array_equal(found.ids, wanted.ids):
        return {}
    pairs = zip(*(np.split(side.ids, np.cumsum(side.lengths)[:-1]) for side in (found, wanted)), strict=True)
    unequal = {}
    for text, (theirs, ours) in enumerate(pairs):
        if not np.array_equal(theirs, ours):
            both = min(len(theirs), len(ours))
            place = int(np.argmax(np.append(theirs[:both] != ours[:both], True)))
            shown = [tokenizer.pieces(side[place : place + SHOWN_PIECES].tolist()) for side in (theirs, ours)]
            unequal[text] = f"{shown[0]} where {tokenizer.library} gives {shown[1]}"
    return unequal
