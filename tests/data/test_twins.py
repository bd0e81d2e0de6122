"""C++, numpy and plain Python integers give the same numbers: a hundred thousand random cases of each, fixed seeds."""

from __future__ import annotations

from bisect import bisect_right
from itertools import accumulate, pairwise
from pathlib import Path
from random import Random

import numpy as np
import pytest

from megaflow.data import native
from megaflow.data.corpus.corpus import Corpus
from megaflow.data.corpus.manifest import Manifest, TokenizerInfo
from megaflow.data.corpus.writer import CorpusWriter
from megaflow.data.sampler import order
from megaflow.data.sampler.counts import CountRule, Progress, quota
from megaflow.data.sampler.schedule import ONE, CompiledSchedule, weights_from_decimals
from megaflow.errors import UserError
from tests.data import million_steps, sampler_oracle
from tests.data.corpora import finish

CASES = 100_000
EOS, VOCABULARY = 2, 30_000
needs_library = pytest.mark.skipif(native.library() is None, reason=native.status())


def random_sizes(generator: np.random.Generator, count: int) -> np.ndarray:
    """Sizes of every magnitude, 1 to 2**62."""
    return (2.0 ** generator.uniform(0, 62, count)).astype(np.int64)


def test_permutations() -> None:
    generator = np.random.default_rng(1)
    keys = generator.integers(2**64, size=CASES, dtype=np.uint64).tolist()
    sizes = random_sizes(generator, CASES).tolist()
    xs = generator.integers(2**62, size=CASES) % np.array(sizes)
    expected = [sampler_oracle.permuted(*case) for case in zip(keys, sizes, xs.tolist(), strict=True)]
    for use_native in (False, True):
        assert order.perm_runs(keys, sizes, [1] * CASES, xs, use_native).tolist() == expected


