"""Training and test examples of a configuration: embedded, from local files, or from the Hugging Face hub."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedsim.config import DataConfig, OnError
from fedsim.data.rows import Malformed, Row, read
from fedsim.data.sets import SETS, DataSet
from fedsim.errors import UserError, nearest
from fedsim.models import looks_local
from fedsim.seeding import numpy_generator
from fedsim.types import Example, Family

EMBEDDED = "embedded"
EMBEDDED_SIZES = {"train": 5000, "test": 500}
"""Examples of each task that the embedded data has unless the configuration asks for fewer."""

HELD_OUT = 0.1
"""Part of a single file's rows that becomes the test set, at most MOST_HELD_OUT rows."""
MOST_HELD_OUT = 1000

_MOST_NOTES = 10


@dataclass(frozen=True)
class Dataset:
    """What a run trains and is tested on. `skipped` says, line by line, what was left out and why."""

    train: list[Example]
    test: dict[str, list[Example]]
    skipped: list[str]


@dataclass
class _Reading:
    """What is common to the reading of all sets of a configuration."""

    config: DataConfig
    seed: int
    notes: list[str] = field(default_factory=list)

    @property
    def path(self) -> str | None:
        return self.config.path


def load(config: DataConfig, seed: int) -> Dataset:
    """Reads the sets that the configuration names.

    Guarantees: the same arguments give the same examples in the same order; `train_examples` and `test_examples` are seeded choices. A local
    folder without one of several test sets is reported in `skipped`. Raises UserError, with file, line and reason, for what cannot be read.
    """
    for name in (*config.train, *config.test):
        _check_name(name)
    reading = _Reading(config, seed)
    if _is_file(config):
        train, test = _held_out(reading)
    else:
        train = [example for name in config.train for example in _split(reading, name, "train")]
        test = _tests(reading)
    train = _at_most(train, config.train_examples, seed, "train")
    test = {task: _at_most(examples, config.test_examples, seed, task) for task, examples in test.items()}
    return Dataset(train, test, reading.notes)


def _check_name(name: str) -> None:
    known = [EMBEDDED, *SETS]
    if name not in known:
        raise UserError(f"data.train, data.test: expected names out of {', '.join(known)}, got {name!r}.{nearest(name, known)}")


def _is_file(config: DataConfig) -> bool:
    return config.path is not None and config.train != [EMBEDDED] and Path(config.path).is_file()


def _held_out(reading: _Reading) -> tuple[list[Example], dict[str, list[Example]]]:
    """A single file is the training set; a seeded part of it is held out as the test set."""
    path, names = Path(str(reading.path)), reading.config.train
    if len(names) != 1:
        raise UserError(
            f"data.path={path}: a single file holds one training set, got data.train=[{','.join(names)}]. Name one, or give a folder."
        )
    examples = _examples(reading, SETS[names[0]], path)
    count = min(MOST_HELD_OUT, int(HELD_OUT * len(examples)))
    if count == 0:
        raise UserError(
            f"{path}: expected at least {int(1 / HELD_OUT)} rows to hold some out as a test, got {len(examples)}. Give a folder with a test file."
        )
    order = numpy_generator(reading.seed, "held out").permutation(len(examples))
    chosen = set(order[:count].tolist())
    reading.notes.append(f"{path}: {count} of {len(examples)} rows are held out as the test set")
    train = [example for i, example in enumerate(examples) if i not in chosen]
    return train, {names[0]: [examples[i] for i in sorted(chosen)]}


def _tests(reading: _Reading) -> dict[str, list[Example]]:
    found: dict[str, list[Example]] = {}
    missing: list[str] = []
    for name in reading.config.test:
        try:
            for example in _split(reading, name, "test"):
                found.setdefault(example.task, []).append(example)
        except _MissingError as error:
            missing.append(str(error))
    if not found:
        raise UserError(missing[0])
    reading.notes += [f"test set left out: {line}" for line in missing]
    return found


