import json
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest

from fedsim.cli import flower_app
from fedsim.cli.compose import compose
from fedsim.cli.flower_app import main
from fedsim.errors import UserError
from fedsim.flower.remote_progress import MARK, ForwardedProgress
from fedsim.flower.roster import Roster
from fedsim.plain import to_dict

PYPROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"


@pytest.fixture
def served(monkeypatch):
    """Replaces the server and records what the ServerApp passes to it."""
    calls = []

    def serve(grid, config, **options):
        calls.append((config, options))
        return {"rounds": 1}

    monkeypatch.setattr("fedsim.flower.server.serve", serve)
    return calls


def context(overrides="", config=""):
    """Returns the part of Flower's Context that the app reads."""
    return SimpleNamespace(run_config={"overrides": overrides, "config": config})


def test_overrides_in_the_run_configuration_compose_as_on_the_command_line(served):
    main("grid", context("seed=3 training=sgd run_dir=\"'my runs'\""))
    assert served == [(compose(["seed=3", "training=sgd", "run_dir='my runs'"]), {})]


def test_a_whole_configuration_is_used_unchanged_and_its_summary_is_sent(served, capsys):
    config = compose(["seed=3", "engine=deployment", "engine.superlink=here", "federation.ranks={4:0.5,8:0.5}"])
    main("grid", context(config=json.dumps(to_dict(config))))
    ((found, options),) = served
    assert found == config
    assert isinstance(options["roster"], Roster)
    assert options["display"] is ForwardedProgress
    assert capsys.readouterr().out == f'{MARK}["summary", {{"rounds": 1}}]\n'


@pytest.mark.parametrize("overrides", ["sed=3", "federation.clients=0"])
def test_mistakes_are_found_before_the_server_starts_and_are_sent(served, overrides, capsys):
    with pytest.raises(UserError) as caught:
        main("grid", context(overrides))
    assert served == []
    assert json.loads(capsys.readouterr().out.removeprefix(MARK)) == ["mistake", str(caught.value)]


def test_pyproject_and_the_bundle_of_a_deployment_name_apps_that_flower_can_load():
    from flwr.clientapp import ClientApp
    from flwr.serverapp import ServerApp

    from fedsim.deploy.submit import _APP

    app = tomllib.loads(PYPROJECT.read_text())["tool"]["flwr"]["app"]
    bundle = tomllib.loads(_APP.format(version="1"))["tool"]["flwr"]["app"]
    assert (app["components"], app["config"]) == (bundle["components"], bundle["config"])
    for name, kind in (("serverapp", ServerApp), ("clientapp", ClientApp)):
        module, _, attribute = app["components"][name].partition(":")
        assert isinstance(getattr(__import__(module, fromlist=[attribute]), attribute), kind)
    assert flower_app.app is not None
