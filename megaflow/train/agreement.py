"""That all ranks, and all launches of a run, follow one plan: chained digests compared, counters replayed."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megaflow.data.sampler.ledger import LedgerEntry, build_sampler, consumed
from megaflow.errors import UserError
from megaflow.parallel.mesh import ParallelContext

CHECKED_STEPS = 100  # at least, whose ids are planned again on resume; counters are replayed from the first step on
FURTHEST = 10_000  # steps planned again at most: two seconds at 1024 sequences a step


class DigestCheck:
    """Compares the ranks' digests now and then: two 64-bit numbers in one reduction.

    Each rank keeps the digests since the last comparison. A digest depends on all steps before it, so where the last
    ones agree all do; where they do not, the ranks exchange what they kept and the first step that differs is found.
    """

    def __init__(self, ctx: ParallelContext) -> None:
        self.ctx = ctx
        self.kept: list[tuple[int, int]] = []

    def add(self, step: int, digest: int) -> None:
        """Keeps the digest of a step."""
        self.kept.append((step, digest))

    def compare(self) -> None:
        """Compares with the other ranks what was kept since the last call; collective.

        Raises:
            UserError: on every rank, naming the first step at which the ranks' plans differ, and which ranks.
        """
        kept, self.kept = self.kept, []
        if self.ctx.world_size == 1 or not kept:
            return
        signed = kept[-1][1] - 2**63
        extremes = torch.tensor([signed, ~signed], dtype=torch.int64)  # the largest, and the smallest inverted
        dist.all_reduce(extremes, op=dist.ReduceOp.MAX)
        highest, lowest = extremes.tolist()
        if highest == ~lowest:
            return
        everyone: list[Any] = [None] * self.ctx.world_size
        dist.all_gather_object(everyone, kept)
        raise UserError(_difference(everyone))


def _difference(everyone: list[list[tuple[int, int]]]) -> str:
    """What the ranks' digests say about the first step at which they differ; fewer ranks are taken to be wrong."""
    for now in zip(*everyone, strict=False):
        if len(set(now)) > 1:
            (usual, _), *_ = Counter(now).most_common(1)
            others = [rank for rank, found in enumerate(now) if found != usual]
            break
    return (
        f"step {usual[0]}: {name_ranks(others)} planned other sequences than the other ranks (digest "
        f"{now[others[0]][1]:016x}, not {usual[1]:016x}); check those ranks' machines and resume from the last "
        "checkpoint"
    )


def name_ranks(ranks: Sequence[int]) -> str:
    """Such as `ranks 3, 4`; the first eight of many."""
    more = f" and {len(ranks) - 8} more" if len(ranks) > 8 else ""
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks[:8]))}{more}"


def check_history(ledger: list[LedgerEntry], state: dict[str, Any], metrics: Path) -> None:
    """Refuse a checkpoint's sampler state that the ledger does not lead to.

    Counters and residuals are replayed from the first step. Digests are planned again from the latest logged at least
    `CHECKED_STEPS` steps before, or else the earliest logged, and compared with those logged since. Where none was
    logged in the last `FURTHEST` steps, counters alone are compared.

    Where weights are shares of tokens with loss, a replay would read the run's data again. The checkpoint's counters
    are then taken as they are but for their sums, and its digest is only compared with the one logged at its step.

    Raises:
        UserError: what differs, and at which step.
    """
    step, logged = state["step"], _logged_digests(metrics, state["step"])
    if ledger[0].loss_tokens is not None:
        _check_sums(ledger, state)
        _check_digest(step, int(state["digest"], 16), logged.get(step), "logged", "the checkpoint holds")
        return
    sampler = build_sampler(ledger)
    if (expected := sampler.replay(step)) != {key: value for key, value in state.items() if key != "digest"}:
        names = [
            old["name"]
            for mine, theirs in zip(expected["groups"], state["groups"], strict=False)
            for new, old in zip(mine["sources"], theirs["sources"], strict=False)
            if new != old
        ]
        raise UserError(
            f"step {step}: the checkpoint's counters are not those that ledger.json leads to (source "
            f"{', '.join(names) or 'none'}); restore the run's own ledger.json, or resume from another checkpoint"
        )
    starts = sorted(known for known in {0: "", **logged} if step - FURTHEST <= known < step)
    if not starts:
        return
    start = max([known for known in starts if known <= step - CHECKED_STEPS], default=starts[0])
    if start > 0:
        sampler.load_state_dict(sampler.replay(start) | {"digest": logged[start]})
    while sampler.step < step:
        plan = sampler.plan()
        _check_digest(plan.step, plan.digest, logged.get(plan.step), "logged")
    _check_digest(step, sampler.digest, state["digest"], "in the checkpoint")


def _check_sums(ledger: Sequence[LedgerEntry], state: dict[str, Any]) -> None:
    """Sequences taken come to the ledger's batches, and credits to 0, of the groups and in each of them."""
    planned, ends = 0, [*(entry.first_step for entry in ledger[1:]), state["step"] + 1]
    for entry, end in zip(ledger, ends, strict=True):
        planned += entry.batch_size * max(0, min(end, state["step"] + 1) - entry.first_step)
    levels = [state["groups"], *(group["sources"] for group in state["groups"])]
    taken = sum(consumed(state).values())
    if taken != planned or any(sum(row["residual"] for row in level) for level in levels):
        raise UserError(
            f"step {state['step']}: the checkpoint's counters are not those of {planned} sequences, which ledger.json "
            "leads to; restore the run's own ledger.json, or resume from another checkpoint"
        )


def _check_digest(
    step: int, digest: int, known: str | None, where: str, otherwise: str = "ledger.json leads to"
) -> None:
    if known not in (None, f"{digest:016x}"):
        raise UserError(
            f"step {step}: the digest {where} is {known}, but {otherwise} {digest:016x}; restore the run's own "
            "ledger.json, metrics.jsonl and checkpoint, or resume from another checkpoint"
        )


def _logged_digests(metrics: Path, step: int) -> dict[int, str]:
    """Digests logged for the last `FURTHEST` steps up to `step`; the latest where a step was run again."""
    found: dict[int, str] = {}
    try:
        lines = metrics.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return found
    for line in lines:
        try:
            record = json.loads(line)
            if record["kind"] == "train" and step - FURTHEST <= record["step"] <= step:
                found[record["step"]] = record["digest"]
        except (ValueError, KeyError, TypeError):
            continue  # torn by a kill
    return found
