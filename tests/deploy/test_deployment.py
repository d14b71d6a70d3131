"""Real programs on loopback: SuperLink, SuperNodes and workers with TLS and node authentication, by the scripts of `fedsim deploy init`."""

import csv
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from types import SimpleNamespace

import psutil
import pytest
import yaml
from safetensors.torch import load_file

from fedsim.deploy.certificates import authority, client_key
from fedsim.deploy.flower import FLWR
from fedsim.deploy.local import NAME, environment, free_port, local_federation
from fedsim.embedded import BASE_MODEL

pytestmark = [pytest.mark.slow, pytest.mark.timeout(280)]

CLIENTS = 2
SMALL = (
    *("data.train_examples=24", "data.test_examples=4", f"federation.clients={CLIENTS}", "federation.rounds=2", "training.batch_size=2"),
    *("training.local_steps=2", "adapter.init_samples=4", "evaluation.max_new_tokens=4", "evaluation.diagnosis=false"),
)
FEDSIM = (sys.executable, "-c", "import sys; from fedsim.cli.main import main; sys.exit(main())")


class CountingProxy:
    """Forwards between a SuperNode and the SuperLink and counts the bytes, TLS included; while `open` is not set, none passes."""

    def __init__(self, target):
        self.up = self.down = 0
        self.open = threading.Event()
        self.open.set()
        self._target, self._lock = target, threading.Lock()
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        while True:
            try:
                near, _ = self._listening.accept()
                far = socket.create_connection(("127.0.0.1", self._target))
            except OSError:
                return
            for source, sink, name in ((near, far, "up"), (far, near, "down")):
                threading.Thread(target=self._pass_on, args=(source, sink, name), daemon=True).start()

    def _pass_on(self, source, sink, name):
        try:
            while part := source.recv(1 << 16):
                self.open.wait()
                sink.sendall(part)
                with self._lock:
                    setattr(self, name, getattr(self, name) + len(part))
        except OSError:
            pass
        finally:
            for each in (source, sink):
                each.close()

    def close(self):
        self._listening.close()


@pytest.fixture(scope="module")
def federation(tmp_path_factory):
    """Two clients whose traffic is counted."""
    folder = tmp_path_factory.mktemp("deployment") / "federation"
    with local_federation(CLIENTS, folder, connect=False) as local:
        local.proxies = [CountingProxy(local.federation.port) for _ in range(CLIENTS)]
        for client, proxy in enumerate(local.proxies):
            local.start_client(client, FEDSIM_SUPERLINK=f"localhost:{proxy.port}")
        yield local
        for proxy in local.proxies:
            proxy.close()


def run(words, home, timeout=240):
    return subprocess.run(
        [*FEDSIM, *words], env=environment() | {"FLWR_HOME": str(home)}, capture_output=True, text=True, timeout=timeout, check=False
    )


def deployed(federation, folder, *words):
    """Runs `fedsim run` on the deployment and returns the finished process."""
    done = run(["run", "engine=deployment", f"engine.superlink={NAME}", *SMALL, *words, f"run_dir={folder}"], federation.flwr_home)
    assert done.returncode == 0, done.stderr + federation.log("superlink").read_text()[-3000:]
    return done


def in_process(federation, folder, *words):
    done = run(["run", "engine.cohort_size=1", *SMALL, *words, f"run_dir={folder}"], federation.flwr_home)
    assert done.returncode == 0, done.stderr


def events(folder, kind):
    lines = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    return [event for event in lines if event["kind"] == kind]


def transfers(folder):
    with open(folder / "communication.csv") as file:
        rows = [{name: int(value) if value.isdigit() else value for name, value in row.items()} for row in csv.DictReader(file)]
    return sorted(rows, key=str)  # the file is in the order of arrival


def worker_log(federation, client):
    log = federation.client_folder(client) / "worker" / "worker.log"
    assert log.stat().st_mode & 0o777 == 0o600
    return log.read_text()


def same_adapter(one, other, tolerance):
    ours, theirs = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (one, other))
    assert ours.keys() == theirs.keys()
    assert max(float((ours[name] - theirs[name]).abs().max()) for name in ours) <= tolerance
    assert max(float(tensor.abs().max()) for tensor in ours.values()) > 100 * tolerance


