"""Decisions of the owner of a client's data, which nothing a server sends can change."""

from dataclasses import replace

import pytest
import yaml

from clients.owner import Owner, RefusedError, accept, load_owner, own_view, owner_text
from fedsim.choices import Partition, PrivacyUnit
from fedsim.config import Config, DataConfig, FederationConfig, MethodConfig, ModelConfig, PrivacyConfig
from fedsim.config_check import check
from fedsim.errors import UserError

CONFIG = Config(federation=FederationConfig(clients=3))


def written(tmp_path, text):
    path = tmp_path / "client.yaml"
    path.write_text(text)
    return path


def test_the_file_written_for_an_owner_is_read_back_and_explains_every_option(tmp_path):
    text = owner_text(Owner(2, shard=True, methods=["fed_sb"]))
    owner = load_owner(written(tmp_path, text))
    assert owner == replace(Owner(2, shard=True, methods=["fed_sb"]), folder=str(tmp_path / "worker"))
    options = list(yaml.safe_load(text))
    lines = text.splitlines()
    assert all(lines[lines.index(next(line for line in lines if line.startswith(f"{name}:"))) - 1].startswith("# ") for name in options)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("clint: 0", "Did you mean 'client'"),
        ("methods: [fed_sb]", "expected `client:`"),
        ("client: one", "expected client to be a whole number, got 'one'"),
        ("client: true", "expected client to be a whole number"),
        ("client: -1", "expected client between 0"),
        ("client: 0\nmax_epsilon: 0", "expected max_epsilon between"),
        ("client: 0\nmethods: fed_sb", "a list of names"),
        ("client: 0\nmin_privacy: strong", "among none, client, example"),
        ("client: 0\ndevice: null", "expected device to be text"),
        ("[1, 2]", "got list"),
        ("a: [", "expected YAML"),
    ],
)
def test_a_mistake_in_the_file_is_reported_in_one_line(tmp_path, text, line):
    with pytest.raises(UserError, match=line) as caught:
        load_owner(written(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_the_error_for_a_missing_file_names_the_command_that_writes_one(tmp_path):
    with pytest.raises(UserError, match="fedsim deploy init"):
        load_owner(tmp_path / "client.yaml")


def test_paths_are_relative_to_the_file_and_hub_names_are_kept(tmp_path):
    (tmp_path / "mine.jsonl").write_text("")
    owner = load_owner(written(tmp_path, "client: 0\ndata_path: mine.jsonl\nmodel_path: org/model"))
    assert (owner.data_path, owner.model_path) == (str(tmp_path / "mine.jsonl"), "org/model")


def test_a_path_that_begins_with_a_tilde_is_in_the_owners_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    owner = load_owner(written(tmp_path, "client: 0\ndata_path: ~/mine.jsonl\nfolder: ~/worker"))
    assert (owner.data_path, owner.folder) == ("/home/somebody/mine.jsonl", "/home/somebody/worker")


def test_data_model_and_device_of_the_server_are_ignored():
    theirs = replace(
        CONFIG,
        model=ModelConfig(path="/etc", device="cuda:7"),
        data=DataConfig(path="/home/somebody", train=["gsm8k"], train_examples=5, owner=2, client_column="user", task_column="kind"),
        run_dir="/tmp/x",
        overwrite=True,
    )
    here = own_view(Owner(1, data_path="/mine", data_sets=["math"], model_path="/base", device="cpu"), theirs)
    assert (here.model.path, here.model.device, here.data.path, here.data.train) == ("/base", "cpu", "/mine", ["math"])
    assert (here.data.owner, here.data.train_examples, here.run_dir, here.overwrite) == (1, None, None, False)
    assert (here.data.client_column, here.data.task_column) == (None, None), "columns are those of the server's file"
    assert (theirs.data.token_cache, here.data.token_cache) == (True, False), (
        "no copies outside of the owner's folder, unless it is asked for"
    )
    assert own_view(Owner(1, token_cache=True), theirs).data.token_cache
    shard_view = own_view(Owner(1, shard=True), theirs)
    assert (shard_view.data.owner, shard_view.data.train_examples, shard_view.data.path) == (None, 5, None)
    assert (shard_view.data.client_column, shard_view.data.task_column) == ("user", "kind")


def test_the_partition_of_the_experiments_data_is_ignored_for_an_owners_own_data():
    natural = FederationConfig(clients=3, partition=Partition.natural)
    theirs = replace(CONFIG, federation=natural, data=DataConfig(path="all.jsonl", train=["instructions"], client_column="user"))
    check(theirs)
    check(own_view(Owner(1, data_path="mine.jsonl"), theirs))
    assert own_view(Owner(1, shard=True), theirs).federation == natural


@pytest.mark.parametrize(
    ("owner", "config", "reason"),
    [
        (Owner(0, methods=["fed_sb"]), replace(CONFIG, method=MethodConfig(name="fedit")), "fedit is not among those accepted: fed_sb"),
        (Owner(0, min_privacy="client"), CONFIG, "unit=none is weaker than client"),
        (
            Owner(0, min_privacy="example"),
            replace(CONFIG, privacy=PrivacyConfig(unit=PrivacyUnit.client)),
            "unit=client is weaker than example",
        ),
        (Owner(0, max_epsilon=3.0), replace(CONFIG, privacy=PrivacyConfig(unit=PrivacyUnit.client)), "max_epsilon takes"),
        (
            Owner(0, min_privacy="client"),
            replace(CONFIG, privacy=PrivacyConfig(unit=PrivacyUnit.client, noise_multiplier=0.0)),
            "noise_multiplier=0 adds no noise, which min_privacy=client asks for",
        ),
        (Owner(3), CONFIG, "no client 3"),
    ],
)
def test_an_unacceptable_configuration_is_refused_with_its_reason(owner, config, reason):
    with pytest.raises(RefusedError, match=reason):
        accept(owner, config)


def test_an_acceptable_configuration_is_accepted():
    accept(Owner(2), CONFIG)
    accept(Owner(0, methods=["fed_sb"], min_privacy="client"), replace(CONFIG, privacy=PrivacyConfig(unit=PrivacyUnit.example)))
