"""Forwards a message from the client app to its worker: connects, starts the worker if there is none, and waits for the reply.

No torch here: Flower starts the app for each message, so it must start fast.
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
"""A worker that dies while handling a message is restarted once for it."""


class WorkerError(RuntimeError):
    """The worker could not be started or died, and its log says why, or it is another client's."""


def forward(message: Message, context: Context, file: str) -> Message:
    """Returns the reply of the worker for the owner's file, starting the worker if there is none.

    Raises WorkerError if it does not start, dies while handling the message, or serves another client than the SuperNode names; UserError
    for an invalid file; FrameError for a reply larger than the owner allows.
    """
    path = Path(file)
    owner = load_owner(path)
    if (given := context.node_config.get("partition-id", owner.client)) != owner.client:
        raise WorkerError(f"Expected partition-id={owner.client} as {path} has it, got {given}.")
    for _ in range(TRIES):
        with _connect(path, owner) as connection:
            try:
                write_message(connection.sendall, message)
                return read_message(connection.recv, owner.max_message_mb * 10**6)
            except (CutOffError, EOFError, ConnectionError):
                continue
    raise WorkerError(
        f"Expected a reply of the worker, but it died {TRIES} times while handling the message. See {Path(owner.folder) / LOG}."
    )


def _connect(path: Path, owner: Owner) -> socket.socket:
    """Returns a connection to the worker; of several client apps only one starts it."""
    connection = _try_connect(owner)
    if connection is not None:
        return connection
    start = take_lock(private_folder(owner) / START_LOCK, wait=True)
    assert start is not None
    try:
        return _try_connect(owner) or _start_worker(path, owner)
    finally:
        os.close(start)


def _try_connect(owner: Owner) -> socket.socket | None:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.connect(str(socket_path(owner)))
    except (FileNotFoundError, ConnectionRefusedError):
        connection.close()
        return None
    return connection


def _start_worker(path: Path, owner: Owner) -> socket.socket:
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
        connection = _try_connect(owner)
        if connection is not None:
            return connection
        if process.poll() is not None and running_pid(owner) is None:
            break
        time.sleep(0.05)
    raise WorkerError(f"Expected the worker to start, but it did not within {START_SECONDS:g} s. See {log}.")
