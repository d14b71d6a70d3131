"""The command's name for hints that can be pasted, the width of its output, and the settings that keep libraries quiet."""

import logging
import os
import shlex
import shutil
import sys

QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}
"""Environment variables that keep libraries from phoning home and from printing into the run's display."""


def keep_libraries_quiet() -> None:
    """Sets the variables of `QUIET` that the user has not set, and stops flwr's log lines from being printed twice."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    logging.getLogger("flwr").propagate = False  # flwr has its own handler; a second one at the root would repeat each line


def width() -> int:
    """Returns the width of a line of prose: the terminal's, limited to 80 to 140 characters; 120 without a terminal."""
    return max(80, min(140, shutil.get_terminal_size((120, 24)).columns))


def program() -> str:
    """Returns the shell words that start this program: "fedsim", unless it runs as `-m fedsim` or from a script that is not on PATH."""
    invoked = sys.argv[0]
    if invoked.endswith(("fedsim/__main__.py", "fedsim/cli/main.py")):
        return f"{shlex.quote(sys.orig_argv[0])} -m fedsim"
    found = shutil.which("fedsim")
    if os.path.basename(invoked) != "fedsim" or (found is not None and os.path.abspath(found) == os.path.abspath(invoked)):
        return "fedsim"
    return shlex.quote(invoked)
