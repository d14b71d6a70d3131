"""Following a run whose SuperLink is away for a while or forever."""

from datetime import datetime
from pathlib import Path

import pytest

from fedsim.config import Config
from fedsim.deploy import submit
from fedsim.errors import RunFailedError, UserError


def answers(monkeypatch, *found):
    """Makes Flower give these answers one by one, and the last one from then on."""
    remaining = list(found)

    def facts(run_id, superlink):
        answer = remaining.pop(0) if len(remaining) > 1 else remaining[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(submit, "run_facts", facts)
    monkeypatch.setattr(submit, "RETRY_SECONDS", 0.01)


def test_runs_submitted_in_the_same_second_get_different_folders(tmp_path, monkeypatch):
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


def test_a_superlink_that_is_restarted_is_waited_for(monkeypatch, capsys):
    away = UserError("flwr list: Connection to the SuperLink is unavailable.")
    answers(monkeypatch, away, away, {"status": "running"})
    assert submit._facts_with_retries("1", "mine", "Go on", quiet=False) == {"status": "running"}
    assert capsys.readouterr().err == "the SuperLink mine does not answer: waiting for it\n", "told once"


def test_a_superlink_that_stays_away_ends_the_command_with_advice_on_how_to_continue(monkeypatch):
    answers(monkeypatch, UserError("flwr list: Connection to the SuperLink is unavailable."))
    monkeypatch.setattr(submit, "ABSENCE_SECONDS", 0.05)
    with pytest.raises(RunFailedError, match=r"has not answered for 0\.05 s\. Go on with resume=true\nflwr list: Connection"):
        submit._facts_with_retries("1", "mine", "Go on with resume=true", quiet=True)
