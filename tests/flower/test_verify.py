"""fedsim verify compares a run's results with what it wrote along the way: honest folders pass, a changed figure is named."""

import json
import shutil
from contextlib import suppress
from dataclasses import replace

import pytest
from faults import FaultyGrid
from rounds import changed, of_method

from fedsim.choices import Accountant, Mode, PrivacyUnit, Weighting
from fedsim.cli.audit import audited
from fedsim.cli.compose import compose
from fedsim.cli.main import main
from fedsim.cli.verify import verify
from fedsim.config import EvaluationConfig
from fedsim.experiment import run
from fedsim.flower.server import serve
from fedsim.journal import Journal

CLIENT_LEVEL = {"unit": PrivacyUnit.client, "noise_multiplier": 1.0, "epsilon": None, "accountant": Accountant.rdp}


def small(method, **sections):
    sections = {"data": {"train_examples": 24, "test_examples": 2}, **sections}
    return replace(of_method(method, **sections), evaluation=EvaluationConfig(max_new_tokens=1, every=1, diagnosis=False))


PRIVATE = changed(
    small("fed_sb"), privacy={"unit": PrivacyUnit.example, "noise_multiplier": 1.0, "epsilon": None, "accountant": Accountant.rdp}
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Returns the folder of a finished private run."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    run(replace(PRIVATE, run_dir=str(folder)), quiet=True)
    return folder


@pytest.fixture
def copied(finished, tmp_path):
    """Returns a copy of the finished run's folder, which tests may change."""
    shutil.copytree(finished, tmp_path / "copy")
    return tmp_path / "copy"


def leaves(value, place=()):
    """Yields the path of keys to every figure and word in nested values."""
    if isinstance(value, dict | list):
        for key, each in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(each, (*place, key))
    else:
        yield place


def container_of(value, place):
    """Returns the container of the last key of a place in nested values."""
    for key in place[:-1]:
        value = value[key]
    return value


def falsify(path, place):
    """Changes one figure or word of a JSON file."""
    content = json.loads(path.read_bytes())
    container_of(content, place)[place[-1]] = "another" if isinstance(container_of(content, place)[place[-1]], str) else 0.123
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    "config",
    [
        small("fed_sb", federation={"network": "mobile", "mode": Mode.fedbuff, "concurrency": 2, "buffer": 1}),
        changed(small("fed_sb", federation={"weighting": Weighting.uniform}), privacy=CLIENT_LEVEL),
        changed(small("fed_sb", federation={"weighting": Weighting.uniform}), privacy=CLIENT_LEVEL | {"secure_aggregation": True}),
        small("fed_sb", adapter={"refresh_every": 1}),
        small("centralized"),
        small("fedsa_lora"),
    ],
    ids=["fedbuff", "client", "secure", "refreshed", "pooled", "personal"],
)
def test_the_folder_of_an_honest_run_verifies(config, tmp_path):
    run(replace(config, run_dir=str(tmp_path / "run")), quiet=True)
    verdict = verify(tmp_path / "run")
    assert (verdict.problems, verdict.finished) == ([], True)


def test_the_folder_of_an_audited_run_verifies(tmp_path):
    options = ("experiment=audit", "data.test_examples=1", "evaluation.max_new_tokens=1", "federation.clients=2", "audit.canaries=8")
    audited(compose([*options, "data.train_examples=8", "privacy.accountant=rdp", f"run_dir={tmp_path / 'run'}"]), quiet=True)
    assert verify(tmp_path / "run").problems == []


def test_the_folder_of_an_interrupted_run_verifies_before_and_after_it_is_resumed(tmp_path):
    def stop(reply):
        raise KeyboardInterrupt

    config = replace(PRIVATE, run_dir=str(tmp_path / "run"))
    grid = FaultyGrid(3, {(1, 1): "died", (2, 1): stop})
    with suppress(KeyboardInterrupt):
        serve(grid, config, grid.contexts, quiet=True)
    verdict = verify(tmp_path / "run")
    assert (verdict.problems, verdict.finished) == ([], False)
    grid = FaultyGrid(3, {})
    serve(grid, replace(config, resume=True), grid.contexts, quiet=True)
    verdict = verify(tmp_path / "run")
    assert (verdict.problems, verdict.finished) == ([], True)


def test_every_changed_figure_of_the_summary_is_named(copied, capsys):
    path = copied / "summary.json"
    whole = path.read_bytes()
    places = [place for place in leaves(json.loads(whole)) if place[0] != "journal"]
    assert len(places) > 40
    for place in places:
        path.write_bytes(whole)
        falsify(path, place)
        problem, *others = verify(copied).problems
        assert problem.startswith(f"summary.json says {'.'.join(map(str, place))}=")
        assert len(others) == (place[0] == "sha256"), "the file of another hash is named as well"
    assert main(["verify", str(copied)]) == 1
    assert "The run folder was changed:\n  summary.json says " in capsys.readouterr().out


