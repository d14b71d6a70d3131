"""The ServerApp of `flwr run .` and of `fedsim run engine=deployment`.

Flower's run configuration takes declared keys only. "config" carries a whole configuration, resolved by `fedsim run engine=deployment`;
without it, "overrides" are composed as in `fedsim run`: `flwr run . --run-config 'overrides="seed=1"'`.
"""

import json
import shlex
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedsim.choices import NoiseSource
from fedsim.config import Config
from fedsim.config_check import check
from fedsim.errors import RunStopped, UserError
from fedsim.plain import from_dict

DEPLOYMENT = "deployment"

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Runs the experiment over Flower's own Grid. Raises UserError and RunStopped, whose message also goes to the run's followers."""
    from fedsim.flower.remote_progress import MISTAKE, STOPPED, forward

    try:
        _run_experiment(grid, _configuration(context))
    except (UserError, RunStopped) as error:
        forward(MISTAKE if isinstance(error, UserError) else STOPPED, str(error))
        raise


def _configuration(context: Context) -> Config:
    text = str(context.run_config.get("config", ""))
    if text:
        config: Config = from_dict(Config, json.loads(text))
    else:
        from fedsim.cli.compose import compose

        config = compose(shlex.split(str(context.run_config["overrides"])))
    check(config)
    return config


def _run_experiment(grid: Grid, config: Config) -> None:
    from fedsim.deploy.registering import REGISTERED, registered_clients
    from fedsim.flower.remote_progress import SUMMARY, ForwardedProgress, forward
    from fedsim.flower.roster import Roster
    from fedsim.flower.server import serve

    if config.engine.name != DEPLOYMENT:
        if config.privacy.noise is NoiseSource.system:
            raise UserError(
                "privacy.noise=system: Flower's processes would have keys of their own; take `fedsim run`, or engine=deployment."
            )
        serve(grid, config)
        return
    roster = Roster(grid, config, lambda: registered_clients(Path(REGISTERED)))  # in the SuperLink's working folder
    summary = serve(grid, config, roster=roster, quiet=True, display=ForwardedProgress)
    forward(SUMMARY, summary)
