"""Handles Ctrl-C and SIGTERM: both end a run cleanly, and neither is lost.

Python prints and drops a KeyboardInterrupt that arrives in a destructor or a library's callback, as Ray has many. The signal is therefore
recorded, and `raise_if_due` raises it again where a run can stop.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOPPED, TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM
"""Exit codes after Ctrl-C and after SIGTERM, as in a shell."""

_received: list[int] = []


@contextmanager
def interruptible() -> Iterator[list[int]]:
    """Makes SIGTERM raise KeyboardInterrupt within the block, as Ctrl-C does; yields the list of received signals, in order.

    In a thread, or if the caller has its own signal handlers, nothing changes and the list stays empty.
    """
    taken = {signal.SIGTERM: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}
    mine = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    before = {number: signal.signal(number, _interrupt) for number, usual in taken.items() if mine and signal.getsignal(number) is usual}
    try:
        yield _received if mine else []
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if mine:
            _received.clear()


def raise_if_due() -> None:
    """Raises KeyboardInterrupt if a signal was received within the block of `interruptible`."""
    if _received:
        raise KeyboardInterrupt


def _interrupt(number: int, frame: FrameType | None) -> None:
    _received.append(number)
    raise KeyboardInterrupt
