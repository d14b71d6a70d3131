"""Section e: the waiting time for the help, for the first training step of a run, and for the tokens of many examples."""

import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from experiments.benchmarks.processes import ROOT, answer, asked, call
from experiments.benchmarks.suite import Case, Column, Found, Section, Settings

HELP, STEP, STEP_SEEDED = "fedsim run --help", "first step", "first step, bases from a seed"
EXAMPLES = 40_000
MADE, FIRST, KEPT = (f"tokens of {EXAMPLES:,} examples, {how}" for how in ("without a file", "made and kept", "from the file"))


def cases(settings: Settings) -> list[Case]:
    """Returns what is waited for in every row."""
    steps = (STEP_SEEDED,) if settings.quick else (STEP, STEP_SEEDED)
    return [{"what": what} for what in (HELP, *steps, MADE, FIRST, KEPT)]


def measure(case: Case, settings: Settings) -> Found:
    """Returns the median over several processes."""
    if case["what"] in (MADE, FIRST, KEPT):
        return _tokens(case["what"], 1 if settings.quick else 3)
    one = _help if case["what"] == HELP else lambda: _first_step(case["what"] == STEP_SEEDED)
    return {"seconds": statistics.median(one() for _ in range(2 if settings.quick else 5 if case["what"] == HELP else 3))}


def _help() -> float:
    begun = time.perf_counter()
    program = "import sys; from fedsim.cli.main import main; sys.exit(main(['run', '--help']))"
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, cwd=ROOT)
    assert b"fedsim run" in done.stdout
    return time.perf_counter() - begun


def _first_step(seeded: bool) -> float:
    begun = time.time()
    return float(call("experiments.benchmarks.startup", {"seeded": seeded})["time"]) - begun


def _tokens(what: str, times: int) -> Found:
    with tempfile.TemporaryDirectory() as folder:
        if what == KEPT:
            _tokens_once(what, folder)
        found = [_tokens_once(what, folder) for _ in range(times)]
    return {name: statistics.median(each[name] for each in found) for name in found[0]}


def _tokens_once(what: str, folder: str) -> dict[str, float]:
    if what == FIRST:
        shutil.rmtree(Path(folder) / "fedsim", ignore_errors=True)
    return call("experiments.benchmarks.startup", {"token_cache": what != MADE}, environment={"XDG_CACHE_HOME": folder})


def tokens_of_all_clients(token_cache: bool) -> dict[str, float]:
    """Gets the tokens of all clients from a new session, and returns the CPU seconds and the MB of memory that this took."""
    from fedsim.config import Config
    from fedsim.session import Session

    config = Config()
    config.data.train_examples, config.data.token_cache, config.model.device = EXAMPLES, token_cache, "cpu"
    session = Session(config)
    before, begun = _memory(), time.process_time()
    for client in range(config.federation.clients):
        session.client_data(client)
    seconds = time.process_time() - begun
    return {"seconds": seconds} | {name: mb - before[name] for name, mb in _memory().items()}


def _memory() -> dict[str, float]:
    """Returns the resident memory of this process in MB: private, and mapped from files and thus shared."""
    lines = [line.split() for line in Path("/proc/self/status").read_text().splitlines()]
    kilobytes = {line[0]: int(line[1]) for line in lines if line[0] in ("RssAnon:", "RssFile:")}
    return {"private_mb": kilobytes.get("RssAnon:", 0) / 1e3, "shared_mb": kilobytes.get("RssFile:", 0) / 1e3}


def run_to_first_step(seeded: bool) -> float:
    """Starts the default experiment, with one test question, and returns the wall-clock time at the end of the first pass."""
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
    """The first pass has been trained; the argument is the time."""


SECTION = Section(
    "e",
    "Start-up",
    "Seconds from the start of the process, median: the full help, and the default experiment (25 clients) up to the "
    "end of its first forward and "
    "backward pass, with the initial gradients of LoRA-SB or with bases from the seed; the base model's evaluation is cut to one token. "
    f"Tokens: processor seconds and MB that the tokens of {EXAMPLES:,} embedded examples take in a process whose model is loaded; files' "
    "pages are shared by all processes of a machine.",
    (
        Column("", "what"),
        Column("seconds", "seconds", "{:.2f}"),
        Column("MB of its own", "private_mb", "{:.0f}"),
        Column("MB of files", "shared_mb", "{:.0f}"),
    ),
    cases,
    measure,
)

if __name__ == "__main__":
    answer(tokens_of_all_clients(**asked()) if "token_cache" in asked() else {"time": run_to_first_step(**asked())})
