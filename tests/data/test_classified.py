"""A user's own texts and labels: rows in the columns of public sets, the labels found, and rows that do not fit the others."""

import json

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsim.choices import OnError
from fedsim.config import Config, DataConfig
from fedsim.config_check import check
from fedsim.data import labels, load
from fedsim.data.classified import LABEL, TEXT, TEXTS
from fedsim.data.rows import Malformed
from fedsim.data.sets import SETS
from fedsim.errors import UserError
from fedsim.types import Labelled

example = SETS["classification"].example


@pytest.mark.parametrize(
    ("row", "texts", "answer"),
    [
        ({"text": "Good. ", "label": 1}, ("Good.",), "1"),  # IMDB, AG News, banking77
        ({"idx": 3, "sentence": "Good.", "label": 0}, ("Good.",), "0"),  # SST-2, CoLA
        ({"content": "Good.", "title": "Film", "label": "pos"}, ("Good.",), "pos"),  # DBpedia
        ({"review": "Good.", "sentiment": " very  good"}, ("Good.",), "very good"),
        ({"text": "Good.", "label": 1.0, "label_text": "x"}, ("Good.",), "1"),  # tables with missing numbers hold integers as floats
        ({"question": "Why?", "label": "DESC"}, ("Why?",), "DESC"),
        ({"premise": "A.", "hypothesis": "B.", "label": 2}, ("A.", "B."), "2"),  # MNLI
        ({"sentence1": "A.", "sentence2": "B.", "label": 1}, ("A.", "B."), "1"),  # MRPC, RTE
        ({"question1": "A?", "question2": "B?", "label": 1}, ("A?", "B?"), "1"),  # QQP
        ({"question": "A?", "sentence": "B.", "label": 1}, ("A?", "B."), "1"),  # QNLI
        ({"question": "A?", "passage": "B.", "label": 1}, ("A?", "B."), "1"),  # BoolQ
        ({"text1": "A.", "text2": "B.", "label": -1}, ("A.", "B."), "-1"),
        ({"text": "A.", "label": True}, ("A.",), "True"),
    ],
)
def test_rows_are_read_in_the_columns_of_public_sets(row, texts, answer):
    found = example(row, "mine")
    assert (found.task, found.texts, found.answer) == ("mine", texts, answer)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a"}, "expected the field 'label' or 'labels' or .*, got 'text'"),
        ({"text": " ", "label": 1}, "expected text in 'text', got ' '"),
        ({"text": 3, "label": 1}, "expected text in 'text', got 3"),
        ({"text": "a\ud800", "label": 1}, "expected Unicode text in 'text'"),
        ({"text": "a", "label": None}, "expected a name or a whole number in 'label', got None"),
        ({"text": "a", "label": 0.5}, "expected a name or a whole number in 'label', got 0.5"),
        ({"text": "a", "label": 1.5}, "expected a name or a whole number in 'label', got 1.5"),
        ({"text": "a", "labels": [0, 2]}, r"expected a name or a whole number in 'labels', got \[0, 2\]"),
        ({"sentence1": "a", "sentence2": None, "label": 1}, "expected text in 'sentence2', got None"),
        ({"premise": "a", "label": 1}, "expected a text in 'text', .* or two in 'premise' and 'hypothesis', .*; got 'premise', 'label'"),
        (["a", 1], "expected an object with fields, got list"),
    ],
)
def test_a_malformed_row_says_what_is_wrong(row, message):
    with pytest.raises(Malformed, match=message):
        example(row, "mine")


COLUMNS = st.sampled_from([*TEXT, *LABEL, *(column for columns in TEXTS for column in columns), "x"])
VALUES = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.lists(st.integers(), max_size=2))


@given(st.one_of(st.dictionaries(COLUMNS, VALUES, max_size=5), VALUES))
def test_any_row_is_read_or_malformed(row):
    try:
        found = example(row, "mine")
    except Malformed:
        return
    assert found.answer.strip()
    assert all(text.strip() and text in map(str.strip, map(str, row.values())) for text in found.texts)


def own(path, **options):
    return DataConfig(name="classification", train=["classification"], test=["classification"], path=str(path), **options)


def write(path, rows):
    path.parent.mkdir(exist_ok=True, parents=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        mark = "," if path.suffix == ".csv" else "\t"
        path.write_text("".join(mark.join(map(str, line)) + "\n" for line in [list(rows[0]), *(row.values() for row in rows)]))
    return path


def rows(*values, **columns):
    return [{"text": f"Text {i}.", "label": label, **columns} for i, label in enumerate(values)]


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "tsv", "parquet"])
def test_files_of_every_format_give_the_same_data(tmp_path, ending):
    told = rows(*[i % 3 + 9 for i in range(12)])
    write(tmp_path / f"train.{ending}", told)
    write(tmp_path / f"test.{ending}", told[:5])
    data = load(own(tmp_path), 0)
    assert (data.labels, data.texts, data.skipped) == (("9", "10", "11"), 1, [])  # by value: as text, 9 would be last
    assert data.train == [Labelled("classification", row["text"], None, str(row["label"]), data.labels) for row in told]
    assert data.test["classification"] == data.train[:5]


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        (["b", "a", "c"], ("a", "b", "c")),
        ([10, 9, -1], ("-1", "9", "10")),
        (["10", "9", "x"], ("10", "9", "x")),
        ([1.0, 0, "2"], ("0", "1", "2")),
        (["1" * 5000, "2"], ("1" * 5000, "2")),  # more digits than Python converts to an int
    ],
)
def test_labels_do_not_depend_on_the_order_of_rows_and_numbers_are_sorted_by_value(tmp_path, told, expected):
    for number, order in enumerate((told, told[::-1])):
        path = write(tmp_path / f"{number}.jsonl", rows(*order * 10))
        data = load(own(path), number)
        assert data.labels == expected
        assert {pair.labels for pair in data.train + data.test["classification"]} == {expected}


