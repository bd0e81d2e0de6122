"""Weights as shares of tokens with loss: which source gives a step's next sequence, by what all have given so far.

Sequences carry different numbers of tokens with loss, so they are counted one by one. Each group has a credit: what its
weights have come to, less what it has given. The group with the largest credit gives the next sequence, of `L` tokens;
then each credit grows by its weight's part of `L` and the giver's shrinks by `L`. Within a group its sources have
credits of their own, and the same rule chooses among them.

The bound. The sum of K credits stays 0. Let `T_j` be the largest sum of j of them; then `T_j <= j (K - j) M` for ever,
with `M` the most tokens a sequence has, whatever the weights and however they are switched on and off, so no credit
leaves `-(K - 1) M .. (K - 1) M`. Proof by induction over sequences. Take any set of j that does not hold the giver
(with it, its sum does not grow), of which m have weight 0 and j - m not; if all have weight 0 the sum stays. Else each
of the j - m is owed no more than the giver, so their sum is at most `(j - m) / (j - m + 1)` of theirs and the giver's
together: the set's sum is at most the mean of `T_m` and `T_{j+1}` with weights 1 and j - m. As `x (K - x)` curves by
-2, that mean is at most `(j (K - j) - (j - m)) M`, and the step adds at most `M`. Where no weight was ever 0, the giver
is owed 0 or more before, so credits stay above `-M`, and by the same induction with m = 0 none exceeds
`(1 + 1/2 + ... + 1/(K - 1)) M`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megaflow.data.sampler import order
from megaflow.data.sampler.schedule import ONE

LossTokens = Callable[[int, int, int], int]
"""Labels with loss of a sequence, given by flat source index, epoch and window."""


@dataclass(frozen=True)
class Lengths:
    """Tokens with loss of any sequence of any source, which stand in the order of a mix.

    Attributes:
        seed: of the run.
        keys, windows: of each source, for its order.
        flat: its flat index.
        loss_tokens: counts them.
    """

    seed: int
    keys: Sequence[int]
    windows: Sequence[int]
    flat: Sequence[int]
    loss_tokens: LossTokens

    def __call__(self, place: int, number: int) -> int:
        """Of sequence `number`, from 0, of source `place`; at least 1: without loss it is no reason to take more."""
        epoch, index = divmod(number, self.windows[place])
        key = order.hash_ints(self.seed, self.keys[place], epoch)
        return max(1, self.loss_tokens(self.flat[place], epoch, order.perm(key, self.windows[place], index)))


def next_giver(weights: Sequence[int], credits: Sequence[int]) -> int:
    """The entry of weight above 0 with the largest credit (ties: the first)."""
    return max((k for k, weight in enumerate(weights) if weight > 0), key=lambda k: (credits[k], -k))


def charge(weights: Sequence[int], credits: list[int], giver: int, tokens: int) -> None:
    """Count `tokens` that `giver` gave; credits are in units of 1 / `ONE` of a token, their sum stays 0."""
    for k, weight in enumerate(weights):
        credits[k] += weight * tokens
    credits[giver] -= ONE * tokens


@dataclass
class Shares:
    """Weights and credits of the groups, and in each group of its sources."""

    weights: list[int]
    credits: list[int]
    source_weights: list[list[int]]
    source_credits: list[list[int]]

    def fill(self, batch: int, consumed: list[int], length: Callable[[int, int], int]) -> int:
        """Choose a step's sequences, updating credits and the sources' `consumed` sequences (listed over all groups).

        Args:
            length: tokens with loss of a source's n-th sequence, above 0.

        Returns:
            Tokens with loss of the step.
        """
        sizes = [len(weights) for weights in self.source_weights]
        first = [sum(sizes[:g]) for g in range(len(sizes))]
        total = 0
        for _ in range(batch):
            group = next_giver(self.weights, self.credits)
            source = next_giver(self.source_weights[group], self.source_credits[group])
            place = first[group] + source
            tokens = length(place, consumed[place])
            consumed[place] += 1
            charge(self.weights, self.credits, group, tokens)
            charge(self.source_weights[group], self.source_credits[group], source, tokens)
            total += tokens
        return total
