"""Section e: how long one waits: for the help, and for the first training step of a run."""

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from experiments.benchmarks.processes import ROOT, answer, asked, call
from experiments.benchmarks.suite import Case, Column, Found, Section, Settings

HELP, STEP, STEP_SEEDED = "fedsim --help", "first step", "first step, bases from a seed"


def cases(settings: Settings) -> list[Case]:
    """Returns what is waited for in every row."""
    return [{"what": HELP}, {"what": STEP_SEEDED}] if settings.quick else [{"what": what} for what in (HELP, STEP, STEP_SEEDED)]


def measure(case: Case, settings: Settings) -> Found:
    """Returns the median over processes of their own."""
    one = _help if case["what"] == HELP else lambda: _first_step(case["what"] == STEP_SEEDED)
    return {"seconds": statistics.median(one() for _ in range(2 if settings.quick else 5 if case["what"] == HELP else 3))}


def _help() -> float:
    begun = time.perf_counter()
    program = "import sys; from fedsim.cli.main import main; sys.exit(main(['--help']))"
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, cwd=ROOT)
    assert b"fedsim run" in done.stdout
    return time.perf_counter() - begun


def _first_step(seeded: bool) -> float:
    begun = time.time()
    return float(call("experiments.benchmarks.startup", {"seeded": seeded})["time"]) - begun


def run_to_first_step(seeded: bool) -> float:
    """Begins the default experiment, with one test question, and returns the clock's time when the first pass has been trained."""
    from fedsim.cli.main import main
    from fedsim.flower import worker

    train = worker.train_clients

    def stopping(session, *arguments, **options):  # type: ignore[no-untyped-def]
        def stop(facts):  # type: ignore[no-untyped-def]
            raise _FirstPassError(time.time())

        session.on_pass = stop
        return train(session, *arguments, **options)

    worker.train_clients = stopping
    with tempfile.TemporaryDirectory() as folder:
        words = ["run", f"run_dir={Path(folder) / 'run'}", "data.test_examples=1", "evaluation.max_new_tokens=1"]
        try:
            main([*words, "adapter.init=orthogonal"] if seeded else words)
        except _FirstPassError as reached:
            return float(reached.args[0])
    raise RuntimeError("Expected the run to come to a training step, but it ended before.")


class _FirstPassError(Exception):
    """The first pass has been trained; the argument is when."""


SECTION = Section(
    "e",
    "Start-up",
    "Seconds from the start of the process, median: the whole help, and the default experiment (25 clients) up to the "
    "end of its first forward and "
    "backward pass, with the initial gradients of LoRA-SB or with bases from the seed; the base model's evaluation is cut to one token.",
    (Column("", "what"), Column("seconds", "seconds", "{:.2f}")),
    cases,
    measure,
)

if __name__ == "__main__":
    answer({"time": run_to_first_step(**asked())})
