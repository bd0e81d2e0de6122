"""Contenders that fetch training windows, all from the same two corpora.

A contender is endless: each call gives the next micro-batch. `positions` restart at documents where it knows them.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import DataLoader

from megaflow.data.corpus.corpus import Corpus
from megaflow.data.corpus.manifest import Manifest, TokenizerInfo
from megaflow.data.corpus.writer import CorpusWriter
from megaflow.data.loader import Loader
from megaflow.data.sampler import order
from megaflow.data.sampler.groups import GroupSpec, SourceSpec
from megaflow.data.sampler.mix import Sampler
from megaflow.data.sampler.schedule import ONE, Knot, compile_knots
from megaflow.data.sources import Source, open_sources

BLEND = (0.7, 0.3)
VOCABULARY, EOS = 32000, 2
NAMES = ("first", "second")


@dataclass(frozen=True)
class Fetched:
    """One micro-batch: arrays [B, S]; positions None where the contender does not know documents."""

    tokens: Any
    labels: Any
    positions: Any | None


Contender = Callable[[], Fetched]


def make_corpora(folder: Path, tokens: int, mean_length: float = 1000.0) -> None:
    """Two corpora of `tokens` random tokens each, uint16, whose documents have log-normal lengths and end in EOS."""
    generator = np.random.default_rng(1)
    info = TokenizerInfo(
        library="none", version="0", sha256="0", probe="0", vocab_size=VOCABULARY, eos_id=EOS, path="none"
    )
    for name in NAMES:
        drawn = generator.lognormal(np.log(mean_length) - 0.5, 1.0, int(2 * tokens / mean_length) + 50)
        lengths = np.maximum(drawn.astype(np.int32), 2)
        lengths = lengths[: int(np.searchsorted(np.cumsum(lengths), tokens))]
        ids = generator.integers(3, VOCABULARY, int(lengths.sum()), dtype=np.uint16)
        ids[np.cumsum(lengths) - 1] = EOS
        counts: dict[str, Any] = dict.fromkeys(("documents", "tokens", "loss_tokens", "bytes", "loss_bytes"), 0)
        with CorpusWriter(folder / name, np.dtype("<u2")) as writer:
            writer.add_documents(ids, lengths)
            writer.complete(Manifest(kind="text", language="none", tokenizer=info, shuffle_seed=1, **counts))
            writer.commit()


def open_both(folder: Path, seq_length: int) -> list[Source]:
    return open_sources({name: folder / name for name in NAMES}, seq_length, seed=1)


def megaflow_source(folder: Path, seq_length: int, batch: int) -> Contender:
    """`Source.read` into one array, windows in the sampler's order; documents as lengths."""
    source = open_both(folder, seq_length)[0]
    windows = order.perm_many(1, source.num_windows, np.arange(source.num_windows)).tolist()
    memory = np.empty((3, batch, seq_length), np.int32)
    at = 0

    def fetch() -> Fetched:
        nonlocal at
        for row in range(batch):
            source.read(0, windows[at % len(windows)], memory[:, row])
            at += 1
        return Fetched(*memory)

    return fetch


def megaflow_loader(folder: Path, seq_length: int, batch: int) -> Contender:
    """The whole way: plan, hand, windows, labels, positions and document boundaries, as tensors (`Loader`)."""
    sources = open_both(folder, seq_length)
    specs = [SourceSpec(source.name, source.num_windows, source.documents) for source in sources]
    groups = [GroupSpec(spec.name, (spec,), (ONE,)) for spec in specs]
    sampler = Sampler(1, 8 * batch, seq_length, groups, compile_knots("steps", [Knot(0, BLEND)]))
    loader = Loader(sampler, sources, dp=1, dp_rank=0, micro_batch_size=batch)

    def batches() -> Iterator[Fetched]:
        while True:
            for found in loader.next_step()[1]:
                yield Fetched(found.tokens, found.labels, found.positions)

    return batches().__next__


class MegatronTokenizer:
    """What megatron-core's datasets ask of a tokenizer."""

    vocab_size, eod, pad, bos, eos = VOCABULARY, EOS, 0, 1, EOS
    unique_identifiers: dict[str, str] = {}  # noqa: RUF012 - megatron-core reads it from instances


