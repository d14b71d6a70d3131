"""Errors that a user can mend.

A message is one line that says what was expected, what came and what to do. The command line prints it and exits with code 2.
"""


class UserError(Exception):
    """Bad input or a contradiction in it; nothing was lost or half written."""


class RunFailedError(Exception):
    """A run that was going on elsewhere has not come to its end; the message says what was heard of it last."""


class LeftRunningError(KeyboardInterrupt):
    """Ctrl-C has ended the watching, not the run, which goes on elsewhere; the argument says how to follow, stop and resume it."""


class RunStopped(Exception):
    """A run that cannot go on for a reason outside of its configuration; what it has is in its folder, from where it can be resumed.

    The command line prints the message, one line, and exits with code 1.
    """


def nearest(word: str, allowed: list[str]) -> str:
    """Returns " Did you mean 'x'?" for the allowed word closest to `word`, or "" when none is close."""
    from difflib import get_close_matches

    close = get_close_matches(word, allowed, n=1, cutoff=0.55)
    return f" Did you mean {close[0]!r}?" if close else ""