class _MissingError(UserError):
    """A folder has no file for a set."""


def _split(reading: _Reading, name: str, split: str) -> list[Example]:
    if name == EMBEDDED:
        return _embedded(reading, split)
    each, path = SETS[name], reading.path
    if not each.patterns(split):
        raise UserError(f"data.{split}: {name} has no {split} split. Choose another set for data.{split}.")
    if path is not None and (Path(path).is_dir() or looks_local(path)):
        examples = [example for file in _files(Path(path), each, split) for example in _examples(reading, each, file)]
    else:
        examples = _from_hub(reading, each, split)
    if not examples:
        raise UserError(f"data.path={path}: expected {split} rows of {name}, but none is left. Look at what was skipped.")
    return examples


def _embedded(reading: _Reading, split: str) -> list[Example]:
    from fedsim.embedded import examples

    asked = reading.config.train_examples if split == "train" else reading.config.test_examples
    each = EMBEDDED_SIZES[split]
    if asked is not None:
        each = min(each, asked if split == "test" else -(-asked // len(Family)))
    return [example for family in Family for example in examples(family, split, each, reading.seed)]


def _files(folder: Path, each: DataSet, split: str) -> list[Path]:
    if not folder.is_dir():
        raise UserError(f"data.path={folder}: there is no such file or folder. Check the path.")
    for pattern in each.patterns(split):
        found = sorted(path for path in folder.glob(pattern) if path.is_file())
        if found:
            return found
    raise _MissingError(f"{each.name}: expected a {split} file {' or '.join(each.patterns(split))} in {folder}, found none")


def _from_hub(reading: _Reading, each: DataSet, split: str) -> list[Example]:
    name = reading.path or each.hub
    if name is None:
        raise UserError(
            f"data.train, data.test: {each.name} is on no hub in this form. "
            "Give data.path= the folder of its files (`dataset/` of github.com/AGI-Edgerunners/LLM-Adapters)."
        )
    import datasets

    datasets.disable_progress_bars()
    try:
        rows: Any = datasets.load_dataset(name, each.hub_config if reading.path is None else None, split=split)
    except Exception as error:  # the libraries beneath raise dozens of kinds, for a wrong name and for a network that is down
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{each.name}: cannot read {name!r} from the Hugging Face hub: {reason:.150}. Check the name, or give data.path= a local folder."
        ) from error
    return _converted(reading, each, f"{name}[{split}]", enumerate(rows, 1))


def _examples(reading: _Reading, each: DataSet, path: Path) -> list[Example]:
    return _converted(reading, each, str(path), read(path))


def _converted(reading: _Reading, each: DataSet, where: str, rows: Iterator[Row]) -> list[Example]:
    """Returns the examples; a malformed row ends the run or is noted, as `data.on_error` says."""
    found: list[Example] = []
    left_out = 0
    for line, row in rows:
        try:
            if isinstance(row, Malformed):
                raise row
            found.append(each.example(row, each.name))
        except Malformed as error:
            if reading.config.on_error is OnError.stop:
                raise UserError(f"{where}, line {line}: {error}. Mend the row, or leave such rows out with data.on_error=skip.") from None
            left_out += 1
            if left_out <= _MOST_NOTES:
                reading.notes.append(f"{where}, line {line}: {error}")
    if left_out:
        reading.notes.append(f"{where}: {left_out} of {left_out + len(found)} rows left out")
    if not found and not left_out:
        raise UserError(f"{where}: expected rows, got none. Check the file.")
    return found


def _at_most(examples: list[Example], count: int | None, seed: int, purpose: str) -> list[Example]:
    """Returns a seeded choice of `count` examples, in their order; all of them where there are no more."""
    if count is None or count >= len(examples):
        return examples
    chosen = numpy_generator(seed, "subset", purpose).choice(len(examples), count, replace=False)
    return [examples[i] for i in sorted(chosen.tolist())]
