import json
import math
from dataclasses import replace

import pytest
from privacy_oracles import pld_epsilon

from fedsim.errors import UserError
from fedsim.files import atomic_write_json
from fedsim.privacy import bounds
from fedsim.privacy.accounting import Mechanism, default_delta, epsilon, noise_multiplier_for
from fedsim.privacy.ledger import PrivacyLedger

INITIALIZATION = Mechanism(3.0, 1.0, 1, "initialization")
SIZES = {0: 400, 1: 900, 2: 900, 3: 50}
PARTICIPANTS = [[0, 1, 2], [0, 3], [1, 2, 3], [0, 1, 2, 3], [1, 2]]


def new_ledger(**options):
    return PrivacyLedger("example", {client: default_delta(size) for client, size in SIZES.items()}, **options)


def charge_round(ledger, participants, noise=1.4, steps=10):
    for client in participants:
        ledger.charge(client, Mechanism(noise, 20 / SIZES[client], steps))


def run(ledger, rounds=PARTICIPANTS):
    for participants in rounds:
        charge_round(ledger, participants)
    return ledger


def started():
    ledger = new_ledger()
    for client in SIZES:
        ledger.charge(client, INITIALIZATION)
    return ledger


def parts(ledger, client):
    return tuple((m.noise_multiplier, m.sampling_rate, m.steps) for m in ledger.history(client))


def test_every_client_pays_for_the_initialization_and_the_rounds_it_took_part_in():
    ledger = run(started())
    for client, size in SIZES.items():
        rounds = sum(client in participants for participants in PARTICIPANTS)
        assert ledger.history(client) == (INITIALIZATION, Mechanism(1.4, 20 / size, 10 * rounds))
        assert ledger.epsilon(client) == pytest.approx(pld_epsilon(parts(ledger, client), default_delta(SIZES[client])), rel=0.01)


@pytest.mark.parametrize("cut", range(len(PARTICIPANTS) + 1))
def test_a_resumed_ledger_equals_the_uninterrupted_one(cut):
    before = run(started(), PARTICIPANTS[:cut])
    resumed = run(PrivacyLedger.from_json(json.loads(json.dumps(before.to_json()))), PARTICIPANTS[cut:])
    uninterrupted = run(started())
    assert resumed.to_json() == uninterrupted.to_json()
    assert resumed.summary() == uninterrupted.summary()


def test_a_ledger_survives_json_bit_for_bit():
    ledger = new_ledger(accountant="rdp", budget=0.1 + 0.2)
    ledger.charge(1, Mechanism(1 / 3, 2 / 3, 10**12, "initialization"))
    ledger.charge(1, Mechanism(math.pi, 1e-17, 1))
    again = PrivacyLedger.from_json(json.loads(json.dumps(ledger.to_json())))
    assert again.to_json() == ledger.to_json()
    assert again.history(1) == ledger.history(1)
    assert (again.unit, again.accountant, again.budget) == ("example", "rdp", 0.1 + 0.2)


def test_the_summary_reports_the_worst_client_and_the_distribution(tmp_path):
    ledger = run(started())
    summary = ledger.summary()
    spent = sorted(ledger.epsilon(client) for client in SIZES)
    assert summary["epsilon"] == spent[-1]
    assert summary["distribution"] == {"min": spent[0], "median": (spent[1] + spent[2]) / 2, "max": spent[-1]}
    assert summary["delta"] == default_delta(50)
    assert summary["initialization_epsilon"] == max(epsilon([INITIALIZATION], default_delta(SIZES[client])) for client in SIZES)
    assert (summary["unit"], summary["accountant"], summary["budget"]) == ("example", "prv", None)
    assert [row["client"] for row in summary["per_client"]] == [0, 1, 2, 3]
    assert summary["per_client"][0]["mechanisms"][0] == {
        "noise_multiplier": 3.0,
        "sampling_rate": 1.0,
        "steps": 1,
        "name": "initialization",
    }
    atomic_write_json(tmp_path / "summary.json", summary)
    assert json.loads((tmp_path / "summary.json").read_text()) == summary


def test_the_initialization_is_part_of_the_total():
    ledger, without = run(started()), run(new_ledger())
    for client in SIZES:
        assert ledger.epsilon(client) > without.epsilon(client)
        assert ledger.epsilon(client, "training") == without.epsilon(client)
        assert ledger.epsilon(client, "initialization") == epsilon([INITIALIZATION], default_delta(SIZES[client]))
    assert without.summary()["initialization_epsilon"] == 0


def test_clients_with_equal_histories_are_computed_once():
    ledger = PrivacyLedger("example", dict.fromkeys(range(1000), 1e-4))
    for client in range(1000):
        ledger.charge(client, Mechanism(1.77, 0.033, 21))
    PrivacyLedger("example", {0: 1e-4}).summary()  # an empty history costs a look-up of its own
    before = bounds.upper_bound.cache_info().misses
    assert len({row["epsilon"] for row in ledger.summary()["per_client"]}) == 1
    assert bounds.upper_bound.cache_info().misses == before + 1