def bytes_passed_during(proxies, work):
    """Returns {direction: (bytes that passed, seconds)} of a call of `work`."""
    counts = lambda: (sum(proxy.up for proxy in proxies), sum(proxy.down for proxy in proxies))  # noqa: E731
    before, begun = counts(), time.monotonic()
    work()
    seconds, after = time.monotonic() - begun, counts()
    return {"uplink": (after[0] - before[0], seconds), "downlink": (after[1] - before[1], seconds)}


def wait_until_idle(federation):
    """Waits until all SuperNodes are online."""
    while run(["deploy", "status", str(federation.folder)], federation.flwr_home).stdout.count(" online ") < CLIENTS:
        time.sleep(0.5)


@pytest.fixture(scope="module")
def first(federation, tmp_path_factory):
    """The same run in the deployment and in process, with the bytes on the wires during the run and while idle."""
    folder = tmp_path_factory.mktemp("first")
    wait_until_idle(federation)
    idle, done = bytes_passed_during(federation.proxies, lambda: time.sleep(10)), []
    wire = bytes_passed_during(federation.proxies, lambda: done.append(deployed(federation, folder / "deployed", "adapter.rank=128")))
    in_process(federation, folder / "in_process", "adapter.rank=128")
    return SimpleNamespace(deployed=folder / "deployed", in_process=folder / "in_process", idle=idle, wire=wire, done=done[0])


def test_result_and_ledger_equal_those_of_a_run_in_process_and_progress_is_shown(first):
    same_adapter(first.deployed, first.in_process, 1e-6)
    assert transfers(first.deployed) == transfers(first.in_process)
    assert {event["client"] for event in events(first.deployed, "joined")} == set(range(CLIENTS))
    assert "round 2/2" in first.done.stderr
    assert str(first.deployed) in first.done.stdout


@pytest.mark.parametrize("direction", ["uplink", "downlink"])
def test_the_bytes_on_the_wire_match_the_ledger_within_one_percent(first, direction):
    """The remainder is headers of HTTP and TLS records, the configuration in every request, the bundle, and digests of objects."""
    seen = sum(row["serialized_bytes"] for row in transfers(first.deployed) if row["direction"] == direction)
    assert seen > 10**7, "a payload of nothing would show nothing"
    (passed, seconds), (idle, idle_seconds) = first.wire[direction], first.idle[direction]
    waiting = idle / idle_seconds * seconds  # SuperNodes that poll for work and send heartbeats
    print(f"{direction}: {seen} told, {passed} passed, {waiting:.0f} of them as when idle, remainder {(passed - waiting) / seen - 1:.2%}")
    assert seen < passed < 1.01 * seen + waiting


def test_a_client_loads_the_base_model_once_and_trains_every_round(first, federation):
    assert first.done
    for client in range(CLIENTS):
        log = worker_log(federation, client)
        assert log.count("base model loaded (1 since the start)") == log.count("base model loaded") == 1
        assert len(re.findall(r"done: train of run \d+, round [12]", log)) == 2
        assert log.count("is process") == 1


def wait_for_round(folder, number):
    while not (folder / "events.jsonl").exists() or len(events(folder, "round")) < number:
        time.sleep(0.05)


def test_a_run_with_killed_workers_that_is_stopped_resumes_to_the_same_result(federation, tmp_path):
    words = ("federation.rounds=4", "training.optimizer=sgd", "training.scaffold=true", "adapter=orthogonal", "training.learning_rate=0.5")
    killed = []

    def disturb():
        wait_for_round(tmp_path / "run", 1)
        for client in range(CLIENTS):
            killed.append(int((federation.client_folder(client) / "worker" / "worker.lock").read_text()))
            os.kill(killed[-1], signal.SIGKILL)
        run_id = flwr_json(federation, "list")["runs"][0]["run-id"]
        wait_for_round(tmp_path / "run", 2)
        assert flwr_json(federation, "stop", run_id)["success"]

    thread = threading.Thread(target=disturb)
    thread.start()
    command = ["run", "engine=deployment", f"engine.superlink={NAME}", *SMALL, *words, f"run_dir={tmp_path / 'run'}"]
    stopped = run(command, federation.flwr_home)
    thread.join()
    assert stopped.returncode == 1
    assert "finished:stopped" in stopped.stderr
    assert "resume=true" in stopped.stderr
    assert not (tmp_path / "run" / "summary.json").exists()
    deployed(federation, tmp_path / "run", *words, "resume=true")
    in_process(federation, tmp_path / "in_process", *words)
    same_adapter(tmp_path / "run", tmp_path / "in_process", 1e-5)
    assert [event["round"] for event in events(tmp_path / "run", "round")] == [1, 2, 3, 4]
    assert all(f"is process {pid}" in worker_log(federation, client) for client, pid in enumerate(killed))


