"""The run directory: what a run is, written once, and checked when it is resumed.

<run>/config.yaml    the resolved config of the latest launch     <run>/ledger.json   the mix, compiled to integers
<run>/tokenizer.*    the tokenizer                                <run>/metrics.jsonl, tensorboard/, samples/
<run>/checkpoints/   step-00000100/ ...
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from megaflow.checkpoint.store import step_directories
from megaflow.config import Config
from megaflow.config_load import dump_config, read_yaml
from megaflow.data.sampler.configured import caps, configured_entry, edited_entry, with_unimax
from megaflow.data.sampler.forecast import Forecast, forecast
from megaflow.data.sampler.ledger import (
    LedgerEntry,
    build_sampler,
    entries_from,
    locked,
    postponed,
    read_ledger,
    replace_ledger,
    source_names,
    write_ledger,
)
from megaflow.data.sampler.mix import Sampler
from megaflow.data.sampler.plan import count_micro_batches
from megaflow.data.sources import Source, open_heldouts, open_sources
from megaflow.data.tokenizer import Tokenizer, load_tokenizer
from megaflow.errors import UserError
from megaflow.model.flops import num_parameters
from megaflow.model.init import check_hf_config
from megaflow.parallel.schedule import make_schedule
from megaflow.train.operations import operations
from megaflow.train.samples import discard_superseded

# what a resumed run keeps: another value would break the weights' shapes or the promises made for the sample order
FIXED = {
    "model": "hidden_size intermediate_size num_layers num_heads num_kv_heads vocab_size norm_eps rope_theta "
    "tie_embeddings",
    "data": "seq_length seed document_boundaries",
    "optim": "moments",
}


@dataclass(frozen=True)
class OpenMix:
    """What a run is mixed from."""

    sources: list[Source]
    """In the order in which the run came to know them: their index is the sampler's flat source index."""
    ledger: list[LedgerEntry]
    read: list[LedgerEntry]
    """The ledger as the run's folder has it; empty for a new run."""
    edit: LedgerEntry | None
    """What an edited config adds to the ledger at the first step after the one resumed from; UniMax weights are set
    then."""
    forecast: Forecast


