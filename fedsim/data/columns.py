"""Reads texts, names and numbers from the columns of a row, or says what is wrong with them."""

import re
from collections.abc import Mapping
from typing import Any

from fedsim.data.rows import Malformed, NoColumn

Row = Mapping[str, Any]

_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


MOST_NAMED = 12
"""Columns that a message names, each by its first characters: without a header, a whole text may pass for a name."""


def column_of(row: Row, *names: str, option: str = "") -> str:
    """Returns the first of the columns that the row has; `option` is the option that names the column, for the message.

    Raises NoColumn if the row has none of them, Malformed if it is not a row.
    """
    if not isinstance(row, Mapping):
        raise Malformed(f"expected an object with fields, got {type(row).__name__}")
    if found := next((name for name in names if name in row), None):
        return found
    if len(row) == 1 and isinstance(next(iter(row.values())), list):
        raise Malformed(f"expected a list of rows, got an object that holds one in {next(iter(row))!r}; write only that list")
    asked = f" ({option})" if option else ""
    raise NoColumn(f"expected the field {' or '.join(map(repr, names))}{asked}, got {columns(row)}")


def columns(row: Row) -> str:
    """Returns the names of a row's columns for a message, at most MOST_NAMED."""
    return ", ".join([f"{name!r:.40}" for name in list(row)[:MOST_NAMED]] + ["more"] * (len(row) > MOST_NAMED)) or "none"


def text_of(row: Row, *names: str) -> str:
    """Returns the text in the first of the columns that the row has. Raises Malformed if it is missing, not text, or blank."""
    name = column_of(row, *names)
    if not isinstance(row[name], str) or not row[name].strip():
        raise Malformed(f"expected text in {name!r}, got {row[name]!r:.40}")
    return unicode_text(row[name], name)


def unicode_text(text: str, name: str) -> str:
    """Returns the text of a column. Raises Malformed if it cannot be encoded."""
    if _LONE_SURROGATE.search(text):
        raise Malformed(f"expected Unicode text in {name!r}, got a lone surrogate")
    return text


def named(row: Row, column: str, option: str = "") -> str:
    """Returns the name or whole number in the column (that `option` names), on one line. Raises Malformed for anything else."""
    value = row[column_of(row, column, option=option)]
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # a table with missing numbers holds floats
    found_name = " ".join(str(value).split())
    if isinstance(value, bool) or not isinstance(value, str | int) or not found_name:
        raise Malformed(f"expected a name or a whole number in {column!r}, got {value!r:.40}")
    return unicode_text(found_name, column)
