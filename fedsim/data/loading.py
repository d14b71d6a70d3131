"""From a configuration to examples: where each set is read from, what is left out, and which part is kept.

`data.path` is the training set's hub name, its file, or a folder for all sets; a set without it is fetched from where its authors put it.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import ceil
from pathlib import Path
from typing import Any

from fedsim.choices import OnError
from fedsim.config import DataConfig
from fedsim.data.hub import Address, Hub
from fedsim.data.rows import READERS, Malformed, Row, Unreadable, read
from fedsim.data.sets import COMMONSENSE, SETS, DataSet, named
from fedsim.errors import UserError, nearest
from fedsim.models import looks_local
from fedsim.seeding import numpy_generator
from fedsim.types import AnyExample

EMBEDDED = "embedded"
EMBEDDED_SIZES = {"train": 5000, "test": 500}
"""Examples of each task that the embedded data has unless the configuration asks for another number."""

HELD_OUT = 0.1
"""Part of a single file's rows that becomes the test set, at most MOST_HELD_OUT rows."""
MOST_HELD_OUT = 1000

MOST_NOTES = 10
"""Malformed rows of one file that are reported one by one; beyond them only their number is."""


@dataclass(frozen=True)
class Dataset:
    """What a run trains and is tested on. `skipped` says, line by line, what was left out and why."""

    train: list[AnyExample]
    test: dict[str, list[AnyExample]]
    skipped: list[str]


@dataclass
class _Reading:
    """What is common to the reading of all sets of a configuration."""

    config: DataConfig
    seed: int
    notes: list[str] = field(default_factory=list)
    divided: dict[str, dict[str, list[AnyExample]]] = field(default_factory=dict)  # files that hold train and test, by place


@dataclass(frozen=True)
class _Source:
    """Where rows come from, what they are examples of, and whether each must name its owner where the configuration has a column for it."""

    each: DataSet
    task: str
    place: str  # a file, an address, or a hub name
    unit: str  # what rows are counted in: lines or rows
    owned: bool = True  # not of a test set on its own


class _MissingError(UserError):
    """A set has no file in the folder, or no usable row: fatal unless it is one of several test sets."""


def labels(config: DataConfig) -> tuple[str, ...]:
    """Returns the labels by which the configuration's sets are classified, in the order of a head's outputs; empty where they are answered.

    Raises UserError where they differ.
    """
    found = {name: SETS[name].labels if name in SETS else () for name in (*config.train, *config.test)}
    if len(set(found.values())) > 1:
        kinds = ", ".join(f"{name} ({'/'.join(own) or 'answered in words'})" for name, own in found.items())
        raise UserError(f"data.train, data.test: expected sets that one model serves, got {kinds}. Choose sets of one kind.")
    return next(iter(found.values()), ())


def load(config: DataConfig, seed: int) -> Dataset:
    """Reads the sets that the configuration names.

    Guarantees: the same arguments give the same examples in the same order; `train_examples` and `test_examples` are seeded choices.
    Of several test sets, one that a folder does not hold is reported in `skipped`. Raises UserError, with file, line and reason, for
    what cannot be read.
    """
    _check(config)
    reading = _Reading(config, seed)
    if config.path is not None and Path(config.path).is_file():
        train, test = _from_single_file(reading, Path(config.path))
    else:
        train = [example for name in config.train for example in _examples(reading, name, "train")]
        test = _tests(reading)
    train = _at_most(train, config.train_examples, seed, "train")
    test = {task: _at_most(examples, config.test_examples, seed, task) for task, examples in test.items()}
    return Dataset(train, test, reading.notes)


def _check(config: DataConfig) -> None:
    known = [EMBEDDED, *SETS]
    for split, names in (("train", config.train), ("test", config.test)):
        for name in names:
            if name not in known:
                raise UserError(f"data.{split}: expected names out of {', '.join(known)}, got {name!r}.{nearest(name, known)}")
            if name != EMBEDDED and not SETS[name].patterns(split):
                raise UserError(f"data.{split}: {name} has no {split} split. Choose another set for data.{split}.")
    if config.path is not None and {*config.train, *config.test} == {EMBEDDED}:
        raise UserError(
            f"data.path={config.path}: the embedded data reads no file. Leave out data.path, or choose a set such as data=gsm8k."
        )
    for option, column in (("data.client_column", config.client_column), ("data.task_column", config.task_column)):
        if column is not None and EMBEDDED in (*config.train, *config.test):
            raise UserError(f"{option}={column}: the embedded data has no columns. Leave it out, or choose a set such as data=gsm8k.")
    if config.path is not None and not Path(config.path).exists() and _means_a_place_here(config.path):
        raise UserError(f"data.path={config.path}: there is no such file or folder. Check the path.")