def test_labels_are_those_of_all_training_rows_whatever_is_held_out_or_chosen(tmp_path):
    path = write(tmp_path / "mine.jsonl", rows(*range(20)))
    assert {load(own(path, train_examples=3), seed).labels for seed in range(5)} == {tuple(map(str, range(20)))}
    for part, told in enumerate(("ab", "cd")):
        write(tmp_path / "parts" / f"train-0000{part}-of-00002.parquet", rows(*told))
    write(tmp_path / "parts" / "test-00000-of-00001.parquet", rows("d"))
    assert load(own(tmp_path / "parts"), 0).labels == ("a", "b", "c", "d")


def test_a_label_that_no_training_row_has_is_refused_with_its_line_or_left_out(tmp_path):
    write(tmp_path / "train.jsonl", rows("neg", "pos", "neg"))
    test = write(tmp_path / "test.jsonl", rows("pos", "neutral"))
    with pytest.raises(UserError, match=r"test.jsonl, line 2: expected a label out of neg, pos, got 'neutral'\. Fix it, or skip such rows"):
        load(own(tmp_path), 0)
    data = load(own(tmp_path, on_error=OnError.skip), 0)
    assert (data.labels, len(data.test["classification"])) == (("neg", "pos"), 1)
    assert data.skipped == [f"{test}, line 2: expected a label out of neg, pos, got 'neutral'", f"{test}: 1 of 2 rows left out"]


def test_configured_labels_keep_their_order_and_apply_to_every_row(tmp_path):
    path = write(tmp_path / "mine.jsonl", rows(*["neg", "pos"] * 10))
    assert load(own(path, labels=["pos", "neutral", "neg"]), 0).labels == ("pos", "neutral", "neg")
    with pytest.raises(UserError, match=r"mine.jsonl, line 2: expected a label out of neg, neutral, got 'pos'"):
        load(own(path, labels=["neg", "neutral"]), 0)


def test_clients_with_their_own_data_have_the_configured_labels(tmp_path):
    one, other = (write(tmp_path / f"{label}.jsonl", rows(*[label] * 10)) for label in ("pos", "neg"))
    named = {"labels": ["pos", "neg"]}
    assert [load(own(path, owner=0, **named), 0).train[0].labels for path in (one, other)] == 2 * [("pos", "neg")]


def test_a_row_left_out_adds_no_label(tmp_path):
    told = [*rows(*"ab" * 10, user="ann"), {"text": "x", "label": "c", "user": None}]
    path = write(tmp_path / "mine.jsonl", told)
    assert load(own(path, on_error=OnError.skip, client_column="user"), 0).labels == ("a", "b")


def test_mixing_rows_of_one_text_and_of_two_is_refused(tmp_path):
    pair = {"sentence1": "A.", "sentence2": "B.", "label": "a"}
    path = write(tmp_path / "mine.jsonl", [*rows(*"ab" * 5), pair])
    with pytest.raises(UserError, match=r"mine.jsonl, line 11: expected one text as in the rows before, got two texts"):
        load(own(path), 0)
    path = write(tmp_path / "pairs.jsonl", [*[pair, pair | {"label": "b"}] * 5, *rows("a")])
    with pytest.raises(UserError, match=r"pairs.jsonl, line 11: expected two texts as in the rows before, got one text"):
        load(own(path), 0)


@pytest.mark.parametrize(("told", "message"), [("a" * 20, "got 1: a. Give"), (range(1001), "got 1,001: 0, 1, 10, .* and 981 more. Give")])
def test_one_label_and_more_than_a_thousand_are_refused(tmp_path, told, message):
    path = write(tmp_path / "mine.jsonl", rows(*told))
    with pytest.raises(UserError, match=f"data.path: expected 2 to 1,000 labels in the training rows, {message}"):
        load(own(path), 0)


def test_columns_name_task_and_owner(tmp_path):
    path = write(tmp_path / "mine.jsonl", [row | {"user": f"u{i % 2}", "kind": "film"} for i, row in enumerate(rows(*"ab" * 10))])
    data = load(own(path, client_column="user", task_column="kind"), 0)
    assert {pair.client for pair in data.train} == {"u0", "u1"}
    assert list(data.test) == ["film"]


def test_known_labels_are_reported_without_reading_data():
    assert labels(own("nowhere")) is None
    assert labels(own("nowhere", labels=["a", "b"])) is None
    with pytest.raises(UserError, match=r"data.labels=\[a,b\]: the labels of sick are known \(entailment/.*\). Leave data.labels out"):
        labels(DataConfig(train=["sick"], test=["sick"], labels=["a", "b"]))
    with pytest.raises(UserError, match=r"data.labels=\[a,b\]: the labels of gsm8k are known \(answered in words\)"):
        labels(DataConfig(train=["gsm8k"], test=["gsm8k"], labels=["a", "b"]))
    with pytest.raises(UserError, match=r"got classification \(labels of your own\), sick \(entailment/"):
        labels(DataConfig(train=["classification"], test=["sick"]))


@pytest.mark.parametrize(
    ("told", "message"), [(["a"], "at least two names in data.labels"), (["a", "b", "a"], "each name in data.labels once")]
)
def test_configured_labels_must_be_at_least_two_and_distinct(told, message):
    with pytest.raises(UserError, match=message):
        check(Config(data=own("nowhere", labels=told)))
