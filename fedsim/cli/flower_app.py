"""The ServerApp of `flwr run .` and of `fedsim run engine=deployment`.

A run configuration takes declared keys only. "config" carries a whole configuration, as `fedsim run engine=deployment` has resolved it;
without it "overrides" are composed as `fedsim run` does its own: `flwr run . --run-config 'overrides="seed=1"'`.
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
    """Carries the experiment out over Flower's own Grid. Raises UserError and RunStopped; one who follows the run is told their line."""
    from fedsim.flower.telling import MISTAKE, STOPPED, tell

    try:
        _carry_out(grid, _configuration(context))
    except (UserError, RunStopped) as error:
        tell(MISTAKE if isinstance(error, UserError) else STOPPED, str(error))
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


def _carry_out(grid: Grid, config: Config) -> None:
    from fedsim.deploy.registering import REGISTERED, registered_clients
    from fedsim.flower.roster import Roster
    from fedsim.flower.server import serve
    from fedsim.flower.telling import SUMMARY, TellingProgress, tell

    if config.engine.name != DEPLOYMENT:
        if config.privacy.noise is NoiseSource.system:
            raise UserError(
                "privacy.noise=system: Flower's processes would have keys of their own; take `fedsim run`, or engine=deployment."
            )
        serve(grid, config)
        return
    roster = Roster(grid, config, lambda: registered_clients(Path(REGISTERED)))  # where the SuperLink runs
    summary = serve(grid, config, roster=roster, quiet=True, display=TellingProgress)
    tell(SUMMARY, summary)
