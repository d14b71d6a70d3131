"""A sweep: runs every combination of the given values, each in its own folder, and ends with one table and picture.

Hydra expands the values and launches the jobs (basic or joblib). All jobs are composed and checked before the first starts. The sweep's
folder records them in sweep.json, so that `resume=true` can continue with the unfinished jobs.
"""

import contextlib
import json
import os
import re
import shlex
import sys
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from hydra._internal.callbacks import Callbacks  # launchers require it, and no public API makes one
from hydra._internal.core_plugins.basic_sweeper import (
    BasicSweeper,
)  # only its expansion; its own `sweep` writes files and stops at a failure
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig

from fedsim.cli.calling import program
from fedsim.cli.compose import compose_with_hydra, initialized, to_config
from fedsim.cli.overrides import parse, quote, swept
from fedsim.cli.sweep_table import seeds_table, sweep_table
from fedsim.config import Config
from fedsim.config_check import check
from fedsim.errors import RunStopped, UserError
from fedsim.events import read_events
from fedsim.files import LOCK, SUMMARY, atomic_write, atomic_write_json, dated_folders
from fedsim.plain import affecting_results, to_dict

SWEEP, PICTURE = "sweep.json", "comparison.png"


@dataclass
class Job:
    """One combination: the overrides that distinguish it, all its overrides, and its outcome."""

    number: int
    varied: list[str]
    overrides: list[str]
    folder: Path
    config: Config = field(default_factory=Config)
    status: str = "not started"
    error: str | None = None
    summary: dict[str, Any] | None = None

    @property
    def label(self) -> str:
        """The job's name in the picture. Jobs that differ only in their seed share it, unless only the seed varies."""
        words = [word for word in self.varied if not word.startswith("seed=")] or self.varied
        return words[0].partition("=")[2] if len(words) == 1 else " ".join(words)


def is_sweep(overrides: list[str]) -> bool:
    """Returns whether the chosen preset is a sweep (`hydra.mode: MULTIRUN`), to which `overrides` may add values."""
    single = [override for override in parse(overrides) if not override.is_sweep_override()]
    if not any(override.key_or_group in ("experiment", "hydra.mode") for override in single):
        return False  # several values without --multirun are a mistake, which `compose` explains
    with initialized():
        return compose_with_hydra([str(override.input_line) for override in single]).hydra.mode == RunMode.MULTIRUN


def sweep(overrides: list[str]) -> int:
    """Runs all jobs, prints their table, writes sweep.json and, if two or more jobs finished, comparison.png.

    Returns 0, 1 if a job failed, or 130 after Ctrl-C. A failed job does not stop the others. Raises UserError, before anything is written,
    if a job does not compose, contradicts itself or fails `fedsim.session.check`, or if the folder holds something else.
    """
    with initialized():
        master, jobs, options = plan(overrides)
        folder = _folder(options)
        _place(jobs, folder, options)
        _refuse_occupied(folder, jobs, options)
        _check([job for job in jobs if not _is_done(job)])
        folder.mkdir(parents=True, exist_ok=True)
        if not options.resume:
            _remove_former(folder, jobs)
        _save(folder, jobs)
        code = _launch(master, jobs)
    _save(folder, jobs)
    plain = [asdict(job) for job in jobs]
    print("\n", "\n\n".join(filter(None, (sweep_table(plain), seeds_table(plain), str(folder / SWEEP)))), sep="")
    _draw(folder, jobs)
    if code == 130:
        again = [word for word in overrides if not word.startswith(("resume=", "overwrite="))]
        again += [] if options.run_dir else [f"run_dir={folder}"]
        print(f"Go on with: {program()} run --multirun {shlex.join([*again, 'resume=true'])}")
    return code


def plan(overrides: list[str]) -> tuple[DictConfig, list[Job], Config]:
    """Returns Hydra's configuration for the launcher, the jobs without folders, and the sweep's run_dir, resume and overwrite."""
    parsed = parse(overrides)
    several = swept(parsed)
    own = [o for o in parsed if o.key_or_group in ("run_dir", "resume", "overwrite")]
    for override in several:
        if override in own or override.is_hydra_override():
            raise UserError(f"Expected one value of {override.key_or_group} for the whole sweep, got {override.input_line!r}. Give one.")
    master = compose_with_hydra([str(o.input_line) for o in parsed if o not in several])
    options = to_config(compose_with_hydra([str(o.input_line) for o in own]))
    params = parse([f"{key}={value}" for key, value in (master.hydra.sweeper.params or {}).items()])
    task = params + [o for o in parsed if o not in own and not o.is_hydra_override()]
    return master, _expand(task), options


