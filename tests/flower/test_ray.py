"""The engine ray: the same runs with actors of Flower's simulation runtime; slow, because Ray takes seconds to start."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import pytest
from safetensors.torch import load_file

from fedsim.cli.main import main
from fedsim.events import read_events
from fedsim.flower.ray_grid import gpu_share

SMALL = (
    *("data.train_examples=30", "data.test_examples=4", "federation.clients=5", "federation.rounds=3", "training.batch_size=2"),
    *("training.local_steps=2", "adapter.rank=4", "adapter.init=orthogonal", "evaluation.max_new_tokens=2"),
)
SGD = ("training.optimizer=sgd", "training.learning_rate=0.5")
"""Adam would amplify rounding differences by dividing by the gradient's size; so would a diverging rate, even in one process."""
KINDS = {
    "factors of all": (),
    "bases from gradients": ("adapter.init=gradient", "adapter.init_samples=5", "adapter.refresh_every=2", "training.learning_rate=0.02"),
    "additions to the weights": ("adapter.init=null", "method=flora"),
    "control variates": ("training.scaffold=true",),
    "residues": (
        "adapter.init=null",
        "method=fedit",
        "compression.name=top_k",
        "compression.density=0.3",
        "compression.error_feedback=true",
    ),
    "personal factors": ("adapter.init=null", "method=fedsa_lora"),
}


def test_without_ray_the_error_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(["run", "engine=ray"]) == 2
    assert "pip install -e '.[simulation]'" in capsys.readouterr().err


def run_in_process(*overrides):
    """Runs the command in a separate process, because Ray takes over a process's signals and warnings."""
    subprocess.run([sys.executable, "-c", CALL, "run", *overrides], check=True, timeout=600)


@pytest.mark.parametrize(
    ("actors", "gpus", "part"), [(1, 0, 0), (2, 2, 1), (1, 4, 1), (3, 2, 1 / 2), (12, 8, 1 / 2), (16, 8, 1 / 2), (3, 1, 1 / 3)]
)
def test_every_actor_fits_on_one_of_the_gpus(actors, gpus, part):
    found = gpu_share(actors, gpus)
    assert found == part
    assert not found or int(1 / found + 1e-9) * gpus >= actors


CALL = (
    "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler);"  # a background shell ignores SIGINT
    "from fedsim.cli.main import main; sys.exit(main(sys.argv[1:]))"
)


@pytest.mark.slow
@pytest.mark.timeout(1300)
@pytest.mark.parametrize("kind", KINDS)
def test_two_actors_give_the_same_result_as_one_process(kind, tmp_path):
    pytest.importorskip("ray")
    for name, engine in (("one", ()), ("two", ("engine=ray", "engine.actors=2"))):
        run_in_process(*SMALL, *SGD, *KINDS[kind], f"run_dir={tmp_path / name}", *engine)
    check_same(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
@pytest.mark.timeout(1300)
def test_with_spare_clients_two_actors_accept_the_same_clients_as_one_process(tmp_path):
    pytest.importorskip("ray")
    spares = ("federation.fraction=0.4", "federation.over_selection=1.0", "engine.cohort_size=1", "federation.rounds=4")
    for name, engine in (("one", ()), ("two", ("engine=ray", "engine.actors=2"))):
        run_in_process(*SMALL, *SGD, *spares, f"run_dir={tmp_path / name}", *engine)
    one, two = (read_events(tmp_path / name / "events.jsonl") for name in ("one", "two"))
    taken = [event["clients"] for event in one if event["kind"] == "round"]
    assert len(taken) == 4
    assert taken == [event["clients"] for event in two if event["kind"] == "round"]


def check_same(first, second):
    """Asserts equal bytes and tokens, and equal updates to float tolerance."""
    one, two = (json.loads((folder / "summary.json").read_text()) for folder in (first, second))
    assert one["communication"] == two["communication"]
    assert one["training"]["tokens"] == two["training"]["tokens"]
    files = sorted((first / "adapter").rglob("*.safetensors"))
    assert files
    for file in files:
        expected, found = updates(file), updates(second / "adapter" / file.relative_to(first / "adapter"))
        assert expected.keys() == found.keys()
        for layer, update in expected.items():
            assert (found[layer] - update).norm() <= 5e-3 * update.norm() + 1e-7, layer


def updates(file):
    """Returns {layer: [out, in]}, the products of factors, since an SVD may give the same product with other factors."""
    factors = load_file(file)
    layers = {key.removesuffix(".lora_A.weight") for key in factors if key.endswith(".lora_A.weight")}
    return {layer: factors[f"{layer}.lora_B.weight"] @ factors[f"{layer}.lora_A.weight"] for layer in layers}


def started(folder, *overrides):
    """Starts the command in a new session, as a terminal does."""
    command = [sys.executable, "-c", CALL, "run", *SMALL, "engine=ray", "engine.actors=2", f"run_dir={folder}", *overrides]
    return subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE, text=True)


