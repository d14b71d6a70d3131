"""Loading by configuration: folders, single files, choices of examples, and what is left out or refused."""

import csv
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from early import load

from fedsim.choices import OnError
from fedsim.cli.compose import compose
from fedsim.config import DataConfig
from fedsim.data import check
from fedsim.errors import UserError

REAL = Path(__file__).resolve().parents[3] / "shared/data"
real_data = pytest.mark.skipif(not REAL.is_dir(), reason="the real data sets are not here")


def gsm8k(**options):
    return DataConfig(train=["gsm8k"], test=["gsm8k"], **options)


def write(path, numbers, odd=()):
    rows = [{"question": f"What is {n}?", "answer": f"#### {n}"} for n in numbers]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps({} if i in odd else row)}\n" for i, row in enumerate(rows)))
    return path


def test_the_embedded_data_has_both_tasks_and_no_question_twice():
    data = load(DataConfig(train_examples=101, test_examples=20), 0)
    assert len(data.train) == 101
    assert {task: len(examples) for task, examples in data.test.items()} == {"arithmetic": 20, "commonsense": 20}
    train = {example.prompt for example in data.train}
    assert len(train) == 101
    assert not train & {example.prompt for examples in data.test.values() for example in examples}
    assert load(DataConfig(train_examples=101, test_examples=20), 0) == data
    assert load(DataConfig(train_examples=101, test_examples=20), 1).train != data.train


def test_the_embedded_data_has_a_default_size_and_gives_as_many_examples_as_configured():
    data = load(DataConfig(), 0)
    assert Counter(example.task for example in data.train) == {"arithmetic": 5000, "commonsense": 5000}
    assert {task: len(examples) for task, examples in data.test.items()} == {"arithmetic": 500, "commonsense": 500}
    more = load(DataConfig(train_examples=12_001, test_examples=600), 0)
    assert (len(more.train), [len(examples) for examples in more.test.values()]) == (12_001, [600, 600])


def test_a_folder_gives_train_and_test_in_the_order_of_the_files(tmp_path):
    write(tmp_path / "gsm8k_train.jsonl", range(30))
    write(tmp_path / "gsm8k_test.jsonl", range(100, 105))
    data = load(gsm8k(path=str(tmp_path)), 0)
    assert [example.answer for example in data.train] == [str(n) for n in range(30)]
    assert [example.answer for example in data.test["gsm8k"]] == [str(n) for n in range(100, 105)]
    assert data.skipped == []


def own(tmp_path, *rows, name="mine.jsonl"):
    """Writes these rows, each with a question and an answer, and returns options that load the file."""
    (tmp_path / name).write_text("".join(f"{json.dumps({'question': f'{i}?', 'answer': str(i)} | row)}\n" for i, row in enumerate(rows)))
    return {"train": ["instructions"], "test": ["instructions"], "path": str(tmp_path / name)}


def test_columns_name_the_task_and_the_owner_of_a_row(tmp_path):
    rows = [{"kind": "sum" if i % 3 else "product", "user": i % 4} for i in range(60)]
    data = load(DataConfig(**own(tmp_path, *rows), task_column="kind", client_column="user"), 0)
    assert set(data.test) == {"sum", "product"}
    assert len(data.train) + sum(map(len, data.test.values())) == 60
    for example in data.train:
        row = rows[int(example.answer)]
        assert (example.task, example.client) == (row["kind"], str(row["user"]))
    plain = load(DataConfig(**own(tmp_path, *rows)), 0)
    assert {(example.task, example.client) for example in plain.train} == {("instructions", None)}


def test_a_separate_test_set_has_no_owners(tmp_path):
    own(tmp_path, *({"user": "ann"} for _ in range(5)), name="train.jsonl")
    own(tmp_path, *({} for _ in range(5)), name="test.jsonl")
    data = load(DataConfig(train=["instructions"], test=["instructions"], path=str(tmp_path), client_column="user"), 0)
    assert {example.client for example in data.train} == {"ann"}
    assert {example.client for example in data.test["instructions"]} == {None}


