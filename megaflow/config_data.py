"""The data section of the config: sources, language groups, schedule."""

from __future__ import annotations

from decimal import Decimal
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from megaflow.config_section import Epochs, Positive, Section, Weight, looks_at_files
from megaflow.data.corpus.prefixes import expand, filesystem, is_url
from megaflow.errors import UserError

Clock = Literal["steps", "sequences", "tokens", "documents"]


class SourceConfig(Section):
    """One tokenised corpus, or several read as one."""

    path: str | list[str]
    """Prefix of the corpus written by `megaflow prepare`: <path>.bin, <path>.idx, <path>.json. A list of them, or a
    pattern such as corpora/zh-*, is read as one corpus; a prefix may be a URL, such as s3://bucket/corpora/zh."""
    weight: Weight = Decimal(1)
    """Share of the group's sequences, relative to the group's other sources; 0 leaves the source out."""
    max_epochs: Epochs | None = None
    """Cap: a run that would read the source more often is refused; none: the group's."""

    @field_validator("path", mode="before")
    @classmethod
    def _one_kind(cls, path: Any) -> Any:
        entries = path if isinstance(path, list) else [path]
        odd = [entry for entry in entries if not isinstance(entry, str)]
        if odd:
            raise ValueError(f"{odd[0]!r} should be a valid string, or path a list of strings")
        if not entries:
            raise ValueError("an empty list; name a corpus")
        return path

    @field_validator("path")
    @classmethod
    def _files(cls, path: str | list[str], info: ValidationInfo) -> str | list[str]:
        """What is at URLs is looked at when the corpora are opened."""
        if not looks_at_files(info):
            return path
        try:
            for entry in [path] if isinstance(path, str) else path:
                if is_url(entry):
                    filesystem(entry)
                    continue
                for prefix in expand(entry):
                    missing = [
                        f"{prefix}.{suffix}"
                        for suffix in ("bin", "idx", "json")
                        if not Path(f"{prefix}.{suffix}").is_file()
                    ]
                    if missing:
                        raise ValueError(f"no file {missing[0]}; write the corpus with `megaflow prepare {prefix} ...`")
        except (UserError, OSError) as error:
            raise ValueError(str(error)) from None
        return path


class GroupConfig(Section):
    """A language group: the unit the schedule gives ratios to."""

    sources: Annotated[dict[str, SourceConfig], Field(min_length=1)]
    """Name of each source to its corpus; the name is part of the source's identity and of its order."""
    weights: Literal["explicit", "proportional", "temperature", "unimax"] = "explicit"
    """Shares of the sources: their `weight`; their sizes in sequences; size ** (1 / temperature); or UniMax (arXiv
    2304.09151): alike, but no source beyond its max_epochs over the run."""
    temperature: Annotated[Decimal, Field(ge=Decimal("0.1"), le=1000)] | None = None
    """For weights temperature: 1 is proportional, more is flatter."""
    max_epochs: Epochs | None = None
    """Cap on the epochs of each source that gives none itself."""

    @model_validator(mode="after")
    def _some_weight(self) -> Self:
        if not any(source.weight for source in self.sources.values()):
            raise ValueError("every source of the group has weight 0; give one a positive weight")
        if self.weights != "explicit":
            odd = [name for name, source in self.sources.items() if source.weight not in (0, 1)]
            if odd:
                raise ValueError(
                    f"weights {self.weights} are computed from sizes, but {odd[0]} has weight "
                    f"{self.sources[odd[0]].weight}; leave it out"
                )
        if (self.temperature is not None) != (self.weights == "temperature"):
            raise ValueError("`temperature` and `weights: temperature` go together; give both or neither")
        uncapped = [name for name in self.sources if self.cap(name) is None]
        if self.weights == "unimax" and uncapped:
            raise ValueError(f"weights unimax needs max_epochs, of the group or of source {uncapped[0]}")
        return self

    def cap(self, source: str) -> Decimal | None:
        """Largest number of epochs of a source."""
        own = self.sources[source].max_epochs
        return self.max_epochs if own is None else own


class KnotConfig(Section):
    """Group weights at one moment of the run."""

    at: Annotated[int, Field(ge=0)]
    """Moment, in units of the schedule's clock."""
    weights: dict[str, Weight]
    """Ratio of every group; they sum to 1."""
    pacing: Literal["const", "linear", "cosine", "step", "root", "geometric"] = "linear"
    """How the weights travel here from the previous knot."""


