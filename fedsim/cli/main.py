"""The program `fedsim`: dispatches the command, shows help at once, and imports what a run needs only for a run.

Exit codes: 0 success, 1 failure, 2 invalid request (explained in one line), 130 stopped by Ctrl-C, 143 by SIGTERM.
"""

import json
import os
import shlex
import signal
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

import fedsim
from fedsim.cli.calling import keep_libraries_quiet, program
from fedsim.errors import LeftRunningError, RunFailedError, RunStopped, UserError, nearest
from fedsim.interruption import STOPPED, TERMINATED, interruptible

if TYPE_CHECKING:
    from fedsim.config import Config

_HELP = ("--help", "-h")


def main(argv: list[str] | None = None) -> int:
    """Executes the words of the command line and returns the exit code."""
    keep_libraries_quiet()
    with interruptible() as received:
        code = _exit_code(sys.argv[1:] if argv is None else argv)
        return TERMINATED if code == STOPPED and received[:1] == [signal.SIGTERM] else code


def _exit_code(words: list[str]) -> int:
    try:
        return _dispatch(words)
    except UserError as error:
        print(f"fedsim: {error}", file=sys.stderr)
        return 2
    except (RunFailedError, RunStopped) as error:
        print(f"fedsim: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return STOPPED
    except BrokenPipeError:  # the reader, such as `head`, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _dispatch(words: list[str]) -> int:
    command, rest = (words[0], words[1:]) if words else ("help", [])
    if command == "--version":
        print(f"fedsim {fedsim.__version__}")
        return 0
    if command in _HELP or command == "help" or any(word in _HELP for word in rest):
        _help(words)
        return 0
    if command not in _ACTIONS:
        raise _unknown(command)
    return _ACTIONS[command](rest)


def _help(words: list[str]) -> None:
    """Prints the help of the program, or of the command or group of options that the words name."""
    from fedsim.cli.help import COMMANDS, command_help, overview, run_help, topics_of_run

    words = [word for word in words if word not in _HELP]
    words = words[1:] if words[:1] == ["help"] else words
    command, rest = (words[0], words[1:]) if words else ("help", [])
    topics = [word for word in rest if "=" not in word and not word.startswith("-")]
    if command == "deploy":
        from fedsim.cli.deploy import usage

        print(usage(), end="")
    elif command == "help":
        print(overview(), end="")
    elif command in COMMANDS:
        print(run_help(topics[0]) if topics else command_help(command), end="")
    elif command in topics_of_run():
        print(run_help(command), end="")
    else:
        raise _unknown(command)


def _unknown(command: str) -> UserError:
    from fedsim.cli.help import COMMANDS

    return UserError(
        f"Unknown command {command!r}: expected one of {', '.join(COMMANDS)}.{nearest(command, list(COMMANDS))} All commands: fedsim --help"
    )


def _run(words: list[str]) -> int:
    flags, overrides = _split("run", words)
    from fedsim.cli.compose import composed
    from fedsim.cli.sweep import is_sweep, sweep

    show = "--cfg" in flags
    if show and "--multirun" in flags:
        raise UserError("Expected --multirun or --cfg, got both. Print the configuration of one job at a time.")
    if show:
        _print_configuration(_composed(overrides))
        return 0
    if flags or is_sweep(overrides):
        return sweep(overrides)
    config = composed(overrides)
    from fedsim.experiment import run

    try:
        run(config)
    except LeftRunningError as left:
        print(f"\n{left}", file=sys.stderr)
        return STOPPED
    except KeyboardInterrupt as interrupt:
        if interrupt.args:  # the run had begun: the argument is its folder
            again = [word for word in overrides if not word.startswith(("run_dir=", "resume=", "overwrite="))]
            again += [f"run_dir={interrupt.args[0]}", "resume=true"]
            print(f"\nStopped. Go on with: {program()} run {shlex.join(again)}", file=sys.stderr)
        else:
            print("\nStopped before the run began.", file=sys.stderr)
        return STOPPED
    return 0


def _data(words: list[str]) -> int:
    _, overrides = _split("data", words)
    config = _composed(overrides)
    from fedsim.cli.holdings import holdings_of
    from fedsim.report import holdings_table

    held = holdings_of(config)
    for line in held.skipped:
        print(f"data: {line}", file=sys.stderr)
    print(holdings_table(held.holdings, owners=held.owners))
    return 0


def _privacy(words: list[str]) -> int:
    flags, overrides = _split("privacy", words)
    config = _composed(overrides)
    from fedsim.cli.privacy import privacy_of, privacy_table

    found = privacy_of(config)
    print(json.dumps(found, indent=2) if flags else privacy_table(found))
    return 0


def _audit(words: list[str]) -> int:
    """Fails, with exit code 1, if the audit refutes the claim."""
    flags, overrides = _split("audit", words)
    config = _composed(overrides)
    from fedsim.cli.audit import audit_table, audited
    from fedsim.files import finite

    found = audited(config, quiet=bool(flags))
    print(json.dumps(finite(found), indent=2) if flags else f"\n{audit_table(found)}")
    return 1 if any(part["refuted"] for part in found["parts"].values()) else 0


def _verify(words: list[str]) -> int:
    _, folders = _split("verify", words)
    if len(folders) != 1:
        raise UserError(f"Expected one run folder, got {len(folders) or 'none'}. Write fedsim verify RUN_FOLDER.")
    from pathlib import Path

    from fedsim.cli.verify import verdict_text, verify

    verdict = verify(Path(folders[0]))
    print(verdict_text(verdict))
    return 1 if verdict.problems else 0


def _cost(words: list[str]) -> int:
    flags, overrides = _split("cost", words)
    if len(flags) > 1:
        raise UserError("Expected --json or --csv, got both. Choose one.")
    from fedsim.cli.cost import cost_table, costs, csv_text, left_out_notes, plain_rows

    found = costs(overrides)
    if not flags:
        print(cost_table(found))
    else:
        for note in left_out_notes(found):
            print(note, file=sys.stderr)
        print(json.dumps(plain_rows(found), indent=2) if "--json" in flags else csv_text(plain_rows(found)))
    return 0


def _estimate(words: list[str]) -> int:
    flags, overrides = _split("estimate", words)
    numbers = {flag: _positive(flag, flags[flag]) for flag in ("--tokens", "--megabits") if flag in flags}
    config = _composed(overrides)
    from fedsim.cli.estimate import MEGABITS, estimate_of, estimate_table, plain

    tokens = round(numbers["--tokens"]) if "--tokens" in numbers else None
    found = estimate_of(config, tokens=tokens, megabits=numbers.get("--megabits", MEGABITS), again="--again" in flags)
    print(json.dumps(plain(found), indent=2) if "--json" in flags else estimate_table(found))
    return 0


def _deploy(words: list[str]) -> int:
    from fedsim.cli.deploy import deploy

    return deploy(words)


def _worker(words: list[str]) -> int:
    from clients.worker import main as worker

    return worker(words)


_ACTIONS: dict[str, Callable[[list[str]], int]] = {
    "run": _run,
    "data": _data,
    "cost": _cost,
    "estimate": _estimate,
    "privacy": _privacy,
    "audit": _audit,
    "verify": _verify,
    "deploy": _deploy,
    "worker": _worker,
}
"""By command, the function that takes the words after it and returns the exit code."""


def _positive(flag: str, text: str) -> float:
    """Returns the number of a flag such as --tokens=200. Raises UserError unless it is a positive number."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise UserError(f"Expected a positive number after {flag}=, got {text!r}. Give it one, such as {flag}=200.")
    return number


def _composed(overrides: list[str]) -> "Config":
    """Returns the checked configuration of one run; prints a note if the preset is a sweep."""
    from fedsim.cli.compose import composed
    from fedsim.cli.sweep import is_sweep

    config = composed(overrides)
    if is_sweep(overrides):
        print(f"The preset is a sweep; this covers one run, method={config.method.name}, and ignores the sweep.", file=sys.stderr)
    return config


def _print_configuration(config: "Config") -> None:
    import yaml

    from fedsim.plain import to_dict

    print(yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True), end="")


def _split(command: str, words: list[str]) -> tuple[dict[str, str], list[str]]:
    """Splits the words, in any order, into flags, {first spelling: value or ""}, and others.

    Raises UserError for a flag that the help does not list, and for one that lacks its value.
    """
    from fedsim.cli.help import COMMANDS

    known = COMMANDS[command].spellings()
    flags: dict[str, str] = {}
    for word in filter(_is_flag, words):
        name, given, value = word.partition("=")
        first, takes, example = known.get(name, "").partition("=")
        if not first or (given and not takes):
            allowed = [*dict.fromkeys([*known, *_HELP])]
            hint = _as_option(command, name) or nearest(name, allowed)
            raise UserError(f"Unknown flag {word!r}: expected one of {', '.join(allowed)}.{hint} All flags: fedsim {command} --help")
        if takes and not given:
            raise UserError(f"Expected a value with {name}, got none. Write {name}={example}, with an equals sign.")
        flags[first] = value
    return flags, [word for word in words if not _is_flag(word)]


def _as_option(command: str, flag: str) -> str:
    """Returns a hint for an option given as a flag (--seed, --rounds); "" if there is no such option or the command takes none."""
    from fedsim.cli.help import WITH_OPTIONS
    from fedsim.cli.options import options

    name = flag.lstrip("-").replace("-", "_")
    found = [key for key in options() if name in (key, key.rpartition(".")[2])]
    return f" Options are written without dashes: {found[0]}=..." if found and command in ("run", *WITH_OPTIONS) else ""


def _is_flag(word: str) -> bool:
    return word.startswith("-")