def _means_a_place_here(path: str) -> bool:
    """Whether a path is no name of the hub, where no data set is called like a file."""
    return looks_local(path) or Path(path).suffix.lower() in READERS


def _from_single_file(reading: _Reading, path: Path) -> tuple[list[AnyExample], dict[str, list[AnyExample]]]:
    """The file is the training set; what it tells to be the test set is that, or a seeded part of it is held out."""
    name = _only_training_set(reading.config, "a single file")
    parts = _divided(reading, _Source(SETS[name], name, str(path), _line_or_row(path)), read(path))
    reading.notes += [f"test set left out: {other}: data.path is a single file" for other in reading.config.test if other != name]
    return parts["train"], _by_task(parts["test"])


def _by_task(examples: Iterable[AnyExample]) -> dict[str, list[AnyExample]]:
    found: dict[str, list[AnyExample]] = {}
    for example in examples:
        found.setdefault(example.task, []).append(example)
    return found


def _divided(reading: _Reading, source: _Source, rows: Iterable[Row]) -> dict[str, list[AnyExample]]:
    """Returns the examples of a file that holds train and test: as a column of its rows tells, or else a seeded part is held out."""
    if source.place not in reading.divided:
        numbered = list(rows)
        told = {_told_split(row, source.each.split_column) for _, row in numbered} - {None}
        divide = _as_told if told else _held_out
        reading.divided[source.place] = divide(reading, source, numbered)
    return reading.divided[source.place]


def _told_split(row: Any, column: str | None) -> str | None:
    return str(row[column]).strip().lower() if isinstance(row, Mapping) and column in row else None


def _as_told(reading: _Reading, source: _Source, rows: Sequence[Row]) -> dict[str, list[AnyExample]]:
    """A row that tells nothing belongs to the training set, where its fault is found; one of a third split to neither."""
    column = source.each.split_column
    split_of = lambda row: _told_split(row[1], column) or "train"  # noqa: E731
    parts = {split: [row for row in rows if split_of(row) == split] for split in ("train", "test")}
    left_out = len(rows) - sum(map(len, parts.values()))
    if left_out:
        reading.notes.append(f"{source.place}: {left_out} of {len(rows)} rows belong to neither train nor test")
    found = {split: _converted(reading, replace(source, owned=split == "train"), part) for split, part in parts.items()}
    for split, examples in found.items():
        if not examples:
            raise UserError(f"{source.place}: expected rows with {split} in {column!r}, got none. Give them, or leave the column out.")
    return found


def _held_out(reading: _Reading, source: _Source, rows: Sequence[Row]) -> dict[str, list[AnyExample]]:
    examples, where = _converted(reading, source, rows), source.place
    count = min(MOST_HELD_OUT, int(HELD_OUT * len(examples)))
    if count == 0:
        least = int(1 / HELD_OUT)
        raise UserError(f"{where}: expected at least {least} rows to hold some out as a test, got {len(examples)}. Give more or a folder.")
    chosen = set(numpy_generator(reading.seed, "held out").permutation(len(examples))[:count].tolist())
    reading.notes.append(f"{where}: {count} of {len(examples)} rows are held out as the test set")
    train = [example for i, example in enumerate(examples) if i not in chosen]
    return {"train": train, "test": [examples[i] for i in sorted(chosen)]}


def _only_training_set(config: DataConfig, what: str) -> str:
    names = [name for name in config.train if name != EMBEDDED]
    if len(config.train) != 1 or not names:
        raise UserError(
            f"data.path={config.path}: {what} holds one training set, got data.train=[{','.join(config.train)}]. "
            "Name one, or give a folder."
        )
    return names[0]


def _tests(reading: _Reading) -> dict[str, list[AnyExample]]:
    found: list[AnyExample] = []
    missing: list[str] = []
    for name in reading.config.test:
        try:
            found += _examples(reading, name, "test")
        except _MissingError as error:
            missing.append(str(error))
    if not found:
        raise UserError(missing[0])
    reading.notes += [f"test set left out: {line}" for line in missing]
    return _by_task(found)


def _examples(reading: _Reading, name: str, split: str) -> list[AnyExample]:
    """Returns the examples of one split of one set. Raises UserError where there is none."""
    if name == EMBEDDED:
        return _embedded(reading, split)
    each, path, num_notes = SETS[name], reading.config.path, len(reading.notes)
    if path is not None and Path(path).is_dir():
        examples = _from_folder(reading, each, Path(path), split)
    else:
        remote = remote_of(reading.config, name)
        if each.in_one and remote is each.remote:
            examples = _divided(reading, _Source(each, name, remote.place(split), "line"), remote.rows(split))[split]
        elif isinstance(remote, Hub) and remote != each.remote and name in reading.config.test and not remote.has_test():
            examples = _divided(reading, _Source(each, name, remote.place("train"), "row"), remote.rows("train"))[split]
        else:
            source = _Source(each, name, remote.place(split), "row", owned=split == "train")
            examples = _converted(reading, source, remote.rows(split))
    if not examples:
        raise _MissingError(f"{name}: expected {split} rows, but each is malformed, first {reading.notes[num_notes]}.")
    return examples


