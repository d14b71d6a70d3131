"""What a person sees while a run goes on: a live display on a terminal, one plain line a phase and a round elsewhere.

Sizes are decimal: 1 MB is 10^6 bytes. Losses are read from the device a few times a second, never at every pass.
"""

import sys
import time
from typing import IO, Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress as Bars, TaskID, TextColumn
from torch import Tensor

REFRESH = 0.25
"""Seconds between two readings of the loss."""


def size(num_bytes: float) -> str:
    """Returns bytes in decimal units: "4.2 MB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(num_bytes) < 999.5:
            return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} TB"


def duration(seconds: float) -> str:
    """Returns "0:42", "12:05" or "1:02:03"."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Progress:
    """The display of one run. As a context manager it leaves the terminal as it was, however the run ends."""

    def __init__(self, rounds: int, *, quiet: bool = False, file: IO[str] | None = None) -> None:
        console = Console(file=file or sys.stderr, quiet=quiet, highlight=False)
        self._console, self._rounds, self._live = console, rounds, console.is_terminal and not quiet
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), TextColumn("{task.fields[facts]}"))
        self._bars = Bars(*columns, console=console, transient=True, disable=not self._live)
        self._bar: TaskID = self._bars.add_task("starting", total=1.0, facts="")
        self._number = self._clients = self._tokens = 0
        self._bytes = {"uplink_bytes": 0, "downlink_bytes": 0, "setup_bytes": 0}
        self._begun = self._read = 0.0
        self._spent: list[float] = []  # seconds of each round in this process
        self._loss = ""

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bars.stop()

    def phase(self, text: str) -> None:
        """Says what is going on between rounds."""
        self._bars.update(self._bar, description=text, completed=0.0, total=None if self._live else 1.0, facts="")
        if not self._live:
            self._line(text)

    def done(self, part: int, whole: int) -> None:
        """Says how far the phase has come."""
        self._bars.update(self._bar, total=float(whole), completed=float(part), facts=f"{part}/{whole}")

    def note(self, text: str) -> None:
        """Leaves a line that stays."""
        self._line(text)

    def round_started(self, number: int, num_clients: int) -> None:
        """Begins round `number` with that many clients."""
        self._number, self._clients, self._tokens, self._loss = number, num_clients, 0, ""
        self._begun = time.monotonic()
        self._bars.update(self._bar, description=f"round {number}/{self._rounds}", total=1.0, completed=0.0, facts=f"{num_clients} clients")

    def step(self, num_tokens: int, loss: Tensor, fraction: float) -> None:
        """Counts one pass in this process; `fraction` of the round's steps are done."""
        self._tokens += num_tokens
        now = time.monotonic()
        if not self._live or now - self._read < REFRESH:
            return
        self._read, self._loss = now, f"  loss {float(loss):.3f}"
        rate = self._tokens / max(now - self._begun, 1e-9)
        self._bars.update(
            self._bar, completed=fraction, facts=f"{self._clients} clients{self._loss}  {rate:,.0f} tokens/s{self._left(fraction)}"
        )

    def round_finished(self, number: int, report: dict[str, Any]) -> None:
        """Leaves the line of a round: clients, loss, speed, bytes so far, time left."""
        self._spent.append(report["wall_seconds"])
        for name in self._bytes:
            self._bytes[name] += report[name]
        rate = report["tokens"] / max(report["wall_seconds"], 1e-9)
        setup = f"  set-up {size(report['setup_bytes'])}" if report["setup_bytes"] else ""
        width = len(str(self._rounds))
        self._line(
            f"round {number:>{width}}/{self._rounds}  {self._clients} clients  loss {report['train_loss']:.4f}  {rate:,.0f} tokens/s  "
            f"up {size(report['uplink_bytes'])}  down {size(report['downlink_bytes'])}{setup}{self._left(1.0)}"
        )

    def _left(self, fraction: float) -> str:
        """Time left, from the rounds so far; before the first has ended, from its part that is done."""
        if self._spent and fraction == 1.0:
            seconds = sum(self._spent) / len(self._spent) * (self._rounds - self._number)
        elif self._spent:
            seconds = sum(self._spent) / len(self._spent) * (self._rounds - self._number + 1 - fraction)
        elif fraction > 0:
            seconds = (time.monotonic() - self._begun) * ((self._rounds - self._number + 1) / fraction - 1)
        else:
            return ""
        return f"  {duration(seconds)} left" if seconds > 0 else ""

    def _line(self, text: str) -> None:
        self._console.print(text, markup=False, soft_wrap=True)
