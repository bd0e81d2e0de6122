"""The sampler in plain Python integers, as short as it can be: what the real one is compared with."""

from __future__ import annotations

import hashlib
import itertools
from typing import Any

from megaflow.data.sampler.ledger import LedgerEntry

ONE = 1 << 32
U64 = (1 << 64) - 1


def mix(x: int) -> int:
    x ^= x >> 30
    x = x * 0xBF58476D1CE4E5B9 & U64
    x ^= x >> 27
    x = x * 0x94D049BB133111EB & U64
    x ^= x >> 31
    return x


def chain(*values: int) -> int:
    a = 0
    for v in values:
        a = mix((a + 0x9E3779B97F4A7C15 + v) & U64)
    return a


def key_of(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")


def scramble(v: int, k: int) -> int:
    z = (v ^ k) & 0xFFFFFFFF
    z ^= z >> 16
    z = z * 0x21F0AAAD & 0xFFFFFFFF
    z ^= z >> 15
    z = z * 0x735A2D97 & 0xFFFFFFFF
    z ^= z >> 15
    return z


def permuted(key: int, n: int, x: int) -> int:
    if n == 1:
        return 0
    b = max(2, len(bin(n - 1)) - 2)
    lo = b // 2
    hi = b - lo
    while True:
        left, right = x // 2**lo, x % 2**lo
        for r in range(6 if n < 65536 else 4):
            k = chain(key, r) % 2**32
            if r % 2 == 0:
                left ^= scramble(right, k) % 2**hi
            else:
                right ^= scramble(left, k) % 2**lo
        x = left * 2**lo + right
        if x < n:
            return x


def share(batch: int, weights: list[int], r: list[int]) -> list[int]:
    """Counts of one level; `r` is updated."""
    K = range(len(weights))
    n = [batch * w // ONE for w in weights]
    f = [batch * w % ONE for w in weights]
    for k in K:
        r[k] += f[k]
    for _ in range(batch - sum(n)):
        best = max((k for k in K if f[k] > 0), key=lambda k: (r[k], -k))
        f[best] = 0
        n[best] += 1
        r[best] -= ONE
    while any(weights[i] > 0 and r[i] >= ONE for i in K) and any(n[j] > 0 and r[j] <= 0 for j in K):
        i = max((k for k in K if weights[k] > 0 and r[k] >= ONE), key=lambda k: (r[k], -k))
        j = min((k for k in K if n[k] > 0 and r[k] <= 0), key=lambda k: (r[k], k))
        if r[i] == ONE and r[j] == 0:  # they would only change places
            break
        n[i], r[i] = n[i] + 1, r[i] - ONE
        n[j], r[j] = n[j] - 1, r[j] + ONE
    return n


def weights_at(knots: list[tuple[int, list[int]]], x: int) -> list[int]:
    if x <= knots[0][0]:
        return list(knots[0][1])
    for (x0, a), (x1, b) in itertools.pairwise(knots):
        if x0 <= x < x1:
            w = [p + (q - p) * (x - x0) // (x1 - x0) for p, q in zip(a, b, strict=True)]
            w[max(range(len(w)), key=lambda k: (a[k] + b[k], -k))] += ONE - sum(w)
            return w
    return list(knots[-1][1])


def entry_at(ledger: list[LedgerEntry], step: int) -> LedgerEntry:
    """The entry that holds for a step: the last that begins no later."""
    return [entry for entry in ledger if entry.first_step <= step][-1]


class OracleSampler:
    """groups: [(name, [(source, windows, documents)], weights)]; the state is public."""

    def __init__(self, seed: int, batch: int, seq_length: int, groups: Any, clock: str, knots: Any) -> None:
        self.seed, self.batch, self.seq_length, self.groups, self.clock, self.knots = (
            seed, batch, seq_length, groups, clock, knots,
        )  # fmt: skip
        self.step = 0
        self.r = [0] * len(groups)
        self.rs = [[0] * len(sources) for _, sources, _ in groups]
        self.consumed = [[0] * len(sources) for _, sources, _ in groups]
        self.digest = hashlib.blake2b(seed.to_bytes(8, "little"), digest_size=8).digest()

    def read_clock(self) -> int:
        sequences = sum(map(sum, self.consumed))
        if self.clock == "documents":
            pairs = [
                (c, s)
                for (_, ss, _), cs in zip(self.groups, self.consumed, strict=True)
                for s, c in zip(ss, cs, strict=True)
            ]
            return sum(c * documents // windows for c, (_, windows, documents) in pairs)
        return {"steps": self.step, "sequences": sequences, "tokens": sequences * self.seq_length}[self.clock]

    def advance(self) -> list[list[int]]:
        """Past one step: its counts by group and source."""
        per_group = share(self.batch, weights_at(self.knots, self.read_clock()), self.r)
        counts = [share(per_group[g], list(self.groups[g][2]), self.rs[g]) for g in range(len(self.groups))]
        for row, taken in zip(self.consumed, counts, strict=True):
            row[:] = [c + n for c, n in zip(row, taken, strict=True)]
        self.step += 1
        return counts

    def plan(self) -> tuple[list[list[int]], list[list[int]], str]:
        """Counts by group and source, cards [group, source in group, epoch, window], digest in hexadecimal."""
        before = [list(row) for row in self.consumed]
        counts = self.advance()
        cards = []
        for g, (_, sources, _) in enumerate(self.groups):
            for s, (name, windows, _) in enumerate(sources):
                for i in range(before[g][s], before[g][s] + counts[g][s]):
                    key = chain(self.seed, key_of(name), i // windows)
                    cards.append([g, s, i // windows, permuted(key, windows, i % windows)])
        data = self.digest + self.step.to_bytes(8, "little")
        for number in [c for row in counts for c in row] + [v for card in cards for v in card]:
            data += number.to_bytes(8, "little", signed=True)
        self.digest = hashlib.blake2b(data, digest_size=8).digest()
        return counts, cards, self.digest.hex()
