import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest

from fedsim.cli.compose import compose
from fedsim.errors import UserError

PYPROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"


@pytest.fixture
def served(monkeypatch):
    """What the ServerApp hands to the server, which is stood in for."""
    calls = []
    monkeypatch.setitem(sys.modules, "fedsim.flower.server", SimpleNamespace(serve=lambda grid, config: calls.append((grid, config))))
    return calls


def context(overrides):
    """The part of Flower's Context that the app reads."""
    return SimpleNamespace(run_config={"overrides": overrides})


def test_the_overrides_of_the_run_configuration_are_composed_as_on_the_command_line(served):
    from fedsim.cli.flower_app import main

    main("grid", context("seed=3 training=sgd run_dir=\"'my runs'\""))
    assert served == [("grid", compose(["seed=3", "training=sgd", "run_dir='my runs'"]))]


@pytest.mark.parametrize("overrides", ["sed=3", "federation.clients=0"])
def test_mistakes_are_found_before_the_server_starts(served, overrides):
    from fedsim.cli.flower_app import main

    with pytest.raises(UserError):
        main("grid", context(overrides))
    assert served == []


def test_flower_finds_the_server_app_by_its_name_in_pyproject():
    from flwr.serverapp import ServerApp

    module, _, name = tomllib.loads(PYPROJECT.read_text())["tool"]["flwr"]["app"]["components"]["serverapp"].partition(":")
    assert isinstance(getattr(__import__(module, fromlist=[name]), name), ServerApp)
