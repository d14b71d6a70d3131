"""The Python interface, for notebooks and scripts: runs like those of `fedsim run`, and custom methods.

A method is a value. `add_method` registers one, and `run("method=<its name>")` runs it in this process, with the same trainer, ledger,
checks and checkpoints as the built-in methods.
"""

from typing import Any

from fedsim.cli.calling import keep_libraries_quiet
from fedsim.core.methods import METHODS, Method
from fedsim.errors import RunFailedError, RunStopped, UserError

__all__ = ["METHODS", "Method", "RunFailedError", "RunStopped", "UserError", "add_method", "run"]

_BUILT_IN = frozenset(METHODS)


def run(*overrides: str, quiet: bool = False) -> dict[str, Any]:
    """Executes one run and returns its summary, the content of summary.json; `overrides` are the words after `fedsim run`.

    With `quiet`, nothing is shown or printed. In the summary, `["evaluation"][task]["final"]["accuracy"]` is between 0 and 1,
    `["communication"]["uplink_bytes"]` (`downlink_bytes`, `setup_bytes`) counts serialised bytes over all clients and rounds, and
    `["adapter_digest"]` is a SHA-256 of the result, equal to that of the command with the same options. `["run_dir"]` is the run folder,
    below the current folder unless `run_dir=` says otherwise.

    Raises UserError for wrong options and for a preset that is a sweep, RunStopped and RunFailedError for a run that cannot continue, and
    KeyboardInterrupt with the run folder, from which `resume=true` continues.
    """
    keep_libraries_quiet()
    from fedsim.cli.compose import composed
    from fedsim.cli.sweep import is_sweep
    from fedsim.experiment import run as carry_out
    from fedsim.session import forget_session

    if is_sweep(list(overrides)):
        raise UserError("Expected one run, got a preset that is a sweep. Call run() for each of its values, or use the command fedsim run.")
    config = composed(list(overrides))
    if config.method.name not in _BUILT_IN and config.engine.name != "inprocess":
        raise UserError(
            f"Expected engine=inprocess with method={config.method.name}, which this program has added, got {config.engine.name}: "
            "other processes do not know it. Leave engine out."
        )
    forget_session()  # the program may have changed its data or replaced a method
    return carry_out(config, quiet=quiet)


def add_method(method: Method, meaning: str = "added by this program") -> None:
    """Adds a method to the choices of `method=` in this process, or replaces an added one of the same name.

    A method that trains B, B, A in turn: `add_method(replace(METHODS["rolora"], name="mine", turns=(("B",), ("B",), ("A",))))`.
    Its fields say whether it averages exactly, has ranks or may keep moments; they are not checked. Other processes do not know it, so it
    excludes `engine=ray` and deployments. Raises UserError for the name of a built-in method.
    """
    from hydra.core.config_store import ConfigStore

    from fedsim.cli.groups import groups

    if method.name in _BUILT_IN:
        raise UserError(f"Expected a name that no method of fedsim has, got {method.name!r}. Choose another name.")
    METHODS[method.name] = method
    groups()["method"][method.name] = meaning
    ConfigStore.instance().store(group="method", name=method.name, node={"name": method.name})
