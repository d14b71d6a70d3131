"""How the client app has its worker do the work: it connects, starts the worker if there is none, and waits for the reply.

No torch here: Flower starts the app anew for each message, and a start must cost little.
"""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

from flwr.app import Context, Message

from clients.framing import CutOffError, read_message, write_message
from clients.owner import Owner, load_owner
from clients.worker import LOG, START_LOCK, private_folder, running_pid, socket_path, take_lock

START_SECONDS = 120.0
TRIES = 2
"""A worker that dies over a message is started once more for it."""


class WorkerError(RuntimeError):
    """The worker cannot be started, or died; its log says why."""


def forward(message: Message, context: Context, file: str) -> Message:
    """Returns the reply of the worker of the owner's file, which is started if there is none.

    Raises WorkerError where it dies over the message, or is another client than the SuperNode says; UserError for a wrong file; FrameError
    for a reply that is larger than the owner allows.
    """
    path = Path(file)
    owner = load_owner(path)
    if (told := context.node_config.get("partition-id", owner.client)) != owner.client:
        raise WorkerError(f"Expected partition-id={owner.client} as {path} has it, got {told}.")
    for _ in range(TRIES):
        with _connected(path, owner) as connection:
            try:
                write_message(connection.sendall, message)
                return read_message(connection.recv, owner.max_message_mb * 10**6)
            except (CutOffError, EOFError, ConnectionError):
                continue
    raise WorkerError(f"Expected a reply of the worker, but it ended over the message {TRIES} times. See {Path(owner.folder) / LOG}.")


def _connected(path: Path, owner: Owner) -> socket.socket:
    """Returns a connection to the worker; only one of several client apps starts one."""
    connection = _connection(owner)
    if connection is not None:
        return connection
    start = take_lock(private_folder(owner) / START_LOCK, wait=True)
    assert start is not None
    try:
        return _connection(owner) or _started(path, owner)
    finally:
        os.close(start)


def _connection(owner: Owner) -> socket.socket | None:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.connect(str(socket_path(owner)))
    except (FileNotFoundError, ConnectionRefusedError):
        connection.close()
        return None
    return connection


def _started(path: Path, owner: Owner) -> socket.socket:
    """Starts the worker in a session of its own, so that it outlives this app, and waits until it listens."""
    log = private_folder(owner) / LOG
    with open(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "clients.worker", str(path)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    ends = time.monotonic() + START_SECONDS
    while time.monotonic() < ends:
        connection = _connection(owner)
        if connection is not None:
            return connection
        if process.poll() is not None and running_pid(owner) is None:
            break
        time.sleep(0.05)
    raise WorkerError(f"Expected the worker to start, but it did not within {START_SECONDS:g} s. See {log}.")