@dataclass(frozen=True)
class Run:
    """A new or resumed run, checked but not begun."""

    config: Config
    tokenizer_sha256: str
    heldouts: list[Source | None]
    """Held-out documents of each source, None for one that has none."""
    mix: OpenMix
    sampler: Sampler

    @property
    def sources(self) -> list[Source]:
        """By flat source index."""
        return self.mix.sources

    @property
    def ledger(self) -> list[LedgerEntry]:
        """What the sampler follows."""
        return self.mix.ledger

    @property
    def dir(self) -> Path:
        return Path(self.config.run_dir)

    def begin(self) -> None:
        """Writes the run directory; on the main rank only. A killed launch's records after this step are dropped."""
        try:
            self.dir.mkdir(parents=True, exist_ok=True)
            tokenizer = Path(self.config.data.tokenizer)
            _replace(self.dir / f"tokenizer{tokenizer.suffix}", tokenizer.read_bytes())
            special = tokenizer.with_name("tokenizer_config.json")  # names a tokenizer.json's special pieces
            if tokenizer.suffix == ".json" and special.exists():
                _replace(self.dir / special.name, special.read_bytes())
            read = self.mix.read
            if read and read != self.ledger:  # before the config: it is by the config that an edit is noticed
                with locked(self.dir / "ledger.json"):
                    replace_ledger(self.dir / "ledger.json", read, self.ledger)
            _replace(self.dir / "config.yaml", dump_config(self.config).encode())
            if not read:
                write_ledger(self.dir / "ledger.json", self.ledger)
            discard_superseded(self.dir, self.sampler.step)
        except OSError as error:
            raise UserError(f"run_dir: {self.dir}: cannot be written ({error.strerror}); give another folder") from None

    def take_up_edit(self) -> str | None:
        """Lets an edited config take effect at the next step, once the state resumed from is known; what it changes."""
        if self.mix.edit is None:
            return None
        last = self.ledger[-1]
        entry = _from_step(self.config, self.ledger, self.mix.edit, self.sampler.step + 1)
        if entry.first_step < last.first_step:
            raise UserError(
                f"{self.dir}/ledger.json: has an entry from step {last.first_step} on, so the mix cannot be edited at "
                f"step {entry.first_step}; resume with {self.dir}/config.yaml, or change the mix from step "
                f"{last.first_step} on with `megaflow data change`"
            )
        self.extend(entry)
        return f"the mix changes {entry.describe()}"

    def continue_from(self, state: dict[str, Any], known: int) -> None:
        """Goes back to a saved sampler state, before anything else is planned.

        Args:
            known: entries of the ledger when it was saved. A later one for a step that was trained by then, without
                it, takes effect at the next step; `begin` writes that.
        """
        later, self.ledger[known:] = self.ledger[known:], []
        self.sampler.forget(len(later))
        self.sampler.load_state_dict(state)
        for entry in later:
            self.extend(postponed(entry, self.sampler.step + 1))

    def extend(self, entry: LedgerEntry) -> None:
        """Appends an entry to the ledger in memory and to the sampler."""
        self.sampler.change(entry.first_step, entry.batch_size, entry.groups, entry.schedule)
        self.ledger.append(entry)

    def check_layout(self, dp: int) -> None:
        """Raises UserError where `dp` replicas cannot share out a batch that the ledger has ahead.

        Or where the pipeline's schedule does not exist for a replica's number of micro-batches.
        """
        step, parallel = self.sampler.step + 1, self.config.parallel
        for entry in entries_from(self.ledger, step):
            try:
                count = count_micro_batches(entry.batch_size, dp, self.config.train.micro_batch_size)
                make_schedule(parallel.schedule, parallel.pp, count, parallel.chunks_per_rank)
            except UserError as error:
                raise UserError(
                    f"{self.dir}/ledger.json: from step {max(step, entry.first_step)} on: {error}"
                ) from None

    def describe(self) -> str:
        size = f"{num_parameters(self.config.model) / 1e6:,.1f} M parameters"
        return f"run {self.dir}: {size}, {len(self.sources)} sources, {self.config.train.steps} steps"


def plan_run(config: Config, device: torch.device) -> Run:
    """Opens what the run reads and checks that it fits, writing nothing.

    Raises UserError for a damaged corpus, a tokenizer that is not the corpora's, an unknown kernel backend, or a run
    directory whose run was begun with another model or mix.
    """
    tokenizer = load_tokenizer(config.data.tokenizer)
    config = with_vocabulary(config, tokenizer)
    if config.model.weights:
        check_hf_config(config.model, config.model.weights)
    try:
        operations(config, device)
    except ValueError as error:
        raise UserError(f"kernels: {error}") from None
    mix = open_mix(config)
    for source in mix.sources:
        made_with = source.corpus.manifest.tokenizer
        given, expected = ((t.sha256, t.bos_id, t.eos_id) for t in (tokenizer, made_with))
        if given != expected:
            what = (
                "not the tokenizer" if given[0] != expected[0] else "the tokenizer, but with other special pieces than"
            )
            raise UserError(
                f"data.tokenizer: {config.data.tokenizer} is {what} that source {source.name} was prepared with "
                f"({made_with.path}); give that one, or prepare {source.corpus.prefix} again"
            )
    heldouts = open_heldouts(mix.sources, config.data.seq_length, config.data.verify, config.data.cache_dir)
    mix.forecast.check_caps()
    sampler = build_sampler(mix.ledger, loss_tokens=lambda k, epoch, index: mix.sources[k].loss_tokens(epoch, index))
    return Run(config, tokenizer.sha256, heldouts, mix, sampler)


