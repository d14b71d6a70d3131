"""The parts of the benchmark suite; the suite itself, at its smallest, in the slow tier."""

import json
import re
import statistics
import subprocess
import sys
import time
from itertools import cycle
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments.benchmarks import accelerator, peers, profiling, results, training, workloads
from experiments.benchmarks.__main__ import SECTIONS, _command, main
from experiments.benchmarks.peers import centralised, peft_trainer
from experiments.benchmarks.processes import require
from experiments.benchmarks.suite import Column, Section, Settings, measured
from experiments.benchmarks.timing import in_turns, interleaved, margin, medians, ratio
from experiments.benchmarks.workloads import Workload
from fedsim.core.adapters import factors
from fedsim.core.fused import ROTATION, GatedMLP, Rotation

ROOT = Path(__file__).resolve().parents[2]
WORKLOAD = Workload("tiny", clients=3, batch=2, tokens=8, steps=2, rank=4)
HARDWARE = {"gpus": [], "cpu": "a CPU", "cpu_capability": "AVX2", "cores": 2}
MADE = {
    "started": "2026-01-02T03:04:05",
    "hardware": HARDWARE,
    "versions": {"torch": "2"},
    "commit": None,
    "quick": False,
    "how": "make bench",
}


def section(cases, measure, summary=lambda rows: ""):
    """Returns a section with the letter z."""
    columns = (Column("n", "n"), Column("rate", "rate", "{:.1f}"), Column("never", "never"))
    return Section("z", "A title", "What is compared.", columns, lambda settings: cases, measure, summary)


def test_turns_alternate_their_order_after_one_warm_up_call_each():
    calls = []
    rates = interleaved({name: lambda name=name: calls.append(name) or 1.0 for name in "ab"}, turns=3)
    assert calls == ["a", "b", "a", "b", "b", "a", "a", "b"]
    assert [len(found) for found in rates.values()] == [3, 3]


def test_rates_are_units_per_second():
    rates = interleaved({"sleep": lambda: time.sleep(0.02) or 5.0}, turns=1)
    assert 100 < rates["sleep"][0] <= 250


def test_the_ratio_is_the_median_of_neighbours_in_time():
    rates = {"a": [10.0, 1.0, 30.0], "b": [5.0, 1.0, 10.0]}
    assert ratio(rates, "a", "b") == statistics.median([2.0, 1.0, 3.0])
    assert medians(rates) == {"a": 10.0, "b": 5.0}


def test_turns_end_when_the_ratio_of_the_first_two_has_settled():
    def given(*values):
        return cycle(values).__next__

    steady = {"a": given(1.0, 2.0), "b": given(2.0, 4.0), "c": given(1.0, 50.0)}
    assert len(in_turns(steady, turns=20)["a"]) == 5, "each turn says half as fast"
    assert len(in_turns({"a": given(1.0, 2.0), "b": given(1.0)}, turns=20)["a"]) == 20, "the turns do not agree"
    assert len(in_turns({"a": given(1.0)}, turns=20)["a"]) == 20, "there is nothing to compare"
    assert len(in_turns({"a": given(1.0), "b": given(2.0)}, turns=20, seconds=0.0)["a"]) == 2


def test_about_95_percent_of_margins_contain_the_true_ratio():
    draw = np.random.default_rng(0)
    held = 0
    for _ in range(1000):
        rates = {"a": np.exp(draw.normal(0.0, 0.05, 25)).tolist(), "b": [1.0] * 25}
        half = margin(rates, "a", "b")
        assert 0.0 < half < 0.1
        held += abs(ratio(rates, "a", "b") - 1.0) <= half
    assert 0.93 < held / 1000 < 0.98
    assert margin({"a": [1.0] * 4, "b": [1.0] * 4}, "a", "b") is None


