"""The client app is thin: Flower starts it for each message, so it must cost little."""

import subprocess
import sys

HEAVY = {"torch", "transformers", "datasets", "opacus", "hydra", "ray", "matplotlib"}


def test_the_client_app_and_its_forwarding_import_nothing_heavy():
    script = "import sys, clients.app, clients.forwarding, clients.worker\nprint(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert HEAVY.isdisjoint(done.stdout.split())