def megatron_blend(folder: Path, seq_length: int, batch: int, boundaries: bool) -> Contender:
    """megatron-core's `BlendedDataset` of two `GPTDataset`s behind torch's DataLoader, without workers.

    boundaries: its `reset_position_ids` and `eod_mask_loss`; attention masks are left to the kernel either way.
    """
    with contextlib.redirect_stdout(sys.stderr):
        gpt = importlib.import_module("megatron.core.datasets.gpt_dataset")
        indexed = importlib.import_module("megatron.core.datasets.indexed_dataset")
        blended = importlib.import_module("megatron.core.datasets.blended_dataset")
        split = importlib.import_module("megatron.core.datasets.utils").Split.train
    logging.getLogger("megatron").setLevel(logging.ERROR)
    config = gpt.GPTDatasetConfig(
        random_seed=1,
        sequence_length=seq_length,
        split="1,0,0",
        tokenizer=MegatronTokenizer(),
        reset_position_ids=boundaries,
        reset_attention_mask=boundaries,
        eod_mask_loss=boundaries,
        create_attention_mask=False,
    )
    datasets = []
    for name in NAMES:
        low = indexed.IndexedDataset(str(folder / name), mmap=True)
        documents = np.arange(len(low), dtype=np.int32)
        datasets.append(gpt.GPTDataset(low, str(folder / name), documents, None, split, config))
    size = int(min(len(dataset) / share for dataset, share in zip(datasets, BLEND, strict=True)) * 0.99)
    whole = blended.BlendedDataset(datasets, list(BLEND), size, config)
    loader = DataLoader(whole, batch_size=batch, num_workers=0, drop_last=True)

    def batches() -> Iterator[Fetched]:
        while True:
            for found in loader:
                positions = found["position_ids"] if boundaries else None
                yield Fetched(found["tokens"], found["labels"], positions)

    return batches().__next__


def hugging_face(folder: Path, seq_length: int, batch: int, boundaries: bool) -> Contender:
    """torch's DataLoader over a Hugging Face dataset of windows cut and stored beforehand, shuffled, without workers.

    boundaries: position ids are stored as a column too; otherwise ids alone, which are their own labels.
    """
    datasets = importlib.import_module("datasets")
    datasets.disable_progress_bars()
    corpus = Corpus.open(folder / NAMES[0], verify="off")
    windows = corpus.num_tokens // seq_length
    ids = np.asarray(corpus.tokens(0, windows * seq_length)).astype(np.int32).reshape(windows, seq_length)
    columns = {"input_ids": ids}
    if boundaries:
        columns["position_ids"] = expected_positions(ids).astype(np.int32)
    path = folder / f"hugging-face-{boundaries}"
    datasets.Dataset.from_dict(columns).save_to_disk(path)
    stored = datasets.load_from_disk(path).with_format("torch")
    loader = DataLoader(stored, batch_size=batch, shuffle=True, num_workers=0, drop_last=True)

    def batches() -> Iterator[Fetched]:
        while True:
            for found in loader:
                yield Fetched(found["input_ids"], found["input_ids"], found.get("position_ids"))

    return batches().__next__


def expected_positions(tokens: np.ndarray) -> np.ndarray:
    """[B, S] positions that restart after each EOS and at the start of a window."""
    starts = np.zeros(tokens.shape, np.int64)
    places = np.arange(tokens.shape[1])
    starts[:, 1:] = np.where(tokens[:, :-1] == EOS, places[1:], 0)
    positions: np.ndarray = places - np.maximum.accumulate(starts, axis=1)
    return positions


def check(name: str, fetched: Fetched) -> None:
    """Raises AssertionError if labels are not the next tokens, or positions do not restart at documents."""
    tokens, labels = np.asarray(fetched.tokens), np.asarray(fetched.labels)
    if not name.startswith("datasets"):  # whose labels are shifted in the model
        following = labels[:, :-1] == tokens[:, 1:]
        assert (following | (labels[:, :-1] < 0)).all(), f"{name}: a label is not the next token"
    if fetched.positions is not None:
        same = np.asarray(fetched.positions) == expected_positions(tokens)
        assert same.all(), f"{name}: positions do not restart at documents"


CONTENDERS: dict[str, tuple[str | None, Callable[[Path, int, int], Contender]]] = {
    "megaflow, Source.read alone": (None, megaflow_source),
    "megaflow, Loader, boundaries": (None, megaflow_loader),
    "megatron-core blend, boundaries": ("megatron-core", partial(megatron_blend, boundaries=True)),
    "megatron-core blend, no boundaries": ("megatron-core", partial(megatron_blend, boundaries=False)),
    "datasets + DataLoader, stored positions": ("datasets", partial(hugging_face, boundaries=True)),
    "datasets + DataLoader, no boundaries": ("datasets", partial(hugging_face, boundaries=False)),
}
"""Contenders with the package that they need."""
