"""Runs from Python give the results of the command, and added methods work like built-in ones."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

from fedsim.api import METHODS, UserError, add_method, run
from fedsim.cli.cost import costs
from fedsim.cli.groups import groups
from fedsim.cli.main import main

BRIEF = [
    *("federation.clients=3", "federation.rounds=2", "data.train_examples=60", "data.test_examples=2", "adapter.rank=4"),
    *("training.local_steps=1", "training.batch_size=2", "evaluation.max_new_tokens=2"),
]


def parameters_of(folder, kind):
    """Counts the parameters of one kind of factor in an adapter in PEFT's form."""
    return sum(tensor.numel() for name, tensor in load_file(folder / "adapter_model.safetensors").items() if kind in name)


def test_a_run_from_python_gives_the_result_of_the_command(tmp_path, capsys):
    from_python = run(*BRIEF, f"run_dir={tmp_path}/python", quiet=True)
    assert capsys.readouterr() == ("", "")
    assert main(["run", *BRIEF, f"run_dir={tmp_path}/command"]) == 0
    from_command = json.loads((tmp_path / "command/summary.json").read_text())
    assert from_python["adapter_digest"] == from_command["adapter_digest"]
    assert from_python["communication"] == from_command["communication"]
    assert Path(from_python["run_dir"]) == tmp_path / "python"


def test_rewritten_data_is_read_again(tmp_path):
    def rows(first):
        texts = [{"prompt": f"{first + i}?", "completion": f"{first + i}"} for i in range(20)]
        (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, texts)))

    own = ["data=instructions", f"data.path={tmp_path}/mine.jsonl", "data.train_examples=null", "overwrite=true", f"run_dir={tmp_path}/run"]
    rows(0)
    before = [run(*BRIEF, *own, quiet=True)["adapter_digest"] for _ in range(2)]
    rows(500)
    assert before[0] == before[1] != run(*BRIEF, *own, quiet=True)["adapter_digest"]


@pytest.fixture
def added():
    """Adds methods that differ from ffa_lora, for one test."""
    names = []

    def add(name, **changes):
        names.append(name)
        add_method(replace(METHODS["ffa_lora"], name=name, **changes))

    yield add
    for name in set(names):
        del METHODS[name], groups()["method"][name]


def test_a_custom_method_trains_and_sends_its_declared_kinds(tmp_path, added):
    added("mine", turns=(("A",),))
    run(*BRIEF, "method=mine", f"run_dir={tmp_path}/first", quiet=True)
    added("mine")  # replaces the first, which has been used
    added("other", turns=(("B",), ("A",)))
    ffa, mine, other = (run(*BRIEF, f"method={name}", f"run_dir={tmp_path}/{name}", quiet=True) for name in ("ffa_lora", "mine", "other"))
    assert (mine["method"], mine["adapter_digest"]) == ("mine", ffa["adapter_digest"])
    assert mine["communication"] == ffa["communication"]
    assert other["adapter_digest"] != ffa["adapter_digest"]
    of_b, of_a = (3 * parameters_of(tmp_path / "other/adapter", kind) for kind in ("lora_B", "lora_A"))
    assert ffa["communication"]["uplink_parameters"] == 2 * of_b
    assert other["communication"]["uplink_parameters"] == of_b + of_a


def test_kinds_first_trained_in_a_later_round_are_sent_too(tmp_path, added):
    added("late", turns=(("B",), ("B",), ("A",)))
    options = [*BRIEF, "method=late", "federation.rounds=4"]
    summary = run(*options, f"run_dir={tmp_path}/late", quiet=True)
    of_b, of_a = (3 * parameters_of(tmp_path / "late/adapter", kind) for kind in ("lora_B", "lora_A"))
    with open(tmp_path / "late/communication.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["purpose"] == "adapter"]
    moved = {(row["direction"], int(row["round"])): 0 for row in rows}
    for row in rows:
        moved[row["direction"], int(row["round"])] += int(row["parameters"])
    assert [moved["downlink", number] for number in (1, 2, 3, 4)] == [of_b, of_b, of_b, of_a]  # what the previous round changed
    assert [moved["uplink", number] for number in (1, 2, 3, 4)] == [of_b, of_b, of_a, of_b]
    predicted = costs(options).rows[0].found.totals
    assert predicted == {name: summary["communication"][name] for name in predicted}


def test_turns_must_name_factors_of_the_form():
    for turns in ((), ((),), (("R",),), (("B",), ("A", "D"))):
        with pytest.raises(ValueError, match="Expected turns of kinds of factors that lora has, B, A, got"):
            replace(METHODS["ffa_lora"], turns=turns)


def test_other_processes_do_not_know_a_custom_method(tmp_path, added):
    added("mine")
    with pytest.raises(UserError, match="Expected engine=inprocess with method=mine, which this program has added, got ray"):
        run(*BRIEF, "method=mine", "engine=ray", f"run_dir={tmp_path}/run")
    assert not (tmp_path / "run").exists()


def test_built_in_methods_cannot_be_replaced():
    with pytest.raises(UserError, match=r"Expected a name that no method of fedsim has, got 'fed_sb'"):
        add_method(METHODS["fed_sb"])


def test_a_mistake_is_a_user_error_and_leaves_no_folder(tmp_path):
    with pytest.raises(UserError, match=r"Unknown method 'mine': expected one of centralized, .*"):
        run(*BRIEF, "method=mine", f"run_dir={tmp_path}/run", quiet=True)
    with pytest.raises(UserError, match=r"Expected federation.rounds >= 1"):
        run("federation.rounds=0")
    with pytest.raises(UserError, match=r"Expected one run, got a preset that is a sweep"):
        run("experiment=methods", f"run_dir={tmp_path}/run", quiet=True)
    assert not (tmp_path / "run").exists()
