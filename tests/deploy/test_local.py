"""A local federation ends every process that it starts; programs that only sleep replace Flower's."""

import os
import signal
import threading
import time

import psutil
import pytest

from clients.owner import load_owner
from fedsim.deploy.folder import Federation, init
from fedsim.deploy.local import Local, local_federation
from fedsim.errors import UserError


@pytest.fixture
def local(tmp_path, monkeypatch):
    monkeypatch.setattr("fedsim.deploy.local.PATIENCE_SECONDS", 1.0)
    return Local(tmp_path, Federation("local", 0, ("localhost",), 1))


def script(folder, text):
    path = folder / "program.sh"
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(0o755)
    return path


def test_ending_a_program_ends_all_its_descendants_even_in_other_sessions_or_ignoring_signals(local, tmp_path):
    ignores_signals = "trap '' TERM INT; while true; do sleep 1; done"
    local.start("program", script(tmp_path, f'setsid bash -c "{ignores_signals}" & bash -c "{ignores_signals}" & sleep 100'))
    process = psutil.Process(local.processes["program"].pid)
    while len(process.children(recursive=True)) < 3:
        time.sleep(0.05)
    started = [process, *process.children(recursive=True)]
    local.end("program")
    assert not any(each.is_running() and each.status() != psutil.STATUS_ZOMBIE for each in started)
    assert local.processes == {}


def test_a_program_that_does_not_start_is_reported_with_the_end_of_its_log(local, tmp_path):
    local.start("program", script(tmp_path, "echo no such port >&2; exit 3"))
    with pytest.raises(UserError, match="Expected program to start, but it did not: no such port"):
        local.wait_for(lambda: False, "program")
    local.end("program")


@pytest.mark.parametrize(
    ("others", "told"),
    [
        (lambda folder: (folder / "letters.txt").write_text("dear"), "holds other files. Choose another folder"),
        (
            lambda folder: init(folder, Federation("ours", 2, ("server.example",))),
            "got the folder of the federation ours. Choose another one",
        ),
        (
            lambda folder: init(folder, Federation("local", 2, ("localhost",), shard=True, data_path="/data/mine.jsonl")),
            r"client.yaml with the trial's data and model \(by name, embedded\), got /data/mine.jsonl, embedded. Edit it, or choose",
        ),
    ],
)
def test_a_folder_with_other_content_is_refused_and_left_unchanged(others, told, tmp_path):
    place = tmp_path / "place"
    place.mkdir()
    others(place)
    before = {path: path.stat().st_mtime_ns for path in place.rglob("*")}
    with pytest.raises(UserError, match=told), local_federation(2, place):
        pytest.fail("it must not begin")
    assert {path: path.stat().st_mtime_ns for path in place.rglob("*")} == before


def test_the_clients_of_a_local_federation_get_its_data_and_base_model(tmp_path):
    place = tmp_path / "trial ä"
    init(place, Federation("local", 2, ("localhost",), shard=True, data_path=str(place / "mine.jsonl"), model_path="owner/name"))
    for client in range(2):
        owner = load_owner(place / f"clients/client-{client}/client.yaml")
        assert (owner.client, owner.shard, owner.data_path, owner.model_path) == (client, True, str(place / "mine.jsonl"), "owner/name")


def test_a_federation_that_is_interrupted_at_the_start_leaves_no_folder_with_keys(tmp_path, monkeypatch):
    monkeypatch.setattr("fedsim.deploy.local.tempfile.mkdtemp", lambda prefix: str(tmp_path / "keys"))
    monkeypatch.setenv("FLWR_HOME", "mine")

    def interrupted(self):
        assert (tmp_path / "keys/server/server.key").exists()
        (tmp_path / "keys/clients/client-0/client.yaml").write_text("no: owner")
        raise KeyboardInterrupt

    monkeypatch.setattr(Local, "start_superlink", interrupted)
    with pytest.raises(KeyboardInterrupt), local_federation(2):
        pytest.fail("it must not begin")
    assert list(tmp_path.iterdir()) == []
    assert os.environ["FLWR_HOME"] == "mine"


def test_a_federation_in_another_thread_also_ends_what_it_has_started(tmp_path, monkeypatch):
    monkeypatch.setattr(Local, "start_superlink", lambda self: self.start("superlink", script(tmp_path, "exec sleep 100")))
    monkeypatch.setattr(Local, "register", lambda self: None)
    monkeypatch.setenv("FLWR_HOME", "mine")
    started, raised = [], []

    def trial():
        try:
            with local_federation(0, tmp_path / "federation") as local:
                started.append(local.processes["superlink"])
        except Exception as error:
            raised.append(error)

    thread = threading.Thread(target=trial)
    thread.start()
    thread.join()
    assert raised == []
    assert started[0].returncode is not None
    assert os.environ["FLWR_HOME"] == "mine"


def test_sigterm_ends_a_federation_like_ctrl_c(tmp_path, monkeypatch):
    monkeypatch.setattr(Local, "start_superlink", lambda self: self.start("superlink", script(tmp_path, "exec sleep 100")))
    monkeypatch.setattr(Local, "register", lambda self: None)
    before = signal.getsignal(signal.SIGTERM)
    started = []

    def terminated():
        with local_federation(0, tmp_path / "federation") as local:
            started.append(local.processes["superlink"])
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)

    with pytest.raises(KeyboardInterrupt):
        terminated()
    assert started[0].returncode is not None
    assert signal.getsignal(signal.SIGTERM) is before