def flwr_json(federation, verb, *words):
    command = [*FLWR, verb, *words, NAME, "--format", "json"]
    done = subprocess.run(command, env=environment() | {"FLWR_HOME": str(federation.flwr_home)}, capture_output=True, text=True, check=True)
    return json.loads(done.stdout[done.stdout.index("{") :])


def test_a_client_whose_owner_refuses_is_reported_and_not_averaged(federation, tmp_path):
    path = federation.client_folder(1) / "client.yaml"
    before = path.read_text()
    path.write_text(yaml.safe_dump(yaml.safe_load(before) | {"max_local_steps": 1}))
    restart = [*FEDSIM, "worker", str(path), "--stop"]  # an owner's change takes effect at the worker's next start
    subprocess.run(restart, check=True, capture_output=True)
    try:
        deployed(federation, tmp_path / "run", "adapter=orthogonal", "federation.rounds=1")
    finally:
        path.write_text(before)
        subprocess.run(restart, check=True, capture_output=True)
    (done,) = events(tmp_path / "run", "round")
    assert done["clients"] == [0]
    (missing,) = done["missing"]
    assert (missing["client"], missing["reason"]) == (1, "refused_by_client")
    assert "2 local steps are more than the 1 accepted" in missing["detail"]


@pytest.mark.timeout(900)
def test_a_client_that_is_cut_off_is_missing_and_returns_with_the_network(federation, tmp_path):
    words = ("adapter=orthogonal", "federation.rounds=60", "federation.round_timeout=20", "federation.min_replies=1")
    seen, cut = [], federation.proxies[1].open

    def disturb():
        wait_for_round(tmp_path / "run", 1)
        wait_for(lambda: any(sorted(event["clients"]) == [0, 1] for event in events(tmp_path / "run", "round")))  # both workers are warm
        seen.append(len(events(tmp_path / "run", "round")))
        cut.clear()
        seen.append(run(["deploy", "status", str(federation.folder)], federation.flwr_home).stdout)
        try:
            wait_for(lambda: any(event["clients"] == [0] for event in events(tmp_path / "run", "round")))
        finally:
            cut.set()
        alone = len(events(tmp_path / "run", "round"))
        wait_for(lambda: any(sorted(event["clients"]) == [0, 1] for event in events(tmp_path / "run", "round")[alone:]))
        (run_id,) = (each["run-id"] for each in flwr_json(federation, "list")["runs"] if each["status"] == "running")
        assert flwr_json(federation, "stop", run_id)["success"]
        seen.append("back")

    thread = threading.Thread(target=disturb)
    thread.start()
    command = ["run", "engine=deployment", f"engine.superlink={NAME}", *SMALL, *words, f"run_dir={tmp_path / 'run'}"]
    run(command, federation.flwr_home, timeout=800)
    thread.join()
    before, status, back = seen
    assert back == "back"
    assert re.search(r"\d+ +running +\d+/60", status), "the status of a run under way"
    missed = [each for event in events(tmp_path / "run", "round")[before:] for each in event["missing"]]
    assert {each["client"] for each in missed} == {1}
    assert "timeout" in {each["reason"] for each in missed}


def wait_for(reached, seconds=150):
    ends = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < ends
        time.sleep(0.1)


def test_status_shows_online_clients_and_the_progress_of_runs(first, federation):
    done = run(["deploy", "status", str(federation.folder)], federation.flwr_home)
    assert done.returncode == 0, done.stderr
    assert re.search(r"client-0 +\d+ +online +now +\d{4}-", done.stdout)
    assert re.search(r"client-1 +\d+ +online", done.stdout)
    assert re.search(r"\d+ +finished:completed +[123]/[123]", done.stdout)


def supernode(federation, log, *words, ca=None, key=None):
    """Starts a SuperNode by hand, which should be rejected; its output goes to `log`."""
    trusted = () if "--insecure" in words else ("--root-certificates", str(ca or federation.folder / "server" / "ca.crt"))
    secret = () if key is None else ("--auth-supernode-private-key", str(key))
    address = ("--superlink", f"localhost:{federation.federation.port}", "--port", str(free_port()), "--max-retries", "2")
    env = environment() | {"FLWR_HOME": str(log.parent), "FLWR_TELEMETRY_ENABLED": "0"}
    with open(log, "w") as output:
        return subprocess.Popen(
            ["flower-supernode", *trusted, *secret, *words, *address], env=env, stdout=output, stderr=output, start_new_session=True
        )


