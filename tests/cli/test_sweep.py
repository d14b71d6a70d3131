"""Sweeps through Hydra's launchers, with a stand-in for the runs of jobs."""

import json
import math
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from fedsim.cli.compose import compose_with_hydra, initialized, to_config
from fedsim.cli.groups import groups
from fedsim.cli.main import main
from fedsim.cli.sweep import plan
from fedsim.cli.sweep_table import _megabytes, sweep_table
from fedsim.config import Config
from fedsim.errors import UserError
from fedsim.models import PACKAGE
from fedsim.plain import to_dict
from fedsim.session import check


def summary(config):
    """Returns the summary of a finished run, whose accuracy encodes the seed and the rank."""
    accuracy = config.seed / 10 + (config.adapter.rank or 64) / 1000
    return {
        "evaluation": {"sums": {"base": {"accuracy": 0.0, "loss": 2.0}, "final": {"accuracy": accuracy, "loss": 1.0}, "num_examples": 10}},
        "communication": {"uplink_bytes": 1234567, "downlink_bytes": 7654321, "setup_bytes": 50000},
        "training": {"wall_seconds": 12.3},
    }


@pytest.fixture
def runs(monkeypatch, tmp_path):
    """Replaces the experiment: records each configuration, calls `on_run`, and leaves the files of a finished run."""
    monkeypatch.chdir(tmp_path)
    recorded = SimpleNamespace(configs=[], on_run=lambda config: None)

    def run(config):
        recorded.configs.append(config)
        folder = Path(config.run_dir)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "run.lock").touch()
        recorded.on_run(config)
        (folder / "summary.json").write_text(json.dumps(summary(config)))

    monkeypatch.setitem(sys.modules, "fedsim.experiment", SimpleNamespace(run=run))
    return recorded


def jobs_of(folder):
    """Returns the jobs in sweep.json."""
    return json.loads((Path(folder) / "sweep.json").read_text())["jobs"]


def fail_at(seed, error):
    """Returns an `on_run` that raises for this seed."""

    def on_run(config):
        if config.seed == seed:
            raise error

    return on_run


def test_every_combination_runs_in_its_own_folder_in_sweep_order(runs, capsys):
    assert main(["run", "-m", "seed=0,1", "adapter.rank=8,16", "federation.clients=3", "run_dir=all"]) == 0
    assert [(config.seed, config.adapter.rank) for config in runs.configs] == [(0, 8), (0, 16), (1, 8), (1, 16)]
    assert {config.federation.clients for config in runs.configs} == {3}
    expected = [f"all/{i}-seed={s},adapter.rank={r}" for i, (s, r) in enumerate([(0, 8), (0, 16), (1, 8), (1, 16)])]
    assert [config.run_dir for config in runs.configs] == expected
    assert {path.name for path in Path("all").iterdir()} == {"sweep.json", "comparison.png", *(Path(name).name for name in expected)}
    assert [path.name for path in Path().iterdir()] == ["all"]  # Hydra leaves no files
    table = capsys.readouterr().out.split("\n\n")[-3].splitlines()
    assert table[0].split() == [
        "job",
        "seed",
        "adapter.rank",
        "sums",
        "loss",
        "MB",
        "up",
        "MB",
        "down",
        "MB",
        "set-up",
        "seconds",
        "status",
    ]
    assert table[5].split() == ["3", "1", "16", "0.0", ">", "11.6", "2.000", ">", "1.000", "1.2", "7.7", "0.05", "12", "finished"]


def test_sweep_json_holds_configuration_summary_and_status_of_every_job(runs):
    main(["run", "-m", "seed=0,1", "run_dir=all"])
    for job, config in zip(jobs_of("all"), runs.configs, strict=True):
        assert job["config"] == to_dict(config)
        assert job["summary"] == summary(config)
        assert (job["status"], job["folder"], job["varied"]) == ("finished", Path(config.run_dir).name, [f"seed={config.seed}"])


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["adapter.rank=8,16,4096"], "job 2 (adapter.rank=4096): adapter.rank: expected at most 192"),
        (["data=gsm8k", "data.path=null,nowhere.csv"], "job 1 (data.path=nowhere.csv): data.path=nowhere.csv: there is no such file"),
        (["method=fed_sb,fedit", "adapter.init=gradient"], "job 1 (method=fedit): adapter.init: method=fedit starts from"),
    ],
)
def test_a_mistake_in_any_job_is_reported_before_the_first_starts(runs, capsys, words, told):
    assert main(["run", "-m", *words]) == 2
    assert capsys.readouterr().err.startswith(f"fedsim: {told}")
    assert runs.configs == list(Path().iterdir()) == []


def test_resuming_does_not_need_the_data_of_a_finished_job(runs):
    Path("a.csv").write_text("instruction,output\nhow,so\n")
    Path("b.csv").write_text("instruction,output\nhow,so\n")
    runs.on_run = lambda config: (_ for _ in ()).throw(RuntimeError) if config.data.path == "b.csv" else None
    words = ["run", "-m", "data=instructions", "data.path=a.csv,b.csv", "run_dir=all"]
    assert main(words) == 1
    Path("a.csv").unlink()
    runs.on_run = lambda config: None
    assert main([*words, "resume=true"]) == 0
    assert [job["status"] for job in jobs_of("all")] == ["finished"] * 2


