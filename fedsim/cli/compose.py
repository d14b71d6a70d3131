"""Composition: overrides and conf/ in, one typed Config out.

Hydra merges the chosen files over the dataclasses of fedsim/config.py; no other package sees a DictConfig.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import hydra
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from fedsim.cli.groups import conf_folder, presets_folder
from fedsim.cli.overrides import HELP, parse, swept
from fedsim.config import Config
from fedsim.config_check import check
from fedsim.errors import UserError

_UNNAMED = ("embedded", "local")
"""Choices of the group model whose names do not describe the model at model.path."""


def compose(overrides: list[str]) -> Config:
    """Returns the configuration composed from the overrides of `fedsim run`, not yet checked for contradictions.

    Raises UserError, with a one-line message, for overrides that do not compose.
    """
    several = swept(parse(overrides))
    if several:
        raise UserError(f"Expected one value, got {several[0].input_line!r}. Write [..] for a list; a sweep is fedsim run --multirun.")
    with initialized():
        return to_config(compose_with_hydra(overrides))


def composed(overrides: list[str]) -> Config:
    """Returns the configuration composed from `overrides`, checked. Raises UserError if it is invalid."""
    config = compose(overrides)
    check(config)
    return config


def compose_with_hydra(overrides: list[str]) -> DictConfig:
    """Returns the composed configuration with Hydra's own node. Must be called within `initialized()`. Raises UserError."""
    with one_line():
        return hydra.compose("config", overrides, return_hydra_config=True)


def to_config(composed: DictConfig) -> Config:
    """Converts a composed configuration to the typed one, without Hydra's node. Raises UserError."""
    plain = composed.copy()
    with open_dict(plain):
        plain.pop("hydra", None)
    with one_line():
        config: Config = OmegaConf.to_object(plain)  # type: ignore[assignment]
    if config.model.name == "local" and config.model.path is None:
        raise UserError("Expected model.path with model=local, got none. Name a Hugging Face folder or hub id: model.path=...")
    if config.model.path is not None and config.model.name in _UNNAMED:
        config.model.name = Path(config.model.path).name
    return config


@contextmanager
def initialized() -> Iterator[None]:
    """Initialises Hydra over conf/, with the schema and the presets, for the duration of the block."""
    _store()
    with hydra.initialize_config_dir(str(conf_folder()), job_name="fedsim", version_base="1.3"):
        yield


@cache
def _store() -> None:
    """Registers the schema and the presets, which are not in conf/; once per process, because Hydra hands out copies."""
    store = ConfigStore.instance()
    store.store(name="schema", node=_schema())
    for path in presets_folder().glob("*.yaml"):
        with one_line(f"{path.name}: "):
            store.store(group="experiment", name=path.stem, node=OmegaConf.load(path), package="_global_")


def _schema() -> DictConfig:
    """Returns the typed defaults; tables such as model.architecture accept new keys without Hydra's ++ prefix."""
    schema = OmegaConf.structured(Config)
    for section in schema.values():
        for option in section.values() if isinstance(section, DictConfig) else ():
            if isinstance(option, DictConfig):
                OmegaConf.set_struct(option, False)
    return schema


@contextmanager
def one_line(where: str = "") -> Iterator[None]:
    """Converts errors of Hydra, OmegaConf and YAML to a UserError with a one-line message."""
    try:
        yield
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        lines = [line.strip() for line in str(cause).splitlines()]
        kept = [line for line in lines if line and not line.startswith(("full_key", "object_type", "reference_type"))]
        raise UserError(f"Expected a configuration that composes, got: {where}{' '.join(kept).rstrip('.')}. {HELP}") from None
