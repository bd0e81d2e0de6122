"""Conversations: their records, their text, and which of their tokens are trained on."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from megaflow.data.prepare.encode import PrepareOptions
from megaflow.data.prepare.prepare import prepare_corpus
from megaflow.data.prepare.readers import BadRecord
from megaflow.data.prepare.templates import ExampleFormat, Segment, check_template
from megaflow.data.sources import open_source
from megaflow.data.tokenizer import load_tokenizer
from megaflow.errors import UserError
from megaflow.tools.prepare import KindChoice, prepare
from tests.data.corpora import read_window

SHAREGPT = {"user": "human", "assistant": "gpt", "system": "system"}
TALK = ExampleFormat("instruction", ("messages",), "chatflow", "response")


def messages(*texts: str, system: str | None = None) -> list[dict[str, str]]:
    """Turns of user and assistant, one after the other."""
    roles = itertools.cycle(("user", "assistant"))
    turns = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    return turns if system is None else [{"role": "system", "content": system}, *turns]


def line(turns: Any, field: str = "messages") -> bytes:
    return json.dumps({field: turns}).encode()


def text(format: ExampleFormat, turns: Any) -> str:
    return "".join(segment.text for segment in format.example(line(turns), "jsonl").segments)


def test_a_conversation_is_its_prompts_and_answers() -> None:
    talk = line(messages("a", "b", "c", "d", system="be kind"))
    assert TALK.example(talk, "jsonl").segments == (
        Segment("be kind\n### Instruction:a ### Response:", loss=False),
        Segment("b", ends=True),
        Segment("\n### Instruction:c ### Response:", loss=False),
        Segment("d"),
    )
    whole = ("be kind\n### Instruction:a ### Response:b", "\n### Instruction:c ### Response:d")
    segments = replace(TALK, loss="all").example(talk, "jsonl").segments
    assert segments == (Segment(whole[0], ends=True), Segment(whole[1]))


def test_templates_of_conversations() -> None:
    turns = messages("{output}", "{x}", "c", "d", system="{instruction}")
    own = replace(TALK, template="<u>{instruction}</u><a>{output}</a>")
    assert text(own, turns) == "{instruction}\n<u>{output}</u><a>{x}</a><u>c</u><a>d</a>"
    assert [s.text for s in own.example(line(turns), "jsonl").segments if s.loss] == ["{x}</a>", "d</a>"]
    assert text(replace(TALK, plain_fraction=1.0), turns) == "{instruction}\n{output}\n{x}\nc\nd"
    assert text(TALK, messages("a", "b", system=" ")) == text(TALK, messages("a", "b"))


def test_both_forms_say_the_same() -> None:
    turns = messages("a", "b", "c", "d", system="s")
    other = [{"from": SHAREGPT[turn["role"]], "value": turn["content"]} for turn in turns]
    conversations = replace(TALK, fields=("conversations",))
    assert conversations.example(line(other, "conversations"), "jsonl") == TALK.example(line(turns), "jsonl")


def test_one_turn_is_an_instruction() -> None:
    """So is what it is held out by."""
    single = ExampleFormat("instruction", ("instruction", "input", "output"), "chatflow", "response")
    record = json.dumps({"instruction": "a", "output": "b"}).encode()
    assert TALK.example(line(messages("a", "b")), "jsonl") == single.example(record, "jsonl")


def test_choices_depend_on_the_first_user_turn() -> None:
    keys = {
        TALK.example(line(turns), "jsonl").key
        for turns in (messages("a", "b"), messages("a", "x", "y", "z"), messages("a", "b", system="s"))
    }
    assert len(keys) == 1
    assert TALK.example(line(messages("b", "b")), "jsonl").key not in keys


BAD: list[tuple[Any, str]] = [
    (messages("a"), "messages has no turn of the assistant"),
    (messages(system="s"), "messages has no turn of the assistant"),
    (messages("a", "b", "c"), "messages ends without an answer"),
    (messages("a", "b", "c", system="s"), "messages ends without an answer"),
    (messages("a", "b")[1:], "turn 1 of messages is the assistant's, where the user's belongs"),
    (messages("a", "b", system="s")[::2], "turn 2 of messages is the assistant's, where the user's belongs"),
    (messages("a", "b") + messages("c", "d")[1:], "turn 3 of messages is the assistant's, where the user's belongs"),
    (messages("a") * 2, "turn 2 of messages is the user's, where the assistant's belongs"),
    (messages("a", "b") + messages(system="s"), "turn 3 of messages is the system's, where the user's belongs"),
    (messages("a", " "), "turn 2 of messages: field content is empty"),
    (messages("a", "b\ud800"), "turn 2 of messages: field content holds half a surrogate pair"),
    ([{"role": "tool", "content": "a"}], "turn 1 of messages: unknown role 'tool'"),
    ([{"role": ["user"], "content": "a"}], "turn 1 of messages: unknown role ['user']"),
    ([{"from": "bing", "value": "a"}], "turn 1 of messages: unknown role 'bing'"),
    ([{"content": "a"}], "turn 1 of messages: no field role"),
    ([{"role": "user", "content": None}], "turn 1 of messages: no field content"),
    ([{"from": "human", "content": "a"}], "turn 1 of messages: no field value"),
    ([{"role": "user", "content": [{"text": "a"}]}], "turn 1 of messages: field content is not a string"),
    (["a"], "turn 1 of messages: not an object"),
    ([], "field messages is not a list of turns"),
    ("a", "field messages is not a list of turns"),
    (None, "no field messages"),
]


@pytest.mark.parametrize(("turns", "reason"), BAD)
def test_bad_conversations_are_named(turns: Any, reason: str) -> None:
    with pytest.raises(BadRecord) as caught:
        TALK.example(line(turns), "jsonl")
    assert str(caught.value) == reason


def test_templates_that_do_not_fit_conversations() -> None:
    check_template("instruction", "{instruction}{output}", turns=True)
    with pytest.raises(UserError, match="no field input; --turns-field has instruction, output"):
        check_template("instruction", "{instruction}{input}{output}", turns=True)
    with pytest.raises(UserError, match=r"\{output\} exactly once"):
        check_template("instruction", "{instruction}", turns=True)


def test_turns_are_of_instructions(tmp_path: Path, sp_model: Path) -> None:
    with pytest.raises(UserError, match="--turns-field is for --kind instruction, not parallel"):
        prepare(tmp_path / "c", [], sp_model, "en", kind=KindChoice.parallel, seq_length=64, turns_field="messages")


SEQ_LENGTH = 160
WORDS = ["the cat", "今天天气", "sat on", "2024", "公园 散步"]


def conversations() -> list[list[dict[str, str]]]:
    """Of one to four exchanges, every third with a system prompt; the sixth is too long for a sequence."""
    talks = []
    for i in range(60):
        said = [f"{WORDS[(i + place) % len(WORDS)]} {i}" for place in range(2 * (1 + i % 4))]
        talks.append(messages(*said, system=None if i % 3 else f"be kind {i}"))
    talks[5] = messages("a", "b", "long " * 60, "d")
    return talks


def expected(model: Path, talk: list[dict[str, str]]) -> tuple[tuple[int, ...], list[int]]:
    """Tokens and labels of a conversation, put together as someone who talks to the model would."""
    tokenizer = load_tokenizer(model)
    system = talk[0]["content"] + "\n" if talk[0]["role"] == "system" else ""
    said = [turn["content"] for turn in talk if turn["role"] != "system"]
    seen, labels = [tokenizer.start_id], []
    for asked, answer in zip(said[::2], said[1::2], strict=True):
        prompt = tokenizer.encode(f"{system}### Instruction:{asked} ### Response:")
        answer_ids = [*tokenizer.encode(answer), tokenizer.eos_id]
        labels += [-100] * len(prompt) + answer_ids
        seen += prompt + answer_ids
        system = "\n"
    return tuple(seen), [*labels, -100]


def packed(prefix: Path) -> dict[tuple[int, ...], list[int]]:
    """Tokens and labels of each document of a corpus, as training reads them."""
    source = open_source("c", prefix, SEQ_LENGTH, seed=0)
    found = {}
    for index in range(source.num_windows):
        window = read_window(source, 0, index)
        stops = np.cumsum(window.lengths)
        for start, stop in zip(stops - window.lengths, stops, strict=True):
            tokens, labels = window.tokens[start:stop].tolist(), window.labels[start:stop].tolist()
            if set(tokens) == {source.corpus.manifest.tokenizer.eos_id}:
                assert set(labels) == {-100}  # padding
            else:
                found[tuple(tokens)] = labels
    return found


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_labels_are_the_answers_and_their_end_tokens(tmp_path: Path, sp_model: Path, name: str) -> None:
    talks = conversations()
    path = tmp_path / name
    if name == "a.parquet":
        pyarrow.parquet.write_table(pyarrow.table({"n": list(range(len(talks))), "messages": talks}), path)
    else:
        path.write_bytes(b"\n".join(map(line, talks)))
    options = PrepareOptions(TALK, "en", str(sp_model), seq_length=SEQ_LENGTH, heldout=0.0)
    report = prepare_corpus(tmp_path / "c", [path], options)
    assert report.num_too_long == 1
    assert report.too_long[0].startswith(f"{path}:6: ")
    wanted = dict(expected(sp_model, talk) for talk in talks[:5] + talks[6:])
    assert packed(tmp_path / "c") == wanted
    assert report.manifest is not None
    assert report.manifest.packs < len(wanted)
    assert report.manifest.loss_tokens == sum(label >= 0 for labels in wanted.values() for label in labels)
    answers = [turn["content"] for talk in talks[:5] + talks[6:] for turn in talk if turn["role"] == "assistant"]
    assert report.manifest.loss_bytes == sum(len(answer.encode()) for answer in answers)


def test_conversations_of_one_opening_are_held_out_together(tmp_path: Path, sp_model: Path) -> None:
    talks = [messages(f"opening {i % 20}", f"answer {i}", "and then?", f"{i}") for i in range(100)]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(map(line, talks)))
    options = PrepareOptions(replace(TALK, loss="all"), "en", str(sp_model), seq_length=SEQ_LENGTH, heldout=0.3)
    prepare_corpus(tmp_path / "c", [path], options)
    tokenizer, openings = load_tokenizer(sp_model), []
    for side in ("c", "c.heldout"):
        found = [tokenizer.decode(tokens) for tokens in packed(tmp_path / side)]
        openings.append({text.split(" ### Response")[0] for text in found})
        assert len(found) == 5 * len(openings[-1])
    assert not openings[0] & openings[1]
    assert min(map(len, openings)) > 0
