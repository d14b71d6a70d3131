"""Options reported as having no effect change nothing in a run; options with an effect are not reported."""

import pytest
import torch
from rounds import Rounds, changed, of_method

from fedsim.choices import (
    Accountant,
    DirichletOver,
    Init,
    NoiseSource,
    Optimizer,
    OverNorm,
    Partition,
    PrivacyUnit,
    Residual,
    ServerRule,
    Weighting,
)
from fedsim.cli.compose import compose
from fedsim.cli.groups import groups
from fedsim.config import Config
from fedsim.unused import CONDITIONS, unused

PLAIN = changed(of_method("fed_sb"), method={"heads": 4})
ADAMW = changed(PLAIN, training={"optimizer": Optimizer.adamw})
FULL = changed(of_method("full", adapter={"rank": None, "scaling": 1.0}), method={"heads": 4})
EPOCHS = changed(PLAIN, training={"local_epochs": 1, "local_steps": 10})
SECURE = changed(PLAIN, privacy={"secure_aggregation": True})
WITHOUT_EFFECT = [
    ("method.residual", Residual.dense, PLAIN),
    ("method.heads", 3, PLAIN),
    ("adapter.rank", 5, FULL),
    ("adapter.scaling", 2.0, FULL),
    ("adapter.init_samples", 7, PLAIN),
    ("federation.alpha", 0.1, PLAIN),
    ("federation.dirichlet_over", DirichletOver.label, PLAIN),
    ("training.beta1", 0.5, PLAIN),
    ("training.beta2", 0.5, PLAIN),
    ("training.epsilon", 0.1, PLAIN),
    ("training.momentum", 0.5, ADAMW),
    ("training.local_steps", 3, EPOCHS),
    ("server.trimmed", 0.4, PLAIN),
    ("server.malicious", 2, PLAIN),
    ("server.kept", 1, PLAIN),
    ("server.momentum", 0.5, PLAIN),
    ("server.beta2", 0.5, PLAIN),
    ("server.tau", 0.5, PLAIN),
    ("compression.density", 0.5, PLAIN),
    ("privacy.clip_norm", 1e-3, PLAIN),
    ("privacy.accountant", Accountant.rdp, PLAIN),
    ("privacy.noise", NoiseSource.system, PLAIN),
    ("privacy.init_share", 0.5, PLAIN),
    ("privacy.init_noise_multiplier", 3.0, PLAIN),
    ("privacy.unsafe_init", True, PLAIN),
    ("privacy.adaptive_clip", True, PLAIN),
    ("privacy.clip_quantile", 0.9, PLAIN),
    ("privacy.clip_rate", 0.9, PLAIN),
    ("secure.bits", 8, PLAIN),
    ("secure.range", 1e-3, PLAIN),
    ("secure.gradient_range", 1e-3, PLAIN),
    ("secure.threshold", 0.9, PLAIN),
    ("secure.neighbours", 2, PLAIN),
    ("server.max_update_norm", 0.1, SECURE),
    ("server.over_norm", OverNorm.clip, SECURE),
    ("federation.min_replies", 0.95, SECURE),
    ("federation.retries", 0, SECURE),
    ("audit.confidence", 0.5, PLAIN),
    ("engine.superlink", "nowhere", PLAIN),
    ("engine.wait_seconds", 1.0, PLAIN),
    ("engine.actors", 1, PLAIN),
    ("engine.address", "nowhere:1", PLAIN),
]
MANY = {"clients": 9}
CLIENTS_PRIVACY = {"unit": PrivacyUnit.client, "noise_multiplier": 1.0, "adaptive_clip": True}
WITH_EFFECT = {
    "method.residual": of_method("flora"),
    "method.heads": of_method("ravan"),
    "adapter.rank adapter.scaling": PLAIN,
    "adapter.init_samples": changed(PLAIN, adapter={"init": Init.gradient}),
    "federation.alpha federation.dirichlet_over": changed(PLAIN, federation={"partition": Partition.dirichlet}),
    "training.beta1 training.beta2 training.epsilon": ADAMW,
    "training.momentum training.local_steps": PLAIN,
    "server.trimmed": changed(PLAIN, server={"rule": ServerRule.trimmed_mean}, federation=MANY),
    "server.malicious server.kept": changed(PLAIN, server={"rule": ServerRule.krum}, federation=MANY),
    "server.momentum": changed(PLAIN, server={"optimizer": "fedavgm"}),
    "server.momentum server.beta2 server.tau": changed(PLAIN, server={"optimizer": "fedadam"}),
    "server.tau": changed(PLAIN, server={"optimizer": "fedadagrad"}),
    "compression.density": changed(PLAIN, compression={"name": "top_k"}),
    "privacy.clip_norm privacy.accountant privacy.noise": changed(PLAIN, privacy={"unit": PrivacyUnit.example, "epsilon": 8.0}),
    "privacy.unsafe_init": changed(PLAIN, privacy={"unit": PrivacyUnit.example, "epsilon": 8.0}, adapter={"init": Init.gradient}),
    "privacy.init_share privacy.init_noise_multiplier": changed(
        PLAIN, privacy={"unit": PrivacyUnit.example, "epsilon": 8.0}, adapter={"init": Init.gradient_dp}
    ),
    "privacy.adaptive_clip privacy.clip_quantile privacy.clip_rate": changed(
        PLAIN, privacy=CLIENTS_PRIVACY, federation={"weighting": Weighting.uniform}
    ),
    "secure.bits secure.range secure.gradient_range secure.threshold secure.neighbours": SECURE,
    "server.max_update_norm server.over_norm federation.min_replies federation.retries": PLAIN,
    "audit.confidence": changed(PLAIN, audit={"canaries": 4}),
    "engine.superlink engine.wait_seconds": changed(PLAIN, engine={"name": "deployment"}),
    "engine.actors engine.address": changed(PLAIN, engine={"name": "ray"}),
}
"""Maps option names to a configuration in which they have an effect."""


