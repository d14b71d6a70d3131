import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import save_classifier, write_sick

from fedsim import calibration as calibrations
from fedsim.calibration import calibrated
from fedsim.cli.compose import compose
from fedsim.cli.estimate import MEMORY_FACTOR, TIME_FACTOR, estimate_of, estimate_table, rough_duration
from fedsim.cli.main import main
from fedsim.core.adapters import adapter_spec
from fedsim.core.cost import forecast
from fedsim.core.estimate import Calibration
from fedsim.effective import effective, method_of
from fedsim.errors import UserError
from fedsim.experiment import run
from fedsim.shapes import adapter_of, layer_shapes, num_parameters
from fedsim.training import cohort

SMALL = ["data.train_examples=40", "data.test_examples=5", "federation.clients=2", "federation.rounds=2", "training.batch_size=1"]
SMALL += ["training.tokens_per_pass=128", "evaluation.tokens_per_pass=256", "evaluation.max_new_tokens=8", "adapter.rank=4"]


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    """Keeps calibrations in the test's folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


@pytest.mark.parametrize("columns", [80, 100])
def test_assumptions_are_wrapped_to_the_width_of_the_terminal(columns, monkeypatch):
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


def test_a_calibration_is_cached_and_measured_again_on_request_or_for_other_settings(tmp_path):
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


def test_missing_data_are_assumed_and_the_assumption_is_shown(monkeypatch):
    monkeypatch.setattr("fedsim.cli.estimate.calibrated", lambda *_, **__: calibration())
    answer = estimate_of(compose(["model=mistral_7b", "experiment=arithmetic_mistral_7b"]), tokens=200)
    assert answer.work.train_examples == 20_000
    assert answer.work.questions == 1319 + 5000
    assert "20,000 examples of 200 tokens" in answer.assumptions[0]
    with pytest.raises(UserError, match=r"data\.path"):
        estimate_of(compose(["data.train=[mine]"]))


def calibration():
    """Returns made-up rates."""
    return Calibration(1e10, 1e-2, 1e-3, 1e9, 5e-3, 1e9, 1e-3, 1e9, 400_000_000, "made up")


@pytest.mark.parametrize("machine", ["benchmarks", "benchmarks_fast", "benchmarks_avx2"])
def test_measured_estimates_were_off_by_at_most_the_stated_factors(machine):
    path = Path(__file__).parents[2] / "experiments" / "results" / f"{machine}.json"
    rows = [row["found"] for row in json.loads(path.read_bytes())["h"]["rows"] if "total_x" in row["found"]]
    assert rows
    for key, factor in (("total_x", TIME_FACTOR), ("memory_x", MEMORY_FACTOR)):
        assert max(max(row[key], 1 / row[key]) for row in rows) <= factor
    assert f"up to {TIME_FACTOR:g} times" in " ".join(estimate_of(compose(SMALL)).assumptions)


@pytest.mark.parametrize("flags", ["--tokens=x", "--tokens=-1", "--megabits=0", "--mega=3", "--yaml", "--tokens"])
def test_a_wrong_flag_is_reported_in_one_line(flags, capsys):
    assert main(["estimate", flags]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_durations_are_rounded_for_reading():
    words = [rough_duration(seconds) for seconds in (0.44, 12, 312, 11_160, 3_542_400, 72_580_000, 1e9)]
    assert words == ["0.4 s", "12 s", "5.2 min", "3.1 h", "41 days", "2.3 years", "32 years"]


# ---- classification


@pytest.fixture
def classified(tmp_path):
    """A small encoder and pairs of words that it knows, 36 for training and 4 for testing."""
    pairs = write_sick(tmp_path / "SICK.txt")
    federation = ["federation.clients=2", "federation.rounds=2", "training.batch_size=2", "training.local_epochs=1"]
    return ["model=local", f"model.path={save_classifier(tmp_path / 'encoder')}", "data=sick", f"data.path={pairs}", *federation]


@pytest.mark.parametrize("apart", [False, True])
def test_the_work_of_pairs_counts_tokens_as_the_model_reads_them(apart, classified, tmp_path):
    from transformers import AutoTokenizer

    given = compose([*classified, f"model.pairs={'apart' if apart else 'together'}", "adapter.rank=4"])
    answer = estimate_of(given, rates=calibration())
    tokenizer = AutoTokenizer.from_pretrained(given.model.path)
    rows = [line.split("\t") for line in (tmp_path / "SICK.txt").read_text().splitlines()[1:]]
    lengths = [len(tokenizer(*each[1:3]).input_ids) + apart for each in rows]  # apart, the second text has a begin token of its own
    work = answer.work
    assert 36 * work.tokens + 4 * work.prompt == pytest.approx(sum(lengths))
    assert (work.train_examples, work.questions, work.responses, work.answer, work.sequences) == (36, 4, 0, 0, 1 + apart)
    config, method = effective(given), method_of(given)
    spec = adapter_of(config, method, ("entailment", "neutral", "contradiction"))
    assert spec.head["classifier"] == (3, 3 * 32 if apart else 32)
    assert answer.found.num_bytes == forecast(config, method, spec).totals


@pytest.mark.parametrize("apart", [False, True])
def test_estimated_padding_is_within_ten_percent_of_a_runs(apart, classified, tmp_path, monkeypatch):
    given = compose([*classified, f"model.pairs={'apart' if apart else 'together'}", "adapter.rank=4", f"run_dir={tmp_path / 'run'}"])
    passes = []
    real = cohort.group_gradients
    monkeypatch.setattr(
        cohort, "group_gradients", lambda model, parts, batch, *rest: passes.append(batch) or real(model, parts, batch, *rest)
    )
    run(given, quiet=True)
    padded = sum(batch.input_ids.numel() for batch in passes) / sum(batch.num_tokens for batch in passes)
    assert padded > 1.1
    assert estimate_of(given, rates=calibration()).work.padded == pytest.approx(padded, rel=0.1)


@pytest.mark.parametrize("pairs", ["apart", "together"])
def test_an_encoder_is_calibrated_and_answers_are_not_mentioned(pairs, classified, capsys):
    assert main(["estimate", *classified, "adapter.rank=4", f"model.pairs={pairs}", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert all(found["calibration"][name] > 0 for name in ("flops", "copy_bytes", "client_seconds", "svd_flops", "process_bytes"))
    assert found["calibration"]["decode_flops"] == found["calibration"]["decode_seconds"] == 0
    assert all(seconds > 0 for seconds in found["phases"].values())
    assert main(["estimate", *classified, "adapter.rank=4", f"model.pairs={pairs}"]) == 0
    text = capsys.readouterr().out
    assert "4 rows 2 times" in text
    assert "a GPU is not in these figures" in text
    assert not any(word in text for word in ("answer", "generat", "max_new_tokens", "response"))


def once(work, times=1):
    """Times one call, in place of the fastest of several."""
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


@pytest.mark.parametrize("labels", [("yes", "no"), ()])
def test_a_large_model_is_calibrated_with_a_small_model_of_its_kind(labels, monkeypatch):
    built = []
    real = calibrations.random_model
    monkeypatch.setattr(calibrations, "DIRECT_LIMIT", 0)
    monkeypatch.setattr(calibrations, "random_model", lambda *given: built.append(real(*given)) or built[-1])
    monkeypatch.setattr(calibrations, "_fastest", once)
    data = ["model=minilm", "data=snli"] if labels else []
    config = compose([*SMALL, "data.train_examples=40", *data])
    settled, method = effective(config), method_of(config)
    found = calibrated(settled, method, adapter_of(settled, method, labels), 20, labels)
    assert (built[0].config.model_type, bool(found.decode_flops)) == (("bert", False) if labels else ("llama", True))
    assert "matrix products" in found.source


def test_other_labels_or_another_reading_of_texts_have_other_calibration_keys(classified, tmp_path):
    def key(*overrides, labels=("yes", "no"), texts=2):
        config = compose([*classified, *overrides])
        method = method_of(config)
        settled = effective(config)
        return calibrations._key(settled, adapter_of(settled, method, labels, texts), 20)

    apart = "model.pairs=apart"
    keys = [key(), key(labels=("a", "b", "c")), key(apart), key(apart, labels=("a", "b", "c")), key(apart, texts=1)]
    assert len(set(keys)) == len(keys)


def test_a_users_own_labels_and_single_texts_are_found_from_the_rows(classified, tmp_path):
    rows = [f"w{i} w{i + 1} w{i + 2},{'abcd'[i % 4]}" for i in range(40)]
    (tmp_path / "mine.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    own = [*classified, "data=classification", f"data.path={tmp_path / 'mine.csv'}"]
    answer = estimate_of(compose([*own, "model.pairs=apart"]), rates=calibration())
    assert answer.spec.head["classifier"] == (4, 32), "one text has one state"
    assert (answer.work.tokens, answer.work.sequences) == (5, 1), "three words between [CLS] and [SEP]"


def test_tokens_are_estimated_from_words_without_a_tokenizer(classified, tmp_path):
    folder = tmp_path / "encoder"
    for file in folder.glob("tokenizer*"):
        file.unlink()
    given = compose(classified)
    answer = estimate_of(given, rates=calibration())
    rows = [line.split("\t") for line in (tmp_path / "SICK.txt").read_text().splitlines()[1:]]
    words = [len(f"{each[1]} {each[2]}".split()) for each in rows]
    assert 36 * answer.work.tokens + 4 * answer.work.prompt == pytest.approx(1.4 * sum(words))
    assert answer.work.answer == answer.work.responses == 0
    assert "1.4 for each word" in answer.assumptions[0]
    room = 8  # positions of a smaller model
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"max_position_embeddings": room}))
    cut = estimate_of(given, rates=calibration()).work
    assert 36 * cut.tokens + 4 * cut.prompt == pytest.approx(sum(min(room, 1.4 * number) for number in words))


@pytest.mark.parametrize("model", ["minilm", "bert_base", "roberta_large"])
def test_the_size_of_missing_inference_sets_is_known(model):
    answer = estimate_of(compose([f"model={model}", "data=snli"]), rates=calibration())
    assert (answer.work.train_examples, answer.work.questions) == (549_367, 9824)
    assert (answer.work.sequences, answer.work.answer) == (2 if model == "minilm" else 1, 0)
    assert "response" not in answer.assumptions[0]
    assert estimate_of(compose([f"model={model}", "data=snli"]), tokens=40, rates=calibration()).work.tokens == 40


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["data=snli"], "takes an encoder"),
        (["model=bert_base", "data=gsm8k"], "cannot generate answers"),
        (["model=bert_base", "data=classification"], "its size is not known"),
    ],
)
def test_data_that_the_model_cannot_serve_are_refused_in_one_line(overrides, reason, capsys):
    assert main(["estimate", *overrides]) == 2
    error = capsys.readouterr().err
    assert reason in error
    assert error.count("\n") == 1
