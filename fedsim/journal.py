"""journal.jsonl: the audit log of a run. Records who joined, what was requested, refused, accepted and released, and its privacy cost.

Append-only: each line holds the SHA-256 of the previous line, so that changing, removing, adding or moving a line breaks the chain (Haber
and Stornetta 1991). The head, which fixes all lines up to it, is also in every checkpoint and in summary.json; it reveals lines missing at
the end and a rebuilt chain. The last line of a finished run holds its summary. No key is involved: rebuilding the chain together with the
heads in checkpoints and summary.json shows only against a head stored elsewhere. A resumed run removes nothing: its line `resumed` names
the line from which it continues; the lines in between are superseded but remain.
"""

import hashlib
import json
import os
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any

from fedsim.events import append
from fedsim.files import finite

FIRST = "0" * 64
"""The previous hash in the first line."""


@dataclass(frozen=True)
class Head:
    """The number of lines so far and the SHA-256 of the last one."""

    lines: int = 0
    sha256: str = FIRST

    def to_json(self) -> dict[str, Any]:
        """Returns {lines, sha256}."""
        return {"lines": self.lines, "sha256": self.sha256}

    @classmethod
    def from_json(cls, value: Any) -> "Head":
        """Returns the head from the value of `to_json`. Raises ValueError for anything else."""
        if not isinstance(value, dict) or set(value) != {"lines", "sha256"} or type(value["lines"]) is not int:
            raise ValueError(f"Expected lines and sha256, got {value!r:.60}.")
        return cls(value["lines"], str(value["sha256"]))

    def after(self, line: bytes) -> "Head":
        """Returns the head after one more line, given without its newline."""
        return Head(self.lines + 1, hashlib.sha256(line).hexdigest())


class Journal:
    """The open journal of a run, written by one process. It continues an existing file, even if a kill has torn the last line."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        self.head = Head()
        for line, whole in [*_lines(path)]:  # read before anything is written
            self.head = self.head.after(line)
            if not whole:
                os.write(self._descriptor, b"\n")

    def append(self, kind: str, **facts: Any) -> None:
        """Appends {line, previous, time, kind, facts...} in one write."""
        head = {"line": self.head.lines + 1, "previous": self.head.sha256}
        entry = {**head, "time": datetime.now(UTC).isoformat(timespec="milliseconds"), "kind": kind, **facts}
        line = json.dumps(finite(entry)).encode()
        append(self._descriptor, line + b"\n")
        self.head = self.head.after(line)

    def sync(self) -> None:
        """Makes all lines so far durable."""
        os.fsync(self._descriptor)

    def close(self) -> None:
        """Closes the file; nothing is buffered."""
        os.close(self._descriptor)


@dataclass
class Verdict:
    """The result of `verified`: whether the chain is intact, and where it is broken."""

    head: Head = field(default_factory=Head)
    superseded: int = 0  # lines, each counted once, after the checkpoint from which a run was resumed
    finished: bool = False  # whether a summary fixes the end; if not, lines missing after the last checkpoint go unnoticed
    problems: list[str] = field(default_factory=list)


def verified(path: Path, checkpoints: dict[str, Head], end: Head | None) -> Verdict:
    """Checks every line of the journal against the previous one, and the heads in `checkpoints` (by name) and in its summary (`end`).

    Finds changed, deleted, inserted and reordered lines and a missing end, provided that the given heads are those that the run wrote. In
    a run without a summary, a missing end is found up to its last checkpoint.
    """
    verdict, hashes, torn = Verdict(finished=end is not None), {0: FIRST}, 0
    standing: list[int] = []  # numbers of the lines that no resumption has superseded, ascending
    for line, whole in _lines(path):
        number = verdict.head.lines + 1
        entry = _entry(line) if whole else None
        if entry is None:
            torn = torn or number
        else:
            verdict.problems += _chain_problems(entry, number, verdict.head, torn)
            torn = 0
            if entry.get("kind") == "resumed":
                from_line = entry.get("goes_on_from", number - 1)
                if type(from_line) is int and 0 <= from_line < number:
                    kept = bisect_right(standing, from_line)
                    verdict.superseded += len(standing) - kept
                    del standing[kept:]
                else:
                    verdict.problems.append(f"line {number} continues from {from_line!r:.20}, which is not an earlier line")
        standing.append(number)
        verdict.head = verdict.head.after(line)
        hashes[number] = verdict.head.sha256
    if torn and (torn < verdict.head.lines or end is not None):
        verdict.problems.append(f"line {torn} cannot be read")
    verdict.problems += _head_problems(checkpoints, end, hashes, verdict.head)
    return verdict


def lines_after(path: Path, number: int) -> list[dict[str, Any]]:
    """Returns the readable entries after line `number`."""
    entries = [_entry(line) for line, whole in islice(_lines(path), number, None) if whole]
    return [entry for entry in entries if entry is not None]


def _chain_problems(entry: dict[str, Any], number: int, before: Head, torn: int) -> Iterator[str]:
    if entry.get("line") != number:
        yield f"line {number} says that it is line {entry.get('line')!r:.20}: lines were removed, added or moved before it"
    if entry.get("previous") != before.sha256:
        yield f"line {number} does not follow line {number - 1}: one of them was changed, or something was removed, added or moved there"
    if torn and entry.get("kind") != "resumed":
        yield f"line {torn} cannot be read, and no run was resumed after it"


def _head_problems(checkpoints: dict[str, Head], end: Head | None, hashes: dict[int, str], head: Head) -> Iterator[str]:
    for name, fixed in checkpoints.items():
        if fixed.lines > head.lines:
            yield f"{name} fixes {fixed.lines} lines, but the journal has {head.lines}: its end is missing"
        elif hashes[fixed.lines] != fixed.sha256:
            yield f"{name} fixes another line {fixed.lines}: that line, or one before it, was changed"
    if end is not None and end != head:
        yield f"summary.json fixes {end.lines} lines, {end.sha256[:16]}..., but the journal has {head.lines}, {head.sha256[:16]}..."


def _lines(path: Path) -> Iterator[tuple[bytes, bool]]:
    """Yields each line without its newline, and whether it has one."""
    if path.exists():
        with open(path, "rb") as file:
            for line in file:
                yield line.removesuffix(b"\n"), line.endswith(b"\n")


def _entry(line: bytes) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return entry if isinstance(entry, dict) else None