def test_every_preset_passes_the_check_before_a_run():
    for preset in groups()["experiment"]:
        with initialized():
            for job in plan([f"experiment={preset}"])[1]:
                config = to_config(compose_with_hydra(job.overrides))
                if not str(config.model.path).startswith(PACKAGE):  # the package may be missing here
                    check(config)


def test_without_run_dir_each_sweep_gets_its_own_dated_folder(runs):
    main(["run", "-m", "seed=0,1"])
    main(["run", "-m", "seed=0,1"])
    parents = {Path(config.run_dir).parent for config in runs.configs}
    assert len(parents) == 2
    assert all(parent.match("runs/*/*-multirun*") for parent in parents)


@pytest.mark.parametrize(
    ("error", "told"), [(UserError("rank above 4."), "rank above 4."), (RuntimeError("no\nmemory"), "RuntimeError: no memory")]
)
def test_a_failed_job_does_not_lose_the_others(runs, capsys, error, told):
    runs.on_run = fail_at(0, error)
    assert main(["run", "-m", "seed=0,1", "run_dir=all"]) == 1
    assert [job["status"] for job in jobs_of("all")] == ["failed", "finished"]
    assert jobs_of("all")[0]["error"] == told
    assert f"failed  {told}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "labels"),
    [
        (["seed=0,1", "method=fedit,flora"], ["fedit", "flora", "fedit", "flora"]),
        (["method=fedit,flora", "federation.rounds=2,3", "seed=0,1"], ["method=fedit federation.rounds=2"] * 2),
        (["seed=0,1"], ["0", "1"]),
    ],
)
def test_jobs_that_differ_only_in_their_seed_share_a_label(options, labels):
    with initialized():
        _, jobs, _ = plan(options)
    assert [job.label for job in jobs][: len(labels)] == labels


def test_a_picture_that_cannot_be_drawn_keeps_the_table_and_removes_the_old_picture(runs, capsys):
    assert main(["run", "-m", "seed=0,1", "run_dir=all"]) == 0
    assert Path("all/comparison.png").read_bytes().startswith(b"\x89PNG")
    runs.on_run = lambda config: (Path(config.run_dir) / "events.jsonl").write_text("{damaged}\n")
    assert main(["run", "-m", "seed=0,1", "run_dir=all", "overwrite=true"]) == 0
    out, err = capsys.readouterr()
    assert out.count("finished") == 4
    assert "comparison.png: not drawn" in err
    assert not Path("all/comparison.png").exists()


def test_a_sweep_over_seeds_shows_mean_and_deviation_for_each_combination(runs, capsys):
    runs.on_run = fail_at(2, RuntimeError("out of luck"))
    assert main(["run", "-m", "adapter.rank=4,8", "seed=0,1,2,3", "run_dir=all"]) == 1
    text = capsys.readouterr().out.partition("mean ± standard deviation over seeds\n")[2].splitlines()
    assert [line.split() for line in text[:4] if "-" not in line] == [
        ["adapter.rank", "seeds", "sums", "loss"],
        ["4", "3", "13.7", "±", "15.3", "1.000", "±", "0.000"],  # 0.4, 10.4 and 30.4 percent
        ["8", "3", "14.1", "±", "15.3", "1.000", "±", "0.000"],
    ]
    assert main(["run", "-m", "adapter.rank=4,8", "run_dir=other"]) == 0
    assert "over seeds" not in capsys.readouterr().out


def test_the_loss_of_a_job_is_the_mean_over_all_questions_and_missing_if_a_task_has_none():
    def row_with(loss):
        task = lambda loss, count: {"base": {"accuracy": 0, "loss": 4.0}, "final": {"accuracy": 0, "loss": loss}, "num_examples": count}  # noqa: E731
        evaluation = {"sums": task(1.0, 30), "texts": task(loss, 10)}
        others = {name: value for name, value in summary(Config()).items() if name != "evaluation"}
        done = {"number": 0, "varied": [], "status": "finished", "error": None, "summary": {"evaluation": evaluation, **others}}
        return sweep_table([done]).splitlines()[2]

    assert "4.000 > 1.500" in row_with(3.0)
    assert "4.000 > - " in row_with(None)
    assert "4.000 > - " in row_with(math.nan)


def test_small_byte_counts_are_not_shown_as_zero():
    assert [_megabytes(n) for n in (0, 4_210, 1_234_567, 45_678_900, 2_345_678_900)] == ["0", "0.00421", "1.2", "45.7", "2,345.7"]


def test_resume_runs_only_what_has_not_finished(runs):
    runs.on_run = fail_at(1, RuntimeError("out of luck"))
    words = ["run", "-m", "seed=0,1,2", "run_dir=all"]
    assert main(words) == 1
    runs.configs.clear()
    runs.on_run = lambda config: None
    assert main([*words, "resume=true"]) == 0
    assert [(config.seed, config.resume) for config in runs.configs] == [(1, True)]
    assert [job["status"] for job in jobs_of("all")] == ["finished"] * 3


