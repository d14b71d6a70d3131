"""Rows of files: every format says the same, and every fault is named with file and line."""

import csv
import json

import pyarrow
import pyarrow.parquet
import pytest

from fedsim.data.rows import Malformed, read
from fedsim.errors import UserError

ROWS = [{"question": "one, \u00e9 and\nmore?", "answer": "#### 1"}, {"question": 'say "two"', "answer": "#### 2"}, {"question": "3", "answer": "x"}]


def write(path, rows=ROWS):
    if path.suffix == ".jsonl":
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=2, ensure_ascii=False), encoding="utf-8")
    elif path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "parquet"])
def test_all_formats_hold_the_same_rows(tmp_path, ending):
    assert [row for _, row in read(write(tmp_path / f"data.{ending}"))] == ROWS


def test_elements_of_an_array_carry_the_line_where_they_begin(tmp_path):
    path = write(tmp_path / "data.json")
    lines = path.read_text(encoding="utf-8").splitlines()
    assert [lines[line - 1].strip() for line, _ in read(path)] == ["{", "{", "{"]
    assert [line for line, _ in read(path)] == [2, 6, 10]


def test_json_lines_may_be_called_json_and_have_empty_lines(tmp_path):
    path = tmp_path / "data.json"
    path.write_text('{"a": 1}\n\n{"a": 2}\n')
    assert list(read(path)) == [(1, {"a": 1}), (3, {"a": 2})]


def test_a_broken_line_is_one_malformed_row_among_good_ones(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": \n{"a": "\xff"}\n{"a": 2}\n')
    found = list(read(path))
    assert [line for line, _ in found] == [1, 2, 3, 4]
    assert [isinstance(row, Malformed) for _, row in found] == [False, True, True, False]
    assert "no JSON" in str(found[1][1])
    assert "UTF-8" in str(found[2][1])


def test_a_row_of_a_table_with_another_number_of_cells_is_malformed(tmp_path):
    path = tmp_path / "data.csv"
    path.write_text("a,b\n1,2\n3\n4,5,6\n")
    assert [isinstance(row, Malformed) for _, row in read(path)] == [False, True, True]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("data.jsonl", b"", "the file is empty"),
        ("data.txt", b"a", "expected a file that ends in .jsonl, .json, .csv, .parquet, got '.txt'"),
        ("data.json", b'[{"a": 1},\n {"a": }]', "data.json, line 2: no JSON"),
        ("data.json", b'[{"a": 1},\n {"a": 2}', "data.json, line 2: no JSON"),
        ("data.csv", b"a,b\n1,2\n\xff,3\n", "data.csv, line 3: expected UTF-8, got byte 0xff"),
        ("data.csv", b'a,b\n"1,2\n', "data.csv, line 2: no CSV"),
        ("data.parquet", b"PAR1 this is none", "data.parquet, row 1: no parquet"),
    ],
)
def test_a_file_that_is_broken_as_a_whole_is_named_with_line_and_reason(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        list(read(path))
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
