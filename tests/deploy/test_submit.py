"""Following a run whose SuperLink goes away for a while, or for good."""

from datetime import datetime
from pathlib import Path

import pytest

from fedsim.config import Config
from fedsim.deploy import submit
from fedsim.errors import RunFailedError, UserError


def answers(monkeypatch, *found):
    """Flower's answers, one after the other, the last one again and again."""
    left = list(found)

    def facts(run_id, superlink):
        answer = left.pop(0) if len(left) > 1 else left[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(submit, "run_facts", facts)
    monkeypatch.setattr(submit, "LOOK_SECONDS", 0.01)


def test_runs_that_are_submitted_in_the_same_second_get_folders_of_their_own(tmp_path, monkeypatch):
    class Stopped(datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2026, 3, 4, 5, 6, 7)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(submit, "datetime", Stopped)
    first = submit.named(Config())
    Path(str(first.run_dir)).mkdir(parents=True)
    assert (first.run_dir, submit.named(Config()).run_dir) == ("runs/2026-03-04/05-06-07-fed_sb", "runs/2026-03-04/05-06-07-fed_sb-2")
    assert submit.named(Config(run_dir="mine")).run_dir == "mine"


def test_a_superlink_that_is_started_again_is_waited_for(monkeypatch, capsys):
    away = UserError("flwr list: Connection to the SuperLink is unavailable.")
    answers(monkeypatch, away, away, {"status": "running"})
    assert submit._facts_with_retries("1", "mine", "Go on", quiet=False) == {"status": "running"}
    assert capsys.readouterr().err == "the SuperLink mine does not answer: waiting for it\n", "told once"


def test_one_that_stays_away_ends_the_command_with_how_to_go_on(monkeypatch):
    answers(monkeypatch, UserError("flwr list: Connection to the SuperLink is unavailable."))
    monkeypatch.setattr(submit, "ABSENCE_SECONDS", 0.05)
    with pytest.raises(RunFailedError, match=r"has not answered for 0\.05 s\. Go on with resume=true\nflwr list: Connection"):
        submit._facts_with_retries("1", "mine", "Go on with resume=true", quiet=True)
