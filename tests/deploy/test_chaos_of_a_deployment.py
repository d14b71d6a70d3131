"""Twenty kill -9 of clients, workers, server and SuperLink over twenty rounds: the run ends, with every round once and correct ledgers.

Real programs on loopback, with TLS and node authentication. Killed programs are restarted, as by systemd: a SuperNode by its script,
a SuperLink with its state on disk. After the server was killed the same command continues with resume=true.
"""

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

import psutil
import pytest

from fedsim.cli.main import main
from fedsim.deploy.local import NAME, environment, local_federation

ROUNDS, CLIENTS, STEPS = 20, 2, 4
OPTIONS = (
    *("data.train_examples=40", "data.test_examples=2", f"federation.clients={CLIENTS}", f"federation.rounds={ROUNDS}"),
    *("adapter.rank=4", "adapter.init=orthogonal", "training.batch_size=2", f"training.local_steps={STEPS}"),
    *("evaluation.max_new_tokens=1", "evaluation.diagnosis=false"),
    *("privacy=example", "privacy.noise_multiplier=1", "privacy.accountant=rdp"),
    *("federation.min_replies=1", "federation.round_timeout=20", "federation.retries=20"),
)
VICTIMS = ("client",) * 4 + ("worker",) * 6 + ("server",) * 5 + ("superlink",) * 5
FEDSIM = (sys.executable, "-c", "import sys; from fedsim.cli.main import main; sys.exit(main())")
PATIENCE_SECONDS = 300
NOBODY = 2**22  # above the largest process id


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []


class ChaosRun:
    """A run on a federation whose processes are killed."""

    def __init__(self, local, folder, log):
        self.local, self.folder, self.log = local, folder, log
        self.command = None
        self.submit()

    def submit(self):
        """Starts the command that submits and follows the run, with resume=true if the run folder exists."""
        arguments = ["run", "engine=deployment", f"engine.superlink={NAME}", *OPTIONS, f"run_dir={self.folder}"]
        resume = ["resume=true"] if (self.folder / "config.yaml").exists() else []
        env = environment() | {"FLWR_HOME": str(self.local.flwr_home)}
        with open(self.log, "a") as output:
            self.command = subprocess.Popen([*FEDSIM, *arguments, *resume], env=env, stdout=output, stderr=output)

    def wait_until(self, reached):
        """Waits until `reached()`; a command that has failed is submitted again."""
        ends = time.monotonic() + PATIENCE_SECONDS
        while not reached():
            assert time.monotonic() < ends, self.log.read_text()[-3000:]
            if self.command.poll() not in (None, 0):
                self.submit()
            time.sleep(0.1)

    def has_reached(self, number):
        return max((event["round"] for event in lines_of(self.folder / "events.jsonl") if event["kind"] == "round"), default=0) >= number

    def kill(self, victim, rng):
        {"client": self._client, "worker": self._worker, "server": self._server, "superlink": self._superlink}[victim](rng)

    def _client(self, rng):
        """Kills a client's whole machine: SuperNode, client app and worker."""
        client = rng.randrange(CLIENTS)
        script = self.local.processes.pop(f"client-{client}")
        os.killpg(script.pid, signal.SIGKILL)
        script.wait()
        with suppress(ProcessLookupError):
            os.kill(self._worker_of(client), signal.SIGKILL)
        self.local.start_client(client)

    def _worker(self, rng):
        self.wait_until(self._workers)
        os.kill(rng.choice(self._workers()), signal.SIGKILL)

    def _workers(self):
        return [pid for pid in map(self._worker_of, range(CLIENTS)) if psutil.pid_exists(pid)]

    def _worker_of(self, client):
        lock = self.local.client_folder(client) / "worker" / "worker.lock"
        return int(lock.read_text()) if lock.exists() and lock.read_text() else NOBODY

    def _server(self, rng):
        self.wait_until(self._servers)
        for server in self._servers():
            server.kill()
        self.command.terminate()  # Flower would report the run as failed after 45 seconds
        self.command.wait(60)
        self.submit()

    def _servers(self):
        children = psutil.Process(self.local.processes["superlink"].pid).children(recursive=True)
        return [child for child in children if child.status() != psutil.STATUS_ZOMBIE and "flwr-serverapp" in " ".join(child.cmdline())]

    def _superlink(self, rng):
        superlink = self.local.processes.pop("superlink")
        superlink.kill()
        superlink.wait()
        self.local.start_superlink()


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_run_with_twenty_kills_over_twenty_rounds_finishes_with_correct_ledgers(tmp_path):
    rng, victims = random.Random(6), list(VICTIMS)
    rng.shuffle(victims)
    with local_federation(CLIENTS, tmp_path / "federation") as local:
        run = ChaosRun(local, tmp_path / "run", tmp_path / "log")
        try:
            for number, victim in enumerate(victims):
                run.wait_until(lambda number=number: run.has_reached(number))
                time.sleep(rng.uniform(0, 3))
                print(f"{time.strftime('%X')} after round {number}: {victim}", flush=True)
                run.kill(victim, rng)
            run.wait_until(lambda: (tmp_path / "run" / "summary.json").exists() and run.command.poll() == 0)
        finally:
            run.command.kill()
            run.command.wait()
        check_ledgers(tmp_path / "run", [local.client_folder(client) for client in range(CLIENTS)])


def check_ledgers(folder, client_folders):
    """Asserts that every round occurs once and that the ledgers of server and clients agree with the audit log."""
    rounds = [event for event in lines_of(folder / "events.jsonl") if event["kind"] == "round"]
    assert [event["round"] for event in rounds] == list(range(1, ROUNDS + 1))
    accepted = Counter((event["round"], client) for event in rounds for client in event["clients"])
    assert set(accepted.values()) == {1}
    assert all(event["clients"] for event in rounds)
    uploads = Counter(
        (int(row["round"]), int(row["client"]))
        for row in csv.DictReader((folder / "communication.csv").read_text().splitlines())
        if row["direction"] == "uplink"
    )
    assert uploads == accepted
    reported = json.loads((folder / "summary.json").read_text())["privacy"]["per_client"]
    charged = steps_charged(lines_of(folder / "journal.jsonl"))
    for client, own_folder in enumerate(client_folders):
        steps = sum(mechanism["steps"] for mechanism in reported[client]["mechanisms"])
        assert steps == charged[client], "the privacy ledger says what the audit log says"
        trained = STEPS * sum(client in event["clients"] for event in rounds)
        own = own_steps(own_folder / "worker" / "privacy.json", client)
        assert trained <= steps
        assert trained <= own, "a client's own accountant has lost nothing with its processes"
    assert main(["verify", str(folder)]) == 0


def steps_charged(journal):
    """Returns {client: steps} from the lines of the audit log that no resumption has superseded."""
    valid = []
    for line in journal:
        if line["kind"] == "resumed":
            valid = [each for each in valid if each["line"] <= line["goes_on_from"]]
        valid.append(line)
    return Counter(
        {client: STEPS * sum(each["kind"] == "charged" and client in each["clients"] for each in valid) for client in range(CLIENTS)}
    )


def own_steps(path, client):
    """Returns the steps in the accountant on the client's disk."""
    from fedsim.privacy.ledger import PrivacyLedger

    return sum(mechanism.steps for mechanism in PrivacyLedger.from_json(json.loads(path.read_text())).history(client))
