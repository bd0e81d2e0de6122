"""Everything a run must save to go on exactly where it stopped."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from megaflow.checkpoint.background import CheckpointSaver
from megaflow.checkpoint.shards import Shards, joined, shards_of
from megaflow.checkpoint.store import CheckpointStore
from megaflow.data.sampler.ledger import LedgerEntry
from megaflow.data.sampler.mix import Sampler
from megaflow.errors import UserError
from megaflow.model.placement import Placement
from megaflow.optim.adamw import AdamW
from megaflow.parallel.parameters import FlatParameters
from megaflow.train.metrics import SourceTotals
from megaflow.train.run import Run


@dataclass
class TrainState:
    """Weights, moments, sampler, totals and random state of a run.

    Weights are saved as the optimizer's fp32 master under `model/<Hugging Face name>`; bf16 parameters are their
    rounding. Tensors are saved and loaded whatever the layout; on the same layout a resumed run is bit-identical.
    """

    run: Run
    placement: Placement
    parameters: FlatParameters
    optimizer: AdamW
    totals: SourceTotals
    """Sums of the whole run per source."""
    skipped_steps: int = 0
    """Steps whose gradient was not finite, since the first."""
    random: torch.Tensor = field(default_factory=torch.get_rng_state)
    """State of torch's generator, alike on all ranks."""

    @property
    def sampler(self) -> Sampler:
        return self.run.sampler

    def save(self, saver: CheckpointSaver) -> None:
        """Begins to save a checkpoint of the step last taken, as everything is now."""
        self.random = torch.get_rng_state()
        scalars = {
            "step": self.sampler.step,
            "sampler": self.sampler.state_dict(),
            "optimizer_steps": float(self.optimizer.steps),
            "totals": self.totals.values.tolist(),
            "skipped_steps": self.skipped_steps,
            "config": self.run.config.model_dump(mode="json"),
            "tokenizer_sha256": self.run.tokenizer_sha256,
            "ledger": [entry.to_json() for entry in self.run.ledger],
        }
        saver.save(self.sampler.step, self.tensors_to_save(), scalars)

    def load(self, store: CheckpointStore) -> bool:
        """Goes back to the newest sound checkpoint; False when there is none yet.

        Raises UserError when no checkpoint is sound, or it is of another model or another mix.
        """
        master = self.optimizer.master_to_load()
        manifest = store.load(self.tensors_to_load(master))
        if manifest is None:
            return False
        scalars = manifest.scalars
        saved = [LedgerEntry.from_json(entry) for entry in scalars["ledger"]]
        known = (self.run.ledger[: len(saved)], self.run.tokenizer_sha256)  # entries are only ever appended
        if (saved, scalars["tokenizer_sha256"]) != known:
            raise UserError(
                f"{store.directory}: step {manifest.step} was saved with another ledger.json or tokenizer than the "
                f"run's; restore the run's own files, or give a new run_dir"
            )
        self.run.continue_from(scalars["sampler"], len(saved))
        self.optimizer.steps.fill_(scalars["optimizer_steps"])
        self.optimizer.copy_master_to_params(master)
        totals = torch.tensor(scalars["totals"], dtype=torch.float64)
        self.totals.values[: len(totals)].copy_(totals)  # sources appended since have theirs at 0
        self.skipped_steps = scalars["skipped_steps"]
        torch.set_rng_state(self.random)
        return True

    def tensors_to_save(self) -> dict[str, Shards | torch.Tensor]:
        """What this rank holds, as views; of a tied embedding one copy."""
        names = [name for name in self.parameters.parameters if name != self.parameters.tied_copy]
        master = self._shards("model", self.optimizer.master, names)
        if self.optimizer.split:
            master = joined(self._shards("model", self.optimizer.params, names), master)
        return {**master, **self._others(names)}

    def tensors_to_load(self, master: list[torch.Tensor]) -> dict[str, Shards | torch.Tensor]:
        """What a checkpoint is read into, as views; the master weights into the given tensors."""
        names = list(self.parameters.parameters)
        return {**self._shards("model", master, names), **self._others(names)}

    def _others(self, names: list[str]) -> dict[str, Shards | torch.Tensor]:
        moments = {"exp_avg": self.optimizer.exp_avg, "exp_avg_sq": self.optimizer.exp_avg_sq}
        tensors: dict[str, Shards | torch.Tensor] = {"random/torch": self.random}
        for group, own in moments.items():
            tensors |= self._shards(group, own, names)
        return tensors

    def _shards(self, group: str, own: list[torch.Tensor], names: list[str]) -> dict[str, Shards]:
        parts = {name: self.parameters.range_of(name, own) for name in names}
        return shards_of(self.placement, parts, group)
