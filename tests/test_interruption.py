"""Ctrl-C is not lost even if Python swallows it. The tests send the real signal to this process."""

import json
import os
import signal
import time

import pytest

from fedsim.cli.main import main
from fedsim.interruption import interruptible, raise_if_due
from fedsim.progress import Progress

swallows = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def _default_sigint_handler():
    """Installs Python's SIGINT handler: background jobs of a shell ignore the signal."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class InterruptedInItsDestructor:
    """An object whose destructor is running when the signal comes."""

    def __init__(self, number=signal.SIGINT):
        self._number = number

    def __del__(self):
        os.kill(os.getpid(), self._number)
        time.sleep(5)


@swallows
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_a_destructor_swallows_is_kept(number):
    with interruptible() as received:
        raise_if_due()
        InterruptedInItsDestructor(number)
        assert received == [number], "the destructor has swallowed it"
        with pytest.raises(KeyboardInterrupt):
            raise_if_due()
    raise_if_due()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_signal_that_is_ignored_stays_ignored():
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as nohup and a shell's background do
    with interruptible() as received:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        assert not received


@swallows
def test_a_run_stops_after_the_round_in_which_ctrl_c_was_swallowed(tmp_path, monkeypatch, capsys):
    finished = Progress.round_finished

    def finish_and_interrupt(self, number, *facts):
        finished(self, number, *facts)
        if number == 2:
            InterruptedInItsDestructor()

    monkeypatch.setattr(Progress, "round_finished", finish_and_interrupt)
    options = ["federation.clients=2", "federation.rounds=50", "data.train_examples=20", "data.test_examples=1", "adapter.rank=2"]
    options += ["adapter.init=orthogonal", "evaluation.max_new_tokens=1", "training.local_steps=1", f"run_dir={tmp_path / 'run'}"]
    assert main(["run", *options]) == 130
    assert f"run_dir={tmp_path / 'run'} resume=true" in capsys.readouterr().err
    events = [json.loads(line) for line in (tmp_path / "run/events.jsonl").read_text().splitlines()]
    assert [event["round"] for event in events if event["kind"] == "round"] == [1, 2]
    assert events[-1]["kind"] == "interrupted"
