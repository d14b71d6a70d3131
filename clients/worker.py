"""The worker: one long-running process for one client on one device. It loads the base model once and answers over a Unix socket.

The client app, which Flower starts for each message, starts the worker if none is running; `fedsim worker FILE` starts it by hand.
The socket is in a folder that only its owner can enter. A lock that is released when the process ends shows whether a worker is running.
"""

import fcntl
import hashlib
import logging
import os
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path
from types import FrameType

from clients.framing import FrameError, read_message, write_message
from clients.owner import Owner, load_owner
from fedsim.errors import UserError

LOG, LOCK, START_LOCK = "worker.log", "worker.lock", "start.lock"
LONGEST_SOCKET_PATH = 100  # Linux takes 107 bytes, macOS 103
STALLED_SECONDS = 60.0
"""How long a connection to a client app may stall before it is dropped."""
LEAVING_SECONDS = 20.0
"""How long a worker may take to end after SIGTERM."""
KILLED_SECONDS = 5.0
"""How long the system may take to end a killed worker."""

log = logging.getLogger("fedsim.worker")


def private_folder(owner: Owner) -> Path:
    """Returns the worker's folder, created with mode 0700 if necessary. Raises UserError if others may enter it."""
    folder = Path(owner.folder)
    return _private(folder)


def socket_path(owner: Owner) -> Path:
    """Returns the worker's socket path: in its folder or, if that is too long, in a private folder under the temporary one."""
    path = private_folder(owner) / "socket"
    if len(os.fsencode(path)) <= LONGEST_SOCKET_PATH:
        return path
    name = hashlib.sha256(os.fsencode(path)).hexdigest()[:16]
    return _private(Path(tempfile.gettempdir()) / f"fedsim-{os.getuid()}-{name}") / "socket"


def _private(folder: Path) -> Path:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
    except OSError as error:
        raise UserError(f"Expected to write in {folder}, but: {error.strerror}. Give the client's file another folder.") from error
    if found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise UserError(f"Expected {folder} to belong to this user alone, mode 0700; run chmod 700 on it or choose another folder.")
    return folder


def take_lock(path: Path, *, wait: bool = False) -> int | None:
    """Returns the descriptor of the lock, None if another process has it. The lock is released when the process ends."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def running_pid(owner: Owner) -> int | None:
    """Returns the process id of the running worker, None if there is none."""
    path = private_folder(owner) / LOCK
    lock = take_lock(path)
    if lock is not None:
        os.close(lock)
        return None
    text = path.read_text().strip()
    return int(text) if text.isdigit() else None


def stop(owner: Owner) -> bool:
    """Ends the worker, by force if it does not end in time. Returns whether there was one."""
    pid = running_pid(owner)
    if pid is None:
        return False
    for number, patience in ((signal.SIGTERM, LEAVING_SECONDS), (signal.SIGKILL, KILLED_SECONDS)):
        os.kill(pid, number)
        ends = time.monotonic() + patience
        while time.monotonic() < ends:
            if running_pid(owner) != pid:
                return True
            time.sleep(0.05)
    raise UserError(f"Expected the worker, process {pid}, to end, but it does not.")


def serve(owner: Owner) -> int:
    """Answers messages until the worker has been idle for too long or a signal ends it. Returns the exit code."""
    folder = private_folder(owner)
    ends = time.monotonic() + LEAVING_SECONDS
    while (lock := take_lock(folder / LOCK)) is None and time.monotonic() < ends and not socket_path(owner).exists():
        time.sleep(0.05)  # a worker that is ending has removed its socket but holds its lock
    if lock is None:
        raise UserError(f"Expected no worker in {folder}, but process {running_pid(owner)} is one. Stop it: fedsim worker FILE --stop")
    os.ftruncate(lock, 0)
    os.pwrite(lock, str(os.getpid()).encode(), 0)
    path = socket_path(owner)
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listening:
        listening.bind(str(path))
        listening.listen(16)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, _end)
        log.info("worker of client %d is process %d", owner.client, os.getpid())
        try:
            _answer_until_idle(listening, owner)
            log.info("idle for %g minutes: ending", owner.idle_minutes)
        except _EndError as end:
            log.info("ending on %s", end)
        finally:
            path.unlink(missing_ok=True)
    return 0


def _answer_until_idle(listening: socket.socket, owner: Owner) -> None:
    from clients.desk import Desk  # imports torch; a waiting client app can connect meanwhile

    desk = Desk(owner)
    listening.settimeout(owner.idle_minutes * 60)
    while True:
        try:
            connection, _ = listening.accept()
        except TimeoutError:
            return
        with connection:
            try:
                connection.settimeout(STALLED_SECONDS)
                message = read_message(connection.recv, owner.max_message_mb * 10**6)
                reply = desk.answer(message)
                write_message(connection.sendall, reply)
            except EOFError:
                pass  # a probe for a running worker
            except (FrameError, OSError) as error:  # the client app is gone or sends no valid message
                log.error("no reply: %s", error)


class _EndError(BaseException):
    """A signal asked the worker to end."""


def _end(number: int, frame: FrameType | None) -> None:
    raise _EndError(signal.Signals(number).name)


def main(argv: list[str] | None = None) -> int:
    """`fedsim worker FILE [--stop]`: serves the client of that file, or ends its worker."""
    words = sys.argv[1:] if argv is None else argv
    paths = [word for word in words if not word.startswith("-")]
    if len(paths) != 1 or any(word not in ("--stop",) for word in words if word.startswith("-")):
        raise UserError(f"Expected fedsim worker FILE [--stop], got {' '.join(words) or 'nothing'!r}. FILE is a client.yaml.")
    owner = load_owner(Path(paths[0]))
    if "--stop" in words:
        print("stopped" if stop(owner) else "no worker was running")
        return 0
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.INFO, stream=sys.stderr, force=True)
    return serve(owner)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(f"fedsim: {error}", file=sys.stderr)
        sys.exit(2)
