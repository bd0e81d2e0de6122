"""Entries that others append to the ledger of a run while it trains."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from megaflow.data.sampler.ledger import LedgerEntry, locked, postponed, read_ledger, source_names, write_ledger
from megaflow.errors import UserError
from megaflow.parallel.mesh import ParallelContext
from megaflow.train.run import Run


def take_up_changes(run: Run, ctx: ParallelContext, say: Callable[[str], None]) -> bool:
    """Takes up what was appended to ledger.json since it was last read; collective.

    The main rank reads, all take up the same. An entry that comes too late for its step is moved to the next one, in
    the file too. One that adds sources needs them opened: the run should stop, to be resumed with a config that names
    them.

    Args:
        say: prints a line on the main rank.

    Returns:
        Whether the run should stop.
    """
    message: list[Any] = [None]
    if ctx.rank == 0:
        try:
            with locked(run.dir / "ledger.json"):
                message = [_news(run)]
        except OSError as error:
            message = [f"{run.dir}/ledger.json: cannot be written ({error.strerror}); mend it and resume the run"]
    if ctx.world_size > 1:
        dist.broadcast_object_list(message, src=0)
    if isinstance(message[0], str):
        raise UserError(message[0])
    lines, entries = message[0]
    for line in lines:
        say(line)
    for entry in map(LedgerEntry.from_json, entries):
        new = [name for name in entry.manifests if name not in source_names(run.ledger)]
        if new:
            say(f"the mix changes {entry.describe()}: stopping; resume with a config that holds {', '.join(new)}")
            return True
        run.extend(entry)
        say(f"the mix changes {entry.describe()}")
    return False


def _news(run: Run) -> tuple[list[str], list[dict[str, Any]]]:
    """Lines for the log, and the entries that the file has and the run has not."""
    path = run.dir / "ledger.json"
    try:
        ledger = read_ledger(path)
        if ledger[: len(run.ledger)] != run.ledger:
            raise UserError(f"{path}: is not this run's ledger any more; restore it")
    except UserError as error:
        return [f"warning: {error}; the run goes on with the mix it has"], []
    step, lines, entries = run.sampler.step + 1, [], []
    for entry in ledger[len(run.ledger) :]:
        if entry.first_step < step:
            lines.append(f"step {entry.first_step} is past: the change of mix takes effect at step {step}")
        entries.append(postponed(entry, step))
    if lines:
        write_ledger(path, [*run.ledger, *entries])
    return lines, [entry.to_json() for entry in entries]
