"""The ServerApp that `flwr run .` finds: composes the overrides that the run configuration carries, as `fedsim run` does its own.

A run configuration takes declared keys only; the one key "overrides" carries them all: `flwr run . --run-config 'overrides="seed=1"'`.
"""

import shlex

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedsim.cli.compose import compose
from fedsim.config import check

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Carries the experiment out over Flower's own Grid. Raises UserError."""
    config = compose(shlex.split(str(context.run_config["overrides"])))
    check(config)
    from fedsim.flower.server import serve

    serve(grid, config)
