"""`fedsim deploy init | register | status | up`: parses the arguments; the work is in fedsim.deploy."""

import json
import os
import sys
from pathlib import Path

from fedsim.errors import UserError, nearest
from fedsim.interruption import STOPPED

PARTS = ("init", "register", "status", "up")
USAGE = {
    "init": "fedsim deploy init DIR [--clients N] [--host NAME ...] [--port P] [--name NAME] [--new-keys]",
    "register": "fedsim deploy register DIR",
    "status": "fedsim deploy status [DIR] [--superlink NAME] [--json]",
    "up": "fedsim deploy up --local N [--dir DIR] [option=value ...]",
}
_INIT = """\
  creates the files of a federation's machines: certificates, one key pair and one client.yaml per client, start scripts,
  systemd units, a compose file, and a README with the steps. Run again, it keeps keys, client.yaml and options that are not
  given again, and rewrites all other files. Defaults of a new folder are in brackets.
  --clients  number of clients (2)
  --host     names or addresses of the server, first the one that clients use (localhost)
  --port     port of the server (9092)
  --name     name of the federation's SuperLink in Flower's configuration (federation)
  --new-keys replaces every key and certificate; `fedsim deploy register` then admits the new keys and revokes the old ones
"""
_REGISTER = """\
  run on the server's machine: makes the running SuperLink admit the clients' public keys and revoke those that they replace.
  DIR is the folder of a federation, or its `server` alone. May be repeated
"""
_UP = """\
  starts a SuperLink and N SuperNodes on loopback, with TLS and node authentication, runs the experiment, and stops everything
  --dir      keeps the folder with keys and logs (default: a temporary folder); another federation's folder is refused
"""
_STATUS = """\
  shows the clients, when each was last seen (now: within the last minute), since when it has been online or offline, and the
  round of the latest runs; unknown means registered at a SuperLink that has lost its database since
"""
_AFTER = """\
Submit to a federation:  fedsim run engine=deployment engine.superlink=NAME federation.clients=N [option=value ...]
A client's worker:       fedsim worker client.yaml [--stop]
"""


def usage() -> str:
    """Returns the help of `fedsim deploy`."""
    texts = {"init": _INIT, "register": _REGISTER, "status": _STATUS, "up": _UP}
    return "".join(f"{USAGE[part]}\n{texts[part]}\n" for part in PARTS) + _AFTER


def deploy(words: list[str]) -> int:
    """Executes the words after `fedsim deploy` and returns the exit code. Raises UserError."""
    part, rest = (words[0], words[1:]) if words else ("", [])
    if part not in PARTS:
        raise UserError(f"Expected fedsim deploy {' | '.join(PARTS)}, got {repr(part) if part else 'nothing'}.{nearest(part, list(PARTS))}")
    return {"init": _init, "register": _register, "status": _status, "up": _up}[part](rest)


def _init(words: list[str]) -> int:
    options, rest = _options("init", words, {"--clients": 1, "--host": 1, "--port": 1, "--name": 1, "--new-keys": 0})
    if len(rest) != 1:
        raise UserError(f"Expected one folder, got {len(rest)}. Usage: {USAGE['init']}")
    from dataclasses import replace

    from fedsim.deploy.folder import SETTINGS, Federation, init, load

    folder = Path(rest[0])
    before = load(folder) if (folder / SETTINGS).is_file() else Federation("federation", 2, ("localhost",))
    hosts = tuple(options.get("--host", before.hosts))
    clients, port = _number(options, "--clients", before.clients, 1, 10_000), _number(options, "--port", before.port, 1, 65_535)
    name = options.get("--name", [before.name])[-1]
    if not name.replace("-", "").replace("_", "").isalnum():
        raise UserError(f"Expected --name of letters, digits, - and _, got {name!r}.")
    federation = replace(before, name=name, clients=clients, hosts=hosts, port=port)
    for line in init(folder, federation, new_keys="--new-keys" in options):
        print(line)
    print(f"Read {folder / 'README.md'} for the next steps.")
    return 0


def _register(words: list[str]) -> int:
    _, rest = _options("register", words, {})
    if len(rest) != 1:
        raise UserError(f"Expected the folder of a federation, got {len(rest)}. Usage: {USAGE['register']}")
    from fedsim.deploy.registering import register

    server, superlink = _select_federation(Path(rest[0]))
    register(server, superlink, lambda line: print(line, flush=True))
    return 0


def _select_federation(folder: Path) -> tuple[Path, str]:
    """Points FLWR_HOME at a federation's configuration; returns its server folder and its SuperLink's name."""
    from fedsim.deploy.folder import load

    federation, folder = load(folder), folder.resolve()
    server = folder / "server" if (folder / "server").is_dir() else folder  # `server` may be copied to its machine alone
    os.environ["FLWR_HOME"] = str(server / "flwr")
    return server, federation.name


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
    from fedsim.session import check as check_session

    if any(word.startswith("federation.clients=") and word != f"federation.clients={clients}" for word in overrides):
        raise UserError(f"Expected --local to be the number of clients, got --local {clients} and another. Leave out federation.clients.")
    config = compose([*overrides, f"federation.clients={clients}", "engine=deployment", f"engine.superlink={NAME}"])
    check(config)
    config = named(config)
    config = replace(
        config,
        run_dir=str(Path(str(config.run_dir)).resolve()),  # the trial's programs run on this machine, but each in its own folder
        data=replace(config.data, path=_absolute("data.path", config.data.path)),
        model=replace(config.model, path=_absolute("model.path", config.model.path)),
    )
    check_session(config)
    folder = Path(options["--dir"][-1]).resolve() if "--dir" in options else None
    print(f"starting a SuperLink and {clients} SuperNodes on loopback", file=sys.stderr)
    try:
        with local_federation(clients, folder, data_path=config.data.path, model_path=config.model.path):
            run(config)
    except KeyboardInterrupt:  # at any stage: the federation is gone, so the run cannot continue
        print(f"\nStopped, and the federation is taken down. What there is of the run lies in {config.run_dir}", file=sys.stderr)
        return STOPPED
    return 0


def _absolute(key: str, path: str | None) -> str | None:
    """Returns an existing path as absolute, a hub id unchanged. Raises UserError for a local path that does not exist."""
    from fedsim.models import looks_local

    if path is None:
        return None
    found = Path(path).expanduser()
    if found.exists():
        return str(found.resolve())
    if looks_local(path):
        raise UserError(f"{key}: expected a file or folder, got {path}, where there is none. Give the right path, or a hub id.")
    return path


def _status(words: list[str]) -> int:
    options, rest = _options("status", words, {"--superlink": 1, "--json": 0})
    from fedsim.deploy.flower import asking
    from fedsim.deploy.registering import REGISTERED
    from fedsim.deploy.status import status, status_table

    if rest:
        server, superlink = _select_federation(Path(rest[0]))
        found = status(superlink, server / REGISTERED)
    elif "--superlink" in options:
        superlink = options["--superlink"][-1]
        with asking(superlink, "--superlink"):
            found = status(superlink)
    else:
        raise UserError(f"Expected the folder of a federation or --superlink, got neither. Usage: {USAGE['status']}")
    print(json.dumps(found, indent=2) if "--json" in options else status_table(found))
    return 0


def _options(part: str, words: list[str], known: dict[str, int]) -> tuple[dict[str, list[str]], list[str]]:
    """Returns the flags with their values, and the other words; `known` gives the values that a flag takes, 0 or 1. Raises UserError."""
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
