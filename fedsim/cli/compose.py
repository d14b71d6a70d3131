"""Composition: overrides and conf/ in, one typed Config out.

Hydra merges the chosen files over the dataclasses of fedsim/config.py; nothing beyond this package sees a DictConfig.
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
"""Names of choices of the group model that say nothing about the model behind model.path."""


def compose(overrides: list[str]) -> Config:
    """Returns the configuration that `overrides` choose, as `fedsim run` reads them; not yet checked for contradictions.

    Raises UserError with one line for anything that does not compose.
    """
    several = swept(parse(overrides))
    if several:
        raise UserError(f"Expected one value, got {several[0].input_line!r}. Write [..] for a list; a sweep is fedsim run --multirun.")
    with initialized():
        return to_config(compose_with_hydra(overrides))


def composed(overrides: list[str]) -> Config:
    """Returns the configuration that `overrides` choose, checked. Raises UserError for what is wrong with it."""
    config = compose(overrides)
    check(config)
    return config


def compose_with_hydra(overrides: list[str]) -> DictConfig:
    """Returns the composed configuration with Hydra's own node; to be called within `initialized()`. Raises UserError."""
    with one_line():
        return hydra.compose("config", overrides, return_hydra_config=True)


def to_config(composed: DictConfig) -> Config:
    """Returns the typed configuration of a composed one, without Hydra's node. Raises UserError."""
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
    """Hydra over conf/, with the schema and the presets, for the time of the block."""
    _store()
    with hydra.initialize_config_dir(str(conf_folder()), job_name="fedsim", version_base="1.3"):
        yield


@cache
def _store() -> None:
    """Gives Hydra what does not lie in conf/, once for the process: it hands out copies."""
    store = ConfigStore.instance()
    store.store(name="schema", node=_schema())
    for path in presets_folder().glob("*.yaml"):
        with one_line(f"{path.name}: "):
            store.store(group="experiment", name=path.stem, node=OmegaConf.load(path), package="_global_")


def _schema() -> DictConfig:
    """Returns the typed defaults; options that are tables, such as model.architecture, take new keys, for which Hydra asks ++ otherwise."""
    schema = OmegaConf.structured(Config)
    for section in schema.values():
        for option in section.values() if isinstance(section, DictConfig) else ():
            if isinstance(option, DictConfig):
                OmegaConf.set_struct(option, False)
    return schema


@contextmanager
def one_line(where: str = "") -> Iterator[None]:
    """Turns what Hydra, OmegaConf and YAML raise into a UserError of one line."""
    try:
        yield
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        lines = [line.strip() for line in str(cause).splitlines()]
        told = [line for line in lines if line and not line.startswith(("full_key", "object_type", "reference_type"))]
        raise UserError(f"Expected a configuration that composes, got: {where}{' '.join(told).rstrip('.')}. {HELP}") from None
