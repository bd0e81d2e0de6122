"""A last step for datatrove pipelines: each task writes a shard as `megaflow prepare` would, with manifest and mask.

Works with datatrove's local, Slurm and Ray executors, which share the pipeline's list of steps. Shards are written to
paths of the file system that all tasks see, not through fsspec: they are written beside their names and renamed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import zstandard

from megaflow.data.corpus.writer import remove_corpus
from megaflow.data.prepare.encode import PrepareOptions
from megaflow.data.prepare.prepare import PrepareReport, prepare_corpus
from megaflow.data.sources import heldout_prefix
from megaflow.errors import UserError

try:
    from datatrove.pipeline.base import PipelineStep
    from datatrove.utils.logging import logger
except ImportError as error:
    raise UserError("datatrove is not installed; pip install 'megaflow[datatrove]'") from error


class PrepareStep(PipelineStep):
    """Writes the documents of task `n` as the corpus `<prefix>-<n>`, five digits, and its held-out documents beside it.

    A task without documents writes none. A task that was killed leaves no corpus; run again, it replaces what it left.

    Args:
        prefix: of the shards.
        options: as of `megaflow prepare`. `format.fields` are looked up in a document's metadata, and in its text under
            the name `text_field`. `workers` and `overwrite` do not count: a task is one process and replaces its shard.
        text_field: name of the field that a reader's `text_key` made the text of.

    Raises:
        UserError: from `run`; as `prepare_corpus`, or shards of a run of more tasks have this prefix.
    """

    name = "megaflow prepare"
    type = "WRITER"

    def __init__(self, prefix: str | Path, options: PrepareOptions, text_field: str = "text") -> None:
        super().__init__()
        self.prefix = str(prefix)
        self.options = options
        self.text_field = text_field

    def run(self, data: Iterable[Any] | None, rank: int = 0, world_size: int = 1) -> None:
        """Write the shard of task `rank`; `data` are datatrove's documents."""
        self._check_tasks(world_size)
        prefix = Path(f"{self.prefix}-{rank:05d}")
        spooled = prefix.with_name(f".tmp-{prefix.name}.jsonl.zst")
        try:
            with self.track_time():
                count = self._spool(data or (), spooled)
                if not count:
                    logger.warning(f"{prefix}: task {rank} has no documents, and so no corpus")
                    remove_corpus(prefix)
                    remove_corpus(heldout_prefix(prefix))
                    return
                options = replace(self.options, workers=1, overwrite=True)
                self._report(prefix, prepare_corpus(prefix, [spooled], options))
        finally:
            spooled.unlink(missing_ok=True)

    def _check_tasks(self, world_size: int) -> None:
        """Refuse to write beside shards that this run would not replace."""
        prefix = Path(self.prefix)
        for path in prefix.parent.glob("*.json"):
            shard = re.fullmatch(re.escape(prefix.name) + r"-(\d{5,})\.json", path.name)
            if shard and int(shard[1]) >= world_size:
                raise UserError(
                    f"{path}: is of an earlier run of more than {world_size} tasks; remove it, or change OUT"
                )

    def _spool(self, documents: Iterable[Any], path: Path) -> int:
        """Write the fields that the options name as JSON lines; the number of documents."""
        path.parent.mkdir(parents=True, exist_ok=True)
        count = 0
        with path.open("wb") as file, zstandard.ZstdCompressor(level=1).stream_writer(file) as lines:
            for document in documents:
                record = {**document.metadata, self.text_field: document.text}
                fields = {field: record.get(field) for field in self.options.format.fields}
                lines.write(json.dumps(fields).encode() + b"\n")
                count += 1
        return count

    def _report(self, prefix: Path, report: PrepareReport) -> None:
        for manifest in (report.manifest, report.heldout):
            if manifest is not None:
                self.stat_update("tokens", value=manifest.tokens)
                self.stat_update("documents", value=manifest.documents)
        for name, count, shown in (
            ("records cannot be used", report.num_bad, report.bad),
            ("examples are too long", report.num_too_long, report.too_long),
        ):
            if count:
                self.stat_update(name, value=count)
                logger.warning(f"{prefix}: {count} of {report.records} {name}; the first: {shown[0]}")
