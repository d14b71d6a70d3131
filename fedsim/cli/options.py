"""The options as data: key, type, default and meaning, read from fedsim/config.py without Hydra.

The meaning is the docstring under the field, which only the source holds.
"""

from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from functools import cache
from typing import Any, Union, get_args, get_origin, get_type_hints

import fedsim.config
from fedsim.choices import AUTO
from fedsim.cli.groups import choice_values, default_choices, groups
from fedsim.config import Config
from fedsim.config_check import BOUNDS, MAY_BE_AUTO
from fedsim.docstrings import field_docstrings
from fedsim.plain import to_dict

_KINDS: dict[Any, str] = {
    int: "integer",
    float: "number",
    str: "text",
    bool: "true or false",
    list[str]: "list of names, such as [a,b]",
    dict[str, Any]: "entries, such as {a:1,b:2}",
    dict[int, float]: "ranks with shares, such as {8:0.5,16:0.5}",
}


@dataclass(frozen=True)
class Option:
    """One option of the configuration. `members` maps allowed words to their meanings, and is empty if any value is allowed."""

    key: str
    kind: str
    default: Any
    meaning: str
    members: dict[str, str]


@cache
def options() -> dict[str, Option]:
    """Returns all options by key ("federation.clients"), in the order of the dataclasses; defaults are those of conf/config.yaml."""
    return {option.key: option for option in _walk(Config, "", _defaults())}


def _walk(schema: type, prefix: str, defaults: dict[str, Any]) -> list[Option]:
    hints, meanings, found = get_type_hints(schema), _docstrings()[schema.__name__], []
    for field in fields(schema):
        kind, key = hints[field.name], prefix + field.name
        if is_dataclass(kind):
            found += _walk(kind, f"{key}.", defaults[field.name])  # type: ignore[arg-type]
        else:
            members = _members(key, kind)
            found.append(Option(key, _describe(key, kind, members), defaults[field.name], meanings[field.name], members))
    return found


def _defaults() -> dict[str, Any]:
    values = to_dict(Config())
    for group, choice in default_choices().items():
        values[group].update(choice_values(group, choice))
    return values


def _describe(key: str, kind: Any, members: dict[str, str]) -> str:
    bounds = f" {BOUNDS[key]}" if key in BOUNDS else ""
    if key in MAY_BE_AUTO:
        return f"{_KINDS[int] + bounds} or {AUTO}"
    if get_origin(kind) is Union:
        inner = next(part for part in get_args(kind) if part is not type(None))
        return f"{'|'.join(members) or _KINDS[inner] + bounds} or null"
    return "|".join(members) or _KINDS[kind] + bounds


def _members(key: str, kind: Any) -> dict[str, str]:
    if key in ("method.name", "engine.name"):  # each choice has a file of its own in conf/
        return groups()[key.removesuffix(".name")]
    inner = next((part for part in get_args(kind) if part is not type(None)), None) if get_origin(kind) is Union else kind
    return {member.name: str(member.value) for member in inner} if isinstance(inner, type) and issubclass(inner, Enum) else {}


@cache
def _docstrings() -> dict[str, dict[str, str]]:
    return field_docstrings(fedsim.config)
