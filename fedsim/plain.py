"""Converts configurations to and from plain values for JSON and YAML, and validates those received over a network."""

import json
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any, Union, cast, get_args, get_origin

from fedsim.config import Config
from fedsim.errors import UserError

NOT_AFFECTING_RESULTS = ("run_dir", "resume", "overwrite", "engine", "data.token_cache")
"""Options that decide where and how a run is computed, not what: changing them leaves it the same run."""

LEAVES = (str, bool, int, float, type(None))  # checked first for speed: every message of a run goes through `to_dict`


def to_dict(config: Any) -> Any:
    """Returns nested plain values (enums by name) that YAML and JSON can hold."""
    if type(config) in LEAVES:
        return config
    if isinstance(config, Enum):
        return config.name
    if is_dataclass(config):
        return {f.name: to_dict(getattr(config, f.name)) for f in fields(config)}
    if isinstance(config, (list, tuple)):
        return [to_dict(value) for value in config]
    if isinstance(config, dict):
        return {str(key): to_dict(value) for key, value in config.items()}
    return config


def option_text(value: Any) -> str:
    """Returns a value in the syntax of the command line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}:{option_text(entry)}' for key, entry in value.items())}}}"
    return f"[{','.join(map(option_text, value))}]" if isinstance(value, list) else str(value)


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns nested values as {"training.batch_size": 8, ...}. Lists stay whole, but the entries of lists of dictionaries are numbered."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, list) and value and all(isinstance(each, dict) for each in value):
            value = dict(enumerate(value))
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def affecting_results(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns the nested plain values of a configuration without the options that do not change the result."""
    kept = {key: value for key, value in values.items() if f"{prefix}{key}" not in NOT_AFFECTING_RESULTS}
    return {key: affecting_results(value, f"{prefix}{key}.") if isinstance(value, dict) else value for key, value in kept.items()}


def from_dict(schema: type, values: dict[str, Any]) -> Any:
    """Returns the `schema` dataclass from nested plain values of `to_dict`. Raises UserError for unknown or missing names."""
    names = {f.name: f.type for f in fields(schema)}
    if set(values) != set(names):
        odd = sorted(set(values) ^ set(names))
        raise UserError(
            f"configuration: expected the options {', '.join(names)} of {schema.__name__}, got a difference in {', '.join(odd)}."
        )
    return schema(**{name: _from_plain(kind, values[name], f"{schema.__name__}.{name}") for name, kind in names.items()})


def from_text(text: str) -> Config:
    """Returns the configuration from the JSON of `to_dict`. Raises UserError for any other text."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        raise UserError(f"configuration: expected JSON, got {text!r:.60}.") from None
    return cast(Config, _from_plain(Config, values, "Config"))


def _from_plain(kind: Any, value: Any, name: str) -> Any:
    """Returns the value as type `kind`. Raises UserError for a value of another type."""
    if get_origin(kind) is Union:
        return value if type(value) in get_args(kind) else _from_plain(get_args(kind)[0], value, name)
    if is_dataclass(kind) and isinstance(value, dict):
        return from_dict(kind, value)  # type: ignore[arg-type]
    if isinstance(kind, type) and issubclass(kind, Enum) and isinstance(value, str) and value in kind.__members__:
        return kind[value]
    if get_origin(kind) in (list, dict) and isinstance(value, get_origin(kind)):
        return _from_items(kind, value, name)
    if kind is Any or type(value) is kind or (kind is float and type(value) is int):
        return value
    raise UserError(f"configuration: expected {name} to be {kind!s:.60}, got {value!r:.60}.")


def _from_items(kind: Any, value: Any, name: str) -> Any:
    if get_origin(kind) is list:
        return [_from_plain(get_args(kind)[0], each, name) for each in value]
    key_kind, item_kind = get_args(kind)
    try:
        return {key_kind(key): _from_plain(item_kind, each, name) for key, each in value.items()}
    except ValueError:
        raise UserError(f"configuration: expected the names in {name} to be {key_kind.__name__}, got {value!r:.60}.") from None
