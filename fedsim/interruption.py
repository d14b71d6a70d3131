"""Ctrl-C and SIGTERM: both end a run cleanly, and neither is lost.

Python swallows a KeyboardInterrupt that arrives while a destructor or a callback of a library runs, as Ray's often do: it prints it and
goes on. The signal is therefore remembered, and `raise_if_due` raises it again where a run can be stopped.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOPPED, TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM
"""Exit codes after Ctrl-C and after SIGTERM, as a shell tells them."""

_came: list[int] = []


@contextmanager
def interruptible() -> Iterator[list[int]]:
    """Within the block SIGTERM raises a KeyboardInterrupt as Ctrl-C does; yields the list of the signals that have come, in order.

    In a thread, and where whoever has called decides what the signals do, nothing is changed and the list stays empty.
    """
    taken = {signal.SIGTERM: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}
    mine = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    before = {number: signal.signal(number, _interrupt) for number, usual in taken.items() if mine and signal.getsignal(number) is usual}
    try:
        yield _came if mine else []
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if mine:
            _came.clear()


def raise_if_due() -> None:
    """Raises KeyboardInterrupt if a signal has come within the block of `interruptible`."""
    if _came:
        raise KeyboardInterrupt


def _interrupt(number: int, frame: FrameType | None) -> None:
    _came.append(number)
    raise KeyboardInterrupt
