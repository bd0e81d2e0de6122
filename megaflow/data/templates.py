"""What becomes of a record: the three kinds of corpora and their templates.

Every choice that varies from example to example (held out or not, direction of a pair, template or plain) is a hash of
the example's own text, so it never depends on order, number of processes or run.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import xxhash

from megaflow.data.readers import BadRecord, Format
from megaflow.errors import UserError

Kind = Literal["text", "parallel", "instruction"]
Loss = Literal["all", "response"]

PRESETS = {
    "tab": "{source}\t{target}",
    "labelled": "{source_label}: {source}\n{target_label}: {target}",
    "chatflow": "### Instruction:{instruction} {input} ### Response:{output}",
}
"""`tab` and `chatflow`: the formats of "Dynamic data sampler for cross-language transfer learning in large language
models" (ChatFlow)."""
DEFAULT_TEMPLATE = {"parallel": "tab", "instruction": "chatflow"}
HELDOUT, DIRECTION, TEMPLATED = 1, 2, 3
"""Hash seeds: one independent choice each."""
NAMES = {"text": ("text",), "parallel": ("source", "target"), "instruction": ("instruction", "input", "output")}
_SLOT = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class Segment:
    """Part of a document, and whether the loss covers it."""

    text: str
    loss: bool = True


@dataclass(frozen=True)
class Example:
    """One document: `segments` are tokenised one by one, so a loss boundary is always a token boundary."""

    segments: tuple[Segment, ...]
    key: str
    """What the choices hash."""


def chosen(key: str, seed: int, share: float) -> bool:
    """Whether `key` is among a `share` (0..1) of all texts, by hash."""
    return xxhash.xxh3_64_intdigest(key.encode(), seed=seed) < share * 2.0**64


@dataclass(frozen=True)
class ExampleFormat:
    """How records of one kind become documents.

    Args:
        fields: name in the file of each of the kind's fields, in the order of `NAMES`.
        template: of `PRESETS`, or a string with the kind's fields in braces. The direction of a pair is
            chosen per example for the presets, a string is written as it stands.
        loss: "all", or "response" for the last field (and what follows it) alone; the text before it is then tokenised
            separately, as a prompt is at generation.
        plain_fraction: share of instruction examples written as their fields on lines of their own, no template.
    """

    kind: Kind
    fields: tuple[str, ...]
    template: str = ""
    loss: Loss = "all"
    plain_fraction: float = 0.0

    def example(self, record: Any, format: Format) -> Example:
        """The document of a record.

        Raises:
            BadRecord: it is not of the form expected.
        """
        values = _values(record, format, self.fields, optional=self.fields[1:2] if self.kind == "instruction" else ())
        named = dict(zip(NAMES[self.kind], values, strict=True))
        if self.kind == "text":
            return Example((Segment(named["text"]),), named["text"])
        if self.kind == "parallel":
            return self._pair(named)
        return self._instruction(named)

    def _pair(self, named: dict[str, str]) -> Example:
        key = named["source"]
        named["source_label"], named["target_label"] = self.fields
        if self.template in PRESETS and chosen(key, DIRECTION, 0.5):
            named["source"], named["target"] = named["target"], named["source"]
            named["source_label"], named["target_label"] = named["target_label"], named["source_label"]
        return self._fill(PRESETS.get(self.template, self.template), named, "target", key)

    def _instruction(self, named: dict[str, str]) -> Example:
        key = f"{named['instruction']}\n{named['input']}"
        if chosen(key, TEMPLATED, self.plain_fraction):
            template = "{instruction}\n{input}\n{output}"
        else:
            template = PRESETS.get(self.template, self.template)
        if not named["input"]:  # leave its separator out too
            template = re.sub(r"\s?\{input\}", "", template)
        return self._fill(template, named, "output", key)

    def _fill(self, template: str, named: Mapping[str, str], response: str, key: str) -> Example:
        before, _, after = template.partition("{" + response + "}")
        prompt, answer = _substitute(before, named), named[response] + _substitute(after, named)
        if self.loss == "all":
            return Example((Segment(prompt + answer),), key)
        return Example((Segment(prompt, loss=False), Segment(answer)), key)


def _substitute(template: str, named: Mapping[str, str]) -> str:
    return _SLOT.sub(lambda slot: named[slot[1]], template)


def _values(record: Any, format: Format, fields: tuple[str, ...], optional: tuple[str, ...]) -> list[str]:
    """The fields of a record, each a non-empty string that UTF-8 can hold."""
    if format in ("lines", "document"):
        record = {fields[0]: _text(record)}
    elif format == "jsonl":
        try:
            record = json.loads(_text(record))
        except (ValueError, RecursionError) as error:
            if isinstance(error, BadRecord):
                raise
            raise BadRecord("not JSON") from error
        if not isinstance(record, dict):
            raise BadRecord("not a JSON object")
    values = []
    for field in fields:
        value = record.get(field)
        if value is None and field in optional:
            value = ""
        if value is None:
            raise BadRecord(f"no field {field}")
        if not isinstance(value, str):
            raise BadRecord(f"field {field} is not a string")
        if not value.strip() and field not in optional:
            raise BadRecord(f"field {field} is empty")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise BadRecord(f"field {field} holds half a surrogate pair") from error
        values.append(value)
    return values


def _text(line: bytes) -> str:
    try:
        text = line.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadRecord("not UTF-8") from error
    if not text.strip():
        raise BadRecord("empty line")
    return text


def check_template(kind: Kind, template: str) -> None:
    """Refuse a template that does not fit the kind.

    Raises:
        UserError: an unknown preset or field, or a field that is missing or given twice.
    """
    if kind == "text":
        if template:
            raise UserError("--template is for --kind parallel and instruction")
        return
    presets = ("tab", "labelled") if kind == "parallel" else ("chatflow",)
    if template in presets:
        return
    slots = _SLOT.findall(template)
    known = (*NAMES[kind], "source_label", "target_label") if kind == "parallel" else NAMES[kind]
    unknown = next((slot for slot in slots if slot not in known), None)
    if unknown is not None:
        raise UserError(f"--template {template!r}: no field {unknown}; --kind {kind} has {', '.join(known)}")
    required = [name for name in NAMES[kind] if name != "input"]
    wrong = next((name for name in required if slots.count(name) != 1), None)
    if wrong is not None or slots.count("input") > 1:
        raise UserError(
            f"--template {template!r}: needs {{{wrong or 'input'}}} exactly once; or one of: {', '.join(presets)}"
        )
