"""`fedsim deploy init | up | status`: reads the words; the work is in fedsim.deploy."""

import json
import os
import sys
from pathlib import Path

from fedsim.errors import UserError, nearest

PARTS = ("init", "up", "status")
USAGE = {
    "init": "fedsim deploy init DIR [--clients N] [--host NAME ...] [--port P] [--name NAME] [--new-keys]",
    "up": "fedsim deploy up --local N [--dir DIR] [option=value ...]",
    "status": "fedsim deploy status [DIR] [--superlink NAME] [--json]",
}
_INIT = """\
  writes all that the machines of a federation need: certificates, one key pair and one client.yaml per client, start scripts,
  systemd units, a compose file, a README with the order of steps. Run again it keeps keys and says so.
  --host     names or addresses of the server, the first being the one that clients use (localhost)
  --new-keys replaces every key and certificate
"""
_UP = """\
  starts a SuperLink and N SuperNodes on loopback, with TLS and node authentication, runs the experiment, and ends all of it
  --dir      keeps the folder with keys and logs; otherwise it is a temporary one
"""
_STATUS = """\
  shows the clients, since when they are there or gone, and the round of the latest runs
"""
_AFTER = """\
Submit to a federation:  fedsim run engine=deployment engine.superlink=NAME federation.clients=N [option=value ...]
A client's worker:       fedsim worker client.yaml [--stop]
"""


def usage() -> str:
    """Returns the help of `fedsim deploy`."""
    return f"{USAGE['init']}\n{_INIT}\n{USAGE['up']}\n{_UP}\n{USAGE['status']}\n{_STATUS}\n{_AFTER}"


def deploy(words: list[str]) -> int:
    """Does what the words after `fedsim deploy` ask for and returns the exit code. Raises UserError."""
    part, rest = (words[0], words[1:]) if words else ("", [])
    if part not in PARTS:
        raise UserError(f"Expected fedsim deploy {' | '.join(PARTS)}, got {repr(part) if part else 'nothing'}.{nearest(part, list(PARTS))}")
    return {"init": _init, "up": _up, "status": _status}[part](rest)


def _init(words: list[str]) -> int:
    options, rest = _options("init", words, {"--clients": 1, "--host": 1, "--port": 1, "--name": 1, "--new-keys": 0})
    if len(rest) != 1:
        raise UserError(f"Expected one folder, got {len(rest)}. Usage: {USAGE['init']}")
    from fedsim.deploy.folder import Federation, init

    hosts = tuple(options.get("--host", ["localhost"]))
    clients, port = _number(options, "--clients", 2, 1, 10_000), _number(options, "--port", 9092, 1, 65_535)
    name = options.get("--name", ["federation"])[-1]
    if not name.replace("-", "").replace("_", "").isalnum():
        raise UserError(f"Expected --name of letters, digits, - and _, got {name!r}.")
    for line in init(Path(rest[0]), Federation(name, clients, hosts, port), new_keys="--new-keys" in options):
        print(line)
    print(f"Read {Path(rest[0]) / 'README.md'} for the next steps.")
    return 0


def _up(words: list[str]) -> int:
    options, overrides = _options("up", words, {"--local": 1, "--dir": 1})
    if "--local" not in options:
        raise UserError(f"Expected --local N, the number of clients on this machine. Usage: {USAGE['up']}")
    clients = _number(options, "--local", 2, 1, 1000)
    from dataclasses import replace

    from fedsim.cli.compose import compose
    from fedsim.config_check import check
    from fedsim.deploy.local import NAME, local_federation
    from fedsim.deploy.submit import named, run

    config = compose([*overrides, f"federation.clients={clients}", "engine=deployment", f"engine.superlink={NAME}"])
    check(config)
    config = named(config)
    config = replace(config, run_dir=str(Path(str(config.run_dir)).resolve()))
    folder = Path(options["--dir"][-1]).resolve() if "--dir" in options else None
    print(f"starting a SuperLink and {clients} SuperNodes on loopback", file=sys.stderr)
    with local_federation(clients, folder) as local:
        os.environ["FLWR_HOME"] = str(local.flwr_home)
        run(config)
    return 0


def _status(words: list[str]) -> int:
    options, rest = _options("status", words, {"--superlink": 1, "--json": 0})
    from fedsim.deploy.folder import load
    from fedsim.deploy.status import status, status_table

    if rest:
        federation, folder = load(Path(rest[0])), Path(rest[0]).resolve()
        server = folder / "server" if (folder / "server").is_dir() else folder  # which is copied to its machine alone
        os.environ["FLWR_HOME"] = str(server / "flwr")
        found = status(federation.name, server / "registered")
    elif "--superlink" in options:
        found = status(options["--superlink"][-1])
    else:
        raise UserError(f"Expected the folder of a federation or --superlink, got neither. Usage: {USAGE['status']}")
    print(json.dumps(found, indent=2) if "--json" in options else status_table(found))
    return 0


def _options(part: str, words: list[str], known: dict[str, int]) -> tuple[dict[str, list[str]], list[str]]:
    """Returns the flags with their values and the other words; `known` tells how many values a flag takes. Raises UserError."""
    found: dict[str, list[str]] = {}
    rest: list[str] = []
    left = iter(words)
    for word in left:
        if not word.startswith("-"):
            rest.append(word)
        elif word not in known:
            raise UserError(f"Unknown flag {word!r}: expected one of {', '.join(known)}.{nearest(word, list(known))} Usage: {USAGE[part]}")
        elif known[word]:
            value = next(left, None)
            if value is None or value.startswith("-"):
                raise UserError(f"Expected a value after {word}, got none. Usage: {USAGE[part]}")
            found.setdefault(word, []).append(value)
        else:
            found[word] = []
    return found, rest


def _number(options: dict[str, list[str]], name: str, default: int, low: int, high: int) -> int:
    text = options.get(name, [str(default)])[-1]
    if not text.isdigit() or not low <= int(text) <= high:
        raise UserError(f"Expected {name} to be a whole number from {low} to {high}, got {text!r}.")
    return int(text)
