"""A run that is killed at any moment and resumed ends with the adapter of an uninterrupted one, bit for bit."""

import json
import os
import random
import signal
import sys

import pytest

SMALL = (
    *("data.train_examples=24", "data.test_examples=8", "federation.clients=3", "federation.rounds=2", "training.batch_size=2"),
    *("adapter.rank=4", "adapter.init_samples=3", "evaluation.max_new_tokens=4", "evaluation.every=1"),
)

PLACES = {
    "broadcast": ("fedsim.flower.worker", "handle"),
    "training": ("fedsim.training.cohort", "update"),
    "aggregation": ("fedsim.flower.reading", "unchecked_from_record"),
    "evaluation": ("fedsim.flower.server", "evaluate"),
    "checkpoint writing": ("os", "replace"),
}
"""A kill strikes just before the k-th call of one of these functions."""

CALLS = {"broadcast": 5, "training": 8, "aggregation": 6, "evaluation": 6, "checkpoint writing": 10}
"""The least number of these calls in a run."""


def run_in_child(overrides, place=None, call=0):
    """Runs the experiment in a forked child, killed before the given call. Returns whether it was killed."""
    child = os.fork()
    if child == 0:
        try:
            if place:
                kill_before(place, call)
            import torch

            from fedsim.cli.compose import compose
            from fedsim.experiment import run

            torch.set_num_threads(1)  # a forked child has none of its parent's threads
            run(compose(list(overrides)), quiet=True)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def kill_before(place, call):
    module_name, name = PLACES[place]
    __import__(module_name)
    module = sys.modules[module_name]
    original, calls = getattr(module, name), iter(range(sys.maxsize))

    def counted(*arguments, **options):
        if next(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **options)

    setattr(module, name, counted)


def results(folder):
    summary = json.loads((folder / "summary.json").read_text())
    rounds = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    facts = {key: summary[key] for key in ("adapter_digest", "evaluation", "communication")}
    return facts | {"tokens": summary["training"]["tokens"], "rounds": [e["round"] for e in rounds if e["kind"] == "round"]}


def check_kill(folder, expected, place, call):
    overrides = (*SMALL, f"run_dir={folder}")
    killed = run_in_child(overrides, place, call)
    if killed:
        resume = (*overrides, "resume=true") if (folder / "config.yaml").exists() else overrides
        assert not run_in_child(resume)
    assert results(folder) == expected, f"killed in {place}, call {call}"
    return killed


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert not run_in_child((*SMALL, f"run_dir={folder}"))
    return results(folder)


def test_the_same_seed_gives_the_same_run(tmp_path, uninterrupted):
    run_in_child((*SMALL, f"run_dir={tmp_path / 'again'}"))
    assert results(tmp_path / "again") == uninterrupted


@pytest.mark.parametrize("place", PLACES)
def test_a_run_killed_once_resumes_to_the_same_result(place, tmp_path, uninterrupted):
    assert check_kill(tmp_path / "run", uninterrupted, place, CALLS[place] - 1)


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
def test_fifty_kills_all_resume_to_the_same_result(place, tmp_path, uninterrupted):
    rng = random.Random(place)
    killed = [check_kill(tmp_path / f"run{i}", uninterrupted, place, rng.randrange(CALLS[place])) for i in range(10)]
    assert all(killed), "a kill that never struck tests nothing"
