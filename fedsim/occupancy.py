"""Controls who may use a run folder: inspects its contents, locks it and clears it.

The contents show how far a run got, whenever it was killed: config.yaml is the last file written at the start of a run, summary.json the
last one at its end. A lock that ends with its process shows whether the run is still active.
"""

import fcntl
import os
import shutil
import time
from contextlib import suppress
from enum import Enum
from pathlib import Path

import yaml

from fedsim.config import Config
from fedsim.errors import UserError
from fedsim.files import LOCK, SUMMARY, TEMPORARY
from fedsim.plain import affecting_results, flat, option_text, to_dict
from fedsim.report import PICTURES

CONFIG = "config.yaml"
MANIFEST = "manifest.json"
EVENTS = "events.jsonl"
JOURNAL = "journal.jsonl"
CHECKPOINTS = "checkpoints"
NOISE_KEY = "noise.key"
TRANSFERS = "communication.csv"
CONTENTS = (
    *(LOCK, CONFIG, MANIFEST, EVENTS, JOURNAL, CHECKPOINTS, SUMMARY, NOISE_KEY),
    *("adapter", "audit.json", TRANSFERS, "holdings.txt"),
    *PICTURES,
)
"""Everything that a run folder may hold. `overwrite` removes nothing else, and refuses a folder that holds anything else."""


class Stage(Enum):
    free = "does not exist or is empty, or nothing but a lock was written"
    foreign = "holds something else"
    interrupted = "holds a run that has not finished"
    finished = "holds a finished run"


def check(config: Config) -> None:
    """Raises UserError if the configured folder visibly cannot be used for the run; does not take it."""
    refuse_foreign(config)
    if config.run_dir is None:
        return
    folder = Path(config.run_dir)
    if (folder / LOCK).exists():
        os.close(_acquire_lock(folder))  # raises if another process holds it
    refuse_unfit(folder, stage_of(folder), config)


def remove(folder: Path) -> None:
    """Removes a run, and its folder if it holds nothing else. Raises UserError if a process uses the folder."""
    lock = _acquire_lock(folder)
    try:
        clear(folder)
        (folder / LOCK).unlink()
        with suppress(OSError):  # it holds other files
            folder.rmdir()
    finally:
        os.close(lock)


def refuse_unfit(folder: Path, stage: Stage, config: Config) -> None:
    """Raises UserError if the folder holds a run that is neither resumed with the same configuration nor overwritten."""
    if config.resume and stage is not Stage.free:
        _refuse_other_configuration(folder, config)
    elif not config.overwrite:
        _refuse_occupied(folder, stage)


def stage_of(folder: Path) -> Stage:
    """Returns the stage of a folder. Unless its lock is held, the stage may change at any time."""
    if not folder.is_dir():
        return Stage.foreign if folder.exists() else Stage.free
    names = {entry.name if _is_ours(entry) else None for entry in folder.iterdir()}
    if names and (LOCK not in names or None in names):
        return Stage.foreign
    if CONFIG not in names:
        return Stage.free
    return Stage.finished if SUMMARY in names else Stage.interrupted


def refuse_foreign(config: Config) -> None:
    """Raises UserError if the configured folder holds anything that no run has written, or no run to resume."""
    folder = Path(config.run_dir) if config.run_dir else None
    if config.resume and (folder is None or stage_of(folder) is Stage.foreign or not (folder / LOCK).exists()):
        raise UserError(f"Expected run_dir= to name the interrupted run to resume, got {folder or 'none'}. Give the folder of that run.")
    if folder is None or stage_of(folder) is not Stage.foreign:
        return
    others = sorted(entry.name for entry in folder.iterdir() if not _is_ours(entry)) if folder.is_dir() else []
    what = f"other files ({others[0]!r})" if others else "something else"
    raise UserError(
        f"Expected {folder} to be a run folder, empty or missing, but it holds {what}. Move that away or choose another run_dir=."
    )


def _refuse_occupied(folder: Path, stage: Stage) -> None:
    if stage is Stage.interrupted:
        raise UserError(
            f"Expected a free run folder, but {folder} holds an interrupted run. "
            "Go on with resume=true, replace it with overwrite=true, or choose another run_dir=."
        )
    if stage is Stage.finished:
        raise UserError(
            f"Expected a free run folder, but {folder} holds a finished run. Replace it with overwrite=true or choose another run_dir=."
        )


def _refuse_other_configuration(folder: Path, config: Config) -> None:
    try:
        before = flat(affecting_results(yaml.safe_load((folder / CONFIG).read_bytes())))
    except (yaml.YAMLError, UnicodeDecodeError, AttributeError):
        raise UserError(
            f"Expected {folder / CONFIG} as the run wrote it, but it is no such file. Put it back, or use overwrite=true."
        ) from None
    now = flat(affecting_results(to_dict(config)))
    keys = [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]
    differing = [f"{key}={option_text(now.get(key))} (run: {option_text(before.get(key))})" for key in keys]
    if differing:
        raise UserError(
            f"Expected the configuration with which {folder} was begun, got {', '.join(differing)}. "
            "Give the same options to resume it, or choose another run_dir=."
        )


def create_folder(folder: Path) -> bool:
    """Creates a folder and its parents; returns False if it exists already. Raises UserError if it cannot be created."""
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        return False
    except OSError as error:
        raise UserError(f"Expected to write in {folder}, but: {error.strerror}. Choose another run_dir=.") from error
    return True


def _try_lock(lock: int) -> bool:
    """Tries to take the lock for a second: Linux may release a killed process's lock a moment after the process is gone."""
    for pause in (0.0, *[0.1] * 10):
        time.sleep(pause)
        with suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
    return False


def lock_folder(folder: Path) -> int:
    """Creates the folder if needed and returns the descriptor that holds its lock, released when the process ends in any way."""
    create_folder(folder)
    lock = _acquire_lock(folder)
    os.ftruncate(lock, 0)
    os.pwrite(lock, f"process {os.getpid()} on {os.uname().nodename}\n".encode(), 0)
    return lock


def _acquire_lock(folder: Path) -> int:
    """Takes the lock of a folder and returns its descriptor. Raises UserError if another process holds it."""
    try:
        lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(f"Expected to write in {folder}, but: {error.strerror}. Choose another run_dir=.") from error
    if not _try_lock(lock):
        owner = os.read(lock, 100).decode().strip()
        os.close(lock)
        raise UserError(f"Expected a free run folder, but {folder} is in use by {owner}. Wait for it or choose another run_dir=.")
    return lock


def clear(folder: Path) -> None:
    """Removes what an earlier run wrote, config.yaml first, so that a kill midway leaves a folder in which no run has begun."""
    (folder / CONFIG).unlink(missing_ok=True)
    for entry in folder.iterdir():
        if entry.name == LOCK or not _is_ours(entry):
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _is_ours(entry: Path) -> bool:
    return entry.name in CONTENTS or entry.match(TEMPORARY)
