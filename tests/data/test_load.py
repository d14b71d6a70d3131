"""Loading by configuration: folders, single files, choices of examples, and what is left out or refused."""

import json
from pathlib import Path

import pytest

from fedsim.config import DataConfig, OnError
from fedsim.data import load
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


def test_a_folder_gives_train_and_test_in_the_order_of_the_files(tmp_path):
    write(tmp_path / "gsm8k_train.jsonl", range(30))
    write(tmp_path / "gsm8k_test.jsonl", range(100, 105))
    data = load(gsm8k(path=str(tmp_path)), 0)
    assert [example.answer for example in data.train] == [str(n) for n in range(30)]
    assert [example.answer for example in data.test["gsm8k"]] == [str(n) for n in range(100, 105)]
    assert data.skipped == []


def test_a_choice_of_examples_is_seeded_and_keeps_the_order(tmp_path):
    write(tmp_path / "train.jsonl", range(30))
    write(tmp_path / "test.jsonl", range(30))
    config = gsm8k(path=str(tmp_path), train_examples=7, test_examples=6)
    numbers = [int(example.answer) for example in load(config, 0).train]
    assert len(numbers) == 7
    assert numbers == sorted(numbers) == [int(example.answer) for example in load(config, 0).train]
    assert numbers != [int(example.answer) for example in load(config, 1).train]
    assert len(load(config, 0).test["gsm8k"]) == 6


def test_of_a_single_file_a_part_is_held_out(tmp_path):
    data = load(gsm8k(path=str(write(tmp_path / "mine.jsonl", range(50)))), 0)
    train, test = ({int(example.answer) for example in examples} for examples in (data.train, data.test["gsm8k"]))
    assert len(test) == 5
    assert train | test == set(range(50))
    assert not train & test
    assert "5 of 50 rows are held out" in data.skipped[0]


def test_a_malformed_row_ends_with_file_line_and_reason_or_is_counted(tmp_path):
    path = write(tmp_path / "train.jsonl", range(40), odd=(3, 7))
    write(tmp_path / "test.jsonl", range(5))
    with pytest.raises(UserError, match=r"train.jsonl, line 4: expected the field 'question', got none.*data.on_error=skip"):
        load(gsm8k(path=str(tmp_path)), 0)
    data = load(gsm8k(path=str(tmp_path), on_error=OnError.skip), 0)
    assert len(data.train) == 38
    assert data.skipped[0].startswith(f"{path}, line 4: ")
    assert data.skipped[-1] == f"{path}: 2 of 40 rows left out"


def test_a_thousand_malformed_rows_make_few_lines(tmp_path):
    write(tmp_path / "train.jsonl", range(1010), odd=range(1000))
    write(tmp_path / "test.jsonl", range(5))
    data = load(gsm8k(path=str(tmp_path), on_error=OnError.skip), 0)
    assert (len(data.train), len(data.skipped)) == (10, 11)


def test_a_test_set_that_a_folder_lacks_is_reported_and_the_union_of_the_train_files_is_trained_on(tmp_path):
    row = {"instruction": "Is it? Answer format: true/false", "input": "", "output": "true", "answer": "true"}
    for name in ("boolq/train.json", "piqa/train.json", "boolq/test.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps([row] * 3))
    data = load(DataConfig(train=["commonsense170k"], test=["boolq", "hellaswag"], path=str(tmp_path)), 0)
    assert len(data.train) == 6
    assert list(data.test) == ["boolq"]
    assert "hellaswag" in data.skipped[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train": ["gsm8"]}, "got 'gsm8'. Did you mean 'gsm8k'"),
        ({"path": "/nowhere/at/all"}, "there is no such file or folder"),
        ({"test": ["metamathqa"]}, "metamathqa has no test split"),
        ({"test": ["math"]}, "math: expected a test file math_test.*"),
        ({"train": ["math"]}, "math: expected a train file"),
    ],
)
def test_a_wrong_name_or_path_is_one_clear_line(tmp_path, options, message):
    write(tmp_path / "gsm8k_train.jsonl", range(5))
    with pytest.raises(UserError) as caught:
        load(DataConfig(**({"train": ["gsm8k"], "test": ["gsm8k"], "path": str(tmp_path)} | options)), 0)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_set_that_is_on_no_hub_asks_for_its_folder():
    with pytest.raises(UserError, match="Give data.path= the folder of its files"):
        load(DataConfig(train=["commonsense170k"], test=["boolq"]), 0)


@real_data
def test_all_real_rows_are_read():
    data = load(gsm8k(path=str(REAL / "arithmetic")), 0)
    assert (len(data.train), len(data.test["gsm8k"])) == (7473, 1319)
    names = ["boolq", "piqa", "siqa", "winogrande", "arc_easy", "arc_challenge", "openbookqa"]
    data = load(DataConfig(train=["commonsense170k"], test=names, path=str(REAL / "commonsense")), 0)
    assert len(data.train) == 9427 + 4957 + 2251 + 1119
    assert [len(data.test[name]) for name in names] == [3270, 1838, 1954, 1267, 2376, 1172, 500]
    assert data.skipped == []