def _expand(overrides: list[Override]) -> list[Job]:
    """Returns a job for each combination, in Hydra's order: the last option varies fastest."""
    varied = {o.get_key_element() for o in overrides if o.is_sweep_override()}
    combinations = BasicSweeper.split_arguments(overrides, None)[0]
    differing = [[word for word in words if word.partition("=")[0] in varied] for words in combinations]
    return [Job(i, mine, words, Path()) for i, (mine, words) in enumerate(zip(differing, combinations, strict=True))]


def _folder(options: Config) -> Path:
    if options.run_dir is not None:
        return Path(options.run_dir)
    return next(folder for folder in dated_folders(datetime.now().astimezone(), "multirun") if not folder.exists())


def _place(jobs: list[Job], folder: Path, options: Config) -> None:
    """Gives every job its folder and its checked configuration. With resume=true, jobs that have begun are resumed."""
    for job in jobs:
        name = re.sub(r"[^\w.,=+-]+", "_", ",".join(job.varied))[:120]
        job.folder = folder / (f"{job.number}-{name}" if name else str(job.number))
        resume = options.resume and (job.folder / LOCK).exists()
        job.overrides += [f"run_dir={quote(str(job.folder))}", f"resume={resume}", f"overwrite={options.overwrite}"]
        job.config = to_config(compose_with_hydra(job.overrides))
        with _attributed_to(job):
            check(job.config)
            _refuse_deployed(job.config)


def _check(jobs: list[Job]) -> None:
    """Raises UserError for the first job whose run would be refused before anything is loaded."""
    from fedsim.session import check as check_session

    for job in jobs:
        with _attributed_to(job):
            check_session(job.config)


@contextlib.contextmanager
def _attributed_to(job: Job) -> Iterator[None]:
    """Prefixes a UserError of the block with the job that it is about."""
    try:
        yield
    except UserError as error:
        raise UserError(f"job {job.number} ({' '.join(job.varied)}): {error}") from None


def _refuse_deployed(config: Config) -> None:
    if config.engine.name == "deployment":
        raise UserError(
            "Expected a simulation in a sweep, got engine=deployment, whose run folders lie at the server. Give one run at a time."
        )


def _refuse_occupied(folder: Path, jobs: list[Job], options: Config) -> None:
    if options.resume and options.overwrite:
        raise UserError(
            "Expected resume=true or overwrite=true, got both. Resume continues the sweep, overwrite starts it again: remove one."
        )
    begun = (folder / SWEEP).is_file()
    if options.resume and not begun:
        raise UserError(f"Expected run_dir to name a sweep to go on with, got {options.run_dir}, which holds none. Give its folder.")
    if options.resume:
        before = [affecting_results(job["config"]) for job in json.loads((folder / SWEEP).read_bytes())["jobs"]]
        if before != [affecting_results(to_dict(job.config)) for job in jobs]:
            raise UserError(
                f"Expected the options with which the sweep in {folder} was begun, got others. Give the same, or another run_dir=."
            )
    elif begun and not options.overwrite:
        raise UserError(f"Expected a free folder, but {folder} holds a sweep. Add resume=true or overwrite=true, or give another run_dir=.")
    elif not begun and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"Expected {folder} to be a sweep, empty or missing, but it holds something else. Give another run_dir=.")


def _remove_former(folder: Path, jobs: list[Job]) -> None:
    """Removes an overwritten sweep's runs and logs whose names no new job has; other files stay."""
    from fedsim.occupancy import remove

    former = json.loads((folder / SWEEP).read_bytes())["jobs"] if (folder / SWEEP).is_file() else []
    for name in sorted({job["folder"] for job in former} - {job.folder.name for job in jobs}):
        if (folder / name / LOCK).is_file():
            remove(folder / name)
        (folder / f"{name}.log").unlink(missing_ok=True)


