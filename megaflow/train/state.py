"""Everything a run must save to go on exactly where it stopped."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from megaflow.checkpoint.background import CheckpointSaver
from megaflow.checkpoint.shards import Shards, shards_of
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
        saver.save(self.sampler.step, self._tensors(self.optimizer.fp32_master(), saving=True), scalars)

    def load(self, store: CheckpointStore) -> bool:
        """Goes back to the newest sound checkpoint; False when there is none yet.

        Raises UserError when no checkpoint is sound, or it is of another model or another mix.
        """
        master = self.optimizer.fp32_master()
        manifest = store.load(self._tensors(master, saving=False))
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

    def _tensors(self, master: list[torch.Tensor], saving: bool) -> dict[str, Shards | torch.Tensor]:
        """What this rank holds, as views; the copy of a tied embedding is read and never saved."""
        names = [name for name in self.parameters.parameters if not (saving and name == self.parameters.tied_copy)]
        groups = {
            "model": master,
            "exp_avg": self.optimizer.exp_avg,
            "exp_avg_sq": self.optimizer.exp_avg_sq,
        }
        tensors: dict[str, Shards | torch.Tensor] = {"random/torch": self.random}
        for group, own in groups.items():
            parts = {name: self.parameters.range_of(name, own) for name in names}
            tensors |= shards_of(self.placement, parts, group)
        return tensors
