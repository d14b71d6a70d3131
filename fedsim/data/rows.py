"""Rows of local files, each with the line where it stands, so that whatever is wrong with it can be named.

JSON lines, JSON arrays and CSV are read here and not through `datasets`, whose errors name neither line nor field; parquet goes through
pyarrow, and hub data sets through `datasets`.
"""

import csv
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fedsim.errors import UserError

Row = tuple[int, Any]
"""Line (or row number in parquet), counted from one, and the parsed value; a `Malformed` where it could not be parsed."""

_GAPS = " \t\r\n,"


class Malformed(ValueError):
    """What is wrong with one row."""


def read(path: Path) -> Iterator[Row]:
    """Yields the rows of a .jsonl, .json, .csv or .parquet file.

    Raises UserError, with the file and where possible the line, for another ending, an empty file, or a file that is broken as a whole.
    """
    if path.suffix not in READERS:
        raise UserError(f"{path}: expected a file that ends in {', '.join(READERS)}, got {path.suffix or 'no ending'!r}. Convert it.")
    try:
        empty = path.stat().st_size == 0
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}. Check data.path.") from error
    if empty:
        raise UserError(f"{path}: expected rows, but the file is empty. Put the data there or change data.path.")
    yield from READERS[path.suffix](path)


def _json_lines(path: Path) -> Iterator[Row]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, _parsed(line)


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return Malformed(f"not UTF-8 at byte {error.start + 1} of the line")
    except json.JSONDecodeError as error:
        return Malformed(f"no JSON: {error.msg} at column {error.colno}")


def _json_array(path: Path) -> Iterator[Row]:
    """Yields the elements of an array, or a file of JSON lines that is called .json."""
    text = _text(path)
    start = len(text) - len(text.lstrip())
    if not text.startswith("[", start):
        yield from _json_lines(path)
        return
    decoder, at, line, counted = json.JSONDecoder(), start + 1, 1, 0
    while True:
        while at < len(text) and text[at] in _GAPS:
            at += 1
        line, counted = line + text.count("\n", counted, at), at
        if text.startswith("]", at):
            return
        try:
            value, at = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {error.lineno}: no JSON: {error.msg}. Mend the file; after this nothing can be read.") from error
        yield line, value


def _csv(path: Path) -> Iterator[Row]:
    reader = csv.DictReader(io.StringIO(_text(path), newline=""), strict=True)
    try:
        for row in reader:
            odd = None in row or None in row.values()
            yield reader.line_num, Malformed(f"expected {len(reader.fieldnames or [])} columns, got another number") if odd else row
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.reader.line_num}: no CSV: {error}. Mend the file; after this nothing can be read.") from error


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow.parquet
    from pyarrow import ArrowException

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (ArrowException, OSError) as error:
        raise UserError(f"{path}, row {number + 1}: no parquet: {str(error).splitlines()[0]}. Write the file again.") from error


def _text(path: Path) -> str:
    content = path.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}, line {line}: expected UTF-8, got byte 0x{content[error.start]:02x}. Save the file as UTF-8.") from error


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {".jsonl": _json_lines, ".json": _json_array, ".csv": _csv, ".parquet": _parquet}