def test_a_row_that_a_set_leaves_out_needs_no_task_column(tmp_path):
    (tmp_path / "snli_train.jsonl").write_text(
        json.dumps({"premise": "a", "hypothesis": "b", "label": 1, "genre": "news"})
        + "\n"
        + json.dumps({"premise": "a", "hypothesis": "b", "label": -1})
    )
    (tmp_path / "snli_test.jsonl").write_text(json.dumps({"premise": "a", "hypothesis": "b", "label": 0, "genre": "news"}))
    data = load(DataConfig(train=["snli"], test=["snli"], path=str(tmp_path), task_column="genre"), 0)
    assert [example.task for example in data.train] == list(data.test) == ["news"]
    assert "1 rows have no label" in data.skipped[0]


@pytest.mark.parametrize(("value", "name"), [("Ann", "Ann"), (7, "7"), (7.0, "7"), (" two\nlines ", "two lines")])
def test_an_owner_is_named_by_a_text_or_a_whole_number(tmp_path, value, name):
    data = load(DataConfig(**own(tmp_path, *({"user": value} for _ in range(20))), client_column="user"), 0)
    assert {example.client for example in data.train} == {name}


@pytest.mark.parametrize("name", [None, "", "  ", 1.5, float("nan"), True, ["ann"]])
def test_a_row_that_names_no_owner_is_malformed(tmp_path, name):
    config = own(tmp_path, *({"user": "ann"} for _ in range(20)), {"user": name})
    with pytest.raises(UserError, match=r"mine.jsonl, line 21: expected a name or a whole number in 'user', got"):
        load(DataConfig(**config, client_column="user"), 0)
    with pytest.raises(
        UserError, match=r"mine.jsonl, line 1: expected the field 'owner' \(data.client_column\), got 'question', 'answer', 'user'"
    ):
        load(DataConfig(**config, client_column="owner"), 0)


def test_a_users_own_set_requires_data_path():
    with pytest.raises(UserError, match=r"data.path: instructions is a set of your own; set it to a file"):
        load(DataConfig(train=["instructions"], test=["instructions"]), 0)


def test_a_task_column_is_refused_for_the_embedded_data():
    with pytest.raises(UserError, match=r"data.task_column=kind: the embedded data has no columns"):
        load(DataConfig(task_column="kind"), 0)


def test_a_choice_of_examples_is_seeded_and_keeps_the_order(tmp_path):
    write(tmp_path / "train.jsonl", range(30))
    write(tmp_path / "test.jsonl", range(30))
    config = gsm8k(path=str(tmp_path), train_examples=7, test_examples=6)
    numbers = [int(example.answer) for example in load(config, 0).train]
    assert len(numbers) == 7
    assert numbers == sorted(numbers) == [int(example.answer) for example in load(config, 0).train]
    assert numbers != [int(example.answer) for example in load(config, 1).train]
    assert len(load(config, 0).test["gsm8k"]) == 6


def test_a_part_of_a_single_file_is_held_out(tmp_path):
    data = load(gsm8k(path=str(write(tmp_path / "mine.jsonl", range(50)))), 0)
    train, test = ({int(example.answer) for example in examples} for examples in (data.train, data.test["gsm8k"]))
    assert len(test) == 5
    assert train | test == set(range(50))
    assert not train & test
    assert "5 of 50 rows are held out" in data.skipped[0]


@pytest.mark.parametrize(
    ("name", "content"),
    [("train.jsonl", b""), ("train.jsonl", '{"question": "1"}'.encode("utf-16")), ("train.parquet", b"PAR1 this is none PAR1")],
)
def test_an_unreadable_file_is_refused_without_advice_to_leave_rows_out(tmp_path, name, content):
    write(tmp_path / "test.jsonl", range(3))
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=r"[^.]\. Fix the file\.$"):
        load(gsm8k(path=str(tmp_path)), 0)


def test_an_object_around_the_rows_is_reported_as_such(tmp_path):
    write(tmp_path / "test.jsonl", range(3))
    (tmp_path / "train.json").write_text('{"data": [{"question": "a", "answer": "#### 1"}]}')
    with pytest.raises(UserError, match="expected a list of rows, got an object that holds one in 'data'"):
        load(gsm8k(path=str(tmp_path)), 0)


