import pytest

from fedsim.choices import Init, Optimizer, Partition
from fedsim.cli.compose import compose
from fedsim.cli.groups import choice_values, conf_folder, groups, presets_folder
from fedsim.config import Config
from fedsim.config_check import check
from fedsim.errors import UserError
from fedsim.plain import to_dict

CHOICES = [(group, choice) for group, choices in groups().items() for choice in choices if not group.startswith("hydra/")]


def test_without_overrides_the_typed_defaults_apply():
    config = compose([])
    assert isinstance(config, Config)
    assert (config.method.name, config.engine.name, config.model.path) == ("fed_sb", "inprocess", None)
    assert config.federation.partition is Partition.iid
    check(config)


def test_overrides_set_only_their_fields():
    expected = compose([])
    expected.federation.clients, expected.training.optimizer, expected.data.train = 3, Optimizer.sgd, ["a", "b"]
    assert compose(["federation.clients=3", "training.optimizer=sgd", "data.train=[a,b]"]) == expected


@pytest.mark.parametrize(("group", "choice"), CHOICES, ids=lambda value: str(value))
def test_every_configuration_file_composes_sets_its_values_and_has_a_description(group, choice):
    path = {"model": ["model.path=some/model"]}.get(group, [])
    config = compose([f"{group}={choice}", *path])
    check(config)
    assert len(groups()[group][choice]) > 10
    if group != "experiment":
        found = to_dict(config)[group]
        assert {key: found[key] for key in choice_values(group, choice) if key not in ("name", "path")} == {
            key: value for key, value in choice_values(group, choice).items() if key not in ("name", "path")
        }


def test_every_configuration_file_belongs_to_a_group():
    files = {(path.parent.name, path.stem) for path in conf_folder().glob("*/*.yaml")}
    assert files | {("experiment", path.stem) for path in presets_folder().glob("*.yaml")} == set(CHOICES)


def test_a_preset_changes_the_defaults_and_the_command_line_changes_the_preset():
    assert compose(["experiment=heterogeneity"]).federation.alpha == 0.3
    assert compose(["federation.alpha=2", "experiment=heterogeneity"]).federation.alpha == 2
    config = compose(["experiment=arithmetic_mistral_7b", "model=qwen25_0_5b", "adapter=orthogonal"])
    assert config.model.path == "Qwen/Qwen2.5-0.5B"
    assert config.adapter.init is Init.orthogonal


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        (["model.path=../models/tiny"], "tiny"),
        (["model.path=org/tiny-1B/"], "tiny-1B"),
        (["model=local", "model.path=org/tiny"], "tiny"),
        (["model.path=org/tiny", "model.name=mine"], "mine"),
        (["model=mistral_7b", "model.path=copies/other"], "mistral_7b"),
        ([], "embedded"),
    ],
)
def test_a_model_is_named_after_its_path_unless_it_has_a_name(overrides, name):
    assert compose(overrides).model.name == name


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["seed=0,1"], "a sweep is fedsim run --multirun"),
        (["model=local"], "Expected model.path with model=local"),
        (["model.name=${data.nme}"], "Interpolation key 'data.nme' not found"),
        (["hydra.nothing=1"], "'nothing' not in 'HydraConf'"),
        (["+seed=3"], "already at 'seed'"),
        (["method@other=fed_sb"], "Could not override"),
    ],
)
def test_overrides_that_do_not_compose_are_reported_in_one_line(overrides, line):
    with pytest.raises(UserError, match=line) as caught:
        compose(overrides)
    assert "\n" not in str(caught.value)
