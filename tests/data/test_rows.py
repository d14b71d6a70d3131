"""Rows of files: every format says the same, and every fault is named with file and line."""

import csv
import json
import tracemalloc

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsim.data.rows import Malformed, _Window, read
from fedsim.errors import UserError

ROWS = [
    {"question": "one, \u00e9 and\nmore?", "answer": "#### 1"},
    {"question": 'say "two"', "answer": "#### 2"},
    {"question": "3", "answer": "x"},
]


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
    assert "invalid JSON" in str(found[1][1])
    assert "UTF-8" in str(found[2][1])


def test_a_row_of_a_table_with_another_number_of_cells_is_malformed(tmp_path):
    path = tmp_path / "data.csv"
    path.write_text("a,b\n1,2\n3\n4,5,6\n")
    assert [isinstance(row, Malformed) for _, row in read(path)] == [False, True, True]


def test_a_csv_row_carries_the_line_where_it_begins(tmp_path):
    assert [line for line, _ in read(write(tmp_path / "data.csv"))] == [2, 4, 5]


@pytest.mark.parametrize(
    ("name", "content", "line", "message"),
    [
        ("data.jsonl", b"", 1, "the file is empty"),
        ("data.jsonl", b" \n\n", 1, "expected rows, got none"),
        ("data.json", b"[]", 1, "expected rows, got none"),
        ("data.csv", b"a,b\n", 1, "expected rows, got none"),
        ("data.csv", b"ask;answer\n1,5;2\n", 1, "expected commas between the names of columns, got ';' in 'ask;answer'"),
        ("data.csv", b"\xef\xbb\xbfask\tanswer\r\n1\t2\r\n", 1, r"expected commas between the names of columns, got '\t' in 'ask\tanswer'"),
        ("data.parquet", b"PAR1 this is none", 1, "invalid Parquet: "),
        ("data.jsonl", '[\n{"a": 1}\n]'.encode("utf-16"), 1, "expected UTF-8, got UTF-16; save the file as UTF-8"),
        ("data.jsonl", b'{"a": ' + b"[" * 100_000 + b"\n", 1, "invalid JSON: "),
        ("data.jsonl", b'{"a": ' + b"1" * 10_000 + b"}\n", 1, "invalid JSON: "),
        ("data.json", b"{" + b'"a": {' * 100_000, 1, "invalid JSON: "),
        ("data.json", b"nothing at all", 1, "invalid JSON: Expecting value"),
    ],
)
def test_a_file_without_any_row_is_malformed_with_line_and_reason(tmp_path, name, content, line, message):
    path = tmp_path / name
    path.write_bytes(content)
    found = list(read(path))
    assert all(isinstance(row, Malformed) for _, row in found)
    assert found[0][0] == line
    assert message in str(found[0][1])


@pytest.mark.parametrize(
    ("name", "content", "line", "message"),
    [
        ("data.json", b'[{"a": "1"},\n {"a": },\n {"a": "2"}]', 2, "invalid JSON: Expecting value"),
        ("data.json", b'[{"a": "1"},\n {"a": "x,\n "b": "y"},\n {"a": "2"}]', 2, "invalid JSON: Invalid control character"),
        ("data.json", b'[{"a": "1"},\n {"a": "x", b": "y"},\n {"a": "2"}]', 2, "invalid JSON: "),
        ("data.json", b'[{"a": "1"},\n {"a": "\xe9"},\n {"a": "2"}]', 2, "expected UTF-8, got the byte 0xe9"),
        ("data.json", b'[{"a": "1"},\n {"a": "2"}', 2, "the file is cut off"),
        ("data.json", b'[{"a": "1"},\n {"a": "2"},\n {"a": "', 3, "invalid JSON: Unterminated string"),
        ("data.json", b'{"a": "1"}\n{"a": \n{"a": "2"}\n', 4, "invalid JSON: "),
        ("data.csv", b"a\n1\n\xff\n2\n", 3, "expected UTF-8, got the byte 0xff"),
        ("data.csv", b'a\n1\n2\n"3\n4\n', 4, "invalid CSV: unexpected end of data"),
        ("data.csv", b'a\n1\n"x" y\n2\n', 3, "invalid CSV: "),
    ],
)
def test_a_fault_costs_one_row_and_is_named_with_line_and_reason(tmp_path, name, content, line, message):
    path = tmp_path / name
    path.write_bytes(content)
    found = list(read(path))
    assert [row for _, row in found if not isinstance(row, Malformed)] == [{"a": "1"}, {"a": "2"}]
    [(at, fault)] = [(at, row) for at, row in found if isinstance(row, Malformed)]
    assert at == line
    assert message in str(fault)


def test_invalid_utf8_in_a_parquet_file_costs_one_row(tmp_path):
    data = pyarrow.array([b"1", b"\xff", b"2"], pyarrow.binary())
    text = pyarrow.Array.from_buffers(pyarrow.string(), 3, data.buffers())
    pyarrow.parquet.write_table(pyarrow.table({"a": text}), tmp_path / "data.parquet")
    found = list(read(tmp_path / "data.parquet"))
    assert [row for _, row in found][::2] == [{"a": "1"}, {"a": "2"}]
    assert found[1][0] == 2
    assert "0xff" in str(found[1][1])


def test_a_parquet_file_that_is_damaged_in_the_middle_is_named(tmp_path):
    path = write(tmp_path / "data.parquet", [{"a": str(n) * 50} for n in range(3000)])
    content = bytearray(path.read_bytes())
    content[200:-600] = bytes(len(content) - 800)
    path.write_bytes(content)
    assert isinstance(list(read(path))[-1][1], Malformed)


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv"])
def test_a_byte_order_mark_is_not_read_into_a_field(tmp_path, ending):
    path = write(tmp_path / f"data.{ending}")
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert [row for _, row in read(path)] == ROWS


def test_a_file_that_cannot_be_opened_or_has_another_format_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"none.json: cannot be read: No such file"):
        list(read(tmp_path / "none.json"))
    with pytest.raises(UserError, match=r"expected a file that ends in .jsonl, .json, .csv, .tsv, .txt, .parquet, got '.doc'"):
        list(read(tmp_path / "data.doc"))


@given(st.lists(st.dictionaries(st.text(max_size=3), st.text(max_size=20), max_size=3), min_size=1), st.integers(1, 7), st.booleans())
def test_json_is_read_as_by_the_json_module_for_any_size_of_the_window(tmp_path_factory, rows, step, indented):
    path = tmp_path_factory.mktemp("json") / "data.json"
    path.write_text(json.dumps(rows, indent=1 if indented else None, ensure_ascii=False), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_Window, "STEP", step)
        assert [row for _, row in read(path)] == rows


def test_a_large_file_is_read_in_little_memory(tmp_path):
    path = tmp_path / "data.json"
    row = json.dumps({"question": "x" * 1000})
    path.write_text(f"[{','.join([row] * 30_000)}]")
    tracemalloc.start()
    assert sum(1 for _ in read(path)) == 30_000
    assert tracemalloc.get_traced_memory()[1] < 8_000_000  # of 30 MB
    tracemalloc.stop()
