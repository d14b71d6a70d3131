"""Calls Flower's command line for what only Flower can do: submitting, listing and following runs, and registering nodes."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fedsim.errors import UserError, nearest

FLWR = (sys.executable, "-m", "flwr.cli.app")
ACTION_SECONDS, CONFIG_SECONDS, LOG_SECONDS = 120.0, 60.0, 30.0
"""Time limits of a request to a SuperLink, of reading Flower's configuration, and of showing a log."""


def flwr(*words: str) -> dict[str, Any]:
    """Returns the JSON that `flwr WORDS --format json` prints. Raises UserError with the reason if it fails or takes too long."""
    done = _call(*words, "--format", "json", timeout=ACTION_SECONDS)
    found = _values(done.stdout)
    if done.returncode or not found.get("success"):
        reason = found.get("error-message") or done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}"
        raise UserError(f"flwr {words[0]}: {' '.join(str(reason).split())[:500]}")
    return found


@contextmanager
def asking(superlink: str, key: str) -> Iterator[None]:
    """Explains a UserError in the block if `key` names no SuperLink of Flower's configuration, or one whose Control API is not served."""
    try:
        yield
    except UserError as error:
        if "404 Not Found" in str(error):  # of a gateway, which forwards SuperNodes only
            raise UserError(
                f"{error} {key}: expected the Control API of a SuperLink, but {superlink!r} does not serve it. "
                "Run this on the SuperLink's machine, or give the address of its Control API in FLWR_HOME."
            ) from None
        known = _values(_call("config", "list", "--format", "json", timeout=CONFIG_SECONDS).stdout).get("superlink", [])
        if not known or superlink in known:
            raise
        raise UserError(
            f"{key}: expected a SuperLink of Flower's configuration, one of {', '.join(known)}, got {superlink!r}."
            f"{nearest(superlink, known)} Give one of them, or point FLWR_HOME to the folder server/flwr of your federation."
        ) from None


def log_of(run_id: str, superlink: str) -> str:
    """Returns the log of a run so far, "" if there is none. Raises UserError if Flower does not answer in time."""
    return _call("log", run_id, superlink, "--show", timeout=LOG_SECONDS).stdout


def _values(text: str) -> dict[str, Any]:
    """Returns the JSON object in a command's output, empty if there is none."""
    try:
        found = json.loads(text[text.find("{") : text.rfind("}") + 1])
    except ValueError:
        return {}
    return dict(found)


def _call(*words: str, timeout: float) -> "subprocess.CompletedProcess[str]":
    try:
        return subprocess.run([*FLWR, *words], capture_output=True, text=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired as error:
        raise UserError(f"flwr {words[0]}: expected an answer of the SuperLink within {timeout:g} s, got none.") from error


def following(run_id: str, superlink: str) -> "subprocess.Popen[str]":
    """Starts and returns a process whose stdout is the log of a run, from its beginning until the run ends."""
    command = [*FLWR, "log", run_id, superlink, "--stream"]
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def run_facts(run_id: str, superlink: str) -> dict[str, Any]:
    """Returns Flower's record of a run, such as its status."""
    (found,) = flwr("list", superlink, "--run-id", run_id)["runs"]
    return dict(found)