def with_value(config, key, value):
    section, name = key.split(".")
    return changed(config, **{section: {name: value}})


def reported(config):
    return {line.split()[0] for line in unused(config)}


@pytest.fixture(scope="module")
def rounds_of():
    """Returns a cached function from a configuration to the factors and ledger totals after one round."""
    known = {}

    def of(config):
        if str(config) not in known:
            rounds = Rounds(config).next()
            known[str(config)] = rounds.flat(*rounds.session.method.trained(1)), rounds.ledger.totals()
        return known[str(config)]

    return of


@pytest.mark.parametrize(("key", "value", "config"), WITHOUT_EFFECT, ids=[row[0] for row in WITHOUT_EFFECT])
def test_options_reported_without_effect_change_no_factor_and_no_transfer(key, value, config, rounds_of):
    given = with_value(config, key, value)
    assert (reported(given), reported(config)) == ({key}, set())
    factors, totals = rounds_of(given)
    expected, expected_totals = rounds_of(config)
    assert torch.equal(factors, expected)
    assert totals == expected_totals


def test_every_option_with_a_condition_is_tested():
    keys = [key for condition in CONDITIONS for key in condition.keys]
    assert [row[0] for row in WITHOUT_EFFECT] == keys
    assert {key for names in WITH_EFFECT for key in names.split()} == set(keys)


@pytest.mark.parametrize("keys", WITH_EFFECT)
def test_an_option_with_an_effect_is_not_reported(keys):
    values = {row[0]: row[1] for row in WITHOUT_EFFECT} | {"server.malicious": 1}
    for key in keys.split():
        assert key not in reported(with_value(WITH_EFFECT[keys], key, values[key]))


def test_defaults_and_shipped_choices_set_no_option_without_effect():
    assert unused(Config()) == []
    needed = {"model=local": ["model.path=somewhere"], "model=minilm": ["data=snli"]}
    choices = [
        f"{group}={choice}" for group, known in groups().items() for choice in known if group != "experiment"
    ]  # experiments are swept
    assert len(choices) > 40
    for choice in choices:
        assert unused(compose([choice, *needed.get(choice, [])])) == [], choice


def test_the_report_says_what_the_option_is_for():
    config = with_value(PLAIN, "federation.alpha", 0.1)
    assert "federation.alpha has no effect here: it is for federation.partition=dirichlet" in unused(config)