def test_a_malformed_row_is_refused_with_file_line_and_reason_or_left_out_and_counted(tmp_path):
    path = write(tmp_path / "train.jsonl", range(40), odd=(3, 7))
    write(tmp_path / "test.jsonl", range(5))
    with pytest.raises(UserError, match=r"train.jsonl, line 4: expected the field 'question', got none.*data.on_error=skip"):
        load(gsm8k(path=str(tmp_path)), 0)
    data = load(gsm8k(path=str(tmp_path), on_error=OnError.skip), 0)
    assert len(data.train) == 38
    assert data.skipped[0].startswith(f"{path}, line 4: ")
    assert data.skipped[-1] == f"{path}: 2 of 40 rows left out"


def test_a_thousand_malformed_rows_are_reported_in_few_lines(tmp_path):
    write(tmp_path / "train.jsonl", range(1010), odd=range(1000))
    write(tmp_path / "test.jsonl", range(5))
    data = load(gsm8k(path=str(tmp_path), on_error=OnError.skip), 0)
    assert (len(data.train), len(data.skipped)) == (10, 11)


def write_choices(folder, *names, rows=3):
    """Files in the form of LLM-Adapters."""
    row = {"instruction": "Is it? Answer format: true/false", "input": "", "output": "the correct answer is true", "answer": "true"}
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_text(json.dumps([row] * rows, indent=4))


def test_a_missing_test_set_is_reported_and_the_union_of_the_train_files_is_trained_on(tmp_path):
    write_choices(tmp_path, "boolq/train.json", "piqa/train.json", "boolq/test.json")
    data = load(DataConfig(train=["commonsense_170k"], test=["boolq", "hellaswag"], path=str(tmp_path)), 0)
    assert [example.task for example in data.train] == ["boolq"] * 3 + ["piqa"] * 3
    assert list(data.test) == ["boolq"]
    assert data.skipped == [
        f"test set left out: hellaswag: expected a test file in {tmp_path}, such as hellaswag/test.*, hellaswag_test.*; found none"
    ]


def test_the_file_of_the_whole_training_set_takes_precedence_over_its_parts(tmp_path):
    write_choices(tmp_path, "boolq/train.json", "boolq/test.json")
    write_choices(tmp_path, "commonsense_170k.json", rows=7)
    data = load(DataConfig(train=["commonsense_170k"], test=["boolq"], path=str(tmp_path)), 0)
    assert [example.task for example in data.train] == ["commonsense_170k"] * 7


@pytest.mark.parametrize("content", ["", "[]", '[{"a": 1}]', '[{"instruction": '])
def test_with_skip_a_test_set_without_a_usable_row_is_left_out_but_a_training_set_is_not(tmp_path, content):
    write_choices(tmp_path, "boolq/train.json", "boolq/test.json", "piqa/test.json")
    (tmp_path / "piqa/test.json").write_text(content)
    config = DataConfig(train=["boolq"], test=["boolq", "piqa"], path=str(tmp_path), on_error=OnError.skip)
    data = load(config, 0)
    assert list(data.test) == ["boolq"]
    assert "piqa/test.json, line 1: " in data.skipped[0]
    assert data.skipped[-1].startswith("test set left out: piqa: expected test rows, but each is malformed, first ")
    (tmp_path / "boolq/train.json").write_text(content)
    with pytest.raises(UserError, match=r"^boolq: expected train rows, but each is malformed, first .*train.json, line 1: "):
        load(config, 0)


def test_a_split_in_two_formats_is_refused_rather_than_read_twice(tmp_path):
    path = write(tmp_path / "gsm8k_train.jsonl", range(5))
    write(tmp_path / "gsm8k_test.jsonl", range(5))
    (tmp_path / "gsm8k_train.jsonl.bak").write_text("an editor's")
    (tmp_path / "gsm8k_train.old.jsonl").write_text("a user's")
    assert len(load(gsm8k(path=str(tmp_path)), 0).train) == 5
    path.with_suffix(".csv").write_text("question,answer\n1,#### 1\n")
    with pytest.raises(UserError, match=r"train split of gsm8k in one format, got .*gsm8k_train.csv, .*gsm8k_train.jsonl"):
        load(gsm8k(path=str(tmp_path)), 0)


