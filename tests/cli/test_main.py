import json
import os
import subprocess
import sys

import pytest

import fedsim
from fedsim.cli.main import main


@pytest.fixture(autouse=True)
def _empty_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


def test_running_the_package_as_a_module_runs_the_command():
    done = subprocess.run([sys.executable, "-m", "fedsim", "rn"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("fedsim: Unknown command 'rn'")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            ["rn"],
            "Unknown command 'rn': expected one of run, data, cost, estimate, privacy, audit, verify, deploy, worker, help.",
        ),
        (["run", "--multirn"], "Unknown flag '--multirn'"),
        (["run", "--seed", "3"], "Options are written without dashes: seed=... All flags"),
        (["cost", "--local-steps=3"], "Options are written without dashes: training.local_steps=..."),
        (["verify", "--seed", "run"], "Unknown flag '--seed': expected one of --help, -h. All flags"),
        (["run", "model=my/llama"], "roberta_large. For your own write model.path=my/llama. All options"),
        (["data", "data=../mine.csv"], "For your own write data=instructions (or another set) data.path=../mine.csv."),
        (["data", "data.path=mine.csv"], "the embedded data reads no file. Choose what reads it, such as data=instructions"),
        (["run", "method=fed_sb,", "fedit"], "(mismatched input '<EOF>'). Write several values without spaces: a,b."),
        (["run", "--multirun", "--cfg"], "got both"),
        (["run", "federaton.clients=3"], "Did you mean 'federation.clients'?"),
        (["run", "method=fedsb"], "Did you mean 'fed_sb'?"),
        (["run", "federation.fraction=0"], "Expected federation.fraction > 0 and <= 1, got 0.0"),
        (["run", "resume=true"], "Expected run_dir with resume=true"),
        (["run", "seed=0,1"], "a sweep is fedsim run --multirun"),
        (["run", "--multirun", "seed=0,-1"], "job 1 (seed=-1): Expected seed >= 0"),
        (["run", "--multirun", "method=fed_sb,fedsb"], "Unknown method 'fedsb'"),
        (["run", "--multirun", "run_dir=a,b"], "Expected one value of run_dir"),
        (["run", "--multirun", "seed=0,1", "resume=true"], "Expected run_dir"),
        (["run", "--multirun", "seed=0,1", "engine=deployment", "engine.superlink=x"], "job 0 (seed=0): Expected a simulation in a sweep"),
        (["data", "federation.alpha=0"], "Expected federation.alpha > 0"),
        (["data", "--multirun"], "Unknown flag"),
        (["cost", "--json=1"], "Unknown flag '--json=1': expected one of --json, --csv, --help, -h. Did you mean '--json'?"),
        (["cost", "--json", "--csv", "--json"], "Expected --json or --csv, got both"),
        (["estimate", "--tokens"], "Expected a value with --tokens, got none. Write --tokens=N"),
        (["estimate", "--tokens="], "Expected a positive number after --tokens="),
        (["verify", "--json", "run"], "Unknown flag '--json'"),
        (["help", "run", "trainig"], "Did you mean 'training'?"),
    ],
)
def test_a_mistake_is_reported_in_one_line_with_exit_code_two_and_leaves_no_files(words, told, capsys, tmp_path):
    assert main(words) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("fedsim: ")
    assert told in output.err
    assert output.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_mistake_is_found_before_anything_heavy_loads():
    script = "import sys\nfrom fedsim.cli.main import main\nmain(['run', 'federation.clients=0'])\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert {"torch", "numpy", "flwr", "transformers", "datasets"}.isdisjoint(done.stdout.split())


@pytest.mark.parametrize(
    "words", [["--version"], ["--help"], ["-h"], ["help"], ["run", "-h"], ["run", "--help", "data"], ["help", "run"], []]
)
def test_help_and_version_exit_with_code_zero(words, capsys):
    assert main(words) == 0
    assert capsys.readouterr().out


def test_version_is_that_of_the_package(capsys):
    main(["--version"])
    assert capsys.readouterr().out == f"fedsim {fedsim.__version__}\n"


def test_cfg_prints_yaml_that_holds_the_whole_configuration(capsys):
    import yaml

    from fedsim.cli.compose import compose
    from fedsim.plain import to_dict

    for flag in ("--cfg", "-c"):
        assert main(["run", "seed=3", flag, "training=sgd"]) == 0
        assert yaml.safe_load(capsys.readouterr().out) == to_dict(compose(["seed=3", "training=sgd"]))


def test_environment_variables_that_the_user_set_are_kept(monkeypatch):
    monkeypatch.setenv("FLWR_TELEMETRY_ENABLED", "1")
    monkeypatch.delenv("RAY_USAGE_STATS_ENABLED", raising=False)
    main(["--version"])
    assert os.environ["FLWR_TELEMETRY_ENABLED"] == "1"
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"


@pytest.mark.parametrize("words", [["data"], ["run", "--cfg"]])
def test_commands_that_show_one_run_say_so_for_a_preset_with_a_sweep(words, capsys):
    note = "The preset is a sweep; this covers one run, method=fed_sb, and ignores the sweep.\n"
    assert main([*words, "experiment=fed_sb_vs_centralized"]) == 0
    assert capsys.readouterr().err == note
    assert main([*words, "experiment=demo"]) == 0
    assert capsys.readouterr().err == ""


def test_data_shows_each_clients_examples_and_the_owners_of_a_natural_partition(capsys, tmp_path):
    rows = [{"prompt": f"{i}?", "completion": str(i), "user": user} for i, user in enumerate(["ann", "bob", "ann", "cy"])]
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = ["data=instructions", f"data.path={tmp_path}", "federation.clients=2"]
    assert main(["data", *own, "federation.partition=natural", "data.client_column=user"]) == 0
    lines = [line.split(maxsplit=4) for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["instructions", "all", "owners"]
    assert lines[2:4] == [["client", "0", "3", "3", "ann, cy"], ["client", "1", "1", "1", "bob"]]
    assert main(["data", *own]) == 0
    assert "owners" not in capsys.readouterr().out
