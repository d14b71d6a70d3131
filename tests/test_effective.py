"""The effective configuration, with the options that the method decides."""

import pytest

from fedsim.cli.compose import compose
from fedsim.data import load
from fedsim.data.assignment import assign_examples
from fedsim.effective import effective
from fedsim.errors import UserError

OWN = ["data=instructions", "data.path=mine.jsonl", "data.task_column=kind"]


def test_a_task_column_is_refused_with_personal_models_in_a_deployment():
    with pytest.raises(UserError, match=r"data.task_column=kind: clients of a deployment answer with models of their own"):
        effective(compose([*OWN, "method=fedsa_lora", "engine=deployment", "engine.address=localhost:1"]))
    effective(compose([*OWN, "method=fedsa_lora"]))
    effective(compose([*OWN, "engine=deployment", "engine.address=localhost:1"]))


def test_a_pooled_method_has_one_client_with_the_combined_batch_of_a_round():
    found = effective(compose(["method=centralized", "federation.clients=10", "federation.fraction=0.5", "training.batch_size=3"]))
    assert (found.federation.clients, found.federation.fraction, found.training.batch_size) == (1, 1.0, 15)


def test_a_pooled_method_has_all_of_the_data_with_any_partition():
    config = effective(
        compose(["method=centralized", "federation.partition=task", "federation.quantity_sigma=1", "data.train_examples=20"])
    )
    (shard,) = assign_examples(config, load(config.data, config.seed).train).shards
    assert shard == list(range(20))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            ["adapter.init=orthogonal"],
            r"method=fed_sb and adapter\.init=orthogonal there are no initial gradients; choose one of gradient, ",
        ),
        (
            ["privacy=example", "privacy.noise_multiplier=1"],
            r"method=fed_sb and adapter\.init=weight_svd there are no initial gradients; choose one of",
        ),
        (["method=fedit"], r"method=fedit and adapter\.init=lora there are no initial gradients; leave it out"),
    ],
)
def test_sketches_require_initial_gradients(words, told):
    assert effective(compose(["adapter.sketch=true"])).adapter.sketch
    with pytest.raises(UserError, match=r"adapter\.sketch: with " + told):
        effective(compose(["adapter.sketch=true", *words]))
