"""Runs an experiment on the engine that the configuration names."""

from collections.abc import Callable
from typing import Any

from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from clients.app import app
from fedsim.config import Config
from fedsim.errors import UserError, nearest
from fedsim.session import check


def run(config: Config, *, quiet: bool = False) -> dict[str, Any]:
    """Runs the experiment and returns its summary, see `fedsim.flower.server.serve`. Raises UserError for an unknown engine."""
    if config.engine.name not in ENGINES:
        raise UserError(
            f"engine.name: expected one of {', '.join(ENGINES)}, got {config.engine.name!r}.{nearest(config.engine.name, list(ENGINES))}"
        )
    return ENGINES[config.engine.name](config, quiet)


def in_process(config: Config, quiet: bool, watch: Callable[[Grid], Grid] = lambda grid: grid) -> dict[str, Any]:
    """Executes the run in this process; `watch` may wrap the Grid to observe its messages."""
    from fedsim.flower.grid import InProcessGrid
    from fedsim.flower.server import serve

    grid = InProcessGrid(app)
    return serve(watch(grid), config, grid.contexts, quiet=quiet)


def _on_ray(config: Config, quiet: bool) -> dict[str, Any]:
    from fedsim.flower.ray_grid import RayGrid
    from fedsim.flower.server import serve

    check(config)  # before Ray is started
    with RayGrid(_app_in_actor, config.engine) as grid:
        return serve(grid, config, grid.contexts, quiet=quiet)


def _app_in_actor() -> ClientApp:
    return app


def _in_a_deployment(config: Config, quiet: bool) -> dict[str, Any]:
    from fedsim.deploy.submit import run as submit

    return submit(config, quiet=quiet)


ENGINES: dict[str, Callable[[Config, bool], dict[str, Any]]] = {
    "inprocess": in_process,
    "ray": _on_ray,
    "deployment": _in_a_deployment,
}
"""The function that executes a run, by engine name."""
