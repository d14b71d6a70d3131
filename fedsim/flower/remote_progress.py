"""The progress display of a run on a remote server: the server's display calls travel as marked lines of its log.

Flower streams the log of a ServerApp to whoever follows the run; there each marked line is replayed as one call of the same display.
"""

import json
import sys
from collections.abc import Iterable
from typing import Any

from fedsim.errors import RunStopped, UserError
from fedsim.progress import Progress

MARK = "@fedsim "
CALLS = ("phase", "done", "evaluated", "note", "round_started", "round_finished")
SUMMARY, STARTED, MISTAKE, STOPPED = "summary", "started", "mistake", "stopped"


class ForwardedProgress(Progress):
    """Shows nothing itself, and forwards every call as a line on stdout."""

    def __init__(self, rounds: int, evaluations: Iterable[int] = (), *, quiet: bool = False) -> None:
        super().__init__(rounds, list(evaluations), quiet=True)
        forward(STARTED, rounds, list(evaluations))

    def __getattribute__(self, name: str) -> Any:
        if name in CALLS:
            return lambda *arguments: forward(name, *arguments)
        return super().__getattribute__(name)


def forward(name: str, *arguments: Any) -> None:
    """Writes one marked line."""
    sys.stdout.write(f"{MARK}{json.dumps([name, *arguments])}\n")
    sys.stdout.flush()


def marked(line: str) -> tuple[str, list[Any]]:
    """Returns the name and arguments of a marked line; the name is "" for any other line, even one that happens to contain the mark."""
    _, mark, text = line.partition(MARK)
    try:
        name, *arguments = json.loads(text) if mark else ("",)
        return str(name), arguments
    except (ValueError, TypeError):
        return "", []


class ProgressFollower:
    """Shows a run from the text of its log, which may arrive in arbitrary pieces; unmarked lines are not shown."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.summary: dict[str, Any] | None = None
        self._quiet, self._partial = quiet, ""
        self._progress: Progress | None = None
        self.others: list[str] = []  # the last lines not shown, for when the run fails

    def feed(self, text: str) -> None:
        """Shows the next piece of the log. Raises the UserError or RunStopped with which the server ended the run."""
        *lines, self._partial = (self._partial + text).split("\n")
        for line in lines:
            self._handle(line)

    def close(self) -> None:
        """Ends the display."""
        if self._progress is not None:
            self._progress.__exit__(None, None, None)
            self._progress = None

    def _handle(self, line: str) -> None:
        try:
            known = self._show(*marked(line))
        except (UserError, RunStopped):
            raise
        except Exception:  # a line of another version
            known = False
        if not known and line.strip():
            self.others = [*self.others[-30:], line]

    def _show(self, name: str, arguments: list[Any]) -> bool:
        """Replays the call of a line. Returns False if there is nothing to show."""
        if name == STARTED:
            self._progress = Progress(*arguments, quiet=self._quiet).__enter__()
        elif name == SUMMARY:
            self.summary = dict(arguments[0])
        elif name == MISTAKE:
            raise UserError(str(arguments[0]))
        elif name == STOPPED:
            raise RunStopped(str(arguments[0]))
        elif name in CALLS and self._progress is not None:
            getattr(self._progress, name)(*arguments)
        else:
            return False
        return True