@pytest.mark.parametrize("shape", ["{split}/algebra/{n}.json", "MATH/{split}/algebra/{n}.json", "math_{split}.jsonl"])
def test_math_is_read_in_each_of_its_folder_layouts(tmp_path, shape):
    for split in ("train", "test"):
        for n in range(3):
            path = tmp_path / shape.format(split=split, n=n)
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a") as file:
                indent = None if "jsonl" in shape else 4
                file.write(json.dumps({"problem": f"{split} {n}", "solution": f"$\\boxed{{{n}}}$"}, indent=indent) + "\n")
    data = load(DataConfig(train=["math"], test=["math"], path=str(tmp_path)), 0)
    assert [example.answer for example in data.train] == [example.answer for example in data.test["math"]] == ["0", "1", "2"]


def test_parquet_parts_as_the_hub_has_them_are_read_in_order(tmp_path):
    for split, count in (("train", 2), ("test", 1)):
        for n in range(count):
            path = tmp_path / "main" / f"{split}-0000{n}-of-0000{count}.parquet"
            path.parent.mkdir(exist_ok=True)
            rows = [{"question": "q", "answer": f"#### {n}"}, {"question": "q", "answer": f"#### {n}0"}]
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    data = load(gsm8k(path=str(tmp_path)), 0)
    assert [example.answer for example in data.train] == ["0", "00", "1", "10"]


def test_test_sets_that_a_single_file_cannot_give_are_reported(tmp_path):
    rows = [{"query": "q", "response": f"The answer is: {n}"} for n in range(20)]
    (tmp_path / "mine.json").write_text(json.dumps(rows))
    config = DataConfig(train=["metamathqa"], test=["gsm8k", "math"], path=str(tmp_path / "mine.json"))
    data = load(config, 0)
    assert {name: len(examples) for name, examples in data.test.items()} == {"metamathqa": 2}
    assert data.skipped[1:] == [f"test set left out: {name}: data.path is a single file" for name in ("gsm8k", "math")]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train": ["gsm8"]}, "data.train: expected names out of embedded, gsm8k, "),
        ({"train": ["gsm8"]}, "got 'gsm8'. Did you mean 'gsm8k'"),
        ({"path": "/nowhere/at/all"}, "there is no such file or folder"),
        ({"path": "nowhere.jsonl"}, "data.path=nowhere.jsonl: there is no such file or folder"),
        ({"test": ["metamathqa"]}, "data.test: metamathqa has no test split"),
        ({"test": ["math"]}, "math: expected a test file in "),
        ({"train": ["math"]}, "math: expected a train file in "),
        ({"train": ["math"]}, "; found none but gsm8k_train.jsonl; rename them, or name one file"),
        ({"train": ["embedded"], "test": ["embedded"]}, "the embedded data reads no file"),
        ({"train": ["gsm8k", "math"], "file": "gsm8k_train.jsonl"}, "a single file holds one training set, got data.train=[gsm8k,math]"),
        ({"file": "gsm8k_train.jsonl"}, "expected at least 10 rows to hold some out as a test, got 5"),
    ],
)
def test_a_wrong_name_or_path_is_reported_in_one_line(tmp_path, options, message):
    write(tmp_path / "gsm8k_train.jsonl", range(5))
    path = str(tmp_path / options.pop("file", ""))
    with pytest.raises(UserError) as caught:
        load(DataConfig(**({"train": ["gsm8k"], "test": ["gsm8k"], "path": path} | options)), 0)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


FIRST_SEEN = [
    {"train": ["gsm8"]},
    {"path": "/nowhere/at/all"},
    {"path": None, "train": ["instructions"]},
    {"path": "someone/something", "train": ["gsm8k", "math"]},
    {"test": ["math"]},
    {"train": ["math"]},
    {"train": ["gsm8k", "math"], "file": "gsm8k_train.jsonl"},
    {"file": "notes.doc"},
    {"train": ["instructions"], "test": ["instructions"], "file": "names.csv"},
    {"task_column": "kind"},
    {"client_column": "user"},
]


