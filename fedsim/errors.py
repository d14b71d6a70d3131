"""Exceptions whose messages are for users.

The message of a UserError is one line: what was expected, what was given and what to do. The command line prints it and exits with code 2.
"""


class UserError(Exception):
    """Wrong or contradictory input; nothing was lost or half written."""


class RunFailedError(Exception):
    """A remote run did not finish; the message gives its last known state."""


class LeftRunningError(KeyboardInterrupt):
    """Ctrl-C stopped following a remote run, which continues; the argument says how to follow, stop and resume it."""


class RunStopped(Exception):
    """A run cannot continue for a reason outside its configuration; its state is saved in its folder, from which it can be resumed.

    The command line prints the one-line message and exits with code 1.
    """


def nearest(word: str, allowed: list[str]) -> str:
    """Returns " Did you mean 'x'?" for the allowed word closest to `word`, or "" if none is close."""
    from difflib import get_close_matches

    close = get_close_matches(word, allowed, n=1, cutoff=0.55)
    return f" Did you mean {close[0]!r}?" if close else ""