def test_the_largest_epsilon_is_that_of_the_client_that_has_spent_most():
    ledger = run(started())
    assert ledger.largest_epsilon() == max(ledger.epsilon(client) for client in SIZES) == ledger.epsilon(3)


def test_a_client_that_took_no_part_has_spent_nothing():
    summary = new_ledger().summary()
    assert (summary["epsilon"], summary["distribution"]) == (0, {"min": 0, "median": 0, "max": 0})
    assert PrivacyLedger("client", {}).summary()["epsilon"] == 0


def test_a_client_without_noise_makes_the_epsilon_infinite():
    ledger = run(new_ledger(budget=8.0))
    ledger.charge(2, Mechanism(0.0, 0.1, 1))
    assert ledger.summary()["epsilon"] == math.inf


# ---- the budget


def rounds_until_stopped(noise, budget=2.0, limit=30):
    """Charges rounds of 10 steps to client 0 as long as the ledger lets it; returns their number and the ledger."""
    ledger = new_ledger(budget=budget)
    ledger.charge(0, INITIALIZATION)
    mechanism = Mechanism(noise, 0.05, 10)
    for count in range(limit):
        if ledger.would_exceed(0, mechanism):
            return count, ledger
        ledger.charge(0, mechanism)
    return limit, ledger


def test_a_calibrated_client_gets_exactly_its_planned_rounds():
    noise = noise_multiplier_for(2.0, default_delta(SIZES[0]), [(0.05, 10)] * 12, [INITIALIZATION])
    count, ledger = rounds_until_stopped(noise)
    assert count == 12
    assert 1.998 <= ledger.epsilon(0) <= 2.0


def test_with_two_thirds_of_the_noise_a_client_is_stopped_earlier_and_within_its_budget():
    noise = noise_multiplier_for(2.0, default_delta(SIZES[0]), [(0.05, 10)] * 12, [INITIALIZATION])
    count, ledger = rounds_until_stopped(noise * 2 / 3)
    assert 0 < count < 8
    assert ledger.epsilon(0) <= 2.0
    assert pld_epsilon((*parts(ledger, 0), (noise * 2 / 3, 0.05, 10)), default_delta(SIZES[0])) > 2.0


def test_would_exceed_changes_nothing_and_is_false_without_a_budget():
    ledger = run(new_ledger())
    before = ledger.to_json()
    assert not ledger.would_exceed(0, Mechanism(0.0, 1.0, 1))
    assert ledger.to_json() == before


def test_spending_above_the_budget_is_recorded():
    ledger = run(new_ledger(budget=0.1))
    assert ledger.epsilon(0) > 0.1


def test_invalid_units_accountants_budgets_deltas_and_clients_are_refused():
    with pytest.raises(UserError, match="unit"):
        PrivacyLedger("batch", {0: 1e-5})
    with pytest.raises(UserError, match="underestimates"):
        PrivacyLedger("example", {0: 1e-5}, accountant="gdp")
    with pytest.raises(UserError, match="budget"):
        PrivacyLedger("example", {0: 1e-5}, budget=0.0)
    with pytest.raises(UserError, match="delta"):
        PrivacyLedger("example", {0: 1e-5, 7: 1.0})
    with pytest.raises(KeyError):
        new_ledger().charge(99, INITIALIZATION)


def test_a_clients_whole_epsilon_is_held_at_the_smallest_of_its_deltas():
    ledger, step = PrivacyLedger("example", {0: 1e-2, 1: 1e-2}, "rdp"), Mechanism(1.0, 0.1, 10)
    for _ in range(2):
        ledger.charge(0, step, 1e-2)
        ledger.charge(1, step, 1e-2)
    ledger.charge(0, step, 1e-5)
    ledger.charge(1, step, 0.5)
    assert [client["delta"] for client in ledger.summary()["per_client"]] == [1e-5, 1e-2]
    alone = PrivacyLedger("example", {0: 1e-5}, "rdp")
    alone.charge(0, Mechanism(1.0, 0.1, 30))
    assert ledger.epsilon(0) == pytest.approx(alone.epsilon(0))
    assert ledger.epsilon(0) > ledger.epsilon(1)


def test_would_exceed_uses_the_delta_at_which_the_charge_will_be_held():
    step = Mechanism(1.0, 0.1, 10)
    ledger = PrivacyLedger("example", {0: 1e-2}, "rdp", budget=1.01 * epsilon([replace(step, steps=20)], 1e-2, "rdp"))
    ledger.charge(0, step)
    assert [ledger.would_exceed(0, step, delta) for delta in (None, 1e-2, 0.5, 1e-5)] == [False, False, False, True]
