"""`fedsim privacy`: the privacy plan of a run, without running it."""

import json
from collections import Counter

import pytest

from fedsim.cli.compose import compose
from fedsim.cli.holdings import holdings_of
from fedsim.cli.main import main
from fedsim.cli.privacy import privacy_of
from fedsim.experiment import run
from fedsim.privacy.accounting import Mechanism, epsilon
from fedsim.session import open_session

SMALL = (
    *("data.train_examples=60", "federation.clients=3", "federation.rounds=2", "training.batch_size=4", "training.local_steps=2"),
    *("adapter.rank=4", "privacy=example", "privacy.accountant=rdp"),
)


def test_the_predicted_epsilon_and_noise_are_those_of_the_run(tmp_path):
    predicted = privacy_of(compose([*SMALL, "privacy.epsilon=4"]))
    spent = run(
        compose([*SMALL, "privacy.epsilon=4", "data.test_examples=2", "evaluation.max_new_tokens=2", f"run_dir={tmp_path / 'run'}"]),
        quiet=True,
    )["privacy"]
    (kind,) = predicted["clients"]
    assert kind["clients"] == len(spent["per_client"]) == 3
    for client in spent["per_client"]:
        assert client["epsilon"] == kind["epsilon_rdp"]
        assert client["mechanisms"][0]["noise_multiplier"] == kind["noise_multiplier"]
    assert predicted["over_rounds"][-1]["epsilon_rdp"] == kind["epsilon_rdp"] <= 4
    two_steps = Mechanism(kind["noise_multiplier"], kind["sampling_rate"], 2)
    assert predicted["over_rounds"][0]["epsilon_rdp"] == epsilon([two_steps], kind["delta"], "rdp")


def test_public_examples_belong_to_no_client():
    public = ["adapter.init=gradient_public", "adapter.init_samples=20", "privacy.noise_multiplier=1", "privacy.epsilon=null"]
    config = compose([*SMALL, *public])
    session = open_session(config)
    sizes = [len(session.client_data(client).examples) for client in range(3)]
    assert sum(sizes) == 40
    found = {row["num_examples"]: row["clients"] for row in privacy_of(config)["clients"]}
    assert found == Counter(sizes)
    assert holdings_of(config)[0] == session.holdings


def test_the_epsilon_of_a_noise_multiplier_gives_that_noise_multiplier_back(capsys):
    assert main(["privacy", *SMALL, "privacy.noise_multiplier=1.1", "privacy.epsilon=null", "--json"]) == 0
    (forward,) = json.loads(capsys.readouterr().out)["clients"]
    assert main(["privacy", *SMALL, f"privacy.epsilon={forward['epsilon_rdp']}", "--json"]) == 0
    (back,) = json.loads(capsys.readouterr().out)["clients"]
    assert back["noise_multiplier"] == pytest.approx(1.1, rel=2e-3)


def test_epsilon_is_larger_if_participation_is_known(capsys):
    small = [*(word for word in SMALL if word != "privacy=example"), "data.train_examples=null"]
    coins = [*small, "privacy=client", "federation.clients=100", "federation.fraction=0.1", "federation.rounds=20", "privacy.epsilon=3"]
    found = privacy_of(compose(coins))
    noise, delta = found["clients"][0]["noise_multiplier"], found["clients"][0]["delta"]
    expected = [epsilon([Mechanism(noise, 1.0, taken)], delta, "rdp") for taken in (1, 2)]
    assert [row["epsilon_rdp"] for row in found["if_participation_is_known"]] == expected
    assert expected[1] > 3
    assert main(["privacy", *coins]) == 0
    shown = found["if_participation_is_known"][1]["epsilon_prv"]
    assert f"{shown:.3f} of one that took part in 2 rounds" in " ".join(capsys.readouterr().out.split())
    for nothing in (["federation.fraction=1"], ["privacy.secure_aggregation=true"]):
        assert privacy_of(compose([*coins, *nothing]))["if_participation_is_known"] == []


def test_the_table_names_its_columns_and_a_run_without_privacy_is_refused(capsys):
    assert main(["privacy", *SMALL, "privacy.noise_multiplier=1.1", "privacy.epsilon=null"]) == 0
    out = capsys.readouterr().out
    assert "sampling rate" in out
    assert "after so many of its rounds" in out
    assert "hardly a guarantee" not in out
    assert main(["privacy", *SMALL, "privacy=client"]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[2].split()[:5] == ["clients", "of", "them", "in", "all"]
    assert "delta 0.3 is hardly a guarantee" in out
    assert main(["privacy"]) == 2
    assert "add privacy=example or privacy=client" in capsys.readouterr().err
