"""`engine=deployment`: submits a run, whose server is a ServerApp at the SuperLink, and follows it.

The run folder is on the SuperLink's machine: run_dir is relative to the SuperLink's working folder. Flower's bundle only names the apps;
the resolved configuration travels with it as one string.
"""

import json
import sys
import tempfile
import time
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import fedsim
from fedsim.config import Config
from fedsim.deploy.flower import asking, flwr, following, run_facts
from fedsim.effective import effective
from fedsim.errors import LeftRunningError, RunFailedError, RunStopped, UserError
from fedsim.files import dated_folders
from fedsim.flower.remote_progress import ProgressFollower
from fedsim.plain import to_dict
from fedsim.report import summary_table

_APP = """\
[project]
name = "fedsim"
version = "{version}"
description = "A run of fedsim"
license = "Apache-2.0"

[tool.flwr.app]
publisher = "fedsim"

[tool.flwr.app.components]
serverapp = "fedsim.cli.flower_app:app"
clientapp = "clients.app:app"

[tool.flwr.app.config]
config = ""
overrides = ""
"""
RECONNECTS = 5
"""How often a log that breaks off during the run is reopened."""
ABSENCE_SECONDS, RETRY_SECONDS = 60.0, 2.0
"""How long to wait for a SuperLink that does not answer, such as during a restart, and the interval between attempts."""


def run(config: Config, *, quiet: bool = False) -> dict[str, Any]:
    """Submits the run, shows its progress, and returns its summary.

    Raises UserError for a mistake and RunStopped for a run that cannot continue, also if the server finds it, RunFailedError if the run
    fails, and LeftRunningError on Ctrl-C, after which the run continues.
    """
    if not config.engine.superlink:
        raise UserError("Expected engine.superlink with engine=deployment, got none. Name a SuperLink of `flwr config list`.")
    config = named(config)
    effective(config)  # raises at once what the server would raise
    run_id = submitted(config)
    if not quiet:
        print(f"run {run_id} at the SuperLink {config.engine.superlink}; its run folder there: {config.run_dir}", file=sys.stderr)
    try:
        summary = _follow_to_end(run_id, config, quiet=quiet)
    except KeyboardInterrupt:
        raise LeftRunningError(_resume_hint(run_id, config)) from None
    if not quiet:
        print(f"\n{summary_table(summary)}")
    return summary


def named(config: Config) -> Config:
    """Returns the configuration with a run folder, whose name is needed to resume the run.

    The folder is at the SuperLink. If that is another machine, only the server can see, and refuse, a folder that is taken.
    """
    if config.run_dir:
        return config
    folders = dated_folders(datetime.now().astimezone(), config.method.name)
    return replace(config, run_dir=str(next(folder for folder in folders if not folder.exists())))


def submitted(config: Config) -> str:
    """Submits the run to the SuperLink and returns Flower's run id. Raises UserError."""
    with tempfile.TemporaryDirectory(prefix="fedsim-") as folder:
        (Path(folder) / "pyproject.toml").write_text(_APP.format(version=fedsim.__version__))
        values = Path(folder) / "values.toml"  # JSON strings are TOML strings
        values.write_text(f"config = {json.dumps(json.dumps(to_dict(config)))}\n")
        superlink = str(config.engine.superlink)
        with asking(superlink, "engine.superlink"):
            return str(flwr("run", folder, superlink, "--run-config", str(values))["run-id"])


def _follow_to_end(run_id: str, config: Config, *, quiet: bool) -> dict[str, Any]:
    shown, taken = ProgressFollower(quiet=quiet), 0
    superlink = str(config.engine.superlink)
    again = f"Go on with the same options and run_dir={config.run_dir} resume=true"
    try:
        for _ in range(RECONNECTS + 1):
            try:
                taken = _follow(run_id, superlink, shown, taken)
            except RunStopped as stopped:
                raise RunStopped(f"{stopped} Its run folder there: {config.run_dir}.") from None
            if shown.summary is not None:
                return shown.summary
            facts = _facts_with_retries(run_id, superlink, again, quiet=quiet)
            if str(facts["status"]).startswith("finished"):
                break
    finally:
        shown.close()
    last = "\n".join(shown.others)
    raise RunFailedError(f"Run {run_id} did not finish: {facts['status']}. {again}\nThe last lines of its log:\n{last}")


def _follow(run_id: str, superlink: str, shown: ProgressFollower, taken: int) -> int:
    """Shows the log after its first `taken` characters, until it ends. Returns its number of characters."""
    with following(run_id, superlink) as process:
        assert process.stdout is not None
        try:
            seen = 0
            for line in process.stdout:
                fresh = line[max(0, taken - seen) :]
                seen += len(line)
                shown.feed(fresh)
            return max(seen, taken)
        finally:
            process.kill()


def _facts_with_retries(run_id: str, superlink: str, again: str, *, quiet: bool) -> dict[str, Any]:
    """Returns Flower's record of the run, after waiting for the SuperLink if necessary. Raises RunFailedError if it stays unreachable."""
    ends, warned = time.monotonic() + ABSENCE_SECONDS, False
    while True:
        try:
            return run_facts(run_id, superlink)
        except UserError as error:
            if time.monotonic() > ends:
                raise RunFailedError(f"The SuperLink {superlink} has not answered for {ABSENCE_SECONDS:g} s. {again}\n{error}") from error
        if not warned and not quiet:
            print(f"the SuperLink {superlink} does not answer: waiting for it", file=sys.stderr)
        warned = True
        time.sleep(RETRY_SECONDS)


def _resume_hint(run_id: str, config: Config) -> str:
    superlink = config.engine.superlink
    return (
        f"The run goes on at the SuperLink. Follow its log: flwr log {run_id} {superlink}    Stop it: flwr stop {run_id} {superlink}\n"
        f"Afterwards go on with the same options and: run_dir={config.run_dir} resume=true"
    )