def _launch(master: DictConfig, jobs: list[Job]) -> int:
    """Launches the unfinished jobs, records the outcome in every job, and returns the exit code."""
    stamps = {job.number: _stamp(job) for job in jobs}
    waiting = [job for job in jobs if not _is_done(job)]
    code, outcomes = 0, dict.fromkeys((job.number for job in waiting), None)
    try:
        with warnings.catch_warnings():  # joblib replaces worker processes whose memory has grown, and warns that it did
            warnings.filterwarnings("ignore", message="A worker stopped while some jobs were given to the executor")
            returned = _launcher(master, len(jobs)).launch([job.overrides for job in waiting], initial_job_idx=0) if waiting else []
        outcomes = {job.number: value.return_value for job, value in zip(waiting, returned, strict=True)}
    except KeyboardInterrupt:
        code = 130
    except Exception:  # a worker process that dies, such as for lack of memory, takes the launcher with it
        traceback.print_exc()
        outcomes = dict.fromkeys(outcomes, "a worker process stopped, see above")
    for job in jobs:
        _record(job, outcomes.get(job.number), finished=job not in waiting or _stamp(job) not in (None, stamps[job.number]))
    return code or int(any(job.status == "failed" for job in jobs))


def _is_done(job: Job) -> bool:
    """Returns whether a resumed sweep skips the job."""
    return job.config.resume and _stamp(job) is not None


def _stamp(job: Job) -> int | None:
    """Returns when the job's summary was written, None if there is none: an older one belongs to a run being overwritten."""
    path = job.folder / SUMMARY
    return path.stat().st_mtime_ns if path.is_file() else None


def _record(job: Job, error: str | None, finished: bool) -> None:
    if finished:
        job.status, job.summary = "finished", json.loads((job.folder / SUMMARY).read_bytes())
    elif error is not None:
        job.status, job.error = "failed", error
    elif (job.folder / LOCK).exists():
        job.status = "interrupted"


def _launcher(master: DictConfig, count: int) -> Any:
    context = HydraContext(config_loader=GlobalHydra.instance().config_loader(), callbacks=Callbacks())
    return Plugins.instance().instantiate_launcher(context, partial(_run_job, os.getpid(), count), master)


def _run_job(main_process: int, count: int, composed: DictConfig) -> str | None:
    """Runs one job, in this process or in a worker process, and returns the reason if it failed."""
    config = to_config(composed)
    folder = Path(str(config.run_dir))
    heading = f"job {folder.name} (of {count})"
    if os.getpid() == main_process:
        print(f"\n{heading}", flush=True)
        return _outcome(config)
    # Several jobs would overwrite each other's displays on one terminal.
    log = folder.with_name(f"{folder.name}.log")
    print(f"{heading}: started, log in {log}", flush=True)
    with open(log, "a", buffering=1) as stream, contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
        error = _outcome(config)
    print(f"{heading}: {error or 'finished'}", flush=True)
    return error


def _outcome(config: Config) -> str | None:
    try:
        from fedsim.experiment import run

        run(config)
    except (UserError, RunStopped) as error:
        print(f"fedsim: {error}", file=sys.stderr)
        return str(error)
    except Exception as error:
        traceback.print_exc()
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    return None


def _draw(folder: Path, jobs: list[Job]) -> None:
    """Draws the finished jobs if there are at least two. Reports jobs that cannot be drawn instead of raising."""
    (folder / PICTURE).unlink(missing_ok=True)
    finished = [job for job in jobs if job.summary is not None]
    if len(finished) < 2:
        return
    from fedsim.comparison import Finished, comparison_png
    from fedsim.occupancy import EVENTS

    try:
        shown = [Finished(job.label, list(read_events(job.folder / EVENTS)), job.summary or {}) for job in finished]
        atomic_write(folder / PICTURE, comparison_png(shown))
    except (OSError, ValueError, KeyError) as error:  # a full disk, a damaged log
        print(f"fedsim: {folder / PICTURE}: not drawn: {error}", file=sys.stderr)
    else:
        print(folder / PICTURE)


def _save(folder: Path, jobs: list[Job]) -> None:
    plain = [asdict(replace(job, config=Config())) | {"folder": job.folder.name, "config": to_dict(job.config)} for job in jobs]
    atomic_write_json(folder / SWEEP, {"jobs": plain})
