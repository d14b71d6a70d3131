import pytest

from fedsim.choices import Partition
from fedsim.cli.options import options
from fedsim.config import Config
from fedsim.config_check import BOUNDS, check
from fedsim.errors import UserError


def config_with(**values):
    """A default configuration with {section__name: value} changed."""
    config = Config()
    for key, value in values.items():
        *section, name = key.split("__")
        setattr(getattr(config, section[0]) if section else config, name, value)
    return config


def test_the_defaults_have_no_contradiction():
    check(Config())


def test_every_number_has_bounds():
    numbers = {key for key, option in options().items() if option.kind.startswith(("integer", "number"))}
    assert numbers == set(BOUNDS)


@pytest.mark.parametrize("key", BOUNDS)
@pytest.mark.parametrize("value", [-1, float("nan"), float("inf"), float("-inf")])
def test_negative_and_non_finite_numbers_are_refused(key, value):
    with pytest.raises(UserError, match=f"Expected {key} >"):
        check(config_with(**{key.replace(".", "__"): value}))


@pytest.mark.parametrize(
    ("key", "refused", "allowed"),
    [
        ("federation.clients", 0, 1),
        ("federation.rounds", 0, 1),
        ("federation.fraction", 0.0, 1.0),
        ("federation.fraction", 1.01, 0.01),
        ("federation.alpha", 0.0, 1e-3),
        ("federation.quantity_sigma", -0.1, 0.0),
        ("adapter.rank", 0, 1),
        ("training.learning_rate", 0.0, 1e-9),
        ("training.warmup_ratio", 1.0, 0.0),
        ("training.beta2", 1.0, 0.0),
        ("training.local_steps", 0, 1),
        ("training.local_epochs", 0, None),
        ("training.batch_size", 0, 1),
        ("data.max_length", 7, 8),
        ("data.test_examples", 0, None),
        ("evaluation.max_new_tokens", 0, 1),
        ("engine.cohort_size", -1, 0),
        ("seed", -1, 0),
        ("federation.rounds", 10**12, 10**6),
        ("federation.clients", 10**6 + 1, 1000),
        ("training.local_steps", 10**9, 10**6),
        ("training.local_epochs", 10**6 + 1, 10**6),
    ],
)
def test_values_outside_a_bound_are_refused_and_values_inside_are_allowed(key, refused, allowed):
    name = key.replace(".", "__")
    check(config_with(**{name: allowed}))
    with pytest.raises(UserError, match=f"Expected {key} .*got {refused}"):
        check(config_with(**{name: refused}))


def test_error_messages_spell_out_bounds_and_infinite_values():
    with pytest.raises(UserError, match=r"Expected federation.rounds >= 1 and <= 1,000,000, got 1000000000000\."):
        check(config_with(federation__rounds=10**12))
    with pytest.raises(UserError, match=r"Expected training\.learning_rate > 0 and finite, got inf"):
        check(config_with(training__learning_rate=float("inf")))


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"resume": True}, "Expected run_dir with resume=true"),
        ({"resume": True, "overwrite": True, "run_dir": "x"}, "got both"),
        ({"data__train": []}, "Expected at least one name in data.train"),
        ({"data__test": ["a", "b", "a"]}, "'a' more than once"),
        ({"model__path": ""}, "model.path=null"),
        ({"run_dir": ""}, "run_dir=null"),
        ({"model__device": "gpu"}, "Expected model.device"),
        ({"data__train_examples": 10, "federation__clients": 11}, "data.train_examples=10 and federation.clients=11"),
    ],
)
def test_a_contradiction_is_refused_in_one_line_that_says_what_to_do(values, line):
    with pytest.raises(UserError, match=line) as caught:
        check(config_with(**values))
    assert "\n" not in str(caught.value)


def test_consistent_options_are_allowed():
    check(config_with(resume=True, run_dir="x", model__device="cuda:1", data__train_examples=25))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"data__client_column": "user"}, "Expected federation.partition=natural with data.client_column=user, got iid"),
        ({"federation__partition": Partition.natural}, "Expected data.client_column with federation.partition=natural, got none"),
        (
            {"federation__partition": Partition.natural, "data__client_column": "user", "federation__quantity_sigma": 1.0},
            "Expected federation.quantity_sigma=0 with federation.partition=natural, where clients hold what owners have, got 1",
        ),
        ({"data__task_column": ""}, "Expected data.task_column to name something, got an empty text"),
    ],
)
def test_inconsistent_owner_columns_and_partitions_are_refused(values, message):
    with pytest.raises(UserError, match=message):
        check(config_with(**values))
    check(config_with(federation__partition=Partition.natural, data__client_column="user"))
