"""The run directory: what a run is, written once, and checked when it is resumed.

<run>/config.yaml    the resolved config of the latest launch     <run>/ledger.json   the mix, compiled to integers
<run>/tokenizer.*    the tokenizer                                <run>/metrics.jsonl, tensorboard/, samples/
<run>/checkpoints/   step-00000100/ ...
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megaflow.config import Config
from megaflow.config_load import dump_config, read_yaml
from megaflow.data.ledger import LedgerEntry, build_sampler, read_ledger, write_ledger
from megaflow.data.mix import GroupSpec, Sampler, SourceSpec
from megaflow.data.schedule import CompiledSchedule, Knot, chatflow, compile_knots, weights_from_decimals
from megaflow.data.sources import Source, open_heldouts, open_sources
from megaflow.data.tokenizer import Tokenizer, load_tokenizer
from megaflow.errors import UserError
from megaflow.kernels.dispatch import select_ops
from megaflow.model.flops import num_parameters
from megaflow.model.init import check_hf_config
from megaflow.train.samples import discard_superseded

# what a resumed run keeps: another value would break the weights' shapes or the promises made for the sample order
FIXED = {
    "model": "hidden_size intermediate_size num_layers num_heads num_kv_heads vocab_size norm_eps rope_theta "
    "tie_embeddings",
    "data": "seq_length seed schedule document_boundaries",
    "train": "global_batch_size",
}


@dataclass(frozen=True)
class Run:
    """A new or resumed run, checked but not begun."""

    config: Config
    tokenizer_sha256: str
    sources: list[Source]
    """In group order: their index is the sampler's flat source index."""
    heldouts: list[Source | None]
    """Their held-out documents, None for a source that has none."""
    ledger: list[LedgerEntry]
    sampler: Sampler
    is_new: bool

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
            _replace(self.dir / "config.yaml", dump_config(self.config).encode())
            if self.is_new:
                write_ledger(self.dir / "ledger.json", self.ledger)
            discard_superseded(self.dir, self.sampler.step)
        except OSError as error:
            raise UserError(f"run_dir: {self.dir}: cannot be written ({error.strerror}); give another folder") from None

    def describe(self) -> str:
        size = f"{num_parameters(self.config.model) / 1e6:,.1f} M parameters"
        return f"run {self.dir}: {size}, {len(self.sources)} sources, {self.config.train.steps} steps"


def plan_run(config: Config, device: torch.device) -> Run:
    """Opens what the run reads and checks that it fits, writing nothing.

    Raises UserError for a damaged corpus, a tokenizer that is not the corpora's, an unknown kernel backend, or a run
    directory whose run was begun with another model or mix.
    """
    tokenizer = load_tokenizer(config.data.tokenizer)
    config = _with_vocabulary(config, tokenizer)
    if config.model.weights:
        check_hf_config(config.model, config.model.weights)
    try:
        select_ops(device, torch.bfloat16 if config.train.precision == "bf16" else torch.float32, config.kernels)
    except ValueError as error:
        raise UserError(f"kernels: {error}") from None
    named = {name: source.path for group in config.data.groups.values() for name, source in group.sources.items()}
    sources = open_sources(named, config.data.seq_length, config.data.seed, config.data.verify)
    heldouts = open_heldouts(sources, config.data.seq_length, config.data.verify)
    for source in sources:
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
    entry = first_entry(config, sources)
    path = Path(config.run_dir) / "ledger.json"
    is_new = not path.exists()
    if is_new and any(Path(config.run_dir).glob("checkpoints/step-*")):
        raise UserError(
            f"run_dir: {config.run_dir} has checkpoints but no ledger.json; restore it or give a new folder"
        )
    ledger = [entry] if is_new else read_ledger(path)
    if not is_new:
        _check_resumable(config, ledger, entry)
    return Run(config, tokenizer.sha256, sources, heldouts, ledger, build_sampler(ledger), is_new)


def first_entry(config: Config, sources: list[Source]) -> LedgerEntry:
    """The ledger entry that the config writes when its run is created."""
    by_name = {source.name: source for source in sources}
    groups = []
    for name, group in config.data.groups.items():
        specs = tuple(SourceSpec(s, by_name[s].num_windows, by_name[s].documents) for s in group.sources)
        try:
            weights = weights_from_decimals([source.weight for source in group.sources.values()])
        except ValueError as error:
            raise UserError(f"data.groups.{name}.sources: weights: {error}") from None
        groups.append(GroupSpec(name, specs, tuple(weights)))
    return LedgerEntry(
        first_step=1,
        schedule=compile_schedule(config),
        batch_size=config.train.global_batch_size,
        seed=config.data.seed,
        seq_length=config.data.seq_length,
        groups=tuple(groups),
        manifests={source.name: source.corpus.manifest.fingerprint for source in sources},
        why="the run's config",
    )


def compile_schedule(config: Config) -> CompiledSchedule:
    """The configured schedule as integer knots over the groups in config order."""
    schedule, groups = config.data.schedule, list(config.data.groups)
    try:
        if schedule.knots is not None:
            knots = [Knot(knot.at, [knot.weights[name] for name in groups], knot.pacing) for knot in schedule.knots]
            return compile_knots(schedule.clock, knots)
        assert schedule.initial is not None
        assert schedule.final is not None
        grow = schedule.grow
        if grow is None:
            sequences = config.train.global_batch_size
            per_step = {"steps": 1, "sequences": sequences, "tokens": sequences * config.data.seq_length}
            grow = max(1, int(config.train.steps * per_step[schedule.clock] * schedule.grow_fraction))
        initial, final = ([mix[name] for name in groups] for mix in (schedule.initial, schedule.final))
        return chatflow(schedule.clock, initial, final, grow, schedule.lambda0)
    except ValueError as error:
        raise UserError(f"data.schedule: {error}") from None


def _with_vocabulary(config: Config, tokenizer: Tokenizer) -> Config:
    size = config.model.vocab_size or tokenizer.vocab_size
    if size < tokenizer.vocab_size:
        raise UserError(
            f"model.vocab_size: {size} is less than the {tokenizer.vocab_size} pieces of {config.data.tokenizer}; "
            f"give at least {tokenizer.vocab_size}, or 0"
        )
    return config.model_copy(update={"model": config.model.model_copy(update={"vocab_size": size})})


def _check_resumable(config: Config, ledger: list[LedgerEntry], entry: LedgerEntry) -> None:
    began, now = read_yaml(Path(config.run_dir) / "config.yaml"), config.model_dump(mode="json")
    for section, names in FIXED.items():
        for name in names.split():
            old, new = ((tree.get(section) or {}).get(name) for tree in (began, now))
            if old != new:
                raise UserError(
                    f"{section}.{name}: {_short(new)} differs from {_short(old)}, which the run in {config.run_dir} "
                    f"was begun with; put it back, or give a new run_dir"
                )
    ledger[-1].check_manifests(entry.manifests)
    if ledger[-1].groups != entry.groups:
        raise UserError(
            f"data.groups: names, order or weights differ from {config.run_dir}/ledger.json; put them back, or give a "
            f"new run_dir"
        )


def _short(value: Any) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 60 else text[:57] + "..."


def _replace(path: Path, content: bytes) -> None:
    beside = path.with_name(f".tmp-{path.name}")
    beside.write_bytes(content)
    beside.replace(path)