@needs_library
def test_quotas() -> None:
    """Steps from any residuals whose weights change at random, groups switched on and off; batches of all sizes."""
    random = Random(2)
    corrections = cases = 0
    while cases < CASES:
        steps, sizes = 50, [random.randint(1, 2) for _ in range(random.randint(1, 4))]
        drawn = [random.choices([0, 0, 1, 2, 7], k=len(sizes)) for _ in range(steps)]
        knots = tuple(
            (at, tuple(weights_from_decimals(weights if any(weights) else [1] * len(sizes))))
            for at, weights in enumerate(drawn)
        )
        shares = [weight for size in sizes for weight in weights_from_decimals(random.choices([1, 2, 5], k=size))]
        ones = np.ones(len(shares), np.int64)
        rule = CountRule(CompiledSchedule("steps", knots), 1, np.array(sizes), np.array(shares), ones, ones)
        progress = Progress.start(len(sizes), len(shares))
        residuals, of_sources = [random.randint(-4, 4) * ONE // 2 for _ in sizes[1:]], [[0] * size for size in sizes]
        residuals.append(-sum(residuals))
        progress.group_residuals[:] = residuals
        edges = list(pairwise(accumulate(sizes, initial=0)))
        for _, weights in knots:
            batch = random.choice([0, 1, 5, 16, 2**20])
            got = rule.advance(progress, 1, batch)
            groups, moved = quota(batch, weights, residuals)
            parts = [quota(n, shares[a:b], r) for n, (a, b), r in zip(groups, edges, of_sources, strict=True)]
            moved += sum(part[1] for part in parts)
            expected = groups, [n for part in parts for n in part[0]], moved
            assert (got.groups, got.sources, got.corrections) == expected
            corrections += moved
            cases += 1 + len(sizes)
        assert progress.group_residuals.tolist() == residuals
        assert progress.source_residuals.tolist() == [r for part in of_sources for r in part]
    assert corrections > 100  # the safety valve was among it


def plain_best_fit(lengths: list[int], capacity: int) -> list[int]:
    rooms: list[int] = []
    bins = []
    for length in lengths:
        room, chosen = min(((room, i) for i, room in enumerate(rooms) if room >= length), default=(capacity, -1))
        if chosen < 0:
            chosen = len(rooms)
            rooms.append(capacity)
        rooms[chosen] = room - length
        bins.append(chosen)
    return bins


def test_best_fit() -> None:
    random = Random(3)
    for _ in range(CASES):
        capacity = random.randint(1, 12)
        lengths = [random.randint(1, capacity) for _ in range(random.randint(0, 8))]
        expected = plain_best_fit(lengths, capacity)
        sizes = np.array(lengths, np.int32)
        assert native.best_fit(sizes, capacity, use_native=False).tolist() == expected
        assert native.best_fit(sizes, capacity, use_native=True).tolist() == expected


def make_corpus(prefix: Path, dtype: str, masked: bool) -> tuple[Corpus, list[int], list[int], list[int]]:
    """A corpus of a few thousand tokens, its ids, what each is as a label, and where documents start."""
    generator = np.random.default_rng(4)
    lengths = generator.choice([1, 2, 3, 9, 40], size=400).astype(np.int32)
    total = int(lengths.sum())
    ids = generator.integers(VOCABULARY, size=total)
    mask = (generator.random(total) < 0.7).astype(np.uint8) if masked else None
    info = TokenizerInfo(
        library="none", version="0", sha256="0", probe="0", vocab_size=VOCABULARY, eos_id=EOS, path="none"
    )
    counts = dict.fromkeys(("documents", "tokens", "loss_tokens", "bytes", "loss_bytes"), 0)
    with CorpusWriter(prefix, np.dtype(dtype)) as writer:
        writer.add_documents(ids, lengths, mask)
        finish(writer, Manifest(kind="text", language="none", tokenizer=info, shuffle_seed=1, **counts))
    starts = list(accumulate(lengths.tolist(), initial=0))
    as_labels = np.where(mask == 0, -100, ids) if masked else ids.copy()
    as_labels[starts[:-1]] = -100
    return Corpus.open(prefix), ids.tolist(), as_labels.tolist(), starts


def random_span(random: Random, total: int, longest: int) -> tuple[int, int]:
    """Any, the ends of the stream often."""
    start = random.choice([0, random.randrange(total), random.randrange(total), max(0, total - random.randint(1, 60))])
    return start, min(total, start + random.randint(1, longest))


def test_boundaries(tmp_path: Path) -> None:
    random = Random(5)
    for dtype in ("<u2", "<i4"):
        corpus, ids, _, starts = make_corpus(tmp_path / dtype[1:], dtype, masked=False)
        for _ in range(CASES // 2):
            start, stop = random_span(random, len(ids), 90)
            inside = starts[bisect_right(starts, start) : bisect_right(starts, stop)]
            expected = [position - start for position in inside]
            assert corpus.starts_within(start, stop, use_native=False).tolist() == expected
            assert corpus.starts_within(start, stop, use_native=True).tolist() == expected


def plain_window(
    span: tuple[int, int], size: int, ids: list[int], as_labels: list[int], starts: list[int]
) -> tuple[list[list[int]], list[int]]:
    """Tokens, labels and positions, and the lengths of the documents, with padding where `size` is longer."""
    start, stop = span
    cuts = starts[bisect_right(starts, start) : bisect_right(starts, stop)]
    edges = sorted({start, *cuts, stop, start + size})
    lengths = [b - a for a, b in pairwise(edges)]
    padding = size - (stop - start)
    labels = as_labels[start + 1 : stop + 1]
    if padding and stop < len(ids):
        labels[-1] = -100  # nothing follows the last token
    labels += [-100] * (size - len(labels))
    return [ids[start:stop] + [EOS] * padding, labels, [i for n in lengths for i in range(n)]], lengths


@pytest.mark.parametrize(("dtype", "masked"), [("<u2", False), ("<u2", True), ("<i4", False), ("<i4", True)])
def test_windows(tmp_path: Path, dtype: str, masked: bool) -> None:
    random = Random(6)
    corpus, *plain = make_corpus(tmp_path / "c", dtype, masked)
    memory = np.full((3, 64), -7, np.int32)
    for case in range(CASES // 4):
        start, stop = random_span(random, corpus.num_tokens, 40)
        size = stop - start + random.choice([0, 0, 1, 9])
        at = random.randrange(64 - size)
        window = memory[:, at : at + size]
        expected, lengths = plain_window((start, stop), size, *plain)
        for use_native in (False, True) if case % 2 else (True, False):
            memory.fill(-7)
            assert corpus.fill(start, stop, window, use_native).tolist() == lengths
            assert window.tolist() == expected
            assert (memory == -7).sum() == 3 * (64 - size)
            with_loss = sum(label != -100 for label in plain[1][start + 1 : stop + 1])
            assert corpus.count_labels(start, stop, use_native) == with_loss


def test_cards() -> None:
    """A hundred thousand sequences, in steps that run through several epochs of small sources."""
    generator = np.random.default_rng(7)
    cards = 0
    while cards < CASES:
        seed, sources = int(generator.integers(2**64, dtype=np.uint64)), int(generator.integers(1, 9))
        keys = generator.integers(2**64, size=sources, dtype=np.uint64)
        windows = np.minimum(random_sizes(generator, sources), 2**40)
        first, counts = generator.integers(2**41, size=sources), generator.integers(0, 40, size=sources)
        epochs, drawn = [], []
        for key, size, begin, count in zip(
            *(column.tolist() for column in (keys, windows, first, counts)), strict=True
        ):
            for i in range(begin, begin + count):
                epochs.append(i // size)
                drawn.append(sampler_oracle.permuted(sampler_oracle.chain(seed, key, i // size), size, i % size))
        for use_native in (False, True):
            epoch, window = order.draw(seed, keys, windows, first, counts, use_native)
            assert (epoch.tolist(), window.tolist()) == (epochs, drawn)
        cards += len(drawn)


@needs_library
def test_a_damaged_file_is_named_alike(tmp_path: Path) -> None:
    """Where C++ finds something wrong the twin says what."""
    _, ids, _, starts = make_corpus(tmp_path / "c", "<i4", masked=True)
    index = tmp_path / "c.idx"
    written = index.read_bytes()
    at = 34 + 4 * 400 + 8 * 5
    index.write_bytes(written[:at] + written[at - 8 : at] + written[at + 8 :])  # document 5 starts where 4 does
    spans = [(start, min(start + 30, len(ids))) for start in range(starts[7])]
    corpus = Corpus.open(tmp_path / "c", "off")
    assert {told(corpus, span, False) for span in spans} - {""}
    assert [told(corpus, span, True) for span in spans] == [told(corpus, span, False) for span in spans]
    with pytest.raises(UserError, match=r"c\.idx: bytes 0 to .* are not what was written"):
        Corpus.open(tmp_path / "c").fill(starts[100], starts[101], np.empty((3, 40), np.int32))
    index.write_bytes(written[:at] + (1 << 50).to_bytes(8, "little") + written[at + 8 :])
    with pytest.raises(UserError, match=r"c\.idx: document 5 is said to start at token 281474976710656 of"):
        Corpus.open(tmp_path / "c", "off").document_start(5)


def told(corpus: Corpus, span: tuple[int, int], use_native: bool) -> str:
    """What filling a window says; nothing where it is well."""
    try:
        corpus.fill(*span, np.empty((3, 40), np.int32), use_native)
    except UserError as error:
        return str(error)
    return ""


@needs_library
def test_a_million_steps() -> None:
    until = max(million_steps.DIGESTS)
    steps = million_steps.sampler_steps(million_steps.make_sampler(use_native=True))
    assert million_steps.digest_after(steps, until) == million_steps.DIGESTS[until]


def test_the_first_of_a_million_steps_in_numpy_and_plain_integers() -> None:
    until = min(million_steps.DIGESTS)
    numpy_steps = million_steps.sampler_steps(million_steps.make_sampler(use_native=False))
    plain_steps = million_steps.oracle_steps(million_steps.make_oracle())
    for steps in (numpy_steps, plain_steps):
        assert million_steps.digest_after(steps, until) == million_steps.DIGESTS[until]
