import subprocess
import sys
import time

import pytest

from fedsim.cli.compose import compose
from fedsim.cli.groups import groups
from fedsim.cli.help import COMMANDS, overview, run_help
from fedsim.cli.main import main
from fedsim.cli.options import options
from fedsim.errors import UserError
from fedsim.plain import to_dict

HEAVY = {"torch", "numpy", "hydra", "omegaconf", "flwr", "transformers", "datasets", "rich", "matplotlib"}


def test_the_help_names_every_group_choice_and_option():
    text = run_help()
    for group, choices in groups().items():
        assert f"{group}=" in text
        assert all(choice in text for choice in choices)
    assert all(f"  {key}=" in text for key in options())
    assert all(f"\n  {command} " in overview() for command in COMMANDS)
    assert all(f" {topic}" in overview().replace(",", "") for topic in {*groups(), *(key.partition(".")[0] for key in options())})


def test_every_option_has_a_description():
    assert [key for key, option in options().items() if len(option.meaning) < 5] == []


def test_the_defaults_shown_are_the_composed_ones():
    found = to_dict(compose([]))
    for key, option in options().items():
        value = found
        for part in key.split("."):
            value = value[part]
        assert option.default == value, key


def test_the_default_of_a_choice_overrides_that_of_the_type(monkeypatch):
    monkeypatch.setattr("fedsim.cli.options.default_choices", lambda: {"training": "sgd"})
    assert (options.__wrapped__()["training.optimizer"].default, options()["training.optimizer"].default) == ("sgd", "adamw")


def test_help_on_a_group_shows_only_that_group():
    text = run_help("training")
    assert "training.learning_rate=" in text
    assert "sgd" in text
    assert "federation.clients" not in text


def test_help_on_a_group_named_like_a_verb_shows_the_group(capsys):
    for words in (["run", "--help", "privacy"], ["help", "run", "privacy"]):
        assert main(words) == 0
        text = capsys.readouterr().out
        assert "privacy.epsilon=" in text
        assert "training.learning_rate" not in text


@pytest.mark.parametrize("command", [command for command in COMMANDS if command != "help"])
def test_every_command_has_its_own_help_with_its_flags(command, capsys):
    texts = []
    for words in ([command, "--help"], ["help", command], [command, "-h"]):
        assert main(words) == 0
        texts.append(capsys.readouterr().out)
    assert texts == texts[:1] * 3
    assert texts[0].startswith(f"fedsim {command} ")
    assert all(flag.partition(",")[0].partition("=")[0] in texts[0] for flag in COMMANDS[command].flags)
    assert len(texts[0].splitlines()) < 40 or command == "run"


def test_help_on_an_unknown_verb_is_an_error(capsys):
    for words in (["sweep", "--help"], ["help", "sweep"], ["--help", "sweep"]):
        assert main(words) == 2
        assert "Unknown command 'sweep': expected one of run, data" in capsys.readouterr().err


def test_the_error_for_a_wrong_flag_names_the_help_with_all_flags(capsys):
    assert main(["cost", "--jsn"]) == 2
    assert "Did you mean '--json'? All flags: fedsim cost --help" in capsys.readouterr().err


def test_help_on_something_unknown_names_the_nearest():
    with pytest.raises(UserError, match="Did you mean 'training'"):
        run_help("trainig")


@pytest.mark.parametrize("words", [["run", "--help"], ["help", "run"]])
def test_help_imports_nothing_heavy_and_takes_less_than_a_second(words):
    script = f"import sys\nfrom fedsim.cli.main import main\nassert main({words!r}) == 0\nprint(*sys.modules, file=sys.stderr)"
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    seconds = time.perf_counter() - began
    assert HEAVY.isdisjoint(done.stderr.split())
    assert "federation.clients=25" in done.stdout
    assert seconds < 1
