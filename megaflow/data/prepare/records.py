"""What a record of an input file says: its texts, or the turns of a conversation."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megaflow.data.prepare.readers import BadRecord, Format

ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "system": "system"}
"""Who speaks, by the names that OpenAI and Hugging Face use (`role`, `content`) and ShareGPT's (`from`, `value`)."""


@dataclass(frozen=True)
class Conversation:
    """What a system prompt says ("" where there is none), and each text of the user with its answer."""

    system: str
    exchanges: tuple[tuple[str, str], ...]


def read_texts(record: Any, format: Format, fields: tuple[str, ...], optional: tuple[str, ...] = ()) -> list[str]:
    """The fields of a record, each a non-empty string that UTF-8 can hold; "" for an optional one that is missing.

    Raises:
        BadRecord: it is not of that form.
    """
    values = _fields(record, format, fields[0])
    return [
        "" if values.get(field) is None and field in optional else _text_of(values, field, field in optional)
        for field in fields
    ]


def read_conversation(record: Any, format: Format, field: str) -> Conversation:
    """The turns under `field`: perhaps the system's, then the user's and the assistant's, one after the other.

    An empty system prompt is none.

    Raises:
        BadRecord: roles are unknown or out of order, a turn is empty, or the last one has no answer.
    """
    turns = _fields(record, format, field).get(field)
    if not isinstance(turns, list) or not turns:
        raise BadRecord(f"no field {field}" if turns is None else f"field {field} is not a list of turns")
    said = []
    for number, turn in enumerate(turns, start=1):
        try:
            said.append(_turn(turn))
        except BadRecord as reason:
            raise BadRecord(f"turn {number} of {field}: {reason}") from reason
    opening = said[0][0] == "system"
    rest = said[opening:]
    for place, (role, _) in enumerate(rest):
        expected = ("user", "assistant")[place % 2]
        if role != expected:
            raise BadRecord(f"turn {1 + place + opening} of {field} is the {role}'s, where the {expected}'s belongs")
    if len(rest) < 2:
        raise BadRecord(f"{field} has no turn of the assistant")
    if len(rest) % 2:
        raise BadRecord(f"{field} ends without an answer")
    texts = [text for _, text in rest]
    return Conversation(said[0][1] if opening else "", tuple(zip(texts[::2], texts[1::2], strict=True)))


def _turn(turn: Any) -> tuple[str, str]:
    """Role and text of a turn."""
    if not isinstance(turn, dict):
        raise BadRecord("not an object")
    who, what = ("from", "value") if "from" in turn else ("role", "content")
    name = turn.get(who)
    role = ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        raise BadRecord(f"unknown role {name!r}" if who in turn else f"no field {who}")
    return role, _text_of(turn, what, may_be_empty=role == "system")


def _fields(record: Any, format: Format, field: str) -> dict[str, Any]:
    """A record's values by field; plain text has one, `field`."""
    if format in ("parquet", "arrow"):
        return record
    text = _decoded(record)
    if format != "jsonl":
        return {field: text.removesuffix("\r") if format == "lines" else text}
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadRecord("not JSON") from error
    if not isinstance(values, dict):
        raise BadRecord("not a JSON object")
    return values


def _decoded(line: bytes) -> str:
    try:
        text = line.decode().removeprefix("\ufeff")  # the utf-8-sig codec is written in Python
    except UnicodeDecodeError as error:
        raise BadRecord("not UTF-8") from error
    if not text.strip():
        raise BadRecord("empty line")
    return text


def _text_of(values: Mapping[str, Any], field: str, may_be_empty: bool) -> str:
    value = values.get(field)
    if value is None:
        raise BadRecord(f"no field {field}")
    if not isinstance(value, str):
        raise BadRecord(f"field {field} is not a string")
    if not value.strip() and not may_be_empty:
        raise BadRecord(f"field {field} is empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadRecord(f"field {field} holds half a surrogate pair") from error
    return value
