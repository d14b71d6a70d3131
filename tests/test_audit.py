"""Audits of ordinary runs, both ways: private runs are not refuted, leaking or broken ones are."""

import json
import math

import pytest
import torch

import fedsim.training.private
from fedsim.audit import Auditor, check, separated
from fedsim.cli.audit import CANARIES, audit_table, audited
from fedsim.cli.compose import compose
from fedsim.cli.main import main
from fedsim.cli.options import options
from fedsim.errors import UserError
from fedsim.privacy.plan import ClientPlan
from fedsim.training.stack import accumulate

TINY = (
    *("experiment=audit", "data.test_examples=1", "evaluation.max_new_tokens=1", "evaluation.diagnosis=false", "federation.clients=2"),
    *("data.train_examples=8", "audit.canaries=96", "privacy.accountant=rdp"),
)


def audit_of(folder, *overrides, base=TINY):
    """Runs an audit and returns its findings."""
    return audited(compose([*base, *overrides, f"run_dir={folder}"]), quiet=True)


@pytest.mark.parametrize("sketch", ["true", "false"])
def test_an_initialisation_without_noise_leaks_more_than_training_claims(tmp_path, sketch):
    options = ("adapter.init=gradient", f"adapter.sketch={sketch}", "adapter.rank=8", "privacy.unsafe_init=true", "privacy.epsilon=1.5")
    found = audit_of(tmp_path / "run", *options)
    parts = found["parts"]
    assert {each["claimed_epsilon"] for each in parts.values()} == {math.inf}, "uploads are seen through bases that leak"
    for part in ("initial_gradient", "bases", "together"):
        assert parts[part]["lower_bound"] > 1.5
    assert not parts["training"]["refuted"]
    assert found["verdict"].startswith("no epsilon is claimed; epsilon is at least")
    written = json.loads((tmp_path / "run" / "audit.json").read_text())
    assert written["parts"]["together"]["claimed_epsilon"] is None
    assert written["parts"]["bases"] == parts["bases"] | {"claimed_epsilon": None}


def test_training_is_compared_with_the_whole_claim_if_its_bases_come_from_the_same_data(tmp_path):
    options = ("privacy.epsilon=null", "privacy.noise_multiplier=2", "privacy.init_noise_multiplier=2")
    parts = audit_of(tmp_path / "data", "adapter.init=gradient_dp", *options)["parts"]
    assert parts["training"]["claimed_epsilon"] == parts["together"]["claimed_epsilon"] > parts["initial_gradient"]["claimed_epsilon"]
    own = audit_of(tmp_path / "weights", "adapter.init=weight_svd", *options)["parts"]
    assert own["training"]["claimed_epsilon"] == own["together"]["claimed_epsilon"] < parts["together"]["claimed_epsilon"]


def test_a_run_that_clips_nothing_is_caught(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fedsim.training.private.CohortDPOptimizer, "clip_and_accumulate", add_unclipped)
    words = [*TINY, "adapter.init=weight_svd", "privacy.epsilon=0.5", "privacy.clip_norm=0.1", f"run_dir={tmp_path / 'run'}"]
    assert main(["audit", *words, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["parts"]["training"]["lower_bound"] > 0.5
    assert found["verdict"].startswith("the claim does not hold: 0.50 for training")


def add_unclipped(optimizer):
    """Replaces clipping: adds the gradients as they are."""
    accumulate(optimizer._sum, optimizer._layout, optimizer._where, {name: part.sum(1) for name, part in optimizer._gradients.items()})


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (("privacy.unit=client", "federation.weighting=uniform"), "example or none"),
        (("privacy=none", "method=fedsa_lora"), "send what they train"),
        (("compression.name=int8",), "compression"),
        (("engine=deployment",), "inprocess"),
        (("privacy.secure_aggregation=true",), "one by one"),
        (("resume=true", "run_dir=somewhere"), "whole run"),
        (("audit.canaries=0",), "at least one canary"),
    ],
)
def test_configurations_that_cannot_be_audited_are_refused(overrides, reason):
    with pytest.raises(UserError, match=reason):
        check(compose(["experiment=audit", *overrides]))


