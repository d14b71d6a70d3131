"""Config groups and presets as files, read without Hydra so that the help is quick.

A file's first comment line says what the choice means.
"""

from functools import cache
from pathlib import Path
from typing import Any

import yaml

PACKAGE = Path(__file__).resolve().parents[1]

LAUNCHERS = {"basic": "jobs of a sweep one after another", "joblib": "jobs of a sweep side by side: hydra.launcher.n_jobs=2"}
"""Choices of the group hydra/launcher, which come from Hydra, not from a file here."""


def conf_folder() -> Path:
    """Returns the folder of the config groups: beside the package in a checkout, inside it in an installed wheel."""
    return _folder("conf")


def presets_folder() -> Path:
    """Returns the folder of the presets, `experiment=` by file name."""
    return _folder("experiments")


@cache
def groups() -> dict[str, dict[str, str]]:
    """Returns {group: {choice: meaning}}, groups in the order of the defaults list, choices by name."""
    found = {group: _choices(conf_folder() / group) for group in default_choices()}
    return found | {"experiment": _choices(presets_folder()), "hydra/launcher": LAUNCHERS}


def default_choices() -> dict[str, str]:
    """Returns {group: choice} of conf/config.yaml."""
    entries = yaml.safe_load((conf_folder() / "config.yaml").read_text())["defaults"]
    pairs = [pair for entry in entries if isinstance(entry, dict) for pair in entry.items()]
    return {group: choice for group, choice in pairs if choice is not None and not group.startswith("override ")}


def choice_values(group: str, choice: str) -> dict[str, Any]:
    """Returns what a choice sets in its own group, as plain values; a file with @package _global_ may set other options too."""
    text = (conf_folder() / group / f"{choice}.yaml").read_text()
    values = yaml.safe_load(text) or {}
    return values.get(group, {}) if "@package _global_" in text else values


def _folder(name: str) -> Path:
    checkout = PACKAGE.parent / name
    return checkout if (PACKAGE.parent / "pyproject.toml").is_file() and checkout.is_dir() else PACKAGE / f"_{name}"


def _choices(folder: Path) -> dict[str, str]:
    return {path.stem: _meaning(path) for path in sorted(folder.glob("*.yaml"))}


def _meaning(path: Path) -> str:
    for line in path.read_text().splitlines():
        if line.startswith("#") and "@package" not in line:
            return line.lstrip("# ").rstrip()
    return ""
