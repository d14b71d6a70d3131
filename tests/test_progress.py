"""The progress display on a terminal, in a pipe, and when it is off."""

import io
import os
import re
import shlex
import signal
import sys
import time

import pytest
import torch

import fedsim.progress
from fedsim.cli.calling import program
from fedsim.cli.compose import compose
from fedsim.cli.main import main
from fedsim.experiment import run
from fedsim.progress import Progress, duration, size


class Terminal(io.StringIO):
    """A file that says it is a terminal."""

    def isatty(self):
        return True


REPORT = {"train_loss": 1.25, "tokens": 6000, "wall_seconds": 2.0}
NOTHING = {"uplink_bytes": 0, "downlink_bytes": 0, "setup_bytes": 0}
SENT = {"uplink_bytes": 1_200_000, "downlink_bytes": 500, "setup_bytes": 0, "uplink_parameters": 7}


@pytest.fixture
def clock(monkeypatch):
    """A clock that advances only when a test sets it."""

    class Clock:
        now = 100.0

        def monotonic(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(fedsim.progress, "time", clock)
    return clock


def play_run(file, quiet=False):
    with Progress(4, [0, 4], quiet=quiet, file=file) as progress:
        progress.phase("evaluating")
        progress.done(3, 10)
        progress.evaluated(0, 5.0)
        progress.round_started(1, 25, NOTHING)
        for part in range(1, 5):
            progress.step(100, torch.tensor(2.5), part / 4)
        progress.round_finished(1, REPORT, SENT)
        progress.note("[bold] is no markup")
    return file.getvalue()


def shown(text):
    """Removes control sequences, which leaves the text in the order in which it is drawn."""
    return re.sub(r"\x1b\[[^A-Za-z]*[A-Za-z]", "", text)


@pytest.mark.parametrize("variable", ["FORCE_COLOR", "TTY_COMPATIBLE", "NO_COLOR"])
def test_a_pipe_gets_one_plain_line_for_each_phase_and_round(monkeypatch, variable, clock):
    monkeypatch.setenv(variable, "1")
    assert play_run(io.StringIO()) == (
        "evaluating\n"
        "round 1/4  25 clients  loss 1.2500  3,000 tokens/s  up 1.2 MB  down 500 B  0:11 left\n"  # 3 rounds of 2 s, an evaluation of 5 s
        "[bold] is no markup\n"
    )


def test_nothing_is_shown_when_quiet():
    assert play_run(io.StringIO(), quiet=True) == ""


def test_a_terminal_shows_the_round_and_its_cursor_is_restored(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    text = play_run(Terminal())
    assert "round 1/4  25 clients" in shown(text)
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") >= 1


def test_the_live_display_shows_loss_speed_bytes_and_time_left_within_80_columns(monkeypatch, clock):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    file = Terminal()
    with Progress(4, [0, 4], file=file) as progress:
        progress.evaluated(0, 3.0)
        progress.round_started(2, 25, SENT)
        clock.now += 10.0
        progress.step(50_000, torch.tensor(2.5), 0.5)  # the round takes 20 s
        progress._bars.refresh()
        lines = shown(file.getvalue()).splitlines()[-2:]
    assert lines[0].strip("\u2501\u2578\u257a ") == "round 2/4  0:53 left  up 1.2 MB  down 500 B"  # 2.5 rounds and 3 s
    assert lines[1].strip("\u2501\u2578\u257a ") == "training 25 clients  loss 2.500  5,000 tokens/s"


def test_a_dumb_terminal_gets_plain_lines(monkeypatch, clock):
    monkeypatch.setenv("TERM", "dumb")
    assert play_run(Terminal()) == play_run(io.StringIO())


def test_the_time_left_is_estimated_from_this_process(clock):
    file = io.StringIO()
    with Progress(10, [0, 5, 10], file=file) as progress:  # resumed after round 3: no evaluation has been timed yet
        for number in (4, 5):
            progress.round_started(number, 2, SENT)
            progress.round_finished(number, REPORT, SENT)
        progress.evaluated(5, 30.0)
        progress.round_started(6, 2, SENT)
        progress.round_finished(6, REPORT | {"wall_seconds": 5.0}, SENT)
    left = [line.split("  ")[-1] for line in file.getvalue().splitlines()]
    assert left == ["0:12 left", "0:10 left", "0:42 left"]  # 6 * 2, 5 * 2, 4 * 3 + 30


def test_no_time_is_left_after_the_last_evaluation(monkeypatch, clock):
    monkeypatch.setenv("TERM", "xterm")
    file = Terminal()
    with Progress(1, [0, 1], file=file) as progress:
        progress.evaluated(0, 30.0)
        progress.round_started(1, 2, SENT)
        progress.round_finished(1, REPORT, SENT)
        progress.evaluated(1, 30.0)
        progress.phase("writing")
        progress._bars.refresh()
        text = shown(file.getvalue())
    assert "0:30 left" in text
    assert "left" not in "".join(text.splitlines()[-2:])


def test_progress_of_a_round_in_several_cohorts_goes_from_start_to_end_once(monkeypatch, tmp_path):
    fractions = []
    monkeypatch.setattr(Progress, "step", lambda self, num_tokens, loss, fraction: fractions.append(fraction))
    small = ["data.train_examples=10", "data.test_examples=1", "federation.clients=5", "federation.rounds=1", "training.batch_size=1"]
    small += ["training.local_steps=2", "evaluation.max_new_tokens=1", "adapter.rank=2", "adapter.init=orthogonal"]
    run(compose([*small, "engine.cohort_size=2", f"run_dir={tmp_path / 'run'}"]), quiet=True)
    assert fractions == sorted(fractions)
    assert {0.2, 0.4, 0.6, 0.8, 0.9, 1.0} == {round(fraction, 9) for fraction in fractions}  # cohorts of 2, 2 and 1, two steps each


def test_the_cursor_is_shown_again_after_ctrl_c(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    file = Terminal()
    with pytest.raises(KeyboardInterrupt), Progress(4, file=file):
        raise KeyboardInterrupt
    assert file.getvalue().rfind("\x1b[?25h") > file.getvalue().rfind("\x1b[?25l")


def test_the_loss_is_read_only_a_few_times_a_second(monkeypatch):
    class Counted:
        reads = 0

        def __float__(self):
            Counted.reads += 1
            return 1.0

    monkeypatch.setenv("TERM", "xterm")
    with Progress(4, file=Terminal()) as progress:
        progress.round_started(1, 5, NOTHING)
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


def test_sigterm_ends_a_run_like_ctrl_c_but_with_exit_code_143(monkeypatch, capsys):
    def terminated(config):
        assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL, "the signal would end the tests"
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        except KeyboardInterrupt:
            raise KeyboardInterrupt("runs/mine") from None

    monkeypatch.setattr("fedsim.experiment.run", terminated)
    assert main(["run", "seed=1"]) == 143
    assert capsys.readouterr().err.strip() == "Stopped. Go on with: fedsim run seed=1 run_dir=runs/mine resume=true"
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.parametrize(
    ("argv0", "orig", "told"),
    [
        ("my env/bin/fedsim", ["my env/bin/python", "my env/bin/fedsim"], "'my env/bin/fedsim'"),
        ("/x/fedsim/__main__.py", [".venv/bin/python", "-m", "fedsim"], ".venv/bin/python -m fedsim"),
        ("/x/pytest", ["python"], "fedsim"),
    ],
)
def test_the_hint_repeats_the_command_as_it_was_called(monkeypatch, argv0, orig, told):
    monkeypatch.setattr(sys, "argv", [argv0])
    monkeypatch.setattr(sys, "orig_argv", orig)
    assert program() == told


def test_ctrl_c_prints_the_users_own_command_to_resume(monkeypatch, capsys):
    def stop(config):
        raise KeyboardInterrupt(*where)

    monkeypatch.setattr("fedsim.experiment.run", stop)
    words = ["run", "seed=1", "data.path=my data", "run_dir=somewhere", "overwrite=true"]
    where = ["runs/my run"]
    assert main(words) == 130
    hint = capsys.readouterr().err.strip().partition("Go on with: ")[2]
    assert shlex.split(hint) == ["fedsim", "run", "seed=1", "data.path=my data", "run_dir=runs/my run", "resume=true"]
    where.clear()
    assert main(words) == 130
    assert capsys.readouterr().err.strip() == "Stopped before the run began."