def ended(process, seconds=90):
    """Returns the exit code and kills the process group."""
    try:
        return process.wait(seconds)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_supernodes_without_a_registered_key_or_the_right_tls_are_rejected(federation, tmp_path):
    (tmp_path / "stranger").write_bytes(client_key("stranger")[1])
    (tmp_path / "other.crt").write_bytes(authority("other")[0])
    own, logs = federation.client_folder(0) / "key", {name: tmp_path / name for name in ("unregistered", "keyless", "authority", "plain")}
    strangers = {
        "unregistered": supernode(federation, logs["unregistered"], key=tmp_path / "stranger"),
        "keyless": supernode(federation, logs["keyless"]),
        "authority": supernode(federation, logs["authority"], ca=tmp_path / "other.crt", key=own),
        "plain": supernode(federation, logs["plain"], "--insecure", key=own),
    }
    codes = {name: ended(process) for name, process in strangers.items()}
    seen = {name: log.read_text() for name, log in logs.items()}
    assert all(code > 0 for code in codes.values()), (codes, seen)
    assert "2004" in seen["unregistered"]
    assert "2001" in seen["keyless"]
    assert "CERTIFICATE_VERIFY_FAILED" in seen["authority"]
    with socket.create_connection(("127.0.0.1", federation.federation.port), 5) as plain:
        plain.sendall(b"GET /v1/fleet HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert not plain.recv(100).startswith(b"HTTP/1.1 2")


def started_by(home):
    """Returns the processes whose environment names this Flower folder."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE and str(home) in process.environ().get("FLWR_HOME", ""):
                found.append(process)
        except psutil.Error:
            continue
    return found


def test_a_client_whose_key_is_registered_for_another_client_is_refused(tmp_path):
    with local_federation(CLIENTS, tmp_path / "federation") as local:
        one, other = (local.folder / "server" / "registered" / f"client-{client}.json" for client in range(CLIENTS))
        texts = one.read_text(), other.read_text()
        one.write_text(texts[1])
        other.write_text(texts[0])
        options = ["engine=deployment", f"engine.superlink={NAME}", *SMALL, "engine.wait_seconds=40"]
        done = run(["run", *options, f"run_dir={tmp_path / 'run'}"], local.flwr_home)
    assert done.returncode != 0
    assert "claims to be client 0, but its key is registered for client 1" in done.stderr


def test_a_terminated_local_federation_leaves_no_process(tmp_path):
    words = ("deploy", "up", "--local", "2", "--dir", str(tmp_path / "federation"), *SMALL, f"run_dir={tmp_path / 'run'}")
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen([*FEDSIM, *words], env=os.environ | {"FLWR_HOME": str(tmp_path)}, stdout=log, stderr=log)
        try:
            ends = time.monotonic() + 150
            while "waiting for 2 clients" not in (tmp_path / "log").read_text():
                assert process.poll() is None, (tmp_path / "log").read_text()
                assert time.monotonic() < ends, (tmp_path / "log").read_text()
                time.sleep(0.2)
            assert len(started_by(tmp_path)) >= 4
            process.terminate()
            assert process.wait(90) == 143  # as for every command that SIGTERM has ended
        finally:
            process.kill()
            process.wait()
    assert started_by(tmp_path) == []


def test_a_local_federation_with_a_users_own_data_and_model_gives_the_result_of_a_simulation(tmp_path):
    rows = [[{"role": "user", "content": f"What is {n} plus 1?"}, {"role": "assistant", "content": str(n + 1)}] for n in range(40)]
    (tmp_path / "mine.jsonl").write_text("".join(f"{json.dumps({'messages': turns})}\n" for turns in rows))
    shutil.copytree(BASE_MODEL, tmp_path / "model")
    own = ("data=instructions", "data.path=mine.jsonl", "model.path=model", *SMALL)
    for words in (("deploy", "up", "--local", "2", *own, "run_dir=deployed"), ("run", *own, "run_dir=simulated")):
        done = subprocess.run(
            [*FEDSIM, *words], cwd=tmp_path, env=os.environ | {"FLWR_HOME": str(tmp_path)}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    deployed, simulated = (json.loads((tmp_path / run / "summary.json").read_text())["adapter_digest"] for run in ("deployed", "simulated"))
    assert deployed == simulated