def open_mix(config: Config) -> OpenMix:
    """Opens the sources of a new or resumed run, finds or makes its ledger, and simulates the whole run.

    The config is one `with_vocabulary`.

    Raises UserError for a damaged corpus, or a mix that the run in `run_dir` cannot change to.
    """
    named = {name: source.path for group in config.data.groups.values() for name, source in group.sources.items()}
    sources = open_sources(named, config.data.seq_length, config.data.seed, config.data.verify, config.data.cache_dir)
    run_dir = Path(config.run_dir)
    is_new = not (run_dir / "ledger.json").exists()
    saved = step_directories(run_dir / "checkpoints")
    if is_new and saved:
        raise UserError(f"run_dir: {run_dir} has checkpoints but no ledger.json; restore it or give a new folder")
    read, edit = ([], None) if is_new else _ledger_of(config, sources)
    ledger = [configured_entry(config, sources)] if is_new else list(read)
    ahead = list(ledger)
    if edit is not None:
        newest = max([0, *(int(path.name.removeprefix("step-")) for path in saved)])
        ahead.append(_from_step(config, ledger, edit, max(newest + 1, ledger[-1].first_step)))
    by_name = {source.name: source for source in sources}
    return OpenMix(
        sources=[by_name[name] for name in source_names(ahead)],
        ledger=ledger,
        read=read,
        edit=edit,
        forecast=forecast(ahead, config.train.steps, caps(config)),
    )


def _from_step(config: Config, ledger: list[LedgerEntry], edit: LedgerEntry, step: int) -> LedgerEntry:
    """What an edited config asks for, from a step on."""
    entry = replace(edit, first_step=step)
    changed = entry.groups != ledger[-1].groups and step >= ledger[-1].first_step
    return with_unimax(config, ledger, entry) if changed else entry


def with_vocabulary(config: Config, tokenizer: Tokenizer) -> Config:
    """The config with its vocabulary's size; raises UserError where the tokenizer's pieces do not fit."""
    size = config.model.vocab_size or tokenizer.vocab_size
    if size < tokenizer.vocab_size:
        raise UserError(
            f"model.vocab_size: {size} is less than the {tokenizer.vocab_size} pieces of {config.data.tokenizer}; "
            f"give at least {tokenizer.vocab_size}, or 0"
        )
    return config.model_copy(update={"model": config.model.model_copy(update={"vocab_size": size})})


def _check_resumable(config: Config, began: dict[str, Any]) -> None:
    now = config.model_dump(mode="json")
    for section, names in FIXED.items():
        fields = type(getattr(config, section)).model_fields
        for name in names.split():
            new = now[section][name]
            # a run that is older than a key was as without it
            default = new if fields[name].is_required() else fields[name].get_default()
            old = (began.get(section) or {}).get(name, default)
            if old != new:
                raise UserError(
                    f"{section}.{name}: {_short(new)} differs from {_short(old)}, which the run in {config.run_dir} "
                    f"was begun with; put it back, or give a new run_dir"
                )


def _ledger_of(config: Config, sources: list[Source]) -> tuple[list[LedgerEntry], LedgerEntry | None]:
    """The ledger of a run that is resumed, and the entry that an edited config adds to it."""
    path = Path(config.run_dir) / "ledger.json"
    began = read_yaml(path.with_name("config.yaml"))
    _check_resumable(config, began)
    ledger, entry = read_ledger(path), configured_entry(config, sources)
    last = ledger[-1]
    if entry.unit != last.unit:
        raise UserError(
            f"data.unit: {entry.unit} differs from {last.unit}, which the run in {config.run_dir} was begun with; put "
            "it back, or give a new run_dir"
        )
    try:
        last.check_manifests(entry.manifests)
        edit = edited_entry(began, config, entry, last)
        if edit is not None:
            edit.check_follows(last)
    except UserError as error:
        raise UserError(f"data.groups: {error}; or give a new run_dir") from None
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{path.with_name('config.yaml')}: not the config of a run; restore it") from None
    return ledger, edit


def _short(value: Any) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 60 else text[:57] + "..."


def _replace(path: Path, content: bytes) -> None:
    beside = path.with_name(f".tmp-{path.name}")
    beside.write_bytes(content)
    beside.replace(path)
