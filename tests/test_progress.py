"""The display on a terminal, in a pipe, and when nobody wants it."""

import io
import re

import pytest
import torch

from fedsim.progress import Progress, duration, size


class Terminal(io.StringIO):
    """A file that says it is a terminal."""

    def isatty(self):
        return True


REPORT = {"train_loss": 1.25, "tokens": 6000, "wall_seconds": 2.0, "uplink_bytes": 1_200_000, "downlink_bytes": 500, "setup_bytes": 0}


def go_through(file, quiet=False):
    with Progress(4, quiet=quiet, file=file) as progress:
        progress.phase("evaluating")
        progress.done(3, 10)
        progress.round_started(1, 25)
        for part in range(1, 5):
            progress.step(100, torch.tensor(2.5), part / 4)
        progress.round_finished(1, REPORT)
        progress.note("[bold] is no markup")
    return file.getvalue()


def test_a_pipe_gets_one_plain_line_for_each_phase_and_round():
    lines = go_through(io.StringIO()).splitlines()
    assert lines[0] == "evaluating"
    assert lines[1] == "round 1/4  25 clients  loss 1.2500  3,000 tokens/s  up 1.2 MB  down 500 B  0:06 left"
    assert lines[2:] == ["[bold] is no markup"]


def test_nothing_is_shown_when_quiet():
    assert go_through(io.StringIO(), quiet=True) == ""


def test_a_terminal_shows_the_round_and_gets_its_cursor_back(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    text = go_through(Terminal())
    assert "round 1/4" in re.sub(r"\x1b\[[^A-Za-z]*[A-Za-z]", "", text)
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") >= 1


def test_the_terminal_is_left_as_it_was_after_ctrl_c(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    file = Terminal()
    with pytest.raises(KeyboardInterrupt), Progress(4, file=file):
        raise KeyboardInterrupt
    assert file.getvalue().rfind("\x1b[?25h") > file.getvalue().rfind("\x1b[?25l")


def test_the_loss_is_read_a_few_times_a_second_only(monkeypatch):
    class Counted:
        reads = 0

        def __float__(self):
            Counted.reads += 1
            return 1.0

    monkeypatch.setenv("TERM", "xterm")
    with Progress(4, file=Terminal()) as progress:
        progress.round_started(1, 5)
        for _ in range(5000):
            progress.step(1, Counted(), 0.5)
    assert 1 <= Counted.reads <= 20


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (1_234_567, "1.23 MB"), (999_600, "1 MB"), (5e9, "5 GB"), (5e12, "5 TB")],
)
def test_sizes_are_decimal(value, text):
    assert size(value) == text


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (725, "12:05"), (3723, "1:02:03")])
def test_durations_read_like_a_clock(seconds, text):
    assert duration(seconds) == text
