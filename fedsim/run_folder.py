"""The folder of a run: its configuration, manifest, events, checkpoints and results. `fedsim.occupancy` controls who may use it."""

import json
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any, Self

import yaml
from torch import Tensor

from fedsim import checkpoints
from fedsim.checkpoints import NO_BASES, Bases, Checkpoint, DamagedError, Store
from fedsim.config import Config
from fedsim.errors import UserError
from fedsim.events import EventLog, cut_events, read_events
from fedsim.files import LOCK, SUMMARY, TEMPORARY, atomic_write, atomic_write_json, dated_folders
from fedsim.journal import Head, Journal, lines_after
from fedsim.manifest import manifest
from fedsim.occupancy import (
    CHECKPOINTS,
    CONFIG,
    CONTENTS,
    EVENTS,
    JOURNAL,
    MANIFEST,
    Stage,
    clear,
    create_folder,
    lock_folder,
    refuse_foreign,
    refuse_unfit,
    stage_of,
)
from fedsim.plain import to_dict

KEPT_ON_RESUME = ("interrupted", "resumed", "damaged_checkpoint")
"""Events about the run itself, which are kept when the rounds after the last checkpoint are cut off."""


class RunFolder:
    """An open run folder, created by `open` and locked until `close` or the end of the process."""

    def __init__(self, folder: Path, lock: int, keep: int) -> None:
        self.folder = folder
        self.finished_summary: dict[str, Any] | None = None
        """The summary if `resume=true` was given for a finished run, which has nothing left to do."""
        self.superseded: list[dict[str, Any]] = []
        """Journal entries after the checkpoint from which the run resumes."""
        self._lock = lock
        self._log: EventLog | None = None
        self._journal: Journal | None = None
        self._checkpoints = Store(folder / CHECKPOINTS, keep)
        self._writer = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None  # the checkpoint in progress
        self._removable: list[Path] | None = None  # folders created for a new run without a checkpoint yet, innermost first

    @classmethod
    def open(cls, config: Config, now: datetime | None = None, keep: int = 2) -> "RunFolder":
        """Opens the configured folder: a new one, or an existing one with `resume` or `overwrite`.

        A new run takes a missing or empty folder, or one whose run was killed before it began. `resume` continues from the last intact
        checkpoint, or from the start without one, and cuts off later events. The latest `keep` checkpoints are kept.
        Guarantees: no other process uses the folder, and results of an earlier run are not mixed in.
        Raises UserError and changes nothing if the folder is in use, if it holds a finished or interrupted run and neither option was
        given, if it holds other files, or if the configuration on resuming would change the result.
        """
        now = now or datetime.now().astimezone()
        refuse_foreign(config)
        given = Path(config.run_dir) if config.run_dir else None
        made = _missing_folders(given or next(dated_folders(now, config.method.name)).parent)
        folder = given or next(folder for folder in dated_folders(now, config.method.name) if create_folder(folder))
        run = cls(folder, lock_folder(folder), keep)
        try:
            run._prepare(config, now)
        except BaseException:
            run.close()
            raise
        if run._removable is not None:
            run._removable = made if given else [folder, *made]
        return run

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        if kind is not None and issubclass(kind, UserError):
            self._discard()
        self.close()

    def _discard(self) -> None:
        """Removes the files of a run that a UserError ended before its first checkpoint, so that the corrected run can use the folder."""
        if self._removable is None:
            return
        clear(self.folder)
        (self.folder / LOCK).unlink(missing_ok=True)
        for folder in self._removable:
            with suppress(OSError):  # it holds other files
                folder.rmdir()

    def close(self) -> None:
        """Waits for the checkpoint in progress and releases the folder. May be called twice."""
        self._writer.shutdown()
        log, journal, lock = self._log, self._journal, self._lock
        self._log, self._journal, self._lock = None, None, -1
        with ExitStack() as closing:  # in reverse order; the lock is released whatever fails
            if lock >= 0:
                closing.callback(os.close, lock)
            for each in (journal, log):
                if each:
                    closing.callback(each.close)

    def path(self, name: str) -> Path:
        """Returns the path of `name` and creates its parent folder. Raises ValueError unless its first part is in CONTENTS."""
        if Path(name).parts[0] not in CONTENTS:
            raise ValueError(f"Expected a name that begins with one of {', '.join(CONTENTS)}, got {name!r}. Add it to CONTENTS.")
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def write_bytes(self, name: str, content: bytes) -> Path:
        """Writes a whole file atomically."""
        path = self.path(name)
        atomic_write(path, content)
        return path

    def write_json(self, name: str, value: Any) -> Path:
        """Writes a whole JSON file atomically."""
        path = self.path(name)
        atomic_write_json(path, value)
        return path

    def event(self, kind: str, **facts: Any) -> None:
        """Appends one line {time, kind, facts...} to events.jsonl, in one write: a kill leaves at most one torn last line."""
        if not self._log:
            raise ValueError(f"Expected an open run folder for the event {kind!r}, but {self.folder} is closed or finished.")
        self._log.append(kind, facts)

    def record(self, kind: str, **facts: Any) -> Head:
        """Appends one line to journal.jsonl, the audit log, and returns its head."""
        if not self._journal:
            raise ValueError(f"Expected an open run folder to record {kind!r}, but {self.folder} is closed or finished.")
        self._journal.append(kind, **facts)
        return self._journal.head

    def events(self) -> Iterator[dict[str, Any]]:
        """Yields all whole events so far, in order."""
        return read_events(self.folder / EVENTS)

    def save_checkpoint(self, round_: int, tensors: dict[str, Tensor], state: dict[str, Any], bases: Bases = NO_BASES) -> None:
        """Saves the state after `round_`, with an event "checkpoint", and returns while it is being written; `settle` waits for it.

        The tensors in `bases` are written only when they have changed. At most one checkpoint is in progress: this call waits for the
        previous one and raises its error. The checkpoint stores the size of the event log; `resume` cuts the log there, so that repeated
        rounds are logged once.
        """
        self.settle()
        self.event("checkpoint", round=round_)
        log, journal = self._log, self._journal
        assert log is not None  # `event` has checked it
        assert journal is not None
        state = {"state": state, "events_size": log.size, "journal": journal.head.to_json()}
        write = self._checkpoints.writing(Checkpoint(round_, tensors, state, bases))

        def durably() -> None:
            log.sync()  # a checkpoint must never be ahead of the lines that it refers to
            journal.sync()
            write()

        self._writing, self._removable = self._writer.submit(durably), None

    def settle(self) -> None:
        """Waits until the last checkpoint is durable. Raises its error if writing failed."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def settle_all(self) -> None:
        """Waits until the last checkpoint and all lines of events and journal are durable."""
        self.settle()
        for log in (self._log, self._journal):
            if log:
                log.sync()

    def last_checkpoint(self) -> Checkpoint | None:
        """Returns the latest intact checkpoint. Renames damaged ones to *.damaged, with an event, and takes the previous one."""
        self.settle()
        found = self._last_intact_checkpoint()
        return replace(found, state=found.state["state"]) if found else None

    def finish(self, summary: dict[str, Any]) -> None:
        """Writes summary.json, which marks the run as finished, after everything it names is durable. Call it last."""
        self.settle_all()
        self.write_json(SUMMARY, summary)

    def _prepare(self, config: Config, now: datetime) -> None:
        """Begins or resumes the run, under the lock."""
        stage = stage_of(self.folder)  # again: another process may have changed it before the lock was taken
        resumed = config.resume and stage is not Stage.free
        refuse_unfit(self.folder, stage, config)
        if resumed and stage is Stage.finished:
            self.finished_summary = json.loads((self.folder / SUMMARY).read_bytes())
            return
        if resumed:
            self._resume(config, now)
        else:
            self._begin(config, now)

    def _begin(self, config: Config, now: datetime) -> None:
        clear(self.folder)
        atomic_write_json(self.folder / MANIFEST, manifest(config.seed, now))
        atomic_write(self.folder / CONFIG, yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True).encode())
        self._log, self._journal = EventLog(self.folder / EVENTS), Journal(self.folder / JOURNAL)
        self._removable = []

    def _resume(self, config: Config, now: datetime) -> None:
        """Cuts off the events after the last checkpoint and adds this session to the manifest, since versions may have changed."""
        for leftover in self.folder.rglob(TEMPORARY):
            leftover.unlink()
        self._log = EventLog(self.folder / EVENTS)
        checkpoint = self._last_intact_checkpoint()
        self._log.close()
        self._log = None
        size = checkpoint.state["events_size"] if checkpoint else 0
        cut_events(self.folder / EVENTS, size, lambda event: event["kind"] in KEPT_ON_RESUME)
        self._log, self._journal = EventLog(self.folder / EVENTS), Journal(self.folder / JOURNAL)
        lines = checkpoint.state.get("journal", self._journal.head.to_json())["lines"] if checkpoint else 0
        self.superseded = lines_after(self.folder / JOURNAL, lines)
        self.record("resumed", round=checkpoint.round if checkpoint else None, goes_on_from=lines)
        facts = json.loads((self.folder / MANIFEST).read_bytes())
        facts.setdefault("resumed", []).append(manifest(config.seed, now))
        atomic_write_json(self.folder / MANIFEST, facts)

    def _last_intact_checkpoint(self) -> Checkpoint | None:
        for path in reversed(checkpoints.saved(self.folder / CHECKPOINTS)):
            try:
                return checkpoints.load(path)
            except DamagedError as error:
                path.rename(path.with_name(path.name + ".damaged"))
                self.event("damaged_checkpoint", reason=str(error))
        return None


def _missing_folders(folder: Path) -> list[Path]:
    """Returns the folder and those of its parents that do not exist, innermost first."""
    return [each for each in (folder, *folder.parents) if not each.exists()]
