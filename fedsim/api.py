"""fedsim from Python, for notebooks and scripts: a run as `fedsim run` does it, and methods of one's own.

A method is a value. `add_method` makes another one known, and `run("method=<its name>")` carries it out in this process, through the same
trainer, ledger, checks and checkpoints as fedsim's own.
"""

from typing import Any

from fedsim.cli.calling import keep_libraries_quiet
from fedsim.core.methods import METHODS, Method
from fedsim.errors import RunFailedError, RunStopped, UserError

__all__ = ["METHODS", "Method", "RunFailedError", "RunStopped", "UserError", "add_method", "run"]

_OWN = frozenset(METHODS)


def run(*overrides: str, quiet: bool = False) -> dict[str, Any]:
    """Carries one run out and returns its summary, which summary.json holds too; `overrides` are the words after `fedsim run`.

    `quiet` shows and prints nothing. In the summary `["evaluation"][task]["final"]["accuracy"]` is between 0 and 1,
    `["communication"]["uplink_bytes"]` (`downlink_bytes`, `setup_bytes`) are serialised bytes over all clients and rounds, and
    `["adapter_digest"]` is a SHA-256 of the result, the same as of the command with these options. "run_dir" names the folder of the run,
    which lies below the current one unless `run_dir=` says otherwise.
    A preset that is a sweep is refused.

    Raises UserError for what can be mended in the options, RunStopped and RunFailedError for a run that cannot go on, and
    KeyboardInterrupt with the run folder, from which `resume=true` goes on.
    """
    keep_libraries_quiet()
    from fedsim.cli.compose import composed
    from fedsim.cli.sweep import is_sweep
    from fedsim.experiment import run as carry_out
    from fedsim.session import forget_session

    if is_sweep(list(overrides)):
        raise UserError("Expected one run, got a preset that is a sweep. Call run() for each of its values, or use the command fedsim run.")
    config = composed(list(overrides))
    if config.method.name not in _OWN and config.engine.name != "inprocess":
        raise UserError(
            f"Expected engine=inprocess with method={config.method.name}, which this program has added, got {config.engine.name}: "
            "other processes do not know it. Leave engine out."
        )
    forget_session()  # a program may have written its data anew, or added a method in the place of another
    return carry_out(config, quiet=quiet)


def add_method(method: Method, meaning: str = "added by this program") -> None:
    """Makes a method a choice of `method=` in this process, or puts it in the place of one that was added under its name.

    A method that takes turns, say B, B, A: `add_method(replace(METHODS["rolora"], name="mine", turns=(("B",), ("B",), ("A",))))`.
    Whether it averages exactly, has ranks or may keep moments is as its fields say: nobody checks them. Other processes do not know it, so
    there is no `engine=ray` and no deployment with it. Raises UserError for the name of one of fedsim's own.
    """
    from hydra.core.config_store import ConfigStore

    from fedsim.cli.groups import groups

    if method.name in _OWN:
        raise UserError(f"Expected a name that no method of fedsim has, got {method.name!r}. Choose another name.")
    METHODS[method.name] = method
    groups()["method"][method.name] = meaning
    ConfigStore.instance().store(group="method", name=method.name, node={"name": method.name})