def test_a_measured_row_is_not_measured_again_and_a_failed_one_is():
    measured_cases = []

    def measure(case, settings):
        measured_cases.append(case["n"])
        if case["n"] == 2:
            raise ValueError("no\nluck")
        return {"rate": 1.0}

    each = section([{"n": 1}, {"n": 2}, {"n": 3}], measure)
    before = [{"case": {"n": 1}, "found": {"rate": 9.0}, "seconds": 0, "load": 0}]
    before += [{"case": {"n": 3}, "found": {"failed": "before"}, "seconds": 0, "load": 0}]
    rows = list(measured(each, Settings(), before))
    assert measured_cases == [2, 3]
    assert [row["found"] for row in rows] == [{"rate": 9.0}, {"failed": "ValueError: no luck"}, {"rate": 1.0}]


def test_a_peer_that_is_not_installed_is_skipped_with_instructions_and_measured_again_later():
    each = section([{"n": 1}], lambda case, settings: require("json", "no_such_peer"))
    (row,) = measured(each, Settings(), [])
    assert row["found"] == {"skipped": "no_such_peer is not installed: pip install -e '.[dev,simulation,bench]'"}
    (again,) = measured(section([{"n": 1}], lambda case, settings: {"rate": 1.0}), Settings(), [row])
    assert again["found"] == {"rate": 1.0}


