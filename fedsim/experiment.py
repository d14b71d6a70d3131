"""Carries an experiment out on the engine that the configuration names."""

from collections.abc import Callable
from typing import Any

from clients.app import app
from fedsim.config import Config
from fedsim.errors import UserError, nearest
from fedsim.flower.grid import InProcessGrid
from fedsim.flower.server import serve

ENGINES: dict[str, Callable[[Config], InProcessGrid]] = {"inprocess": lambda config: InProcessGrid(app)}


def run(config: Config, *, quiet: bool = False) -> dict[str, Any]:
    """Returns the summary of the finished run, see `fedsim.flower.server.serve`. Raises UserError for an unknown engine."""
    if config.engine.name not in ENGINES:
        raise UserError(
            f"engine.name: expected one of {', '.join(ENGINES)}, got {config.engine.name!r}.{nearest(config.engine.name, list(ENGINES))}"
        )
    grid = ENGINES[config.engine.name](config)
    return serve(grid, config, grid.contexts, quiet=quiet)
