"""events.jsonl: the events of a run in order, one per line."""

import json
import os
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedsim.files import atomic_write, finite


def append(descriptor: int, line: bytes) -> None:
    """Appends a whole line to a file in one write. Raises OSError if only a part of it fits on the disk."""
    written = os.write(descriptor, line)
    if written < len(line):  # the disk is full: writing the rest raises the reason
        os.write(descriptor, line[written:])


class EventLog:
    """The open log of a run, written by one process and readable by others meanwhile. Opening terminates a line cut short by a kill."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        if self.size and os.pread(self._descriptor, 1, self.size - 1) != b"\n":
            append(self._descriptor, b"\n")

    def append(self, kind: str, facts: dict[str, Any]) -> None:
        """Appends {time, kind, facts...} in one write: a kill leaves at most one torn last line. Costs some ten microseconds."""
        event = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "kind": kind, **facts}
        try:
            text = json.dumps(event, allow_nan=False)
        except ValueError:  # a loss is NaN, which JSON lacks
            text = json.dumps(finite(event))
        append(self._descriptor, text.encode() + b"\n")

    @property
    def size(self) -> int:
        """Size of the log in bytes."""
        return os.fstat(self._descriptor).st_size

    def sync(self) -> None:
        """Makes all events so far durable."""
        os.fsync(self._descriptor)

    def close(self) -> None:
        """Closes the file; nothing is buffered."""
        os.close(self._descriptor)


def read_events(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the events of a log, none if it does not exist, without a torn last line. Raises ValueError for any other damage."""
    if path.exists():
        with open(path, "rb") as file:
            yield from (json.loads(line) for line in file if line.endswith(b"\n"))


def cut_events(path: Path, size: int, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Keeps the first `size` bytes of a log and, after them, the whole lines whose event `keep` accepts. Atomic."""
    content = path.read_bytes()
    lines = content[size:].splitlines(keepends=True)
    atomic_write(path, content[:size] + b"".join(line for line in lines if (event := _event(line)) is not None and keep(event)))


def _event(line: bytes) -> dict[str, Any] | None:
    """Returns the event of a line, None for a torn line, terminated or not."""
    try:
        event = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    return event if isinstance(event, dict) else None
