"""Reads the rows of local files with their line numbers, so that error messages can name them.

JSON lines, JSON, CSV and tab-separated text are read here and not through `datasets`, whose errors name neither line nor field; Parquet
goes through pyarrow. All are read piece by piece in little memory, and reading continues after a broken row where it can: the caller
decides whether that is an error.
"""

import codecs
import csv
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from fedsim.errors import UserError

NumberedRow = tuple[int, Any]
"""The line where a row begins (row number in Parquet), from one, and the parsed value, a `Malformed` if it could not be parsed."""

BATCH = 1024
"""Rows of an Arrow table that are converted to Python values at a time."""


class Malformed(ValueError):
    """One row is wrong."""


class Unreadable(Malformed):
    """A whole file is wrong: leaving rows out does not help."""


class NoColumn(Malformed):
    """A row lacks a column; in a table all rows do."""


def read(path: Path) -> Iterator[NumberedRow]:
    """Yields the rows of a .jsonl, .json, .csv, .tsv, .txt or .parquet file in order; a file without rows yields one `Malformed`.

    Text must be UTF-8, with or without a byte-order mark. Raises UserError for another suffix or a file that cannot be opened.
    """
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"{path}: expected a file that ends in {', '.join(READERS)}, got {path.suffix or 'no ending'!r}. Convert it.")
    empty = True
    try:
        if _is_utf_16(path):
            yield 1, Unreadable("expected UTF-8, got UTF-16; save the file as UTF-8")
            return
        for row in reader(path):
            empty = False
            yield row
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}. Check data.path.") from error
    if empty:
        yield 1, Unreadable("expected rows, got none" if path.stat().st_size else "expected rows, but the file is empty")


