"""The sampler's state as plain values, for checkpoints: residuals and counts under the names of groups and sources."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megaflow.data.sampler.counts import Progress
from megaflow.data.sampler.groups import GroupSpec, SourceSpec, check_names, check_size
from megaflow.errors import UserError


def write_state(
    seed: int, progress: Progress, groups: Sequence[GroupSpec], specs: Sequence[SourceSpec]
) -> dict[str, Any]:
    """A JSON-able dict of strings, integers and lists, without the digest.

    Args:
        groups: of the mix that `progress` is at.
        specs: the sources that `progress` counts, which may be more than those of `groups`.
    """
    columns = zip(specs, progress.source_residuals.tolist(), progress.consumed.tolist(), strict=True)
    states = {
        spec.name: {
            "name": spec.name,
            "windows": spec.windows,
            "documents": spec.documents,
            "residual": residual,
            "consumed": consumed,
        }
        for spec, residual, consumed in columns
    }
    residuals = progress.group_residuals[: len(groups)].tolist()
    rows = [
        {"name": group.name, "residual": residual, "sources": [states[source.name] for source in group.sources]}
        for group, residual in zip(groups, residuals, strict=True)
    ]
    return {"seed": seed, "step": progress.step, "groups": rows}


def read_state(state: dict[str, Any], seed: int, groups: Sequence[GroupSpec]) -> tuple[Progress, int]:
    """Progress over `groups`, and the digest.

    The groups and their sources must begin with the state's, in order; those appended start at their first sequence.

    Raises:
        UserError: not a state, another seed, or a group or source that is missing, moved or of another size.
    """
    try:
        if int(state["seed"]) != seed:
            raise UserError(f"sampler state: the run was started with seed {state['seed']}, not {seed}: restore it")
        return _read_progress(state, groups), int(state["digest"], 16)
    except (LookupError, TypeError, ValueError) as error:
        raise UserError(f"sampler state: not readable ({type(error).__name__}: {error})") from error


def _read_progress(state: dict[str, Any], groups: Sequence[GroupSpec]) -> Progress:
    check_names("group", [group["name"] for group in state["groups"]], [group.name for group in groups])
    progress = Progress.start(len(groups), sum(len(group.sources) for group in groups))
    progress.step = int(state["step"])
    first = 0
    for g, (saved, group) in enumerate(zip(state["groups"], groups, strict=False)):
        names = [source.name for source in group.sources]
        check_names(f"source of group {group.name}", [source["name"] for source in saved["sources"]], names)
        progress.group_residuals[g] = saved["residual"]
        for k, (old, source) in enumerate(zip(saved["sources"], group.sources, strict=False), start=first):
            check_size(source, old["windows"], old["documents"])
            progress.source_residuals[k] = old["residual"]
            progress.consumed[k] = old["consumed"]
        first += len(group.sources)
    return progress
