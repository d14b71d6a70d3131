"""Converts rows to examples, handles malformed rows, and divides a file that holds both train and test."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fedsim.choices import OnError
from fedsim.config import DataConfig
from fedsim.data.classified import Form
from fedsim.data.columns import named
from fedsim.data.rows import WITH_HEADER, Malformed, NoColumn, NumberedRow, Unreadable
from fedsim.data.sets import DataSet, labels
from fedsim.errors import UserError
from fedsim.seeding import numpy_generator
from fedsim.types import AnyExample, Labelled

HELD_OUT = 0.1
"""Fraction of a single file's rows that becomes the test set, at most MOST_HELD_OUT rows."""
MOST_HELD_OUT = 1000

MOST_NOTES = 10
"""Malformed rows of one file that are reported individually; the rest are only counted."""


@dataclass
class Reading:
    """State shared by all sets of a configuration while they are read."""

    config: DataConfig
    seed: int
    notes: list[str] = field(default_factory=list)
    divided: dict[str, dict[str, list[AnyExample]]] = field(default_factory=dict)  # files that hold train and test, by place
    form: Form = field(init=False)  # of a user's own rows for classification

    def __post_init__(self) -> None:
        self.form = Form(tuple(self.config.labels))

    def labels(self) -> tuple[str, ...]:
        """Returns the labels of the data; where its rows give them, fixes them to those of the rows read so far."""
        known = labels(self.config)
        return self.form.fix_labels() if known is None else known


@dataclass(frozen=True)
class Source:
    """Where rows come from, their task, and whether each must name its client if the configuration has a column for that."""

    each: DataSet
    task: str
    place: str  # a file, an address, or a hub name
    unit: str  # what rows are counted in: lines or rows
    owned: bool = True  # False for rows of a separate test set


def divided(reading: Reading, source: Source, rows: Iterable[NumberedRow]) -> dict[str, list[AnyExample]]:
    """Returns the examples of a file that holds train and test, split by a column of its rows, or else by a seeded choice."""
    if source.place not in reading.divided:
        numbered = list(rows)
        named_splits = {named_split(row, source.each.split_column) for _, row in numbered} - {None}
        divide = _split_by_column if named_splits else _hold_out
        reading.divided[source.place] = divide(reading, source, numbered)
    return reading.divided[source.place]


def named_split(row: Any, column: str | None) -> str | None:
    """Returns the split named in the row's `column`, in lower case; None if it names none."""
    return str(row[column]).strip().lower() if isinstance(row, Mapping) and column in row else None


def _split_by_column(reading: Reading, source: Source, rows: Sequence[NumberedRow]) -> dict[str, list[AnyExample]]:
    """Splits rows by column. Rows without one join the training set, where the fault is found; those of a third split are dropped."""
    column = source.each.split_column
    splits = [named_split(row, column) or "train" for _, row in rows]
    parts = {split: [row for row, own in zip(rows, splits, strict=True) if own == split] for split in ("train", "test")}
    left_out = len(rows) - sum(map(len, parts.values()))
    if left_out:
        reading.notes.append(f"{source.place}: {left_out:,} of {len(rows):,} rows belong to neither train nor test")
    found = {split: converted(reading, replace(source, owned=split == "train"), part) for split, part in parts.items()}
    for split, examples in found.items():
        if not examples:
            raise UserError(f"{source.place}: expected rows with {split} in {column!r}, got none. Add such rows, or remove the column.")
    return found


def _hold_out(reading: Reading, source: Source, rows: Sequence[NumberedRow]) -> dict[str, list[AnyExample]]:
    examples, where = converted(reading, source, rows), source.place
    count = min(MOST_HELD_OUT, int(HELD_OUT * len(examples)))
    if count == 0:
        least, others = int(1 / HELD_OUT), f" besides malformed ones, first {reading.notes[0]}" if reading.notes else ""
        raise UserError(
            f"{where}: expected at least {least} rows to hold some out as a test, got {len(examples)}{others}. Give more or a folder."
        )
    chosen = set(numpy_generator(reading.seed, "held out").permutation(len(examples))[:count].tolist())
    reading.notes.append(f"{where}: {count:,} of {len(examples):,} rows are held out as the test set")
    train = [example for i, example in enumerate(examples) if i not in chosen]
    return {"train": train, "test": [examples[i] for i in sorted(chosen)]}


def converted(reading: Reading, source: Source, rows: Iterable[NumberedRow]) -> list[AnyExample]:
    """Returns the examples; a malformed row ends the run or is noted, as `data.on_error` says. Counts rows without a label."""
    found: list[AnyExample] = []
    num_left_out = num_unlabelled = 0
    where = source.place
    for number, row in rows:
        try:
            if isinstance(row, Malformed):
                raise row
            example = _example(reading, source, row)
            if example is None:
                num_unlabelled += 1
            else:
                found.append(example)
        except Malformed as error:
            fault = f"{where}, {source.unit} {number}: {error}"
            if reading.config.on_error is OnError.stop:
                raise UserError(f"{fault}. {_remedy(error, where)}") from None
            num_left_out += 1
            if num_left_out <= MOST_NOTES:
                reading.notes.append(fault)
    if num_left_out:
        reading.notes.append(f"{where}: {num_left_out:,} of {num_left_out + len(found):,} rows left out")
    if num_unlabelled:
        reading.notes.append(f"{where}: {num_unlabelled:,} rows have no label and are left out, as {source.each.name} intends")
    return found


def _remedy(error: Malformed, place: str) -> str:
    if isinstance(error, Unreadable):
        return "Fix the file."
    if isinstance(error, NoColumn) and Path(place).suffix.lower() in WITH_HEADER:
        return "The first line of the file must name the columns: correct it, or put such a line above it where it is a row."
    return "Fix it, or skip such rows with data.on_error=skip."


def _example(reading: Reading, source: Source, row: Any) -> AnyExample | None:
    """Returns the row as an example of its set, with its task and client if the configuration has columns for them."""
    config, example = reading.config, source.each.example(row, source.task)
    if example is not None and config.task_column is not None:
        example = replace(example, task=named(row, config.task_column, "data.task_column"))
    if example is not None and config.client_column is not None and source.owned:
        example = replace(example, client=named(row, config.client_column, "data.client_column"))
    if isinstance(example, Labelled) and source.each.labels is None:
        reading.form.take(example)
    return example
