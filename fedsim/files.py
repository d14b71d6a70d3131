"""Atomic file writes: content goes to a temporary file in the same folder, which is then renamed to its target."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO

LOCK, SUMMARY = "run.lock", "summary.json"
"""Files of a run folder: the first exists once a process has taken the folder, the second once the run has finished."""

TEMPORARY = ".*.fedsim-tmp"
"""Pattern of the names from `temporary`; a kill may leave such files behind."""


def temporary(path: Path) -> Path:
    """Returns the path, in the same folder, of the file that becomes `path` once it is complete."""
    return path.with_name(f".{path.name}.{os.getpid()}.fedsim-tmp")


@contextmanager
def atomically(path: Path, mode: int = 0o666) -> Iterator[BinaryIO]:
    """Yields an open file whose content durably becomes that of `path` when the block ends.

    Guarantees: at any time, even after a kill or a power cut, `path` holds its old content or all of the new, and never has more
    permissions than `mode` less the process's umask. A block that raises changes nothing. The folder must exist.
    """
    new = temporary(path)
    try:
        with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def atomic_write(path: Path, *content: bytes | memoryview, mode: int = 0o666) -> None:
    """Replaces the content of `path` by the concatenated parts of `content`, with the guarantees of `atomically`."""
    with atomically(path, mode) as file:
        file.writelines(content)


def atomic_write_json(path: Path, value: Any, mode: int = 0o666) -> None:
    """Writes `value` as indented JSON; NaN and infinities, which JSON lacks, become null."""
    atomic_write(path, (json.dumps(finite(value), indent=2) + "\n").encode(), mode=mode)


def finite(value: Any) -> Any:
    """Returns `value` with None for every float that JSON cannot hold."""
    if isinstance(value, float):
        return value if abs(value) < float("inf") else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value


def cache_folder() -> Path:
    """Returns fedsim's folder in $XDG_CACHE_HOME or ~/.cache, for files that can be recreated."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fedsim"


def dated_folders(now: datetime, name: str) -> Iterator[Path]:
    """Yields runs/<date>/<time>-<name>, then the same with -2, -3, ... for runs that start in the same second; creates no folder."""
    first = Path(now.strftime(f"runs/%Y-%m-%d/%H-%M-%S-{name}"))
    yield first
    yield from (first.with_name(f"{first.name}-{number}") for number in count(2))


def sync_folder(folder: Path) -> None:
    """Makes the names in `folder` durable, of created or renamed files and of folders."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
