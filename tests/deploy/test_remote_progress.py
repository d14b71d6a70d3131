"""Progress that a remote server shows is shown locally, call by call."""

import io

import pytest

from fedsim.errors import RunStopped, UserError
from fedsim.flower import remote_progress
from fedsim.flower.remote_progress import MARK, ForwardedProgress, ProgressFollower, forward
from fedsim.progress import Progress

REPORT = {"wall_seconds": 2.0, "tokens": 100, "train_loss": 1.5}
SENT = {"uplink_bytes": 1000, "downlink_bytes": 2000, "setup_bytes": 0}


def script(progress):
    """Shows the progress of a short run, as its server does."""
    with progress:
        progress.phase("loading model and data")
        progress.round_started(1, 3, {})
        progress.step(100, None, 0.5)  # from a process of the server; not sent
        progress.round_finished(1, REPORT, SENT)
        progress.evaluated(1, 0.5)
        progress.note("left out: nothing")


def test_a_log_cut_anywhere_shows_the_same_lines_as_a_local_run(capsys, monkeypatch):
    local_text = io.StringIO()
    script(Progress(1, [0, 1], file=local_text))
    script(ForwardedProgress(1, [0, 1]))
    forward("summary", {"rounds": 1})
    output = "INFO: something of Flower's\n" + capsys.readouterr().out
    remote_text = io.StringIO()
    monkeypatch.setattr(remote_progress, "Progress", lambda *arguments, quiet: Progress(*arguments, quiet=quiet, file=remote_text))
    shown = ProgressFollower()
    for start in range(0, len(output), 11):
        shown.feed(output[start : start + 11])
    shown.close()
    assert remote_text.getvalue() == local_text.getvalue()
    assert (shown.summary, shown.others) == ({"rounds": 1}, ["INFO: something of Flower's"])


def test_a_mistake_that_the_server_finds_raises_a_user_error_here(capsys):
    forward("mistake", "Expected more.")
    with pytest.raises(UserError, match=r"Expected more\."):
        ProgressFollower().feed(capsys.readouterr().out)


def test_a_stopped_server_stops_its_follower(capsys):
    forward("stopped", "No room.")
    with pytest.raises(RunStopped, match=r"No room\."):
        ProgressFollower().feed(capsys.readouterr().out)


def test_malformed_marked_lines_are_ignored():
    shown = ProgressFollower()
    shown.feed(f'{MARK}no json\n{MARK}[]\n{MARK}3\n{MARK}["close"]\n{MARK}["round_started"]\nlast\n')
    assert shown.summary is None
    assert shown.others[-1] == "last"
