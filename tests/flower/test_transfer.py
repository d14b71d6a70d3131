"""Transfers to a worker in another process, and the factors it derives."""

from rounds import Rounds, of_method

from fedsim.flower import worker
from fedsim.session import Session


def test_a_remote_worker_draws_floras_fresh_factors_itself(monkeypatch):
    config = of_method("flora")
    shared_process = Rounds(config).next(3)
    run, theirs, installed = Rounds(config), Session(config), []
    monkeypatch.setattr(worker, "open_session", lambda config: theirs)
    monkeypatch.setattr(
        worker, "install_received", lambda *facts, original=worker.install_received: installed.append(original(*facts)) or installed[-1]
    )
    run.next(3)
    assert installed == [True] * 3, "nothing has to be sent again"
    assert run.state.digests() == shared_process.state.digests()
    assert run.moved(direction="downlink") == run.moved(direction="downlink", purpose="fold") > 0