class ScheduleConfig(Section):
    """Group ratios over the run: either `initial` to `final` (ChatFlow, arXiv 2405.10626) or a list of knots."""

    clock: Clock = "tokens"
    """What `grow` and knots count: steps, sequences, tokens or documents consumed by all ranks together."""
    initial: dict[str, Weight] | None = None
    """ChatFlow: ratios at the start; they sum to 1."""
    final: dict[str, Weight] | None = None
    """ChatFlow: ratios once the ramp has ended; they sum to 1."""
    grow: Annotated[int, Field(ge=1)] | None = None
    """ChatFlow's T_grow, length of the ramp in the clock's units; none: grow_fraction of the run."""
    grow_fraction: Annotated[Decimal, Field(gt=0, le=1)] = Decimal("0.6")
    """Length of the ramp as a share of the run, when `grow` is not given."""
    lambda0: Annotated[Decimal, Field(ge=0, lt=1)] = Decimal(0)
    """ChatFlow's lambda_0: how far along the ramp the run starts."""
    knots: list[KnotConfig] | None = None
    """Any other schedule: weights at moments, in ascending order; the first at 0, the last is held."""

    def mixes(self) -> list[tuple[str, dict[str, Decimal]]]:
        """Every set of ratios in the schedule with the key it stands under."""
        if self.knots is not None:
            return [(f"knots[{i}].weights", knot.weights) for i, knot in enumerate(self.knots)]
        return [("initial", self.initial or {}), ("final", self.final or {})]

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        ramp = self.initial is not None and self.final is not None
        if ramp == (self.knots is not None) or (self.initial is None) != (self.final is None):
            raise ValueError("has neither or both of its forms; give either `initial` and `final`, or `knots`")
        if ramp and self.grow is None and self.clock == "documents":
            raise ValueError("the documents clock needs `grow`; the run's length in documents is not known beforehand")
        if self.knots is not None:
            moments = [knot.at for knot in self.knots]
            if not moments or moments[0] != 0 or any(b <= a for a, b in pairwise(moments)):
                raise ValueError(f"knots must ascend from 0; they are at {moments}")
        for key, weights in self.mixes():
            total = sum(weights.values())
            if total != 1:
                raise ValueError(f"{key} sum to {total}, not 1; scale them, or change one by {1 - total}")
        return self


class DataConfig(Section):
    """What the run is trained on."""

    tokenizer: str
    """SentencePiece .model or Hugging Face tokenizer.json that the corpora were prepared with."""
    seq_length: Annotated[int, Field(ge=2, le=2**24)]
    """Tokens per sequence."""
    groups: Annotated[dict[str, GroupConfig], Field(min_length=1)]
    """Language groups, in order, each with its sources."""
    schedule: ScheduleConfig
    """Ratios of the groups over the run."""
    unit: Literal["sequences", "loss_tokens"] = "sequences"
    """What ratios and weights are shares of: sequences, in every step; or tokens with loss, over the run."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of the sample order."""
    verify: Literal["off", "lazy", "full"] = "lazy"
    """Checksums of the corpora: none, each 16 MiB block before its first use, or everything at launch."""
    cache_dir: str | None = None
    """Folder on every machine for blocks of corpora at URLs; none: megaflow in the user's cache folder."""
    digest_interval: Positive = 100
    """Steps between two comparisons of the ranks' plans, and two looks at ledger.json for a changed mix."""
    workers: Annotated[int, Field(ge=0, le=64)] = 2
    """Threads of each rank that read ahead, and one that plans; 0: the training thread does both between steps."""
    prefetch: Annotated[int, Field(ge=1, le=64)] = 2
    """Steps prepared ahead, in host memory of 12 bytes a token each, where there are workers."""
    document_boundaries: bool = True
    """Attention and positions restart at each document; false: plain causal attention over the whole sequence."""

    @field_validator("tokenizer")
    @classmethod
    def _tokenizer_file(cls, path: str, info: ValidationInfo) -> str:
        if looks_at_files(info) and not Path(path).is_file():
            raise ValueError(f"no file {path}; give a SentencePiece .model or a tokenizer.json")
        return path

    @model_validator(mode="after")
    def _names(self) -> Self:
        for key, weights in self.schedule.mixes():
            if set(weights) != set(self.groups):
                raise ValueError(
                    f"schedule.{key} name {sorted(weights)}, the groups are {sorted(self.groups)}; name each group once"
                )
        names = [name for group in self.groups.values() for name in group.sources]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"source {twice[0]!r} stands in two groups; source names are unique in a run")
        return self