def remote_of(config: DataConfig, name: str) -> Hub | Address:
    """Returns where a set is fetched from: a hub name in `data.path` is that of the training set; other sets keep their own sources.

    Raises UserError for a set that has none.
    """
    if config.path is not None and name == _only_training_set(config, "a hub name"):
        return Hub(config.path)
    found = SETS[name].remote
    if found is None:
        raise UserError(f"data.path: {name} is a set of your own; say where it lies: a file, a folder, or a hub name.")
    return found


def _embedded(reading: _Reading, split: str) -> list[AnyExample]:
    from fedsim.embedded import FAMILIES, examples

    in_all, of_each = reading.config.train_examples, reading.config.test_examples
    asked = of_each if split == "test" else in_all and ceil(in_all / len(FAMILIES))
    each = asked or EMBEDDED_SIZES[split]
    return [example for family in FAMILIES for example in examples(family, split, each, reading.seed)]


def _from_folder(reading: _Reading, each: DataSet, folder: Path, split: str) -> list[AnyExample]:
    """Reads the files of a set; what stands in the folder of one of the eight commonsense sets is of its task."""
    examples: list[AnyExample] = []
    for file in _files(each, folder, split):
        task = file.parent.name if file.parent.name in COMMONSENSE else each.name
        source = _Source(each, task, str(file), _line_or_row(file), owned=each.in_one or split == "train")
        examples += _divided(reading, source, read(file))[split] if each.in_one else _converted(reading, source, read(file))
    return examples


def _files(each: DataSet, folder: Path, split: str) -> list[Path]:
    for pattern in each.patterns(split):
        found = sorted(path for path in folder.glob(pattern) if path.suffix.lower() in READERS and "." not in path.stem)
        if len({path.with_suffix("") for path in found}) < len(found):
            twice = ", ".join(str(path) for path in found[:4])
            raise UserError(f"data.path={folder}: expected the {split} split of {each.name} in one format, got {twice}. Keep one of them.")
        if found:
            return found
    wanted = ", ".join(each.patterns(split)[:5])
    raise _MissingError(f"{each.name}: expected a {split} file in {folder}, such as {wanted}; found none")


def _line_or_row(path: Path) -> str:
    return "row" if path.suffix.lower() == ".parquet" else "line"


def _converted(reading: _Reading, source: _Source, rows: Iterable[Row]) -> list[AnyExample]:
    """Returns the examples; a malformed row ends the run or is noted, as `data.on_error` says. Rows without a label are counted."""
    found: list[AnyExample] = []
    num_left_out = num_unlabelled = 0
    where = source.place
    for number, row in rows:
        try:
            if isinstance(row, Malformed):
                raise row
            example = _example(reading.config, source, row)
            if example is None:
                num_unlabelled += 1
            else:
                found.append(example)
        except Malformed as error:
            fault = f"{where}, {source.unit} {number}: {error}"
            if reading.config.on_error is OnError.stop:
                skip = "" if isinstance(error, Unreadable) else ", or leave such rows out with data.on_error=skip"
                raise UserError(f"{fault}. Mend {'the file' if isinstance(error, Unreadable) else 'it'}{skip}.") from None
            num_left_out += 1
            if num_left_out <= MOST_NOTES:
                reading.notes.append(fault)
    if num_left_out:
        reading.notes.append(f"{where}: {num_left_out} of {num_left_out + len(found)} rows left out")
    if num_unlabelled:
        reading.notes.append(f"{where}: {num_unlabelled} rows have no label and are left out, as {source.each.name} means them to be")
    return found


def _example(config: DataConfig, source: _Source, row: Any) -> AnyExample | None:
    """Returns the row as an example of its set, with the task and the owner that it names where the configuration has columns for them."""
    example = source.each.example(row, source.task)
    if example is not None and config.task_column is not None:
        example = replace(example, task=named(row, config.task_column))
    if example is not None and config.client_column is not None and source.owned:
        example = replace(example, client=named(row, config.client_column))
    return example


def _at_most(examples: Sequence[AnyExample], count: int | None, seed: int, purpose: str) -> list[AnyExample]:
    """Returns a seeded choice of `count` examples, in their order; all of them where there are no more."""
    if count is None or count >= len(examples):
        return list(examples)
    chosen = numpy_generator(seed, "subset", purpose).choice(len(examples), count, replace=False)
    return [examples[i] for i in sorted(chosen.tolist())]