@pytest.mark.parametrize("key", ["rounds", "evaluation", "communication", "privacy", "seed"])
def test_a_removed_part_of_the_summary_is_named(key, copied):
    summary = json.loads((copied / "summary.json").read_bytes())
    del summary[key]
    (copied / "summary.json").write_text(json.dumps(summary))
    problems = verify(copied).problems
    assert problems
    assert all(problem.startswith(f"summary.json says {key}") for problem in problems)


def test_a_changed_or_removed_adapter_file_is_named(copied):
    path = copied / "adapter" / "adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    (problem,) = verify(copied).problems
    assert problem.startswith("adapter/adapter_model.safetensors is not as the run wrote it")
    path.unlink()
    assert verify(copied).problems == ["adapter/adapter_model.safetensors cannot be read: No such file or directory"]


def test_changed_removed_added_or_reordered_transfers_are_named(copied):
    path = copied / "communication.csv"
    head, *rows = path.read_text().splitlines()
    for number, row in enumerate(rows, 2):
        rest = rows[: number - 2], rows[number - 1 :]
        values = row.split(",")
        changes = [[",".join([*values[:place], "7", *values[place + 1 :]])] for place in (0, 1, 4, 5, 6, 7) if values[place] != "7"]
        for change in [*changes, [], [row, row]]:
            path.write_text("\n".join([head, *rest[0], *change, *rest[1]]) + "\n")
            (problem,) = verify(copied).problems
            assert problem.startswith("communication.csv is not as the run wrote it: line ")
    path.write_text("\n".join([head, *reversed(rows)]) + "\n")
    assert verify(copied).problems[0].startswith("communication.csv is not as the run wrote it: line 2 is ")


def test_without_the_last_checkpoint_transfer_sums_are_compared_with_the_summary(copied):
    (copied / "checkpoints/round_0002.safetensors").unlink()
    assert verify(copied).problems == []
    path = copied / "communication.csv"
    path.write_text("\n".join(path.read_text().splitlines()[:-1]) + "\n")
    problems = verify(copied).problems
    assert problems
    assert all("communication.uplink_" in problem and "but communication.csv " in problem for problem in problems)


@pytest.mark.parametrize("name", ["communication.csv", "events.jsonl"])
@pytest.mark.parametrize("content", [None, b"", b"\xff\x00", b'{"kind": 3}\n', b"[[[[\n"])
def test_a_missing_or_malformed_result_file_is_reported_as_one_problem(name, content, copied):
    (copied / name).unlink()
    if content is not None:
        (copied / name).write_bytes(content)
    (problem,) = verify(copied).problems
    assert problem.startswith(f"{name} is not as the run wrote it: ")


def replace_last_line(folder, **facts):
    """Replaces the journal's last line, and the head in the summary."""
    lines = (folder / "journal.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "journal.jsonl").write_bytes(b"".join(lines[:-1]))
    journal = Journal(folder / "journal.jsonl")
    journal.append("finished", **facts)
    journal.close()
    summary = json.loads((folder / "summary.json").read_bytes())
    (folder / "summary.json").write_text(json.dumps(summary | {"journal": journal.head.to_json()}))


@pytest.mark.parametrize(
    ("key", "source"),
    [
        ("evaluation.arithmetic.base.accuracy", "events.jsonl"),
        ("evaluation.arithmetic.final.loss", "events.jsonl"),
        ("privacy.epsilon", "events.jsonl"),
        ("adapter_digest", "events.jsonl"),
        ("rounds", "events.jsonl"),
        ("communication.uplink_bytes", "communication.csv"),
    ],
)
def test_a_figure_changed_in_summary_and_journal_is_found_by_another_file(key, source, copied):
    falsify(copied / "summary.json", key.split("."))
    summary = json.loads((copied / "summary.json").read_bytes())
    replace_last_line(copied, summary={name: value for name, value in summary.items() if name != "journal"})
    (problem,) = verify(copied).problems
    assert problem.startswith(f"summary.json says {key}=")
    assert f"but {source} " in problem


def test_a_journal_without_a_summary_still_verifies_and_other_files_reveal_changes(copied):
    replace_last_line(copied, round=2)
    assert verify(copied).problems == []
    falsify(copied / "summary.json", ("rounds",))
    (problem,) = verify(copied).problems
    assert problem == "summary.json says rounds=0.123, but events.jsonl 2"
