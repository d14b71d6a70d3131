"""The same experiment through Flower's own runtime: `flwr run .` with local simulation, in separate processes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
OVERRIDES = (
    *("data.train_examples=30", "data.test_examples=8", "federation.clients=4", "federation.rounds=2", "training.batch_size=2"),
    *("training.local_steps=2", "adapter.rank=4", "adapter.init_samples=4", "evaluation.max_new_tokens=4"),
)


@pytest.fixture
def flower_home(tmp_path):
    """Yields a separate Flower folder, then terminates the SuperLink that `flwr run` leaves behind in it."""
    home = tmp_path / "flower"
    yield home
    for process in psutil.process_iter():
        try:
            started_here = process.environ().get("FLWR_HOME") == str(home)
        except psutil.Error:
            continue
        if started_here:
            process.terminate()


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.skipif(shutil.which("ray", path=str(Path(sys.executable).parent)) is None, reason="needs the extra simulation")
def test_flwr_run_matches_fedsim_run_in_transfers_tokens_and_losses(flower_home, tmp_path):
    bin_folder = Path(sys.executable).parent
    environment = os.environ | {
        "FLWR_HOME": str(flower_home),
        "PATH": f"{bin_folder}:{os.environ['PATH']}",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
    }
    folders = {name: tmp_path / name for name in ("flwr", "fedsim")}
    overrides = " ".join((*OVERRIDES, f"run_dir={folders['flwr']}"))
    with (tmp_path / "log").open("w") as log:  # a file: the SuperLink would keep a pipe open
        command = [bin_folder / "flwr", "run", ".", "--stream", "--run-config", f'overrides="{overrides}"']
        subprocess.run(command, cwd=ROOT, env=environment, stdout=log, stderr=log, timeout=360, check=True)
    assert (folders["flwr"] / "summary.json").exists(), (tmp_path / "log").read_text()
    subprocess.run([bin_folder / "fedsim", "run", *OVERRIDES, f"run_dir={folders['fedsim']}"], check=True, capture_output=True, timeout=200)
    theirs, ours = (json.loads((folder / "summary.json").read_text()) for folder in folders.values())
    assert theirs["communication"] == ours["communication"]
    assert theirs["training"]["tokens"] == ours["training"]["tokens"]
    for task, found in ours["evaluation"].items():
        assert theirs["evaluation"][task]["final"]["loss"] == pytest.approx(found["final"]["loss"], rel=1e-2)
