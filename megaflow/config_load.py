"""Reads the config tree from YAML and dotted overrides, and says in one line each what is wrong with it."""

from __future__ import annotations

import difflib
import typing
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from megaflow.config import Config
from megaflow.errors import UserError


class _UniqueKeyLoader(yaml.SafeLoader):
    """Safe YAML in which a key that stands twice is an error: plain YAML lets the last one win silently."""


def _mapping(loader: _UniqueKeyLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    loader.flatten_mapping(node)
    result: dict[Any, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        line = key_node.start_mark.line + 1
        if not isinstance(key, str):
            raise UserError(f"line {line}: key {key_node.value!r} is read as {key!r}; put it in quotes")
        if key in result:
            raise UserError(f"line {line}: key {key!r} stands twice; keep one")
        result[key] = loader.construct_object(value_node, deep=True)
    return result


_UniqueKeyLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file as nested dicts. Raises UserError naming file and line when it cannot be read."""
    try:
        value = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give an existing YAML file") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not UTF-8 text; give a YAML file") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}: " if mark else ""
        what = str(getattr(error, "problem", None) or error).splitlines()[0]
        raise UserError(f"{path}: {where}not valid YAML ({what}); mend that line") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds {type(value).__name__}, not sections; see `megaflow config --help`")
    return value


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Sets one `section.key=value` in the tree. The value is read as YAML."""
    key, separator, text = override.partition("=")
    if not separator or not key.strip("."):
        raise UserError(f"{override!r}: not an override; write section.key=value, as in train.steps=50")
    try:
        value = yaml.load(text, Loader=_UniqueKeyLoader)
    except (yaml.YAMLError, ValueError, RecursionError):
        raise UserError(f"{key}: value {text!r} is not valid YAML; put it in quotes") from None
    *sections, last = key.split(".")
    for section in sections:
        child = tree.setdefault(section, {})
        if child is None:
            child = tree[section] = {}
        if not isinstance(child, dict):
            raise UserError(f"{key}: {section!r} is a value, not a section; see `megaflow config --help`")
        tree = child
    tree[last] = value


def _section(annotation: Any) -> type[BaseModel] | None:
    """The section type inside an annotation such as `dict[str, Section]` or `Section | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for found in map(_section, typing.get_args(annotation)) if found), None)


def _siblings(location: tuple[int | str, ...]) -> list[str]:
    """Names of the fields that stand where `location` does."""
    section: type[BaseModel] | None = Config
    through_dict = False
    for part in location[:-1]:
        if through_dict or section is None:
            through_dict = False
            continue
        field = section.model_fields.get(str(part))
        if field is None:
            return []
        through_dict = typing.get_origin(field.annotation) in (dict, list) or isinstance(field.annotation, UnionType)
        section = _section(field.annotation)
    return list(section.model_fields) if section else []


def _line(error: ErrorDetails) -> str:
    location = error["loc"]
    key = ".".join(str(part) for part in location)
    if error["type"] == "extra_forbidden":
        siblings = _siblings(location)
        close = difflib.get_close_matches(str(location[-1]), siblings, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]!r}?" if close else f"known here: {', '.join(siblings)}"
        return f"{key}: unknown key; {hint}"
    if error["type"] == "missing":
        return f"{key}: missing; give it a value (`megaflow config --help` says what it means)"
    message = error["msg"].removeprefix("Value error, ").replace("Input should", "should")
    if isinstance(error["input"], dict | list | BaseModel):
        return f"{key}: {message}" if key else message
    if error["type"] == "literal_error":
        choices = [c.strip(" '") for c in error["ctx"]["expected"].replace(" or ", ",").split(",")]
        close = difflib.get_close_matches(str(error["input"]), choices, n=1, cutoff=0.0)
        message += f"; nearest: {close[0]}" if close else ""
    return f"{key}: {error['input']!r}: {message}"


def load_config(path: str | Path | None, overrides: list[str] | None = None, files: bool = True) -> Config:
    """The config in a YAML file with `section.key=value` overrides applied; `files` as in `parse_config`.

    Raises UserError with one line per problem, each naming the key, the value, the reason and a valid choice.
    """
    tree = read_yaml(Path(path)) if path is not None else {}
    for override in overrides or []:
        apply_override(tree, override)
    return parse_config(tree, str(path) if path is not None else "config", files)


def parse_config(tree: dict[str, Any], name: str, files: bool = True) -> Config:
    """The config in a tree of plain values; `name` says in messages where it came from.

    `files`: corpora, tokenizer and weights must be on this machine.
    """
    try:
        return Config.model_validate(tree, context={"files": files})
    except ValidationError as error:
        raise UserError("\n".join(f"{name}: {_line(detail)}" for detail in error.errors())) from None


def dump_config(config: Config) -> str:
    """The resolved config as YAML that `load_config` reads back to an equal config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def describe(section: type[BaseModel] = Config, prefix: str = "") -> Iterator[tuple[str, str, str, str]]:
    """Every setting as (dotted key, type, default, help), depth first."""
    for name, field in section.model_fields.items():
        inner = _section(field.annotation)
        key = f"{prefix}{name}"
        text = " ".join((field.description or "").split())
        if inner is None:
            default = "required" if field.is_required() else str(field.get_default(call_default_factory=True))
            yield key, _type_name(field.annotation), default, text
            continue
        wrapper = str(field.annotation)
        key += ".<name>" if "dict[" in wrapper else "[i]" if "list[" in wrapper else ""
        yield key, "section", "", text
        yield from describe(inner, key + ".")


def _type_name(annotation: Any) -> str:
    if typing.get_origin(annotation) is typing.Literal:
        return " | ".join(str(choice) for choice in typing.get_args(annotation))
    if typing.get_origin(annotation) is typing.Annotated:
        return _type_name(typing.get_args(annotation)[0])
    if isinstance(annotation, UnionType) or typing.get_origin(annotation) is typing.Union:
        return " | ".join(_type_name(part) for part in typing.get_args(annotation))
    if typing.get_origin(annotation) is dict:
        return "mapping name -> " + _type_name(typing.get_args(annotation)[1])
    return {"NoneType": "none", "Decimal": "number", "float": "number"}.get(annotation.__name__, annotation.__name__)
