"""SNLI and SICK: rows of every form, rows without a label, malformed ones, and the split of a single file."""

import json
from collections import Counter
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from early import load

from fedsim.choices import OnError
from fedsim.config import DataConfig
from fedsim.data import labels
from fedsim.data.rows import Malformed, read
from fedsim.data.sets import INFERENCE, SETS
from fedsim.errors import UserError

REAL = Path(__file__).resolve().parents[3] / "shared/data/nli/SICK.txt"
SNLI = {"premise": "A man sleeps. ", "hypothesis": "He rests.", "label": 0}
ORIGINAL = {"gold_label": "contradiction", "sentence1": "A man sleeps.", "sentence2": "He runs.", "pairID": "1"}
SICK = {"pair_ID": "1", "sentence_A": "A man sleeps.", "sentence_B": "A man runs", "entailment_judgment": "NEUTRAL"}


@pytest.mark.parametrize(
    ("name", "row", "answer"),
    [
        ("snli", SNLI, "entailment"),
        ("snli", SNLI | {"label": 1}, "neutral"),
        ("snli", SNLI | {"label": "2"}, "contradiction"),
        ("snli", ORIGINAL, "contradiction"),
        ("sick", SICK, "neutral"),
        ("sick", {"sentence_A": "A man sleeps.", "sentence_B": "A man runs", "label": 2}, "contradiction"),
    ],
)
def test_a_row_becomes_a_pair(name, row, answer):
    pair = SETS[name].example(row, name)
    assert (pair.task, pair.premise, pair.answer, pair.labels) == (name, "A man sleeps.", answer, INFERENCE)


@pytest.mark.parametrize("row", [SNLI | {"label": -1}, SNLI | {"label": "-1"}, ORIGINAL | {"gold_label": "-"}])
def test_a_pair_without_a_label_is_left_out(row):
    assert SETS["snli"].example(row, "snli") is None


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("snli", SNLI | {"label": 3}, "one of entailment, neutral, contradiction or 0, 1, 2, got 3"),
        ("snli", SNLI | {"label": True}, "got True"),
        ("snli", SNLI | {"label": None}, "got None"),
        ("snli", SNLI | {"hypothesis": " "}, "expected text in 'hypothesis'"),
        ("snli", {"premise": "a", "hypothesis": "b"}, "expected the field 'label' or 'gold_label', got 'premise', 'hypothesis'"),
        ("snli", {"label": 0, "text": "b"}, "expected the field 'sentence1'"),
        ("snli", ["a", "b", 0], "expected an object with fields, got list"),
        ("sick", SICK | {"entailment_judgment": "MAYBE"}, "got 'MAYBE'"),
        ("sick", {"sentence_A": "a", "label": 1}, "expected the field 'sentence_B'"),
    ],
)
def test_a_malformed_row_says_what_is_wrong(name, row, message):
    with pytest.raises(Malformed, match=message):
        SETS[name].example(row, name)


def snli(**options):
    return DataConfig(train=["snli"], test=["snli"], **options)


def sick(path, **options):
    return DataConfig(train=["sick"], test=["sick"], path=str(path), **options)


def write_snli(folder, ending):
    rows = [SNLI | {"premise": f"Man {i} sleeps.", "label": i % 4 - 1} for i in range(8)]
    for split in ("train", "test"):
        path = folder / f"snli_{split}.{ending}"
        if ending == "jsonl":
            path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        elif ending == "csv":
            lines = ["premise,hypothesis,label", *(f"{row['premise']},{row['hypothesis']},{row['label']}" for row in rows)]
            path.write_text("\n".join(lines) + "\n")
        else:
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_snli_is_read_from_local_files_of_every_format_and_rows_without_a_label_are_counted(ending, tmp_path):
    write_snli(tmp_path, ending)
    data = load(snli(path=str(tmp_path)), 0)
    assert [pair.answer for pair in data.train] == 2 * list(INFERENCE) == [pair.answer for pair in data.test["snli"]]
    assert [pair.premise for pair in data.train][:2] == ["Man 1 sleeps.", "Man 2 sleeps."]
    assert [line.partition(": ")[2] for line in data.skipped] == 2 * ["2 rows have no label and are left out, as snli intends"]


def write_tsv(path, rows):
    path.write_text("\n".join("\t".join(row) for row in rows) + "\n")
    return path


HEAD = ("pair_ID", "sentence_A", "sentence_B", "entailment_judgment")


