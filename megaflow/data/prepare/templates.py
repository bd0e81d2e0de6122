"""What becomes of a record: the three kinds of corpora and their templates.

Every choice that varies from example to example (held out or not, direction of a pair, template or plain) is a hash of
the example's own text, so it never depends on order, number of processes or run.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import xxhash

from megaflow.data.prepare.readers import Format
from megaflow.data.prepare.records import read_conversation, read_texts
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
PLAIN = "{instruction}\n{input}\n{output}"
HELDOUT, DIRECTION, TEMPLATED, COMPARED = 1, 2, 3, 4
"""Hash seeds: one independent choice each."""
NAMES = {"text": ("text",), "parallel": ("source", "target"), "instruction": ("instruction", "input", "output")}
_SLOT = re.compile(r"\{(\w+)\}")
_INPUT = re.compile(r"\s?\{input\}")
"""With its separator, which goes where there is no input."""


@dataclass(frozen=True)
class Segment:
    """Part of a document, whether the loss covers it, and whether an end token follows; one always does at the end."""

    text: str
    loss: bool = True
    ends: bool = False


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
        fields: name in the file of each of the kind's fields, in the order of `NAMES`; of instructions also one name
            alone, of a list of turns.
        template: of `PRESETS`, or a string with the kind's fields in braces. The direction of a pair is
            chosen per example for the presets, a string is written as it stands. A conversation is the template once
            for each answer: a preset on lines of their own, a string back to back, the system prompt on a line before.
            Each answer is followed by an end token, where generation is to stop.
        loss: "all", or "response" for the last field (and what follows it in the template) alone, in a conversation
            for each of the assistant's turns; the text before it is then tokenised separately, as a prompt is at
            generation.
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
        if self.turns:
            talk = read_conversation(record, format, self.fields[0])
            turns = [{"instruction": text, "input": "", "output": answer} for text, answer in talk.exchanges]
            return self._instruction(turns, talk.system)
        optional = self.fields[1:2] if self.kind == "instruction" else ()
        values = read_texts(record, format, self.fields, optional)
        named = dict(zip(NAMES[self.kind], values, strict=True))
        if self.kind == "text":
            return Example((Segment(named["text"]),), named["text"])
        return self._pair(named) if self.kind == "parallel" else self._instruction([named])

    @property
    def turns(self) -> bool:
        """Whether records are conversations."""
        return self.kind == "instruction" and len(self.fields) == 1

    def _pair(self, named: dict[str, str]) -> Example:
        key = named["source"]
        named["source_label"], named["target_label"] = self.fields
        if self.template in PRESETS and chosen(key, DIRECTION, 0.5):
            named["source"], named["target"] = named["target"], named["source"]
            named["source_label"], named["target_label"] = named["target_label"], named["source_label"]
        template = PRESETS.get(self.template, self.template)
        return Example(self._segments(_fill(template, named, "target")), key)

    def _instruction(self, turns: Sequence[Mapping[str, str]], system: str = "") -> Example:
        key = f"{turns[0]['instruction']}\n{turns[0]['input']}"
        plain = chosen(key, TEMPLATED, self.plain_fraction)
        template = PLAIN if plain else PRESETS.get(self.template, self.template)
        between = "\n" if plain or self.template in PRESETS else ""
        segments: list[Segment] = []
        before = f"{system}\n" if system.strip() else ""
        for named in turns:
            filled = _fill(template if named["input"] else _INPUT.sub("", template), named, "output", before)
            segments += self._segments(filled, ends=named is not turns[-1])
            before = between
        return Example(tuple(segments), key)

    def _segments(self, parts: tuple[Segment, Segment], ends: bool = False) -> tuple[Segment, ...]:
        """A prompt and a response as they are tokenised: together where the loss covers both."""
        prompt, response = parts
        if self.loss == "all":
            return (Segment(prompt.text + response.text, ends=ends),)
        return prompt, replace(response, ends=ends)


def _fill(template: str, named: Mapping[str, str], response: str, before: str = "") -> tuple[Segment, Segment]:
    """`before` and a template filled in, up to the response and from it on."""
    prompt, _, after = template.partition("{" + response + "}")
    return (
        Segment(before + _substitute(prompt, named), loss=False),
        Segment(named[response] + _substitute(after, named)),
    )


def _substitute(template: str, named: Mapping[str, str]) -> str:
    return _SLOT.sub(lambda slot: named[slot[1]], template)


def check_template(kind: Kind, template: str, turns: bool = False) -> None:
    """Refuse a template that does not fit the kind; `turns`: of instructions that are conversations.

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
    names = tuple(name for name in NAMES[kind] if not (turns and name == "input"))
    known = (*names, "source_label", "target_label") if kind == "parallel" else names
    unknown = next((slot for slot in slots if slot not in known), None)
    if unknown is not None:
        what = "--turns-field" if turns else f"--kind {kind}"
        raise UserError(f"--template {template!r}: no field {unknown}; {what} has {', '.join(known)}")
    wrong = next((name for name in names if name != "input" and slots.count(name) != 1), None)
    if wrong is not None or slots.count("input") > 1:
        raise UserError(
            f"--template {template!r}: needs {{{wrong or 'input'}}} exactly once; or one of: {', '.join(presets)}"
        )
