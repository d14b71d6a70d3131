"""`fedsim deploy init`: the folder with everything that a federation's machines need, secrets with mode 0600."""

import json
import os
import shutil
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from string import Template
from typing import Any

from clients.owner import Owner, owner_text
from fedsim.cli.calling import QUIET
from fedsim.deploy import templates
from fedsim.deploy.certificates import authority, client_key, is_issued_by, is_pair, server_certificate
from fedsim.errors import UserError
from fedsim.files import atomic_write, temporary

SETTINGS = "federation.json"
LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")  # where the ServerApp reaches the SuperLink
FIRST_RUNTIME_PORT = 9094

SECRET, PROGRAM, PLAIN = 0o600, 0o755, 0o644


@dataclass(frozen=True)
class Federation:
    """The parameters of a federation's files; `hosts` are the server's names and addresses, of which clients use the first."""

    name: str
    clients: int
    hosts: tuple[str, ...]
    port: int = 9092
    shard: bool = False
    """Set in a trial: clients train on their shards of the experiment's data."""
    data_path: str | None = None
    """Path of the experiment's data in a trial, in which the server and the clients share a disk; None for data without a path."""
    model_path: str | None = None
    """The same for the base model."""

    def owner(self, client: int) -> Owner:
        """Returns the initial contents of client.yaml."""
        return Owner(client, shard=self.shard, data_path=self.data_path, model_path=self.model_path)


def init(folder: Path, federation: Federation, *, new_keys: bool = False) -> list[str]:
    """Writes the federation's files and returns, line by line, which keys are new, kept or replaced.

    Guarantees: a new folder appears whole or not at all. In an existing one, client.yaml stays, valid keys stay unless `new_keys` is set
    (the server's also change with its hosts), and every file is replaced atomically. Raises UserError if the folder holds something else.
    """
    if not folder.exists() or not any(folder.iterdir()):
        staging = temporary(folder)
        try:
            lines = _write(staging, federation, new_keys=False, final=folder)
            if folder.exists():
                folder.rmdir()
            os.replace(staging, folder)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
        return lines
    if not (folder / SETTINGS).is_file():
        raise UserError(f"Expected {folder} to be new, empty or a federation's folder, but it holds other files. Choose another folder.")
    return _write(folder, federation, new_keys=new_keys, final=folder)


