"""How the command was called, so that a hint can be typed as it stands, and how it is told to end."""

import logging
import os
import shlex
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

STOPPED, TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM
"""Exit codes after Ctrl-C and after SIGTERM, as a shell tells them."""


_QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}


def keep_libraries_quiet() -> None:
    """Libraries neither phone home nor print beside the run's own display; a value that the user has set stays."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    logging.getLogger("flwr").propagate = False  # it has a handler of its own: with a second one at the root each line came twice


def command() -> str:
    """Returns the words that start this program in a shell: "fedsim" where that is on the path, or else as it was started."""
    program = sys.argv[0]
    if program.endswith(("fedsim/__main__.py", "fedsim/cli/main.py")):
        return f"{shlex.quote(sys.orig_argv[0])} -m fedsim"
    found = shutil.which("fedsim")
    if os.path.basename(program) != "fedsim" or (found is not None and os.path.abspath(found) == os.path.abspath(program)):
        return "fedsim"
    return shlex.quote(program)


@contextmanager
def terminated_as_interrupted() -> Iterator[list[int]]:
    """SIGTERM ends the block as Ctrl-C does, with a KeyboardInterrupt; yields a list that holds the signal once it has come."""
    came: list[int] = []

    def interrupt(number: int, frame: object) -> None:
        came.append(number)
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield came  # whoever has called decides what the signal does
        return
    signal.signal(signal.SIGTERM, interrupt)
    try:
        yield came
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
