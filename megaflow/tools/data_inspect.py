"""`megaflow data inspect`: the windows of a corpus or of a step as a model sees them, decoded."""

from __future__ import annotations

import unicodedata
from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megaflow.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from rich.console import RenderableType

    from megaflow.data.sources import Source
    from megaflow.data.tokenizer import Tokenizer

BEGIN, END, NO_LOSS = "‹s›", "‹/s›", ("⟦", "⟧")
"""How begin and end tokens and text without loss are marked."""
SPECIAL_STYLE, NO_LOSS_STYLE, RULE_STYLE = "bold cyan", "dim", "green"
CORPUS_ONLY = ("--seq-length", "--first", "--epoch", "--seed", "--tokenizer")


def inspect(
    what: Annotated[
        str,
        typer.Argument(
            metavar="PREFIX|CONFIG|RUN", help="A corpus (or a pattern of several), a config, a run's folder."
        ),
    ],
    windows: Annotated[int, typer.Option(min=1, help="Windows to show; of a step, of each source.")] = 3,
    step: Annotated[
        int | None, typer.Option(min=1, help="CONFIG, RUN: the step whose windows to show, by the ledger; 1.")
    ] = None,
    seq_length: Annotated[
        int | None, typer.Option(min=8, help="PREFIX: tokens in a window; 256, or what it is packed for.")
    ] = None,
    first: Annotated[int | None, typer.Option(min=0, help="PREFIX: number of the first window; 0.")] = None,
    epoch: Annotated[int | None, typer.Option(min=0, help="PREFIX: text is cut otherwise in every epoch; 0.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, max=2**64 - 1, help="PREFIX: of the epochs' cuts; 0.")] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="PREFIX: the tokenizer, if it is no longer where the manifest says.")
    ] = None,
) -> None:
    """Show windows decoded: document boundaries, padding, and what carries no loss, dimmed and in brackets."""
    from rich.console import Console

    console = Console(highlight=False)
    given = (seq_length, first, epoch, seed, tokenizer)
    if what.endswith((".yaml", ".yml")) or (Path(what).is_dir() and not Path(f"{what}.json").is_file()):
        extra = next((name for name, value in zip(CORPUS_ONLY, given, strict=True) if value is not None), None)
        if extra:
            raise UserError(f"{extra}: is for a corpus; of {what}, which is a config or run, give --step")
        shown = list(_of_step(Path(what), step or 1, windows))
    else:
        if step is not None:
            raise UserError(f"--step: is for a config or run, which {what} is not; give --first and --epoch")
        shown = list(_of_corpus(what, windows, seq_length, first or 0, epoch or 0, seed or 0, tokenizer))
    console.print(f"{BEGIN} {END} begin and end of a document; {NO_LOSS[0]}no loss on this{NO_LOSS[1]}", markup=False)
    for part in shown:
        console.print(part, markup=False)


def _of_corpus(
    prefix: str,
    windows: int,
    seq_length: int | None,
    first: int,
    epoch: int,
    seed: int,
    tokenizer_path: Path | None,
) -> Iterator[RenderableType]:
    """Consecutive windows of a corpus."""
    from megaflow.data.corpus.shards import open_corpus
    from megaflow.data.sources import open_source
    from megaflow.data.tokenizer import load_tokenizer

    length = seq_length or open_corpus(prefix).manifest.seq_length or 256
    source = open_source(Path(prefix).name, prefix, length, seed)
    manifest = source.corpus.manifest
    if tokenizer_path is None and not Path(manifest.tokenizer.path).is_file():
        raise UserError(f"{manifest.tokenizer.path}: no such tokenizer file; say as --tokenizer where it is now")
    tokenizer = load_tokenizer(tokenizer_path or manifest.tokenizer.path)
    if tokenizer.sha256 != manifest.tokenizer.sha256:
        raise UserError(
            f"{tokenizer.path}: not the tokenizer that {prefix} was prepared with; that was "
            f"{manifest.tokenizer.path}: give it as --tokenizer"
        )
    if first >= source.num_windows:
        raise UserError(f"--first {first}: {prefix} has {source.num_windows} windows of {length}, from 0 on")
    for index in range(first, min(first + windows, source.num_windows)):
        yield from _window(source, epoch, index, seed, tokenizer)


def _of_step(what: Path, step: int, windows: int) -> Iterator[RenderableType]:
    """The first windows of each source in a step, as the ledger of a run, or of a run to be, plans it."""
    from rich.text import Text

    from megaflow.config_load import load_config
    from megaflow.data.sampler.ledger import build_sampler
    from megaflow.data.tokenizer import load_tokenizer
    from megaflow.train.run import open_mix, with_vocabulary

    config = load_config(what / "config.yaml", [f"run_dir={what}"]) if what.is_dir() else load_config(what)
    if step > config.train.steps:
        raise UserError(f"--step {step}: the run of {what} ends at step {config.train.steps}")
    tokenizer = load_tokenizer(config.data.tokenizer)
    mix = open_mix(with_vocabulary(config, tokenizer))
    sampler = build_sampler(mix.ledger, loss_tokens=lambda k, epoch, index: mix.sources[k].loss_tokens(epoch, index))
    sampler.skip(step - 1)
    deck = sampler.plan().deck
    for number, source in enumerate(mix.sources):
        cards = (deck.source == number).nonzero()[0]
        if len(cards):
            title = f"step {step}: {len(cards)} of {len(deck.source)} sequences are of {source.name}"
            yield Text(title, style="bold")
        for card in cards[:windows]:
            yield from _window(source, int(deck.epoch[card]), int(deck.window[card]), config.data.seed, tokenizer)


def _window(source: Source, epoch: int, index: int, seed: int, tokenizer: Tokenizer) -> Iterator[RenderableType]:
    """A window's parts: a line of counts, then each document under a rule."""
    import numpy as np
    from rich.rule import Rule
    from rich.text import Text

    from megaflow.data.packing import IGNORE

    window = np.empty((3, source.seq_length), dtype=np.int32)
    lengths = source.read(epoch, index, window)
    tokens, loss = window[0], window[1] != IGNORE
    document, start, documents = _place(source, epoch, index, seed, len(lengths))
    padding = int(lengths[documents:].sum())
    yield Text(
        f"{source.name}, window {index} of epoch {epoch}: {len(tokens) - padding} tokens, {loss.sum()} with loss, "
        f"{documents} document{'s' if documents > 1 else ''}" + (f", {padding} padding" if padding else ""),
        style="bold",
    )
    at = 0
    for i, length in enumerate(lengths[:documents].tolist()):
        number = (document + i) % source.corpus.num_documents
        skipped = start - source.corpus.document_start(document) if i == 0 else 0
        title = f"document {number}, {length} tokens" + (f" from its token {skipped} on" if skipped else "")
        yield Rule(Text(title), align="left", style=RULE_STYLE)
        carried = np.concatenate([[False], loss[at : at + length - 1]])  # as a label of the token before
        yield _text(tokens[at : at + length], carried, tokenizer)
        at += length
    yield Text("")


def _place(source: Source, epoch: int, index: int, seed: int, lengths: int) -> tuple[int, int, int]:
    """First document and token of a window, and how many of its `lengths` are documents rather than padding."""
    from megaflow.data.sampler.order import window_offset

    corpus = source.corpus
    if corpus.manifest.kind != "text":
        first, last = corpus.pack(index)
        return first, corpus.document_start(first), last - first
    start = window_offset(seed, source.name, epoch, corpus.num_tokens) + index * source.seq_length
    start %= corpus.num_tokens
    return bisect_right(range(corpus.num_documents), start, key=corpus.document_start) - 1, start, lengths


def _text(tokens: npt.NDArray[np.int32], loss: npt.NDArray[np.bool_], tokenizer: Tokenizer) -> Any:
    """A document's tokens as text, in which begin and end tokens and what has no loss are marked."""
    from rich.text import Text

    text = Text()
    special = {tokenizer.start_id: BEGIN, tokenizer.eos_id: END}
    ids, done, first = tokens.tolist(), "", 0
    while first < len(ids):
        last = first + 1
        if ids[first] in special:
            text.append(special[ids[first]], SPECIAL_STYLE)
        else:
            while last < len(ids) and ids[last] not in special and loss[last] == loss[first]:
                last += 1
            decoded = tokenizer.decode(ids[:last])
            if last < len(ids) and ids[last] not in special:  # a character goes with its last token
                decoded = decoded.rstrip("\ufffd")
            piece = visible(decoded[len(done) :] if decoded.startswith(done) else tokenizer.decode(ids[first:last]))
            text.append(piece if loss[first] else piece.join(NO_LOSS), None if loss[first] else NO_LOSS_STYLE)
            done = decoded
        first = last
    return text


def visible(text: str) -> str:
    """`text` with what a terminal would act on, or not show, written out; new lines stay."""
    return "".join(_shown(c) if unicodedata.category(c)[0] in "CZ" and c not in " \n" else c for c in text)


def _shown(character: str) -> str:
    code = ord(character)
    if character == "\t":
        return "⇥"
    if code < 0x20:
        return chr(0x2400 + code)  # the picture of a control character
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
