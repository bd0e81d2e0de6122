"""`megaflow data inspect`: what it shows is what the windows hold."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from megaflow.data.corpus.manifest import Manifest, TokenizerInfo
from megaflow.data.corpus.writer import CorpusWriter
from megaflow.data.sampler.order import window_offset
from megaflow.data.tokenizer import Tokenizer, load_tokenizer
from megaflow.errors import UserError
from megaflow.tools.cli import app
from megaflow.tools.data_inspect import visible
from tests.data.conftest import hf_json, sp_model  # noqa: F401
from tests.data.corpora import add_document, finish

HOSTILE = "Hello [bold red]world[/] \x1b[31m\t\u202e</s> :smile: \x07"
EMOJI = "🙂"


def call(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["data", "inspect", *map(str, arguments)], env={"COLUMNS": "300"})
    if isinstance(result.exception, UserError):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.stdout


def write(prefix: Path, tokenizer: Tokenizer, documents: list[list[int]], seq_length: int | None = None) -> None:
    """A corpus of documents as they stand, of which all but the last two tokens carry no loss; two in each pack."""
    with CorpusWriter(prefix, np.dtype("<u2")) as writer:
        for ids in documents:
            add_document(writer, ids, [0] * (len(ids) - 2) + [1, 1] if seq_length else None)
        if seq_length:
            writer.write_packs(seq_length, np.arange(0, len(documents) + 1, 2))
        manifest = Manifest(
            kind="parallel" if seq_length else "text",
            language="en",
            documents=0,
            tokens=0,
            loss_tokens=0,
            bytes=1,
            loss_bytes=1,
            tokenizer=TokenizerInfo.of(tokenizer),
            shuffle_seed=0,
            seq_length=seq_length,
            packs=len(documents) // 2 if seq_length else None,
        )
        finish(writer, manifest)


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    return [tokenizer.start_id, *tokenizer.encode(text), tokenizer.eos_id]


def test_a_pack_shows_documents_masks_and_padding(tmp_path: Path, sp_model: Path) -> None:  # noqa: F811
    tokenizer = load_tokenizer(sp_model)
    documents = [encode(tokenizer, f"the cat sat {word}") for word in ("on", "in", "at", "up")]
    write(tmp_path / "pairs", tokenizer, documents, seq_length=64)
    shown = call(tmp_path / "pairs", "--first", 1, "--windows", 5).splitlines()
    sizes = [len(ids) for ids in documents[2:]]
    assert shown[1] == (
        f"pairs, window 1 of epoch 0: {sum(sizes)} tokens, 4 with loss, 2 documents, {64 - sum(sizes)} padding"
    )
    assert shown[2].startswith(f"document 2, {sizes[0]} tokens ──")
    assert shown[4].startswith(f"document 3, {sizes[1]} tokens ──")
    for line, ids in ((shown[3], documents[2]), (shown[5], documents[3])):
        without, trained = tokenizer.decode(ids[:-2]), tokenizer.decode(ids[-2:-1])
        assert re.sub(r"\s+", "", line) == re.sub(r"\s+", "", f"‹s›⟦{without}⟧{trained}‹/s›")
    assert len(shown) == 7  # and no third window


def test_text_is_cut_where_training_cuts_it(tmp_path: Path, sp_model: Path) -> None:  # noqa: F811
    tokenizer = load_tokenizer(sp_model)
    documents = [encode(tokenizer, f"{i} the moon and the park {i}") for i in range(7)]
    write(tmp_path / "text", tokenizer, documents)
    stream = [(number, place, token) for number, ids in enumerate(documents) for place, token in enumerate(ids)]
    start, total = window_offset(5, "text", 2, len(stream)), len(stream) // 16
    shown = call(tmp_path / "text", "--seq-length", 16, "--windows", total, "--epoch", 2, "--seed", 5)
    blocks = shown.split("text, window ")[1:]
    assert len(blocks) == total
    for index, block in enumerate(blocks):
        window = [stream[(start + index * 16 + i) % len(stream)] for i in range(16)]
        numbers = list(dict.fromkeys(number for number, _, _ in window))
        assert [int(n) for n in re.findall(r"^document (\d+), ", block, re.M)] == numbers
        first = re.search(r"tokens from its token (\d+) on", block)
        assert (int(first[1]) if first else 0) == window[0][1]
        assert "padding" not in block


def test_nothing_in_a_text_reaches_the_terminal(tmp_path: Path, hf_json: Path) -> None:  # noqa: F811
    tokenizer = load_tokenizer(hf_json)
    write(tmp_path / "text", tokenizer, [encode(tokenizer, HOSTILE)] * 20)
    shown = call(tmp_path / "text", "--seq-length", len(encode(tokenizer, HOSTILE)) * 2, "--windows", 1)
    assert "Hello [bold red]world[/] ␛[31m⇥\\u202e</s> :smile: ␇" in shown
    assert not set("\x1b\x07\t\u202e") & set(shown)
    assert visible("a\nb\u00a0\ud800\x7f🙂") == "a\nb\\u00a0\\ud800\\u007f🙂"


def test_a_character_of_several_tokens_is_shown_once(tmp_path: Path, hf_json: Path) -> None:  # noqa: F811
    tokenizer = load_tokenizer(hf_json)
    ids = encode(tokenizer, f"a{EMOJI}b")
    assert len(ids) == 8  # of the emoji a token each byte
    with_mask = [[*ids[:4], tokenizer.eos_id], ids]
    write(tmp_path / "pairs", tokenizer, with_mask, seq_length=16)
    shown = call(tmp_path / "pairs").splitlines()
    assert shown[3] == "‹/s›⟦a⟧\ufffd‹/s›"  # cut in the middle
    assert shown[5] == f"‹/s›⟦a{EMOJI}⟧b‹/s›"


@pytest.fixture
def config(tmp_path: Path, sp_model: Path) -> Path:  # noqa: F811
    """A config of two sources."""
    tokenizer = load_tokenizer(sp_model)
    for name in ("one", "two"):
        write(tmp_path / name, tokenizer, [encode(tokenizer, f"{name} {i} the moon") for i in range(30)])
    groups = {name: {"sources": {name: {"path": str(tmp_path / name)}}} for name in ("one", "two")}
    mix = {"one": 0.5, "two": 0.5}
    tree = {
        "run_dir": str(tmp_path / "run"),
        "model": {"hidden_size": 32, "intermediate_size": 48, "num_layers": 1, "num_heads": 2},
        "data": {
            "tokenizer": str(sp_model),
            "seq_length": 16,
            "groups": groups,
            "schedule": {"clock": "steps", "knots": [{"at": 0, "weights": mix}]},
        },
        "train": {"steps": 20, "global_batch_size": 8, "micro_batch_size": 1},
        "optim": {"lr": 1.0e-3},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def test_a_step_shows_the_windows_that_it_trains_on(config: Path, tmp_path: Path) -> None:
    from megaflow.config_load import dump_config, load_config
    from megaflow.data.sampler.ledger import build_sampler, write_ledger
    from megaflow.train.run import open_mix, with_vocabulary

    settings = load_config(config)
    settings = with_vocabulary(settings, load_tokenizer(settings.data.tokenizer))
    mix = open_mix(settings)
    sampler = build_sampler(mix.ledger)
    plans = [sampler.plan() for _ in range(9)]
    expected = [(mix.sources[s].name, w, e) for _, s, _, e, w in zip(*vars(plans[-1].deck).values(), strict=True)]
    shown = call(config, "--step", 9, "--windows", 8)
    found = re.findall(r"^(\w+), window (\d+) of epoch (\d+):", shown, re.M)
    assert [(name, int(window), int(epoch)) for name, window, epoch in found] == expected
    assert "step 9: 4 of 8 sequences are of one" in shown
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(dump_config(settings))
    write_ledger(tmp_path / "run" / "ledger.json", mix.ledger)
    assert call(tmp_path / "run", "--step", 9, "--windows", 8) == shown


def test_mistakes_are_named(config: Path, tmp_path: Path, hf_json: Path) -> None:  # noqa: F811
    one = tmp_path / "one"
    for arguments, why in (
        ((one, "--step", 3), "--step: is for a config or run"),
        ((config, "--first", 3), "--first: is for a corpus"),
        ((config, "--step", 21), "ends at step 20"),
        ((one, "--first", 999), "--first 999: .*one has [0-9]+ windows of 256"),
        ((one, "--tokenizer", hf_json), "not the tokenizer that .*one was prepared with"),
        ((tmp_path / "none",), "none.json: no such corpus manifest"),
        ((f"{one}.idx",), "is a file of a corpus; give its prefix, .*one$"),
    ):
        with pytest.raises(UserError, match=why):
            call(*arguments)
    one.mkdir()  # of the inputs, perhaps
    assert "window 0 of epoch 0" in call(one)
    manifest = json.loads(Path(f"{one}.json").read_text())
    manifest["tokenizer"]["path"] = "/moved/away.model"
    Path(f"{one}.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"/moved/away[.]model: no such tokenizer file; say as --tokenizer"):
        call(one)
