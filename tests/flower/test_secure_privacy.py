"""Client-level privacy with noise added by clients: its size, refusal of sums without it, and the reported epsilon."""

import numpy as np
import pytest
import torch
from flower.rounds import Rounds, changed, of_method
from flwr.app import RecordDict

from fedsim.choices import Accountant, NoiseSource, PrivacyUnit, Weighting
from fedsim.cli.compose import compose
from fedsim.cli.privacy import privacy_of, privacy_table
from fedsim.core.participation import draw_participants
from fedsim.core.secure_aggregation import fewest_survivors
from fedsim.effective import effective
from fedsim.errors import UserError
from fedsim.experiment import run
from fedsim.flower.requests import Request
from fedsim.flower.secure_worker import check_upload
from fedsim.local_round import train_clients
from fedsim.privacy.accounting import epsilon
from fedsim.seeding import NoiseKey

CLIP = 0.05


def config_of(noise, clients=5, **sections):
    privacy = {"secure_aggregation": True, "unit": PrivacyUnit.client, "noise_multiplier": noise, "clip_norm": CLIP, "epsilon": None}
    federation = {"clients": clients, "weighting": Weighting.uniform, **sections.pop("federation", {})}
    return changed(of_method("fed_sb", privacy=privacy, federation=federation, **sections), adapter={"rank": 8, "target_modules": []})


def step_of(config):
    rounds = Rounds(config)
    start = rounds.flat("R")
    rounds.next()
    return rounds.flat("R") - start, rounds


def clipped_updates(clients):
    plain = Rounds(changed(config_of(None, clients), privacy={"unit": PrivacyUnit.none, "secure_aggregation": False}))
    plain.session.install_state(plain.state)
    start = plain.flat("R")
    updates = [train_clients(plain.session, [client], 1, {})[0].arrays["values"] - start for client in range(clients)]
    assert all(float(update.norm()) > CLIP for update in updates), "nothing would be clipped"
    return [update * CLIP / float(update.norm()) for update in updates]


def test_with_negligible_noise_the_mean_equals_that_of_clipped_updates_within_one_step():
    found, rounds = step_of(config_of(1e-9))
    step = CLIP / (2**15 - 1)
    assert rounds.strategy.facts.secure["step"] == pytest.approx(step)
    torch.testing.assert_close(found, sum(clipped_updates(5)) / 5, rtol=0, atol=step + 1e-7)


def test_the_sum_has_the_noise_of_all_its_survivors():
    clients, noise = 5, 1.3
    mean = sum(clipped_updates(clients)) / clients
    expected = noise * np.sqrt(clients / fewest_survivors(clients, 0.6))

    def sigma(multiplier):
        return float((step_of(config_of(multiplier))[0] - mean).std()) * clients / CLIP

    assert sigma(noise) == pytest.approx(expected, rel=0.05)
    for factor in (2 / 3, 3 / 2):
        assert sigma(noise * factor) != pytest.approx(expected, rel=0.05)


def test_with_the_fewest_survivors_the_noise_equals_the_noise_multiplier(monkeypatch):
    from fedsim.core.dropout import Stage

    monkeypatch.setattr("fedsim.core.dropout.vanishes", lambda config, number, client, *rates: Stage.upload if client in (1, 3) else None)
    found, rounds = step_of(config_of(1.3))
    assert rounds.strategy.facts.clients == [0, 2, 4]
    updates = clipped_updates(5)
    mean = sum(updates[client] for client in (0, 2, 4)) / 3
    assert float((found - mean).std()) * 3 / CLIP == pytest.approx(1.3, rel=0.05)


def test_noise_repeats_with_a_seeded_key_and_differs_with_secret_keys():
    seeded = [step_of(config_of(1.0))[0] for _ in range(2)]
    assert torch.equal(*seeded)
    system = config_of(1.0)
    system.privacy.noise = NoiseSource.system
    secret, _ = step_of(system)
    rounds = Rounds(system)
    again = rounds.flat("R")
    rounds.session.noise_key = NoiseKey.secret()
    again = rounds.next().flat("R") - again
    assert not torch.equal(secret, again)
    assert not torch.equal(seeded[0], secret)


def test_clients_withhold_losses_token_counts_and_clip_counts():
    _, rounds = step_of(config_of(1.0))
    facts = rounds.strategy.facts
    assert np.isnan(facts.mean_loss)
    assert (facts.num_tokens, facts.secure["clipped"], facts.secure["modulus_bits"]) == (0, 0, 32)
    assert rounds.moved("payload_bytes", purpose="adapter", direction="uplink") == 5 * 4 * rounds.spec.num_parameters(("R",))


