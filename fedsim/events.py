"""events.jsonl: what happened in a run, one line per event, in order."""

import json
import os
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedsim.files import atomic_write, finite


def append(descriptor: int, line: bytes) -> None:
    """Writes a whole line at the end of a file, in one write. Raises OSError if only a part of it found room."""
    written = os.write(descriptor, line)
    if written < len(line):  # the disk is full: the rest tells why
        os.write(descriptor, line[written:])


class EventLog:
    """The open log of a run: one process writes it, anyone may read it meanwhile. A line cut short by a kill is ended first."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        if self.size and os.pread(self._descriptor, 1, self.size - 1) != b"\n":
            append(self._descriptor, b"\n")

    def append(self, kind: str, facts: dict[str, Any]) -> None:
        """Appends {time, kind, facts...} in one write: a kill leaves at most one torn last line. Costs some ten microseconds."""
        event = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "kind": kind, **facts}
        try:
            text = json.dumps(event, allow_nan=False)
        except ValueError:  # a loss that has become NaN, for which JSON has no word
            text = json.dumps(finite(event))
        append(self._descriptor, text.encode() + b"\n")

    @property
    def size(self) -> int:
        """Bytes of the log so far."""
        return os.fstat(self._descriptor).st_size

    def sync(self) -> None:
        """Makes all events so far durable."""
        os.fsync(self._descriptor)

    def close(self) -> None:
        """Closes the file; nothing is buffered."""
        os.close(self._descriptor)


def read_events(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the events of a log, none if it does not exist; a torn last line is left out. Raises ValueError for any other damage."""
    if path.exists():
        with open(path, "rb") as file:
            yield from (json.loads(line) for line in file if line.endswith(b"\n"))


def cut_events(path: Path, size: int, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Keeps the first `size` bytes of a log and, of the whole lines after them, those that `keep` wants; no torn one. Atomic."""
    content = path.read_bytes()
    lines = content[size:].splitlines(keepends=True)
    atomic_write(path, content[:size] + b"".join(line for line in lines if (event := _event(line)) is not None and keep(event)))


def _event(line: bytes) -> dict[str, Any] | None:
    """Returns the event of a line, None for a torn one, ended or not."""
    try:
        event = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    return event if isinstance(event, dict) else None