def test_the_files_and_the_page_show_the_table_and_the_failures(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- bench:z -->\nold\n<!-- /bench:z -->\nafter\n")
    rows = [{"case": {"n": 1}, "found": {"rate": 2.25}, "load": 0.5}, {"case": {"n": 2}, "found": {"failed": "no luck"}, "load": 9.0}]
    out, each = tmp_path / "out.json", section([], None, lambda rows: f"{len(rows)} row.")
    results.save({"z": {"title": "A title", "made": MADE, "rows": rows}}, out, [each], page)
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("<!-- /bench:z -->\nafter\n")
    assert "old" not in text
    assert "| n | rate |\n| --- | --- |\n| 1 | 2.2 |\n\n1 row.\n\nWhat is compared.\n\nNot measured: n 2: no luck." in text
    assert "load 9.0" in text
    assert "busy" in text
    assert "2026-01-02T03:04" in text
    assert "a CPU (AVX2), 2 cores" in text
    assert results.load(out)["z"]["rows"][0]["found"]["rate"] == 2.25
    assert "## A title" in out.with_suffix(".md").read_text()
    results.save(results.load(out), out, [each], page)
    assert page.read_text() == text, "writing the tables again changes nothing"


def test_every_section_has_its_place_on_the_page_and_distinct_cases():
    page = results.PAGE.read_text()
    assert re.findall(r"<!-- bench:(\w) -->", page) == [each.letter for each in SECTIONS]
    for each in SECTIONS:
        for settings in (Settings.of(True), Settings.of(False)):
            cases = [json.dumps(case, sort_keys=True) for case in each.cases(settings)]
            assert cases
            assert len(set(cases)) == len(cases)


def test_the_tables_on_the_page_match_the_results_file():
    texts = results.section_texts(results.load(results.FOLDER / "benchmarks.json"), SECTIONS)
    page = results.PAGE.read_text()
    assert results.filled(page, texts) == page


@pytest.mark.parametrize("name", ["benchmarks", "benchmarks_fast", "benchmarks_avx2"])
def test_the_markdown_tables_of_a_results_file_match_it(name):
    texts = results.section_texts(results.load(results.FOLDER / f"{name}.json"), SECTIONS)
    assert {"a", "b", "c", "w"} <= set(texts)
    assert (results.FOLDER / f"{name}.md").read_text() == results.document(texts, SECTIONS)


def test_all_ways_of_training_see_the_same_tokens():
    on = workloads.subject("tiny", 4)
    clients = WORKLOAD.all_clients(on.vocabulary)
    seen = [train(on, clients, WORKLOAD.training) for train in (workloads.train, workloads.train_one_by_one, centralised.train)]
    assert seen == [WORKLOAD.num_tokens] * 3


def test_centralised_training_of_one_client_equals_a_cohort_of_one():
    on = workloads.subject("tiny", 4)
    client = [WORKLOAD.client(0, on.vocabulary)]
    trained = {}

    class Spy(torch.optim.AdamW):
        def step(self, closure=None):
            super().step(closure)
            trained["R"] = torch.cat([R.detach().flatten() for group in self.param_groups for R in group["params"]])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.optim.AdamW", Spy)
        centralised.train(on, client, WORKLOAD.training)
    from fedsim.training.cohort import train_cohort

    (result,) = train_cohort(on.model, on.start, on.layout, client, WORKLOAD.training, pad_id=0, seed=0, round=1, rounds=1)
    torch.testing.assert_close(trained["R"], result.factors, rtol=1e-4, atol=1e-6)
    assert not factors(on.model, ("R",))["model.layers.0.self_attn.q_proj.R"].requires_grad, "the model has its own factors back"


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft calls it
def test_peers_train_unfused_transformers_models():
    pytest.importorskip("peft")
    own = workloads.base_model("tiny")
    mlp = own.model.layers[0].mlp
    names = vars(sys.modules[type(own).__module__])
    seen = []
    with peers.as_written():
        seen.append(type(names[ROTATION]))
        theirs = peft_trainer.peft_model("tiny", 4)

    assert seen != [Rotation]
    assert not any(isinstance(module, GatedMLP) for module in theirs.modules())
    assert isinstance(mlp, GatedMLP)
    assert isinstance(names[ROTATION], Rotation), "in force again for our own"
    assert isinstance(workloads.base_model("tiny").model.layers[0].mlp, GatedMLP)


def test_large_combinations_have_shorter_sequences():
    cases = training.cases(Settings())
    assert all(case["clients"] * case["batch"] * case["tokens"] <= training.STEP_TOKENS[case["model"]] for case in cases)
    embedded = {(case["clients"], case["batch"]) for case in cases if case["model"] == "embedded"}
    assert embedded == {(clients, batch) for clients in (1, 5, 25, 100, 1000) for batch in (1, 4, 16)}
    assert {(case["model"], case["clients"], case["batch"]) for case in cases} >= training.PEER_CASES
    assert min(case["tokens"] for case in cases) == 8


def test_the_command_under_a_table_does_not_say_where_the_file_went():
    assert _command(["--quick", "--out", "/somewhere/x.json", "--only", "a,b"]) == 'make bench ARGS="--quick --only a,b"'
    assert _command([]) == "make bench"


def test_an_output_that_is_no_json_file_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--tables", "--out", str(tmp_path)])

    assert stopped.value.code == 2
    assert f"expected the name of a .json file, got {tmp_path}" in capsys.readouterr().err
    assert not [*tmp_path.iterdir()]


def test_shares_of_the_profile_sum_to_all_of_the_time():
    times = {"aten::mm": 30.0, "aten::_log_softmax": 10.0, "aten::copy_": 5.0, "aten::mul": 5.0, "everything": 50.0}
    found = profiling.shares(times)
    assert found.pop("largest").startswith("mm 30 %, _log_softmax 10 %")
    assert found == {"matrix products": 30, "log-softmax of the logits": 10, "copies": 5, "other elementwise": 5, "Python": 50}


def test_the_accelerator_section_is_complete_on_a_cpu():
    settings = Settings(quick=True, device="cpu", turns=1, seconds=0.0)
    for case in accelerator.cases(settings):
        found = accelerator.measure(case, settings)
        assert found["cohort"] > 0
        assert 0 < found["utilisation"] < 100
        assert found["peak_gb"] > 0
        assert ("ratio_one by one" in found) == (case["way"] == "plain")


def test_published_models_become_cases_when_named():
    cases = accelerator.cases(Settings(models=("mistral_7b",)))
    assert {case["clients"] for case in cases} == {1, 5, 25}
    workload = accelerator.workload_of("mistral_7b", 25, 2)
    assert (workload.tokens, workload.batch, workload.rank) == (512, 1, 200)


@pytest.mark.slow
@pytest.mark.parametrize("letters", ["b", "c", "d", "e,f", "g,p,s"])
def test_the_suite_runs_at_its_smallest(letters, tmp_path):
    out = tmp_path / "results.json"
    command = [sys.executable, "-m", "experiments.benchmarks", "--quick", "--threads", "1", "--only", letters, "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    assert set(json.loads(out.read_text())) == set(letters.split(","))
    assert "Not measured" not in out.with_suffix(".md").read_text()
