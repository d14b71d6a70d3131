"""Measurements that need a process of their own: for a peer with its own runtime, or for untouched memory."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from experiments.benchmarks.suite import SkippedError
from fedsim.cli.calling import QUIET

ROOT = Path(__file__).parents[2]
OFFLINE = {**QUIET, "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "HF_HUB_OFFLINE": "1"}
MARK = "RESULT "


def require(*modules: str) -> None:
    """Raises SkippedError if one of a peer's modules is not installed."""
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise SkippedError(f"{module} is not installed: pip install -e '.[dev,simulation,bench]'")


def call(module: str, arguments: dict[str, Any], *, timeout: float = 600.0, environment: dict[str, str] | None = None) -> dict[str, Any]:
    """Runs `python -m module JSON` and returns the JSON after `MARK` in its output; it sees no GPU unless `environment` names one.

    Raises RuntimeError with its last line of output if it fails, and subprocess.TimeoutExpired.
    """
    given = {"CUDA_VISIBLE_DEVICES": ""} | (environment or {})  # all sections but g measure the CPU
    path = os.pathsep.join(filter(None, [given.get("PYTHONPATH", ""), str(ROOT), os.environ.get("PYTHONPATH", "")]))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", module, json.dumps(arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=ROOT,
        env={**os.environ, **OFFLINE, **given, "PYTHONPATH": path},
    )
    for line in reversed(done.stdout.splitlines()):
        if line.startswith(MARK):
            return json.loads(line.removeprefix(MARK))
    last = (done.stderr or done.stdout).strip().splitlines()[-1:] or ["nothing was said"]
    raise RuntimeError(f"{module} ended with code {done.returncode}: {last[0][:200]}")


def answer(value: dict[str, Any]) -> None:
    """Prints the value for `call` to return."""
    print(f"{MARK}{json.dumps(value)}", flush=True)


def asked() -> dict[str, Any]:
    """Returns the arguments of `call`."""
    return json.loads(sys.argv[1])
