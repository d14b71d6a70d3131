"""Kills workers and server 20 times at seeded moments of a run of 20 rounds on Ray: the run finishes with correct ledgers."""

import csv
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress

import pytest

from fedsim.cli.main import main

ROUNDS, CLIENTS, STEPS = 20, 4, 4
OPTIONS = (
    *("data.train_examples=40", "data.test_examples=2", f"federation.clients={CLIENTS}", f"federation.rounds={ROUNDS}"),
    *("adapter.rank=4", "adapter.init=orthogonal", "evaluation.max_new_tokens=1", "training.batch_size=2", f"training.local_steps={STEPS}"),
    *("privacy=example", "privacy.noise_multiplier=1", "privacy.accountant=rdp", "engine=ray", "engine.actors=2"),
    *(f"federation.min_replies={CLIENTS}", "federation.retries=20"),
)
CALL = "import sys; from fedsim.cli.main import main; sys.exit(main(sys.argv[1:]))"


def start(folder):
    resume = ["resume=true"] if (folder / "config.yaml").exists() else []
    command = [sys.executable, "-c", CALL, "run", *OPTIONS, f"run_dir={folder}", *resume]
    return subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)


def events_of(folder):
    path = folder / "events.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []


def wait_until_round(run, folder, number):
    """Waits until this round has ended. Fails if the server ends by itself."""
    ends = time.monotonic() + 600
    while max([event["round"] for event in events_of(folder) if event["kind"] in ("round", "checkpoint")], default=-1) < number:
        assert run.poll() is None, f"the server ended by itself with {run.returncode}"
        assert time.monotonic() < ends, f"round {number} did not end"
        time.sleep(0.02)


def workers_of(run):
    import psutil

    found = []
    for child in psutil.Process(run.pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # the process has ended meanwhile
            if "ClientAppActor" in " ".join(child.cmdline()):
                found.append(child)
    return found


def kill_one(run, folder, rng):
    """Kills a worker, or the server with its process group, and returns the running server and the kind of victim."""
    workers = workers_of(run)
    if workers and rng.random() < 0.7:
        rng.choice(workers).kill()
        return run, "worker"
    os.killpg(run.pid, signal.SIGKILL)
    run.wait()
    return start(folder), "server"


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_a_run_killed_twenty_times_finishes_with_correct_ledgers(tmp_path):
    pytest.importorskip("ray")
    pytest.importorskip("psutil")
    folder, rng, kills = tmp_path / "run", random.Random(6), Counter()
    run = start(folder)
    for number in range(ROUNDS):
        wait_until_round(run, folder, number)
        time.sleep(rng.uniform(0, 0.4))
        run, victim = kill_one(run, folder, rng)
        kills[victim] += 1
    assert run.wait(timeout=600) == 0
    assert min(kills["worker"], kills["server"]) >= 3, kills
    check_ledgers(folder)


def check_ledgers(folder):
    """Checks that no round is lost or counted twice, in both ledgers and the audit log."""
    rounds = [event for event in events_of(folder) if event["kind"] == "round"]
    assert [event["round"] for event in rounds] == list(range(1, ROUNDS + 1))
    assert all(sorted(event["clients"]) == list(range(CLIENTS)) for event in rounds)
    uploads = Counter(
        (int(row["round"]), int(row["client"]))
        for row in csv.DictReader((folder / "communication.csv").read_text().splitlines())
        if row["direction"] == "uplink"
    )
    assert uploads == Counter({(number, client): 1 for number in range(1, ROUNDS + 1) for client in range(CLIENTS)})
    privacy = json.loads((folder / "summary.json").read_text())["privacy"]
    steps = [sum(mechanism["steps"] for mechanism in client["mechanisms"]) for client in privacy["per_client"]]
    assert steps == [ROUNDS * STEPS] * CLIENTS
    assert main(["verify", str(folder)]) == 0
