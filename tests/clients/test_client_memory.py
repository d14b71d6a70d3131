"""What a client keeps on its own disk."""

from dataclasses import replace

import pytest
from flwr.app import ConfigRecord, RecordDict

from clients.memory import Budget, ContextStore, experiment_key
from clients.owner import Owner, RefusedError
from fedsim.config import Config, EngineConfig
from fedsim.privacy.accounting import Mechanism, default_delta, epsilon

STEP = Mechanism(1.0, 0.1, 10)


def test_a_state_survives_a_restart_and_a_damaged_one_is_set_aside(tmp_path):
    store = ContextStore(tmp_path)
    assert not store.load("a")
    store.save("a", RecordDict({"secret": ConfigRecord({"key": b"\1\2"})}))
    assert ContextStore(tmp_path).load("a")["secret"]["key"] == b"\1\2"
    store.save("a", RecordDict())  # what was deleted is gone
    assert not ContextStore(tmp_path).load("a")
    (tmp_path / "a.state").write_bytes(b"fedsim1\nnonsense")
    assert not ContextStore(tmp_path).load("a")
    assert (tmp_path / "a.damaged").exists()


def test_a_large_state_is_read_back(tmp_path):
    store = ContextStore(tmp_path)
    store.save("a", RecordDict({f"memory-{i}": ConfigRecord({"key": bytes(200_000)}) for i in range(10)}))
    assert len(store.load("a")) == 10


def test_a_resumed_run_is_the_same_experiment_and_another_seed_is_another():
    config = Config()
    again = replace(config, run_dir="x", resume=True, engine=EngineConfig(name="deployment", superlink="other"))
    again.data = replace(config.data, token_cache=False)
    assert experiment_key(config) == experiment_key(again) != experiment_key(replace(config, seed=1))


def test_the_budget_counts_across_restarts_and_refuses_what_would_exceed_it(tmp_path):
    limit = epsilon([replace(STEP, steps=25)], 1e-3)
    owner = Owner(4, max_epsilon=limit, delta=1e-3)
    for _ in range(2):
        budget = Budget(tmp_path / "privacy.json", owner)  # as after a restart
        budget.check(STEP, 100)
        budget.charge(STEP, 100)
    with pytest.raises(RefusedError, match=r"epsilon would exceed the owner's .* is spent"):
        Budget(tmp_path / "privacy.json", owner).check(STEP, 100)
    Budget(tmp_path / "privacy.json", replace(owner, max_epsilon=None)).check(STEP, 100)  # the owner may lift the limit
    with pytest.raises(RefusedError):
        Budget(tmp_path / "privacy.json", owner).check(replace(STEP, noise_multiplier=0.0), 100)


def test_a_budget_is_checked_at_the_owners_current_delta(tmp_path):
    spent = epsilon([replace(STEP, steps=20)], 1e-3)
    owner = Owner(4, max_epsilon=spent * 1.01, delta=1e-3)
    Budget(tmp_path / "privacy.json", owner).charge(STEP, 100)
    Budget(tmp_path / "privacy.json", owner).check(STEP, 100)
    with pytest.raises(RefusedError, match="epsilon would exceed"):
        Budget(tmp_path / "privacy.json", replace(owner, delta=1e-6)).check(STEP, 100)


def test_a_delta_derived_from_the_number_of_examples_never_grows(tmp_path):
    def delta_after(num_examples):
        budget = Budget(tmp_path / "privacy.json", Owner(4))
        budget.charge(STEP, num_examples)
        return budget._ledger.delta(4)

    assert delta_after(100) == default_delta(100)
    assert delta_after(1000) == default_delta(1000)
    assert delta_after(50) == default_delta(1000)


def test_spending_is_kept_when_the_clients_number_changes(tmp_path):
    Budget(tmp_path / "privacy.json", Owner(4)).charge(STEP, 100)
    renumbered = Budget(tmp_path / "privacy.json", Owner(7))
    renumbered.charge(STEP, 100)
    assert renumbered._ledger.history(7) == (replace(STEP, steps=20),)


def test_a_check_alone_charges_nothing(tmp_path):
    budget = Budget(tmp_path / "privacy.json", Owner(0, max_epsilon=100.0))
    budget.check(STEP, 100)
    assert not (tmp_path / "privacy.json").exists()
