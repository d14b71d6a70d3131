"""The gateway's configuration in a real nginx, between SuperNodes and SuperLink on loopback."""

import shutil
import ssl
import subprocess
import urllib.error
import urllib.request
from contextlib import contextmanager

import pytest
from test_deployment import CLIENTS, NAME, SMALL, deployed, ended, events, run, wait_for

from fedsim.deploy.local import environment, free_port, local_federation

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(280),
    pytest.mark.skipif(shutil.which("nginx") is None, reason="nginx is not installed"),
]


@contextmanager
def gateway(local, port):
    """Runs nginx with the configuration of `fedsim deploy init`, whose public address is a port on loopback."""
    folder = local.folder / "server"
    own = folder / "gateway.conf"
    own.write_text(own.read_text().replace(f"PUBLIC_ADDRESS:{local.federation.port}", f"127.0.0.1:{port}"))
    log = local.log("gateway")
    with open(log, "w") as output:
        command = ["nginx", "-p", str(folder), "-c", "gateway.conf", "-e", "stderr", "-g", f"daemon off; pid {folder}/nginx.pid;"]
        process = subprocess.Popen(
            command, env=environment(), stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
    try:
        wait_for(lambda: status_of(local, port, "/") is not None, 20)
        yield log
    finally:
        process.terminate()
        ended(process)


def status_of(local, port, path, method="GET"):
    """Returns the status of a response to a client without a key; None where nothing listens."""
    context = ssl.create_default_context(cafile=str(local.folder / "server" / "ca.crt"))
    try:
        request = urllib.request.Request(f"https://localhost:{port}{path}", method=method, data=b"" if method == "POST" else None)
        with urllib.request.urlopen(request, context=context, timeout=10) as found:
            return found.status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return None


def test_clients_take_part_through_the_gateway_and_only_the_fleet_api_is_reachable(tmp_path):
    port = free_port()
    with local_federation(CLIENTS, tmp_path / "federation", connect=False) as local, gateway(local, port) as log:
        for client in range(CLIENTS):
            local.start_client(client, FEDSIM_SUPERLINK=f"localhost:{port}")
        done = deployed(local, tmp_path / "run", "adapter.rank=128")
        config = local.flwr_home / "config.toml"
        config.write_text(config.read_text().replace(f":{local.federation.port}", f":{port}"))
        submitted = run(["run", "engine=deployment", f"engine.superlink={NAME}", *SMALL, f"run_dir={tmp_path / 'other'}"], local.flwr_home)
        statuses = {
            path: status_of(local, port, path, "POST") for path in ("/", "/v1/control/list-runs", "/v1/runtime/x", "/v1/fleet/../control/x")
        }
    assert "round 2/2" in done.stderr
    assert [len(event["clients"]) for event in events(tmp_path / "run", "round")] == [CLIENTS, CLIENTS]
    assert (submitted.returncode, "expected the Control API of a SuperLink" in submitted.stderr) == (2, True), submitted.stderr
    assert not (tmp_path / "other").exists()
    assert set(statuses.values()) == {404}, statuses
    assert "error" not in log.read_text()
