"""The progress display of a run: live on a terminal, otherwise one plain line per phase and round.

Sizes are decimal: 1 MB is 10^6 bytes. Losses are read from the device only a few times a second, not on every pass.
"""

import sys
import time
from collections.abc import Collection
from statistics import fmean
from typing import IO, TYPE_CHECKING, Any, Self

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bars

from fedsim.core.missing import missing_text

if TYPE_CHECKING:
    from torch import Tensor

    from fedsim.core.communication import Totals

REFRESH = 0.25
"""Seconds between two readings of the loss."""

UNITS = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def size(num_bytes: float) -> str:
    """Returns bytes in decimal units: "4.2 MB"."""
    unit = next((unit for unit, bytes_ in UNITS.items() if abs(num_bytes) < 999.5 * bytes_), "TB")
    return f"{num_bytes / UNITS[unit]:.3g} {unit}"


def duration(seconds: float) -> str:
    """Returns "0:42", "12:05" or "1:02:03"."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def plural(number: int, noun: str) -> str:
    """Returns "1 round" or "1,000 rounds"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


class Progress:
    """The display of one run, on stderr by default. As a context manager it restores the terminal, however the run ends.

    `evaluations` are the rounds after which the model is evaluated, which the time left allows for. Output that is not a terminal gets no
    control characters, whatever the environment's colour settings.
    """

    def __init__(self, rounds: int, evaluations: Collection[int] = (), *, quiet: bool = False, file: IO[str] | None = None) -> None:
        file = file or sys.stderr
        self._console = Console(file=file, quiet=quiet, highlight=False, force_terminal=file.isatty())
        self._live = self._console.is_terminal and not self._console.is_dumb_terminal and not quiet
        columns = (BarColumn(bar_width=16), TextColumn("{task.description}", markup=False))
        self._bars = Bars(*columns, console=self._console, transient=True, disable=not self._live, refresh_per_second=1 / REFRESH)
        self._whole = self._bars.add_task("starting", total=rounds)
        self._part = self._bars.add_task("", total=None)
        self._rounds, self._evaluations = rounds, evaluations
        self._round_seconds: list[float] = []  # both lists: of this process only
        self._evaluation_seconds: list[float] = []
        self._number = self._clients = self._tokens = 0
        self._evaluated = -1  # the round after which the latest evaluation ran
        self._sent: Totals = {}
        self._text = ""
        self._begun = self._read = 0.0
        self._ends: float | None = None

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bars.stop()

    def phase(self, text: str) -> None:
        """Shows the current phase between rounds."""
        if self._live:
            self._show_part(text, None)
        else:
            self._line(text)

    def done(self, part: int, whole: int) -> None:
        """Shows the progress of the phase."""
        if self._live:
            self._bars.update(self._part, total=whole, completed=part, description=f"{self._text}  {part:,}/{whole:,}")
            self._show_whole()

    def evaluated(self, number: int, seconds: float) -> None:
        """Records the duration of the evaluation after round `number`."""
        self._evaluation_seconds.append(seconds)
        self._evaluated = number
        self._estimate_end(number)

    def note(self, text: str) -> None:
        """Prints a permanent line."""
        self._line(text)

    def round_started(self, number: int, num_clients: int, sent: "Totals") -> None:
        """Starts the display of round `number` with `num_clients` clients; `sent` holds the bytes sent before it."""
        self._number, self._clients, self._tokens, self._sent = number, num_clients, 0, sent
        self._begun = time.monotonic()
        if self._live:
            self._bars.update(self._whole, completed=number - 1)
            self._show_part(f"training {plural(num_clients, 'client')}", 1.0)

    def step(self, num_tokens: int, loss: "Tensor", fraction: float) -> None:
        """Counts one pass in this process; `fraction` of the round is done. Costs a microsecond unless a loss reading is due."""
        self._tokens += num_tokens
        now = time.monotonic()
        if not self._live or now - self._read < REFRESH:
            return
        self._read = now
        rate = self._tokens / max(now - self._begun, 1e-9)
        text = f"{self._text}  loss {float(loss):.3f}  {rate:,.0f} tokens/s"
        self._bars.update(self._part, completed=fraction, description=text)
        self._bars.update(self._whole, completed=self._number - 1 + fraction)
        self._estimate_end(self._number - 1 + fraction)
        self._show_whole()

    def round_finished(self, number: int, report: dict[str, Any], sent: "Totals") -> None:
        """Prints the line of a round: clients, loss, speed, bytes `sent` so far, time left."""
        self._round_seconds.append(report["wall_seconds"])
        self._sent = sent
        self._estimate_end(number)
        rate = report["tokens"] / max(report["wall_seconds"], 1e-9)
        private = "epsilon" in report  # clients then report neither loss nor tokens
        facts = f"epsilon {report['epsilon']:.3f}" if private else f"loss {report['train_loss']:.4f}  {rate:,.0f} tokens/s"
        missing = missing_text(report.get("missing", {}))
        clients = f"{plural(self._clients, 'client')}{f', {missing}' if missing else ''}"
        self._line(f"{self._heading(number)}  {clients}  {facts}{self._sent_so_far()}{self._time_left()}")
        if self._live:
            self._bars.update(self._whole, completed=number)

    def _estimate_end(self, finished: float) -> None:
        """Estimates the end of the run from the rounds and evaluations so far, or from the finished part of the first round."""
        part = finished - (self._number - 1)
        if not self._round_seconds and (part <= 0 or not self._number):
            return
        now = time.monotonic()
        each = fmean(self._round_seconds) if self._round_seconds else (now - self._begun) / part
        evaluation = fmean(self._evaluation_seconds) if self._evaluation_seconds else 0.0
        waiting = sum(after >= finished and after > self._evaluated for after in self._evaluations)
        self._ends = now + each * (self._rounds - finished) + evaluation * waiting

    def _show_part(self, text: str, total: float | None) -> None:
        """Starts a new bar for the current work; it pulses without a total."""
        self._text = text
        self._bars.remove_task(self._part)
        self._part = self._bars.add_task(text, total=total)
        self._show_whole()

    def _show_whole(self) -> None:
        self._bars.update(self._whole, description=f"{self._heading(self._number)}{self._time_left()}{self._sent_so_far()}")

    def _heading(self, number: int) -> str:
        return f"round {number:>{len(str(self._rounds))}}/{self._rounds}"

    def _sent_so_far(self) -> str:
        kinds = {"up": "uplink_bytes", "down": "downlink_bytes", "set-up": "setup_bytes"}
        return "".join(f"  {word} {size(self._sent[name])}" for word, name in kinds.items() if self._sent.get(name))

    def _time_left(self) -> str:
        seconds = 0.0 if self._ends is None else self._ends - time.monotonic()
        return f"  {duration(seconds)} left" if seconds >= 0.5 else ""

    def _line(self, text: str) -> None:
        self._console.print(text, markup=False, soft_wrap=True)