def _is_utf_16(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def _open(path: Path, newline: str | None = None) -> TextIO:
    """Opens a text file. Invalid UTF-8 becomes lone surrogates, which `_not_utf8` finds, so that the rows around it can still be read."""
    return open(path, encoding="utf-8-sig", errors="surrogateescape", newline=newline)


def _not_utf8(text: str) -> Malformed | None:
    found = re.search("[\udc80-\udcff]", text)
    return Malformed(f"expected UTF-8, got the byte 0x{ord(found[0]) - 0xDC00:02x}; save the file as UTF-8") if found else None


def _json_lines(path: Path) -> Iterator[NumberedRow]:
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, _not_utf8(line) or _parsed(line)


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        return Malformed(f"invalid JSON: {error.msg.removesuffix(' at')} at column {error.colno}")
    except (ValueError, RecursionError) as error:  # see `_json`
        return Malformed(f"invalid JSON: {error}")


class _Window:
    """A window sliding over a text file; the next value begins at `at`, in line `line` of the file."""

    STEP = 1 << 20

    def __init__(self, file: TextIO) -> None:
        self.file, self.text, self.at, self.line = file, "", 0, 1

    def grow(self) -> bool:
        """Drops the text before `at` and reads more; returns False at the end of the file."""
        more = self.file.read(max(self.STEP, len(self.text) - self.at))  # doubling, so that a long value is parsed few times
        if more:
            self.text, self.at = self.text[self.at :] + more, 0
        return bool(more)

    def line_of(self, position: int) -> int:
        return self.line + self.text.count("\n", self.at, position)

    def move(self, to: int) -> None:
        self.line, self.at = self.line_of(to), to

    def seek(self, wanted: re.Pattern[str]) -> str:
        """Moves to the next match and returns it; moves to the end and returns "" if there is none."""
        while (found := wanted.search(self.text, self.at)) is None:
            self.move(len(self.text))
            if not self.grow():
                return ""
        self.move(found.start())
        return found[0]

    def take(self) -> Any:
        """Returns the JSON value at the current position and moves past it; a `Malformed` if not UTF-8. Raises the decoder's errors."""
        while True:
            try:
                value, end = json.JSONDecoder().raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                cut_off = error.msg.startswith("Unterminated string") or error.pos > len(self.text) - 16  # no token is longer
                if cut_off and self.grow():
                    continue
                raise
            fault = _not_utf8(self.text[self.at : end])
            self.move(end)
            return fault or value

    def resume(self) -> bool:
        """Moves to the next opening brace; returns False if there is none."""
        self.move(self.at + 1)
        return bool(self.seek(_BRACE))


_VISIBLE, _BRACE = re.compile(r"\S"), re.compile(r"\{")


def _json(path: Path) -> Iterator[NumberedRow]:
    """Yields the elements of an array, or objects one after another. After a broken one, reading goes on at the next opening brace."""
    with _open(path) as file:
        window = _Window(file)
        end = "]" if window.seek(_VISIBLE) == "[" else ""
        window.move(window.at + len(end))
        while (character := window.seek(_VISIBLE)) != end:
            line = window.line
            if not character:
                yield line, Malformed("invalid JSON: the array has no end; the file is cut off")
                return
            try:
                yield line, window.take()
            except json.JSONDecodeError as error:
                yield window.line_of(error.pos), Malformed(f"invalid JSON: {error.msg}")
                if not window.resume():
                    return
            except (ValueError, RecursionError) as error:  # a number of thousands of digits, deep nesting
                yield line, Malformed(f"invalid JSON: {error}; nothing after it was read")
                return
            if end and window.seek(_VISIBLE) == ",":
                window.move(window.at + 1)


def _csv(path: Path) -> Iterator[NumberedRow]:
    """Yields the rows after the first, which names the columns; a quoted cell may hold line breaks."""
    with _open(path, newline="") as file:
        reader, header = csv.reader(file, strict=True), list[str]()
        while True:
            line = reader.line_num + 1
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield line, Malformed(f"invalid CSV: {error}")
                continue
            if header and cells:
                yield line, _not_utf8("".join(cells)) or _row_of(header, cells)
            header = header or cells
            if len(header) == 1 and (other := re.search("[;\t|]", header[0])):
                yield line, Unreadable(f"expected commas between the names of columns, got {other[0]!r} in {header[0]!r:.40}")
                return


def _tsv(path: Path) -> Iterator[NumberedRow]:
    """Yields the rows after the first, which names the columns; cells are verbatim, quotation marks included."""
    with _open(path) as file:
        header = list[str]()
        for number, line in enumerate(file, 1):
            cells = line.rstrip("\n").split("\t")
            if header and line.strip():
                yield number, _not_utf8(line) or _row_of(header, cells)
            header = header or (cells if line.strip() else header)


def _row_of(header: list[str], cells: list[str]) -> Any:
    if len(cells) != len(header):
        return Malformed(f"expected {len(header)} columns as in the first row, got {len(cells)}")
    return dict(zip(header, cells, strict=True))


def _parquet(path: Path) -> Iterator[NumberedRow]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    number = 0
    try:
        with ParquetFile(path) as file:
            rows = (row for batch in file.iter_batches(batch_size=BATCH) for row in batch_rows(batch))
            for number, row in enumerate(rows, 1):
                yield number, row
    except (ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # it cannot be opened
        fault = Malformed if number else Unreadable  # any rows before the fault were read
        yield number + 1, fault(f"invalid Parquet: {str(error).splitlines()[0].rstrip('.')}")


def batch_rows(batch: Any) -> Iterator[Any]:
    """Yields the rows of an Arrow batch or table as dictionaries, a `Malformed` for a row whose text is not UTF-8."""
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError as error:
        if len(batch) == 1:
            yield Malformed(f"expected UTF-8, got the byte 0x{error.object[error.start]:02x}")
            return
        for i in range(len(batch)):
            yield from batch_rows(batch.slice(i, 1))


READERS: dict[str, Callable[[Path], Iterator[NumberedRow]]] = {
    ".jsonl": _json_lines,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _tsv,
    ".txt": _tsv,
    ".parquet": _parquet,
}
"""The reader of each file suffix."""

WITH_HEADER = (".csv", ".tsv", ".txt")
"""Suffixes of formats whose first line names the columns."""