def test_the_help_states_the_default_number_of_canaries():
    assert f"0: none, {CANARIES} in fedsim audit" in options()["audit.canaries"].meaning


def test_an_audit_in_which_no_client_with_a_canary_took_part_is_an_error():
    with pytest.raises(UserError, match="no client with a canary took part"):
        Auditor(compose(["experiment=audit"])).findings(None)


def test_scores_separate_canaries_that_plain_inner_products_do_not():
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(300, generator=generator)
    gradients = (torch.randn(20, 300, generator=generator) + 2 * common) * torch.rand(20, 1, generator=generator)
    inside = torch.rand(20, generator=generator) < 0.5
    scores = separated(gradients @ gradients.T, gradients @ gradients[inside].sum(0))
    assert scores[inside].min() > scores[~inside].max()
    assert not (gradients @ gradients[inside].sum(0))[inside].min() > (gradients @ gradients[inside].sum(0))[~inside].max()


def test_the_table_shows_claims_bounds_and_the_verdict():
    row = {"num_right": 60, "num_guesses": 64, "num_canaries": 128}
    parts = {
        "initial_gradient": {"claimed_epsilon": math.inf, "lower_bound": 2.2, "refuted": False, **row},
        "training": {"claimed_epsilon": 1.0, "lower_bound": 1.5, "refuted": True, **row},
    }
    found = {"method": "fed_sb", "init": "gradient", "canaries": 128, "canaries_inside": 70, "delta": 1e-5, "confidence": 0.95}
    text = audit_table(found | {"parts": parts, "verdict": "so it is"})
    assert "128 canaries, 70 of them in the data, delta 1e-05" in text
    assert "at least (95 %)" in text
    assert [line.split() for line in text.splitlines() if line.startswith(("initial", "training"))] == [
        ["initial", "gradient", "none", "2.20", "60", "of", "64"],
        ["training", "1.00", "1.50", "!", "60", "of", "64"],
    ]
    assert text.endswith("so it is")


# ---- statistics over whole runs

SLOW = ("experiment=audit", "audit.canaries=1024", "data.test_examples=1", "evaluation.max_new_tokens=1", "evaluation.diagnosis=false")


@pytest.mark.slow
@pytest.mark.parametrize("init", ["gradient_dp", "weight_svd"])
@pytest.mark.parametrize("seed", [1, 2])
def test_the_claim_of_a_private_run_is_not_refuted(tmp_path, init, seed):
    found = audit_of(tmp_path / "run", f"adapter.init={init}", f"seed={seed}", base=SLOW)
    assert found["parts"]["together"]["claimed_epsilon"] <= 2
    assert not any(part["refuted"] for part in found["parts"].values())
    assert found["parts"]["training"]["lower_bound"] > 0.05  # the canaries are seen


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_third_of_the_noise_is_caught(tmp_path, monkeypatch, seed):
    original = fedsim.training.private.gaussian_noise
    monkeypatch.setattr(fedsim.training.private, "gaussian_noise", lambda deviation, *rest: original(deviation / 3, *rest))
    found = audit_of(tmp_path / "run", "adapter.init=weight_svd", "privacy.epsilon=2", "audit.canaries=2048", f"seed={seed}", base=SLOW)
    assert found["parts"]["training"]["refuted"]


@pytest.mark.slow
def test_an_overstated_noise_multiplier_is_caught(tmp_path, monkeypatch):
    honest = ClientPlan.round_mechanism.fget
    exaggerated = property(lambda plan: type(honest(plan))(4 * plan.noise_multiplier, plan.rate, plan.steps))
    monkeypatch.setattr(ClientPlan, "round_mechanism", exaggerated)
    found = audit_of(tmp_path / "run", "adapter.init=weight_svd", "privacy.epsilon=8", base=SLOW)
    assert found["parts"]["training"]["refuted"]