@pytest.mark.parametrize("options", FIRST_SEEN)
def test_names_files_and_first_rows_are_checked_before_anything_is_loaded_or_fetched(tmp_path, monkeypatch, options):
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("a connection was attempted"))
    for split in ("train", "test"):
        write(tmp_path / f"gsm8k_{split}.jsonl", range(5))
    (tmp_path / "notes.doc").write_text("what one has heard")
    (tmp_path / "names.csv").write_text("name,age\nann,7\n" * 20)
    path = str(tmp_path / options.get("file", ""))
    given = {key: value for key, value in options.items() if key != "file"}
    config = DataConfig(**({"train": ["gsm8k"], "test": ["gsm8k"], "path": path} | given))
    with pytest.raises(UserError):
        check(config)
    with pytest.raises(UserError):
        load(config, 0)


def test_a_fault_after_the_first_row_is_found_only_on_loading(tmp_path):
    path = write(tmp_path / "mine.jsonl", range(40), odd=[1])
    check(gsm8k(path=str(path)))
    with pytest.raises(UserError, match="line 2: expected the field"):
        load(gsm8k(path=str(path)), 0)


def test_check_does_not_fetch_remote_sets(monkeypatch):
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("a connection was attempted"))
    check(DataConfig(train=["gsm8k"], test=["gsm8k", "math"]))
    check(DataConfig(train=["instructions"], test=["gsm8k"], path="someone/something", task_column="kind"))


@pytest.mark.parametrize("name", ["mine.csv", "mine.tsv", "mine.txt"])
def test_a_table_without_the_columns_says_what_its_first_line_must_be(tmp_path, name):
    lines = [["Say one, two and three in French, please, as slowly as you can.", "un"], *([f"Say {n}.", str(n)] for n in range(20))]
    with (tmp_path / name).open("w", newline="") as file:
        csv.writer(file, "excel" if name == "mine.csv" else "excel-tab").writerows(lines)
    config = DataConfig(train=["instructions"], test=["instructions"], path=str(tmp_path / name))
    with pytest.raises(UserError) as caught:
        load(config, 0)
    first, rest = str(caught.value).split(", got ")
    assert first.endswith(f"{name}, line 2: expected the field 'instruction' or 'question' or 'query' or 'prompt'")
    assert rest == (
        "'Say one, two and three in French, pleas, 'un'. The first line of the file must name the columns: "
        "correct it, or put such a line above it where it is a row."
    )
    with pytest.raises(UserError, match=r"expected at least 10 rows .*, got 0 besides malformed ones, first .*line 2: expected the field"):
        load(replace(config, on_error=OnError.skip), 0)


def test_the_error_for_a_row_of_many_fields_names_only_the_first(tmp_path):
    (tmp_path / "mine.jsonl").write_text(json.dumps({f"column {n}": n for n in range(500)}))
    with pytest.raises(UserError, match=r"got 'column 0', .*'column 11', more\. Fix it, or skip such rows"):
        load(gsm8k(path=str(tmp_path / "mine.jsonl")), 0)


def test_the_error_for_a_row_with_line_breaks_is_one_line(tmp_path):
    (tmp_path / "train.jsonl").write_text(json.dumps({"question": "q", "answer\n": "a"}))
    with pytest.raises(UserError) as caught:
        load(gsm8k(path=str(tmp_path)), 0)
    assert "\n" not in str(caught.value)


@real_data
def test_all_real_rows_are_read():
    data = load(gsm8k(path=str(REAL / "arithmetic")), 0)
    assert (len(data.train), len(data.test["gsm8k"])) == (7473, 1319)
    config = compose(["data=commonsense", f"data.path={REAL / 'commonsense'}"]).data
    data = load(config, 0)
    assert Counter(example.task for example in data.train) == {"boolq": 9427, "openbookqa": 4957, "ARC-Easy": 2251, "ARC-Challenge": 1119}
    expected = {"boolq": 3270, "piqa": 1838, "social_i_qa": 1954, "winogrande": 1267}
    expected |= {"ARC-Easy": 2376, "ARC-Challenge": 1172, "openbookqa": 500}
    assert {task: len(examples) for task, examples in data.test.items()} == expected
    assert ["hellaswag" in line for line in data.skipped] == [True]
