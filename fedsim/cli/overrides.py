"""Checks the overrides of `fedsim run` one by one before Hydra composes anything.

Hydra finds the same mistakes, but reports them in several lines and without the nearest name.
"""

import re
from functools import cache
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fedsim.cli.groups import groups
from fedsim.cli.options import Option, options
from fedsim.config import Config
from fedsim.errors import UserError, nearest
from fedsim.plain import option_text

HELP = "All options: fedsim run --help"
_OWN_PLACES = {"model": "model.path=", "data": "data=instructions (or another set) data.path="}
_OWN_FOLDERS = ("hydra.run.dir", "hydra.sweep.dir", "hydra.sweep.subdir", "hydra.output_subdir")


def parse(words: list[str]) -> list[Override]:
    """Parses and checks the overrides, in order.

    Raises UserError for the first that is malformed, names an unknown option, group or choice, or holds a value of the wrong type.
    """
    parsed = [_parse_one(word) for word in words]
    for override in parsed:
        _check_override(override)
    return parsed


def swept(overrides: list[Override]) -> list[Override]:
    """Returns the overrides with several values, which span the jobs of a sweep."""
    return [override for override in overrides if override.is_sweep_override()]


def quote(value: str) -> str:
    """Quotes any text so that Hydra reads it back unchanged."""
    # In a quoted value only backslashes before a quote are escapes, so those before any quote or at the end are doubled.
    escaped = re.sub(r"(\\*)('|$)", lambda match: match[1] * 2 + ("\\'" if match[2] else ""), value)
    return f"'{escaped}'"


def _parse_one(word: str) -> Override:
    if "=" not in word and not word.startswith("~"):
        hint = f" Write {word}=..." if word in options() else nearest(word, list(options()) + list(groups()))
        raise UserError(f"Expected option=value, got {word!r}.{hint} {HELP}")
    try:
        return OverridesParser.create().parse_override(word)
    except HydraException as error:
        reason = str(error).splitlines()[0].partition(" expecting ")[0]  # the names in the grammar do not help users
        remedy = "Write several values without spaces: a,b" if word.endswith(",") else "Quote special characters: \"option='text'\""
        raise UserError(f"Expected option=value, got {word!r} ({reason}). {remedy}. {HELP}") from None


def _check_override(override: Override) -> None:
    key = override.key_or_group
    if key.startswith("hydra.") and key not in _OWN_FOLDERS:
        return  # Hydra checks its own options against its own types
    if key in _OWN_FOLDERS:
        raise UserError(f"Expected run_dir for the run folder, got {key!r}: fedsim keeps its own folders. Write run_dir=...")
    if key in groups():
        return _check_choice(override, groups()[key])
    if key not in options():
        raise UserError(_unknown(key, override))
    if not override.is_delete():
        for value in _values(override):
            _check_value(options()[key], value)


def _values(override: Override) -> list[Any]:
    """Returns the value, or all values of a sweep."""
    if not override.is_sweep_override():
        return [override.value()]
    if not override.is_discrete_sweep():
        raise UserError(f"Expected a sweep over listed values or range(...), got {override.input_line!r}. List the values. {HELP}")
    return list(override.sweep_iterator())


def _check_choice(override: Override, choices: dict[str, str]) -> None:
    if override.is_delete():
        key = override.key_or_group
        raise UserError(
            f"Expected a choice of {key}, got {override.input_line!r}: a group always has one. Write {key}=... or leave it out."
        )
    for value in map(option_text, _values(override)):
        if value not in choices:
            allowed, hint = ", ".join(choices) or "none yet", _own_hint(override.key_or_group, value) or nearest(value, list(choices))
            raise UserError(f"Unknown {override.key_or_group} {value!r}: expected one of {allowed}.{hint} {HELP}")


def _own_hint(group: str, value: str) -> str:
    """Returns a hint on how to give one's own model or data if an unknown choice looks like a path or hub id, "" otherwise."""
    if group not in _OWN_PLACES or not ("/" in value or Path(value).exists()):
        return ""
    return f" For your own write {_OWN_PLACES[group]}{value}."


def _unknown(key: str, override: Override) -> str:
    section, _, name = key.rpartition(".")
    siblings = [known.rpartition(".")[2] for known in options() if known.rpartition(".")[0] == section]
    sections = list(dict.fromkeys(known.partition(".")[0] for known in options()))
    allowed = f"{section} has {', '.join(siblings)}" if section and siblings else f"expected one of {', '.join([*sections, 'experiment'])}"
    same_name = [known for known in options() if known.rpartition(".")[2] == name]
    hint = f" Did you mean {same_name[0]!r}?" if same_name else nearest(key, list(options()) + list(groups()))
    return f"Unknown option {key!r} in {override.input_line!r}: {allowed}.{hint} {HELP}"


@cache
def _schema() -> DictConfig:
    return OmegaConf.structured(Config)


def _check_value(option: Option, value: Any) -> None:
    """Tries the value on the typed schema, with which Hydra merges it later."""
    if isinstance(value, str) and "${" in value:
        return  # interpolations are resolved in composition
    section, _, name = option.key.partition(".")
    schema = OmegaConf.masked_copy(_schema(), [section]) if name else OmegaConf.structured(Config)  # the whole schema is slow
    try:
        OmegaConf.update(schema, option.key, value)
        OmegaConf.to_object(schema)
        fits = not option.members or value is None or str(value) in option.members  # an invalid null has raised above
    except (OmegaConfBaseException, ValueError, TypeError):
        fits = False
    if not fits:
        words = list(option.members)
        expected = f"one of {', '.join(words)}" if words else option.kind
        raise UserError(f"Expected {option.key} ({expected}), got {option_text(value)!r}.{nearest(option_text(value), words)} {HELP}")
