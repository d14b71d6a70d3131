"""`fedsim deploy up --local N`: a complete federation on loopback, with TLS and node authentication, for the duration of one run.

The programs, scripts and files are those of `fedsim deploy init`; only the addresses are loopback's. Whatever happens, all processes
started here are ended, and no others.
"""

import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from clients.owner import load_owner
from clients.worker import stop
from fedsim.deploy.folder import SETTINGS, Federation, init, load
from fedsim.deploy.registering import register
from fedsim.errors import UserError
from fedsim.interruption import interruptible

NAME = "local"
TAIL_LINES = 5  # of a log, shown in an error message
START_SECONDS = 60.0
PATIENCE_SECONDS = 15.0
"""How long a process may take to end after SIGTERM before it is killed."""


@dataclass
class Local:
    """A federation on this machine. Its SuperLink is called `NAME` in Flower's configuration, in FLWR_HOME = `flwr_home`."""

    folder: Path
    federation: Federation
    processes: dict[str, "subprocess.Popen[bytes]"] = field(default_factory=dict)

    @property
    def flwr_home(self) -> Path:
        """FLWR_HOME of the federation's operator."""
        return self.folder / "server" / "flwr"

    def client_folder(self, client: int) -> Path:
        """The folder of a client, with its owner's file."""
        return self.folder / "clients" / f"client-{client}"

    def log(self, name: str) -> Path:
        """The file with a program's output."""
        return self.folder / "logs" / f"{name}.log"

    def start_superlink(self) -> None:
        """Starts the SuperLink and waits until it answers over TLS with the certificate of this federation."""
        self.start("superlink", self.folder / "server" / "superlink.sh")
        context = ssl.create_default_context(cafile=str(self.folder / "server" / "ca.crt"))

        def answers() -> bool:
            address = ("127.0.0.1", self.federation.port)
            with suppress(OSError), context.wrap_socket(socket.create_connection(address, 1), server_hostname="localhost"):
                return True
            return False

        self.wait_for(answers, "superlink")

    def register(self) -> None:
        """Registers the clients' keys with the SuperLink."""
        register(self.folder / "server", self.federation.name)

    def start_client(self, client: int, **variables: str) -> None:
        """Starts the SuperNode of a client; its worker starts with the first message."""
        own = {"FEDSIM_PORT": str(free_port())} | variables
        self.start(f"client-{client}", self.client_folder(client) / "supernode.sh", **own)

    def start(self, name: str, script: Path, **variables: str) -> None:
        """Starts a program in a process group of its own, its output in a log."""
        self.log(name).parent.mkdir(exist_ok=True)
        with open(self.log(name), "ab") as log:
            self.processes[name] = subprocess.Popen(
                [str(script)], env=environment() | variables, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    def wait_for(self, ready: Callable[[], bool], name: str) -> None:
        """Waits until `ready()` is true. Raises UserError with the end of the program's log if it ends first or takes too long."""
        ends = time.monotonic() + START_SECONDS
        while time.monotonic() < ends and self.processes[name].poll() is None:
            if ready():
                return
            time.sleep(0.1)
        raise UserError(f"Expected {name} to start, but it did not: {tail(self.log(name))}")

    def end(self, name: str) -> None:
        """Ends a program and all its descendants, including those outside its process group, such as the ServerApp in its own session."""
        process = self.processes.pop(name)
        with suppress(psutil.NoSuchProcess):
            started = psutil.Process(process.pid).children(recursive=True)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                process.wait(PATIENCE_SECONDS)
            remaining = psutil.wait_procs(started, timeout=PATIENCE_SECONDS)[1]
            for each in remaining:
                with suppress(psutil.NoSuchProcess):
                    each.kill()
            psutil.wait_procs(remaining, timeout=PATIENCE_SECONDS)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def end_all(self) -> None:
        """Ends the clients, their workers, and the SuperLink."""
        for name in list(self.processes)[::-1]:
            self.end(name)
        for client in range(self.federation.clients):
            try:
                owner = load_owner(self.client_folder(client) / "client.yaml")
            except UserError:  # no worker starts without a readable owner's file
                continue
            stop(owner)


@contextmanager
def local_federation(
    clients: int,
    folder: Path | None = None,
    *,
    connect: bool = True,
    data_path: str | None = None,
    model_path: str | None = None,
) -> Iterator[Local]:
    """Runs a federation of `clients` clients for the block, in a temporary folder unless `folder` is given, which stays.

    Clients train on their shards of the experiment's data at `data_path` with the base model at `model_path`, both as in the configuration,
    absolute if on disk. Without `connect` the caller starts their SuperNodes. In the block, Flower's programs use the federation's
    configuration (FLWR_HOME).

    Guarantees: however the block is left, nothing that was started still runs. Raises UserError for another federation's folder, and for
    one in which a client takes shards of other data or has another base model.
    """
    if folder is not None and (folder / SETTINGS).is_file() and (name := load(folder).name) != NAME:
        raise UserError(f"Expected {folder} to be new or of an earlier trial, got the folder of the federation {name}. Choose another one.")
    place = folder or Path(tempfile.mkdtemp(prefix="fedsim-"))
    federation = Federation(NAME, clients, ("localhost",), free_port(), True, data_path, model_path)
    local, home = Local(place, federation), os.environ.get("FLWR_HOME")
    _check_owners(local)  # before anything is written there
    try:
        with interruptible():  # SIGTERM too, so that the processes are ended
            init(place, federation)
            os.environ["FLWR_HOME"] = str(local.flwr_home)
            local.start_superlink()
            local.register()
            for client in range(clients if connect else 0):
                local.start_client(client)
            yield local
    finally:
        with _ignoring_signals():
            try:
                local.end_all()
            finally:
                os.environ.pop("FLWR_HOME", None)
                if home is not None:
                    os.environ["FLWR_HOME"] = home
                if folder is None:
                    shutil.rmtree(place, ignore_errors=True)


def _check_owners(local: Local) -> None:
    """Raises UserError if a client.yaml kept from an earlier trial names other data or another model than this trial."""
    wanted = local.federation
    for client in range(wanted.clients):
        path = local.client_folder(client) / "client.yaml"
        owner = load_owner(path) if path.exists() else wanted.owner(client)
        if owner.shard and (owner.data_path, owner.model_path) != (wanted.data_path, wanted.model_path):
            raise UserError(
                f"Expected {path} with the trial's data and model ({wanted.data_path or 'by name'}, {wanted.model_path or 'embedded'}), "
                f"got {owner.data_path or 'by name'}, {owner.model_path or 'embedded'}. Edit it, or choose another folder."
            )


def environment() -> dict[str, str]:
    """Returns the environment of the programs: the current one, with this installation's programs first in PATH."""
    return os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"}


def free_port() -> int:
    """Returns a loopback port that is currently free."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def tail(log: Path) -> str:
    """Returns the last lines of a log as one line."""
    return " | ".join(log.read_text(errors="replace").strip().splitlines()[-TAIL_LINES:]) or "(its log is empty)"


@contextmanager
def _ignoring_signals() -> Iterator[None]:
    """Ignores Ctrl-C and SIGTERM in the block. Does nothing outside the main thread, which alone receives signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