def test_ctrl_c_ends_the_sweep_and_prints_how_to_continue(runs, capsys):
    runs.on_run = fail_at(1, KeyboardInterrupt())
    assert main(["run", "-m", "seed=0,1,2", "run_dir=all"]) == 130
    assert [job["status"] for job in jobs_of("all")] == ["finished", "interrupted", "not started"]
    told = capsys.readouterr().out.splitlines()[-1].partition("Go on with: fedsim ")[2]
    runs.configs.clear()
    runs.on_run = lambda config: None
    assert main(shlex.split(told)) == 0
    assert [(config.seed, config.resume) for config in runs.configs] == [(1, True), (2, False)]


def test_a_sweep_is_not_overwritten_unless_asked(runs, capsys):
    words = ["run", "-m", "seed=0,1", "run_dir=all"]
    assert main(words) == 0
    assert main(words) == 2
    assert "holds a sweep" in capsys.readouterr().err
    assert main([*words, "overwrite=true"]) == 0
    assert [config.overwrite for config in runs.configs] == [False, False, True, True]


def test_overwriting_a_sweep_removes_its_runs_and_keeps_other_files(runs):
    main(["run", "-m", "seed=0,1,2", "run_dir=all"])
    (Path("all/2-seed=2") / "notes.txt").write_text("mine")
    Path("all/1-seed=1.log").write_text("told")
    assert main(["run", "-m", "adapter.rank=4,8", "run_dir=all", "overwrite=true"]) == 0
    folders = sorted(path.name for path in Path("all").iterdir() if path.is_dir())
    assert folders == ["0-adapter.rank=4", "1-adapter.rank=8", "2-seed=2"]
    assert [path.name for path in Path("all/2-seed=2").iterdir()] == ["notes.txt"]
    assert not list(Path("all").glob("*.log"))


def test_summaries_of_an_overwritten_sweep_are_discarded(runs):
    words = ["run", "-m", "seed=0,1", "run_dir=all"]
    main(words)
    runs.on_run = fail_at(0, KeyboardInterrupt())
    assert main([*words, "overwrite=true"]) == 130
    assert [job["summary"] for job in jobs_of("all")] == [None, None]


def test_resume_with_other_options_is_refused(runs, capsys):
    main(["run", "-m", "seed=0,1", "run_dir=all"])
    assert main(["run", "-m", "seed=0,1", "run_dir=all", "federation.rounds=9", "resume=true"]) == 2
    assert "Expected the options with which the sweep in all was begun" in capsys.readouterr().err
    assert main(["run", "-m", "seed=0,1", "run_dir=elsewhere", "resume=true"]) == 2
    assert "holds none" in capsys.readouterr().err


def test_a_folder_with_other_files_is_refused(runs, capsys):
    Path("all").mkdir()
    Path("all/thesis.txt").touch()
    assert main(["run", "-m", "seed=0,1", "run_dir=all"]) == 2
    assert "holds something else" in capsys.readouterr().err
    assert [path.name for path in Path("all").iterdir()] == ["thesis.txt"]


def test_a_preset_with_a_sweep_runs_all_its_jobs(runs):
    assert main(["run", "experiment=fed_sb_vs_centralized", "run_dir=all", "seed=4"]) == 0
    assert [(config.method.name, config.seed) for config in runs.configs] == [("fed_sb", 4), ("centralized", 4)]


def test_comma_separated_values_are_swept_together_with_those_of_a_preset(runs, capsys):
    assert main(["run", "experiment=fed_sb_vs_centralized", "run_dir=all", "seed=0,1"]) == 0
    assert [(config.method.name, config.seed) for config in runs.configs] == [
        ("fed_sb", 0),
        ("fed_sb", 1),
        ("centralized", 0),
        ("centralized", 1),
    ]
    assert main(["run", "experiment=demo", "seed=0,1"]) == 2  # this preset has no sweep
    assert "a sweep is fedsim run --multirun" in capsys.readouterr().err


def test_the_command_line_replaces_the_swept_values_of_a_preset(runs):
    assert main(["run", "-m", "experiment=initializations", "adapter.init=orthogonal,weight_svd", "run_dir=all"]) == 0
    assert [config.adapter.init.name for config in runs.configs] == ["orthogonal", "weight_svd"]


def test_folder_names_replace_separators_and_brackets_in_values(runs):
    Path("c d").mkdir()
    for name in ("links/a.csv", "c d/e.csv"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text("uplink,downlink\n1e6,1e6\n")
    main(
        [
            "run",
            "-m",
            "federation.network=links/a.csv,c d/e.csv",
            "data.train=[gsm8k,math],[math]",
            "data.test=[math]",
            "run_dir='my sweep, 1=2'",
        ]
    )
    names = [Path(config.run_dir).name for config in runs.configs]
    assert names[0] == "0-federation.network=links_a.csv,data.train=_gsm8k,math_"
    assert {config.federation.network for config in runs.configs} == {"links/a.csv", "c d/e.csv"}
    assert {Path(config.run_dir).parent.name for config in runs.configs} == {"my sweep, 1=2"}