def test_tab_separated_cells_are_read_verbatim(tmp_path):
    path = write_tsv(tmp_path / "a.txt", [HEAD, ("1", 'A "man', "sleeps, ' he", "NEUTRAL"), ("2", "b"), ("3", "c", "d", "NEUTRAL")])
    (first, whole), (second, fault), (third, _) = read(path)
    assert (first, whole) == (2, dict(zip(HEAD, ("1", 'A "man', "sleeps, ' he", "NEUTRAL"), strict=True)))
    assert second == 3
    assert "expected 4 columns as in the first row, got 2" in str(fault)
    assert third == 4


@pytest.mark.parametrize("whole_folder", [False, True])
def test_sick_without_splits_holds_out_a_seeded_part(whole_folder, tmp_path):
    rows = [(str(i), f"Man {i} sleeps", "he rests", ("NEUTRAL", "ENTAILMENT")[i % 2]) for i in range(50)]
    path = write_tsv(tmp_path / "SICK.txt", [HEAD, *rows])
    config = sick(tmp_path if whole_folder else path)
    data = load(config, 0)
    assert (len(data.train), len(data.test["sick"])) == (45, 5)
    assert sorted(pair.premise for pair in data.train + data.test["sick"]) == sorted(row[1] for row in rows)
    assert data.skipped == [f"{path}: 5 of 50 rows are held out as the test set"]
    assert load(config, 0) == data
    assert load(config, 1).test != data.test


@pytest.mark.parametrize("whole_folder", [False, True])
def test_sick_follows_its_column_of_splits(whole_folder, tmp_path):
    head = ("sentence_A", "sentence_B", "entailment_label", "SemEval_set")
    rows = [(f"Man {i} sleeps", "he rests", "NEUTRAL", ("TRAIN", "TRAIN", "TEST", "TRIAL")[i % 4]) for i in range(12)]
    path = write_tsv(tmp_path / "SICK.txt", [head, *rows])
    data = load(sick(tmp_path if whole_folder else path), 0)
    assert [pair.premise for pair in data.train] == [f"Man {i} sleeps" for i in (0, 1, 4, 5, 8, 9)]
    assert [pair.premise for pair in data.test["sick"]] == [f"Man {i} sleeps" for i in (2, 6, 10)]
    assert data.skipped == [f"{path}: 3 of 12 rows belong to neither train nor test"]
    write_tsv(path, [head, *((*row[:3], "TRAIN") for row in rows)])
    with pytest.raises(UserError, match="expected rows with test in 'SemEval_set', got none"):
        load(sick(path), 0)


def test_a_malformed_first_row_of_an_unused_split_is_ignored(tmp_path):
    rows = [("a man", "sleeps", "NEUTRAL", ("TRAIN", "TEST")[i % 2]) for i in range(4)]
    head = ("sentence_A", "sentence_B", "entailment_label", "SemEval_set")
    path = write_tsv(tmp_path / "SICK.txt", [head, ("a man", "sleeps", "PERHAPS", "TRIAL"), *rows])
    assert len(load(sick(path), 0).train) == 2


def test_a_malformed_row_of_sick_is_named_by_its_line_or_left_out(tmp_path):
    rows = [(str(i), "a man", "sleeps", "NEUTRAL") for i in range(20)]
    path = write_tsv(tmp_path / "SICK.txt", [HEAD, *rows, ("20", "a", "b", "PERHAPS"), ("21", "a")])
    with pytest.raises(UserError, match=r"SICK.txt, line 22: expected 'entailment_judgment' to be one of .*, got 'PERHAPS'"):
        load(sick(path), 0)
    data = load(sick(path, on_error=OnError.skip), 0)
    assert len(data.train) + len(data.test["sick"]) == 20
    assert any(line.endswith("2 of 22 rows left out") for line in data.skipped)


def test_the_labels_of_sets_are_reported_and_mixing_kinds_is_refused():
    assert labels(snli()) == labels(DataConfig(train=["snli"], test=["sick"])) == INFERENCE
    assert labels(DataConfig()) == labels(DataConfig(train=["gsm8k"], test=["math"])) == ()
    with pytest.raises(UserError, match="expected sets that one model serves"):
        labels(DataConfig(train=["snli"], test=["boolq"]))


@pytest.mark.skipif(not REAL.is_file(), reason="the real data set is not here")
def test_the_real_sick_is_read_whole():
    data = load(sick(REAL), 0)
    everything = data.train + data.test["sick"]
    assert len(everything) == len(REAL.read_text(encoding="utf-8").splitlines()) - 1
    assert len(data.test["sick"]) == len(everything) // 10
    assert Counter(pair.answer for pair in everything) == {"neutral": 5611, "entailment": 2857, "contradiction": 1459}