def wait_for(folder, kind, number, timeout=600):
    """Waits until the run has written an event of this kind for the round."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        path = folder / "events.jsonl"
        events = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []
        if any(event["kind"] == kind and event.get("round") == number for event in events):
            return events
        time.sleep(0.05)
    raise AssertionError(f"{kind} of round {number} did not come")


def actors_of(process):
    import psutil

    return [child for child in psutil.Process(process.pid).children(recursive=True) if "ClientAppActor" in " ".join(child.cmdline())]


@pytest.mark.slow
@pytest.mark.timeout(1300)
def test_ctrl_c_leaves_a_resumable_run_and_no_ray_process(tmp_path):
    psutil = pytest.importorskip("psutil")
    pytest.importorskip("ray")
    run = started(tmp_path / "run", "federation.rounds=500")
    wait_for(tmp_path / "run", "round", 2)
    children = psutil.Process(run.pid).children(recursive=True)
    os.killpg(run.pid, signal.SIGINT)  # a terminal signals the whole foreground group
    _, errors = run.communicate(timeout=60)
    assert run.returncode == 130
    assert "resume=true" in errors
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive
    assert main(["verify", str(tmp_path / "run")]) == 0


@pytest.mark.slow
@pytest.mark.timeout(1300)
def test_a_killed_actor_is_replaced_and_its_clients_are_asked_again(tmp_path):
    pytest.importorskip("ray")
    run = started(tmp_path / "run", "federation.rounds=40", "federation.min_replies=5", "training.local_steps=20")
    wait_for(tmp_path / "run", "round", 2)
    victim = actors_of(run)[0]
    victim.kill()
    _, errors = run.communicate(timeout=600)
    assert run.returncode == 0, errors
    events = [json.loads(line) for line in (tmp_path / "run/events.jsonl").read_text().splitlines()]
    rounds = [event for event in events if event["kind"] == "round"]
    assert [event["round"] for event in rounds] == list(range(1, 41))
    assert all(sorted(event["clients"]) == [0, 1, 2, 3, 4] for event in rounds), "all were needed, so the missing were asked again"
    assert sum("num_attempts" in event for event in rounds) >= 1


CLUSTER = """
import sys
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
cluster.add_node(num_cpus=1)
cluster.wait_for_nodes()
print("address", cluster.address, flush=True)
sys.stdin.readline()
cluster.shutdown()
"""


@contextmanager
def cluster_of_two_nodes():
    """Yields process and address of a Ray cluster with two one-core nodes, which Ray treats as two machines."""
    env = os.environ | {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    command = [sys.executable, "-c", CLUSTER]
    with subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            yield process, next(line.split()[1] for line in process.stdout if line.startswith("address"))
        finally:
            process.communicate("end\n", timeout=60)


def raylets_with_actors(cluster, stop):
    """Watches the cluster until `stop` is set and returns the raylets that had one of our actors."""
    import psutil

    seen = set()
    while not stop.wait(0.2):
        for child in psutil.Process(cluster.pid).children(recursive=True):
            try:
                if "ClientAppActor" in " ".join(child.cmdline()):
                    seen.add(child.ppid())
            except psutil.Error:
                continue
    return seen


@pytest.mark.slow
@pytest.mark.timeout(1300)
def test_a_run_uses_all_nodes_of_a_running_cluster_and_leaves_it_running(tmp_path):
    psutil = pytest.importorskip("psutil")
    pytest.importorskip("ray")
    run_in_process(*SMALL, *SGD, f"run_dir={tmp_path / 'one'}")
    with cluster_of_two_nodes() as (cluster, address):
        before, seen, stop = len(psutil.Process(cluster.pid).children(recursive=True)), [], threading.Event()
        watcher = threading.Thread(target=lambda: seen.append(raylets_with_actors(cluster, stop)))
        watcher.start()
        try:
            run_in_process(*SMALL, *SGD, f"run_dir={tmp_path / 'two'}", "engine=ray", "engine.actors=2", f"engine.address={address}")
        finally:
            stop.set()
            watcher.join()
        assert before >= 3, "the cluster runs apart from us"
        assert len(seen[0]) == 2, "an actor on each node"
        assert cluster.poll() is None
        assert not actors_of(cluster), "our actors are gone"
        raylets = [each for each in psutil.Process(cluster.pid).children(recursive=True) if each.pid in seen[0]]
        assert len(raylets) == 2, "the cluster has stayed"
    check_same(tmp_path / "one", tmp_path / "two")


def test_an_address_without_a_cluster_is_refused(capsys):
    pytest.importorskip("ray")
    assert main(["run", *SMALL, "engine=ray", "engine.address=127.0.0.1:1"]) == 2
    assert "engine.address: no Ray cluster at '127.0.0.1:1'" in capsys.readouterr().err
