import json
from dataclasses import replace
from pathlib import Path

import pytest

from fedsim.calibration import calibrated
from fedsim.cli.compose import compose
from fedsim.cli.estimate import MEMORY_FACTOR, TIME_FACTOR, estimate_of, estimate_table, rough_duration
from fedsim.cli.main import main
from fedsim.core.adapters import adapter_spec
from fedsim.core.cost import forecast
from fedsim.effective import effective, method_of
from fedsim.errors import UserError
from fedsim.shapes import layer_shapes, num_parameters

SMALL = ["data.train_examples=40", "data.test_examples=5", "federation.clients=2", "federation.rounds=2", "training.batch_size=1"]
SMALL += ["training.tokens_per_pass=128", "evaluation.tokens_per_pass=256", "evaluation.max_new_tokens=8", "adapter.rank=4"]


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    """Calibrations of the tests stay in the test's folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


@pytest.mark.parametrize("columns", [80, 100])
def test_assumptions_are_no_wider_than_the_terminal(columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    shown = estimate_table(estimate_of(compose(SMALL))).partition("- Rates")[2].splitlines()
    assert len(shown) > 5
    assert max(map(len, shown)) <= columns


def test_the_command_prints_phases_memory_bytes_and_assumptions(capsys):
    assert main(["estimate", *SMALL]) == 0
    text = capsys.readouterr().out
    for word in ("initialisation", "training", "transfers", "evaluation", "total", "memory at the peak", "uplink", "- Rates:"):
        assert word in text


def test_json_holds_the_bytes_of_the_cost_and_positive_times(capsys):
    assert main(["estimate", *SMALL, "--json", "--megabits=8"]) == 0
    found = json.loads(capsys.readouterr().out)
    given = compose(SMALL)
    config, method = effective(given), method_of(given)
    spec = adapter_spec(layer_shapes(given.model, []), method.form, 4, 1, 1.0)
    assert found["bytes"] == forecast(config, method, spec).totals
    assert found["parameters"] == num_parameters(given.model)
    assert all(seconds > 0 for seconds in found["phases"].values())
    moved = sum(number for name, number in found["bytes"].items() if name.endswith("payload_bytes"))
    assert found["network_seconds_a_client"] == pytest.approx(moved / 2 / 1e6)


def test_a_calibration_is_kept_and_measured_anew_when_asked(tmp_path):
    config = compose(SMALL)
    settled, method = effective(config), method_of(config)
    spec = adapter_spec(layer_shapes(config.model, []), method.form, 4, 1, 1.0)
    first = calibrated(settled, method, spec, 20)
    (kept,) = (tmp_path / "fedsim" / "calibration").iterdir()
    kept.write_text(kept.read_text().replace('"source": "', '"source": "kept: '))
    assert calibrated(settled, method, spec, 20).source == f"kept: {first.source}"
    others = [
        (settled, adapter_spec(layer_shapes(config.model, ["q_proj"]), method.form, 4, 1, 1.0)),
        (settled, replace(spec, scaling=2.0)),
        (replace(settled, evaluation=replace(settled.evaluation, max_new_tokens=7)), spec),
    ]
    for other, of_other in others:
        assert not calibrated(other, method, of_other, 20).source.startswith("kept"), "it measures something else"
    assert not calibrated(settled, method, spec, 20, again=True).source.startswith("kept")


def test_data_that_are_not_here_are_assumed_and_said_so(monkeypatch):
    monkeypatch.setattr("fedsim.cli.estimate.calibrated", lambda *_, **__: calibration())
    answer = estimate_of(compose(["model=mistral_7b", "experiment=arithmetic_mistral_7b"]), tokens=200)
    assert answer.work.train_examples == 20_000
    assert answer.work.questions == 1319 + 5000
    assert "20,000 examples of 200 tokens" in answer.assumptions[0]
    with pytest.raises(UserError, match=r"data\.path"):
        estimate_of(compose(["data.train=[mine]"]))


def calibration():
    """Rates that nobody measured."""
    from fedsim.core.estimate import Calibration

    return Calibration(1e10, 1e-2, 1e-3, 1e9, 5e-3, 1e9, 1e-3, 1e9, 400_000_000, "made up")


@pytest.mark.parametrize("machine", ["benchmarks", "benchmarks_fast", "benchmarks_avx2"])
def test_estimates_were_off_by_no_more_than_they_say(machine):
    path = Path(__file__).parents[2] / "experiments" / "results" / f"{machine}.json"
    rows = [row["found"] for row in json.loads(path.read_bytes()).get("h", {}).get("rows", []) if "failed" not in row["found"]]
    if not rows:
        pytest.skip("no estimate has been measured (make bench)")
    for key, factor in (("total_x", TIME_FACTOR), ("memory_x", MEMORY_FACTOR)):
        assert max(max(row[key], 1 / row[key]) for row in rows) <= factor
    assert f"up to {TIME_FACTOR:g} times" in " ".join(estimate_of(compose(SMALL)).assumptions)


@pytest.mark.parametrize("flags", ["--tokens=x", "--tokens=-1", "--megabits=0", "--mega=3", "--yaml", "--tokens"])
def test_a_wrong_flag_is_one_line(flags, capsys):
    assert main(["estimate", flags]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_times_are_written_as_one_reads_them():
    words = [rough_duration(seconds) for seconds in (0.44, 12, 312, 11_160, 3_542_400, 72_580_000, 1e9)]
    assert words == ["0.4 s", "12 s", "5.2 min", "3.1 h", "41 days", "2.3 years", "32 years"]
