from collections import Counter

import pytest

from fedsim.cli.compose import compose
from fedsim.data.assignment import assign_examples
from fedsim.errors import UserError
from fedsim.types import Example, Family

TRAIN = [Example("sums", f"{i} + 1 =", f" {i + 1}", str(i + 1), Family.arithmetic, client=f"owner {i % 3}") for i in range(40)]
PUBLIC = ["adapter.init=gradient_public", "adapter.init_samples=15"]


def dealt(*overrides):
    return assign_examples(compose(["federation.clients=4", *overrides]), TRAIN)


def test_without_a_public_sample_everything_is_dealt():
    assert dealt().pool == TRAIN
    assert dealt().public == []
    assert sorted(i for shard in dealt().shards for i in shard) == list(range(40))


def test_every_example_is_public_or_belongs_to_one_client():
    pool, shards, public = dealt(*PUBLIC)
    owned = [pool[i] for shard in shards for i in shard]
    assert len(public) == 15
    assert Counter(each.prompt for each in [*public, *owned]) == Counter(each.prompt for each in TRAIN)


def test_the_public_sample_depends_on_the_seed_alone():
    assert dealt(*PUBLIC).public == dealt(*PUBLIC, "federation.partition=dirichlet").public
    assert dealt(*PUBLIC).public != dealt(*PUBLIC, "seed=1").public


def test_an_owner_has_all_of_its_own_data_and_none_is_public():
    config = compose(["federation.clients=4", *PUBLIC])
    config.data.owner = 2
    assert assign_examples(config, TRAIN) == (TRAIN, [[], [], list(range(40)), []], [])


def test_a_public_sample_of_everything_is_refused():
    with pytest.raises(UserError, match="expected fewer than the 40 training examples, got 40"):
        dealt("adapter.init=gradient_public", "adapter.init_samples=40")
