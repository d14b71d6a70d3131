"""Lines that a run writes to its audit log, and fedsim verify, which compares them with the checkpoints and the summary."""

import json
import re
import shutil
from dataclasses import replace

import pytest
from faults import FaultyGrid
from rounds import changed, of_method

from fedsim.choices import Accountant, PrivacyUnit
from fedsim.cli.main import main
from fedsim.cli.verify import verify
from fedsim.config import EvaluationConfig
from fedsim.flower.reporter import Reporter
from fedsim.flower.server import serve
from fedsim.journal import Journal
from fedsim.progress import Progress
from fedsim.run_folder import RunFolder
from fedsim.session import open_session

CONFIG = changed(
    of_method("fed_sb", federation={"clients": 4, "rounds": 3}, data={"train_examples": 32, "test_examples": 2}),
    privacy={"unit": PrivacyUnit.example, "noise_multiplier": 1.0, "accountant": Accountant.rdp},
)
CONFIG = replace(CONFIG, evaluation=EvaluationConfig(max_new_tokens=1))


def stop(reply):
    raise KeyboardInterrupt


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    """Returns folder and journal of a finished run: a client died in round 1, and the run was stopped in round 2 and resumed."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    config = replace(CONFIG, run_dir=str(folder))
    grid = FaultyGrid(4, {(1, 2): "died", (2, 1): stop})
    with pytest.raises(KeyboardInterrupt):
        serve(grid, config, grid.contexts, quiet=True)
    grid = FaultyGrid(4, {})
    serve(grid, replace(config, resume=True), grid.contexts, quiet=True)
    return folder, [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]


def of_kind(journal, kind):
    return [entry for entry in journal if entry["kind"] == kind]


def test_a_resumed_run_verifies_and_counts_superseded_lines(resumed):
    verdict = verify(resumed[0])
    assert verdict.problems == []
    assert verdict.superseded == 2, "the second round had been asked and charged before it was stopped"
    assert verdict.finished


def test_the_journal_lists_the_clients_asked_in_every_round(resumed):
    assert [entry["round"] for entry in of_kind(resumed[1], "asked")] == [1, 2, 2, 3]
    assert all(entry["clients"] == [0, 1, 2, 3] for entry in of_kind(resumed[1], "asked"))


def test_the_privacy_charges_follow_directly_after_the_clients_asked(resumed):
    kinds = [entry["kind"] for entry in resumed[1]]
    assert all(kinds[place + 1] == "charged" for place, kind in enumerate(kinds) if kind == "asked")
    found = of_kind(resumed[1], "charged")[0]["mechanisms"]
    assert sorted(client for each in found for client in each["clients"]) == [0, 1, 2, 3]
    plan = open_session(CONFIG).privacy_plan
    for each in found:
        expected = {"noise_multiplier": 1.0, "steps": 2, "name": "training", "sampling_rate": plan[each["clients"][0]].rate}
        assert each == expected | {"clients": each["clients"]}


def test_the_journal_lists_accepted_clients_and_missing_ones_with_the_reason(resumed):
    assert [entry["clients"] for entry in of_kind(resumed[1], "accepted")] == [[0, 1, 3], [0, 1, 2, 3], [0, 1, 2, 3]]
    (missing,) = of_kind(resumed[1], "missing")
    assert missing["clients"] == [{"client": 2, "reason": "died", "detail": "died"}]


def test_the_journal_records_the_digest_of_each_released_adapter(resumed):
    folder, journal = resumed
    released = of_kind(journal, "released")
    assert [entry["round"] for entry in released] == [1, 2, 3]
    assert released[-1]["adapter_digest"] == json.loads((folder / "summary.json").read_text())["adapter_digest"]


def test_the_journal_records_start_resumption_and_end(resumed):
    kinds = [entry["kind"] for entry in resumed[1]]
    assert (kinds[0], kinds[-1], kinds.count("resumed")) == ("started", "finished", 1)


def test_the_summary_counts_journal_lines_and_missing_clients(resumed):
    summary = json.loads((resumed[0] / "summary.json").read_text())
    assert summary["journal"]["lines"] == len(resumed[1])
    assert summary["missing"] == {"died": 1}


@pytest.mark.parametrize("kind", ["joined", "refused", "left", "absent"])
def test_membership_changes_are_written_to_the_journal(kind, tmp_path):
    config = replace(CONFIG, run_dir=str(tmp_path / "run"))
    with Progress(3, [], quiet=True) as progress, RunFolder.open(config) as folder:
        Reporter(open_session(config), folder, progress).membership(kind, client=1, reason="why")
    assert of_kind([json.loads(line) for line in (tmp_path / "run/journal.jsonl").read_text().splitlines()], kind)


def forged_copy(folder, to):
    """Copies the run folder, changes its journal, and rebuilds the original chain and the head in the summary."""
    shutil.copytree(folder, to)
    entries = [json.loads(line) for line in (to / "journal.jsonl").read_text().splitlines()]
    (to / "journal.jsonl").unlink()
    forged = Journal(to / "journal.jsonl")
    for entry in entries:
        facts = {name: value for name, value in entry.items() if name not in ("line", "previous", "time", "kind")}
        forged.append(entry["kind"], **facts | ({"clients": [0]} if entry["kind"] == "accepted" else {}))
    forged.close()
    summary = json.loads((to / "summary.json").read_text()) | {"journal": forged.head.to_json()}
    (to / "summary.json").write_text(json.dumps(summary))
    return to


def test_a_rebuilt_chain_is_detected_by_the_checkpoints_or_by_their_absence(resumed, tmp_path, capsys):
    forged = forged_copy(resumed[0], tmp_path / "run")
    assert main(["verify", str(forged)]) == 1
    assert "fixes another line" in capsys.readouterr().out
    shutil.rmtree(forged / "checkpoints")
    assert main(["verify", str(forged)]) == 1
    assert "it has no checkpoint" in capsys.readouterr().out


def test_verify_prints_the_head_for_comparison_with_a_copy(resumed, capsys):
    assert main(["verify", str(resumed[0])]) == 0
    text = capsys.readouterr().out
    assert json.loads((resumed[0] / "summary.json").read_text())["journal"]["sha256"] in text
    assert "compare the head with a copy kept elsewhere" in text


def test_verify_reports_a_resumption_from_an_invalid_line(resumed, tmp_path, capsys):
    shutil.copytree(resumed[0], tmp_path / "run")
    path = tmp_path / "run/journal.jsonl"
    path.write_text(re.sub(r'"goes_on_from": \d+', '"goes_on_from": "a while ago"', path.read_text()))
    assert main(["verify", str(tmp_path / "run")]) == 1
    assert "continues from 'a while ago', which is not an earlier line" in capsys.readouterr().out


def test_verify_reports_changed_and_removed_journal_lines(resumed, tmp_path, capsys):
    folder, _ = resumed
    assert main(["verify", str(folder)]) == 0
    assert "The journal holds" in capsys.readouterr().out
    path = folder / "journal.jsonl"
    original = path.read_bytes()
    path.write_bytes(original.replace(b'"clients": [0, 1, 3]', b'"clients": [0, 1, 2]'))
    try:
        assert main(["verify", str(folder)]) == 1
        assert "does not follow line" in capsys.readouterr().out
        path.write_bytes(b"".join(original.splitlines(keepends=True)[:-1]))
        assert main(["verify", str(folder)]) == 1
        assert "summary.json fixes" in capsys.readouterr().out
    finally:
        path.write_bytes(original)
    assert main(["verify", str(tmp_path)]) == 2