def upload_request(**facts):
    """Returns a private sum's upload request with the given facts replaced; None removes one."""
    rounds = Rounds(config_of(1.0))
    upload_request = {"contributors": 5, "largest": 9, "clip_norm": CLIP, "noise_multiplier": 1.0, **facts}
    kept = {name: value for name, value in upload_request.items() if value is not None}
    return RecordDict({"request": rounds.strategy.asking.request([0], 1, {}, **kept)})


@pytest.mark.parametrize("noise", [0, 0.0, -1.0, float("nan"), float("inf"), "1", [1.0], True])
def test_a_noise_multiplier_that_is_not_positive_is_refused(noise):
    with pytest.raises(ValueError, match="'noise_multiplier' to be a number above 0"):
        Request.of(upload_request(noise_multiplier=noise))
    assert Request.of(upload_request()).noise_multiplier == 1.0


@pytest.mark.parametrize("missing", ["noise_multiplier", "clip_norm", "contributors"])
def test_an_upload_request_without_the_noise_parameters_is_refused(missing):
    request = Request.of(upload_request(**{missing: None}))
    with pytest.raises(ValueError, match=f"Expected '{missing}' in the request"):
        check_upload(request.config, request)
    check_upload(request.config, Request.of(upload_request()))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("contributors", 1),
        ("contributors", 10**6),
        ("contributors", 5.0),
        ("largest", 0),
        ("largest", 2**62),
        ("largest", "9"),
        ("gradient_range", 0.0),
        ("gradient_range", float("nan")),
        ("gradient_range", -1.0),
    ],
)
def test_sum_parameters_out_of_bounds_are_refused(name, value):
    with pytest.raises(ValueError, match=name):
        Request.of(upload_request(**{name: value}))


SMALL = (
    *("data.train_examples=60", "data.test_examples=2", "federation.clients=5", "federation.rounds=3", "training.batch_size=3"),
    *("training.local_steps=1", "adapter.rank=4", "evaluation.max_new_tokens=2", "adapter.target_modules=[layers.1.self_attn.q_proj]"),
    *("privacy=client", "privacy.secure_aggregation=true", "federation.fraction=0.6", "adapter.init=orthogonal"),
)


def test_a_client_is_charged_for_its_own_rounds_without_amplification(tmp_path):
    summary = run(compose([*SMALL, "privacy.epsilon=5", "federation.dropout=0.2", f"run_dir={tmp_path / 'run'}"]), quiet=True)
    taken = [client for number in (1, 2, 3) for client in draw_participants(5, 0.6, 0, number)]
    spent = summary["privacy"]
    assert (spent["accountant"], spent["unit"]) == ("skellam", "client")
    for row in spent["per_client"]:
        rounds = taken.count(row["client"])
        assert sum(each["steps"] for each in row["mechanisms"]) == rounds
        assert all(each["sampling_rate"] == 1.0 for each in row["mechanisms"])
    assert 0.995 * 5 < spent["epsilon"] <= 5


def test_the_privacy_calculator_matches_the_epsilon_of_the_plan():
    found = privacy_of(compose([*SMALL, "privacy.epsilon=5"]))
    assert found["accountants"] == ["skellam"]
    assert max(row["epsilon_skellam"] for row in found["clients"]) == pytest.approx(5, rel=0.005)
    assert not any("epsilon_prv" in row for row in found["clients"]), "which does not hold for this noise"
    assert "epsilon skellam" in privacy_table(found)
    config = effective(compose([*SMALL, "privacy.epsilon=5"]))
    assert config.privacy.accountant is Accountant.skellam
    session_plan = Rounds(compose([*SMALL, "privacy.epsilon=5"])).session.privacy_plan
    costs = [epsilon(each.mechanisms, each.delta, "skellam") for each in session_plan]
    assert max(costs) == pytest.approx(max(row["epsilon_skellam"] for row in found["clients"]))


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (("privacy.noise_multiplier=0", "privacy.epsilon=null"), "refuse to add none"),
        (("privacy.adaptive_clip=true",), "its counts have no price in discrete noise"),
        (("federation.weighting=examples",), "set federation.weighting=uniform"),
        (("adapter.init=gradient_dp",), "undefined cost with unit=client"),
    ],
)
def test_options_that_would_void_the_guarantee_are_refused(overrides, reason):
    with pytest.raises(UserError, match=reason):
        effective(compose([*SMALL, *overrides]))


def test_noise_that_exceeds_the_range_of_the_sum_is_refused():
    config = compose([*SMALL, "secure.bits=24", "privacy.noise_multiplier=500", "privacy.epsilon=null"])
    with pytest.raises(UserError, match=r"secure.bits: a sum of 3 clients with noise 500 x clip_norm"):
        _ = Rounds(config).session.privacy_plan
