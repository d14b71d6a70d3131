"""How the command was called, so that hints can be copied as they are, how wide its output may be, and how libraries are kept quiet."""

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
"""Environment variables under which libraries neither phone home nor print beside the run's own display."""


def keep_libraries_quiet() -> None:
    """Sets what `QUIET` names; a value that the user has set stays."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    logging.getLogger("flwr").propagate = False  # it has a handler of its own: with a second one at the root each line came twice


def width() -> int:
    """Returns how many characters a line of prose may take: as many as the terminal has, between 80 and 140; 120 where there is none."""
    return max(80, min(140, shutil.get_terminal_size((120, 24)).columns))


def command() -> str:
    """Returns the words that start this program in a shell: "fedsim" where that is on the path, or else as it was started."""
    program = sys.argv[0]
    if program.endswith(("fedsim/__main__.py", "fedsim/cli/main.py")):
        return f"{shlex.quote(sys.orig_argv[0])} -m fedsim"
    found = shutil.which("fedsim")
    if os.path.basename(program) != "fedsim" or (found is not None and os.path.abspath(found) == os.path.abspath(program)):
        return "fedsim"
    return shlex.quote(program)