def load(folder: Path) -> Federation:
    """Returns the parameters of a federation's folder, or of its `server` folder alone. Raises UserError if it is neither."""
    try:
        values = json.loads((folder / SETTINGS).read_text())
        return Federation(**values | {"hosts": tuple(values["hosts"])})
    except (OSError, ValueError, TypeError, KeyError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UserError(
            f"Expected {folder} to be a federation's folder, made by `fedsim deploy init`, but {SETTINGS}: {reason}."
        ) from error


def _write(folder: Path, federation: Federation, *, new_keys: bool, final: Path) -> list[str]:
    lines: list[str] = []
    writer = _Writer(folder, new_keys, lines)
    before = load(folder) if (folder / SETTINGS).exists() else federation
    writer.pair("ca/ca.crt", "ca/ca.key", "certificate authority", lambda: authority(federation.name))
    ca, ca_key = writer.read("ca/ca.crt"), writer.read("ca/ca.key")
    hosts = list(dict.fromkeys([*federation.hosts, *LOCAL_HOSTS]))
    issued = writer.has("server/server.crt") and is_issued_by(writer.read("server/server.crt"), ca)  # not if --new-keys was interrupted
    other = before.hosts != federation.hosts or not issued
    issue = partial(server_certificate, ca, ca_key, hosts)
    writer.pair("server/server.crt", "server/server.key", "server certificate", issue, replace=other)
    for client in range(federation.clients):
        home, name = f"clients/client-{client}", f"client-{client}"
        writer.pair(f"server/keys/{name}.pub", f"{home}/key", f"key of client {client}", partial(client_key, name))
        writer.keep(f"{home}/client.yaml", owner_text(federation.owner(client)).encode(), PLAIN)
        _client_files(writer, federation, client, ca)
    _server_files(writer, federation, ca, final)
    writer.put(SETTINGS, _settings(federation), PLAIN)  # last: it marks a complete folder
    return lines


def _client_files(writer: "_Writer", federation: Federation, client: int, ca: bytes) -> None:
    home, values = f"clients/client-{client}", _values(federation, client=client)
    writer.put(f"{home}/ca.crt", ca, PLAIN)
    writer.text(f"{home}/supernode.sh", templates.SUPERNODE, values, PROGRAM)
    writer.text(f"{home}/fedsim-supernode.service", templates.SUPERNODE_UNIT, values)


def _server_files(writer: "_Writer", federation: Federation, ca: bytes, final: Path) -> None:
    values = _values(federation, certificate=json.dumps(str((final / "server" / "ca.crt").resolve())))
    writer.put("server/ca.crt", ca, PLAIN)
    writer.text("server/superlink.sh", templates.SUPERLINK, values, PROGRAM)
    writer.put(f"server/{SETTINGS}", _settings(federation), PLAIN)
    writer.text("server/flwr/config.toml", templates.FLWR_CONFIG, values)
    writer.text("server/gateway.conf", templates.GATEWAY, values | {"upstream": f"127.0.0.1:{federation.port}"})
    writer.text("server/fedsim-superlink.service", templates.SUPERLINK_UNIT, values)
    writer.text("Dockerfile", templates.DOCKERFILE, values)
    clients = [Template(templates.COMPOSE_CLIENT).substitute(client=client) for client in range(federation.clients)]
    writer.text("compose.yaml", templates.COMPOSE_HEAD + "".join(clients) + templates.COMPOSE_TAIL, values)
    writer.text("README.md", templates.README, values)


def _settings(federation: Federation) -> bytes:
    return json.dumps(asdict(federation), indent=2).encode() + b"\n"


def _values(federation: Federation, client: int = 0, **others: Any) -> dict[str, Any]:
    return {
        "name": federation.name,
        "clients": federation.clients,
        "host": federation.hosts[0],
        "hosts": ", ".join(federation.hosts),
        "port": federation.port,
        "client": client,
        "runtime_port": FIRST_RUNTIME_PORT + client,
        "quiet": " ".join(f"{name}={value}" for name, value in QUIET.items()),
        **others,
    }


class _Writer:
    """Writes into the folder and records what happens to keys."""

    def __init__(self, folder: Path, new_keys: bool, lines: list[str]) -> None:
        self._folder, self._new_keys, self._lines = folder, new_keys, lines

    def has(self, name: str) -> bool:
        return (self._folder / name).exists()

    def read(self, name: str) -> bytes:
        return (self._folder / name).read_bytes()

    def put(self, name: str, content: bytes, mode: int) -> None:
        path = self._folder / name
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        atomic_write(path, content, mode=mode)

    def keep(self, name: str, content: bytes, mode: int) -> None:
        if not self.has(name):
            self.put(name, content, mode)

    def text(self, name: str, template: str, values: dict[str, Any], mode: int = PLAIN) -> None:
        self.put(name, Template(template).substitute(values).encode(), mode)

    def pair(self, public: str, private: str, what: str, make: Any, *, replace: bool = False) -> None:
        """Writes a public and a private part, the private one first, unless a matching pair exists and may stay."""
        exists = self.has(public) and self.has(private)
        if exists and not (self._new_keys or replace) and is_pair(self.read(public), self.read(private)):
            self._lines.append(f"kept: {what} ({private})")
            return
        shown, secret = make()
        self.put(private, secret, SECRET)
        self.put(public, shown, PLAIN)
        self._lines.append(f"{'replaced' if exists else 'new'}: {what} ({private}, mode 0600)")
