"""Loads the examples of a configuration: finds each set, reads it, and keeps a part if asked.

`data.path` is the training set's hub name, its file, or a folder for all sets; without it, a set is fetched from its authors' source.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from math import ceil
from pathlib import Path

from fedsim.config import DataConfig
from fedsim.data.converting import Reading, Source, converted, divided, named_split
from fedsim.data.hub import Address, Hub
from fedsim.data.rows import READERS, read
from fedsim.data.sets import COMMONSENSE, SETS, DataSet
from fedsim.errors import UserError, nearest
from fedsim.models import looks_local
from fedsim.seeding import numpy_generator
from fedsim.types import AnyExample, Labelled

EMBEDDED = "embedded"
EMBEDDED_SIZES = {"train": 5000, "test": 500}
"""Examples of each task in the embedded data unless the configuration sets another number."""


@dataclass(frozen=True)
class Dataset:
    """A run's training and test examples. Each line of `skipped` says what was left out and why.

    For classification, `labels` are the labels in the order of the head's outputs and `texts` the number of texts per row; else they are
    empty and 0.
    """

    train: list[AnyExample]
    test: dict[str, list[AnyExample]]
    skipped: list[str]
    labels: tuple[str, ...] = ()
    texts: int = 0


class _MissingError(UserError):
    """A set has no file in the folder, or no usable row: fatal unless it is one of several test sets."""


def load(config: DataConfig, seed: int) -> Dataset:
    """Reads the sets that the configuration names.

    Guarantees: the same arguments give the same examples in the same order; `train_examples` and `test_examples` are seeded choices.
    Of several test sets, one that is missing from a folder or has no usable row is reported in `skipped`. Raises UserError, with file,
    line and reason, for anything that cannot be read.
    """
    _check_names(config)
    reading = Reading(config, seed)
    if config.path is not None and Path(config.path).is_file():
        train, test = _from_single_file(reading, Path(config.path))
        known = reading.labels()
    else:
        train = [example for name in config.train for example in _examples(reading, name, "train")]
        known = reading.labels()  # before the test sets, which may not add labels
        test = _tests(reading)
    train = _sampled(train, config.train_examples, seed, "train")
    test = {task: _sampled(examples, config.test_examples, seed, task) for task, examples in test.items()}
    texts = len(train[0].texts) if isinstance(train[0], Labelled) else 0
    tests = {task: _labelled(examples, known) for task, examples in test.items()}
    return Dataset(_labelled(train, known), tests, reading.notes, known, texts)


def _labelled(examples: Sequence[AnyExample], known: tuple[str, ...]) -> list[AnyExample]:
    return [replace(example, labels=known) if isinstance(example, Labelled) else example for example in examples]


def check(config: DataConfig) -> None:
    """Raises UserError where `load` would, judging by names, files and the first row of each set; fetches nothing."""
    _check_names(config)
    reading = Reading(config, 0)
    if config.path is not None and Path(config.path).is_file():
        _check_first_row(reading, _single_file(config, Path(config.path)))
        return
    for name in config.train:
        _check_set(reading, name, "train")
    missing: list[_MissingError] = []
    for name in config.test:
        try:
            _check_set(reading, name, "test")
        except _MissingError as error:
            missing.append(error)
    if len(missing) == len(config.test):
        raise missing[0]


def _check_set(reading: Reading, name: str, split: str) -> None:
    path = reading.config.path
    if name == EMBEDDED:
        return
    if path is None or not Path(path).is_dir():
        remote_of(reading.config, name)
        return
    first, *_ = _sources(SETS[name], Path(path), split)
    _check_first_row(reading, first)


def _check_first_row(reading: Reading, source: Source) -> None:
    """Raises UserError for a file's first row if `load` would; skips a row that belongs to neither split."""
    (first,) = islice(read(Path(source.place)), 1)
    split = named_split(first[1], source.each.split_column) or "train"
    if split in ("train", "test"):
        converted(reading, replace(source, owned=source.owned and split == "train"), [first])


def _check_names(config: DataConfig) -> None:
    known = [EMBEDDED, *SETS]
    for split, names in (("train", config.train), ("test", config.test)):
        for name in names:
            if name not in known:
                raise UserError(f"data.{split}: expected names out of {', '.join(known)}, got {name!r}.{nearest(name, known)}")
            if name != EMBEDDED and not SETS[name].patterns(split):
                raise UserError(f"data.{split}: {name} has no {split} split. Choose another set for data.{split}.")
    if config.path is not None and {*config.train, *config.test} == {EMBEDDED}:
        raise UserError(
            f"data.path={config.path}: the embedded data reads no file. Choose what reads it, such as data=instructions or "
            "data=classification, or leave it out."
        )
    for option, column in (("data.client_column", config.client_column), ("data.task_column", config.task_column)):
        if column is not None and EMBEDDED in (*config.train, *config.test):
            raise UserError(f"{option}={column}: the embedded data has no columns. Leave it out, or choose a set such as data=gsm8k.")
    if config.path is not None and not Path(config.path).exists() and _is_local(config.path):
        raise UserError(f"data.path={config.path}: there is no such file or folder. Check the path.")


def _is_local(path: str) -> bool:
    """Returns whether a path must be local: no data set of the hub is named like a file."""
    return looks_local(path) or Path(path).suffix.lower() in READERS


def _from_single_file(reading: Reading, path: Path) -> tuple[list[AnyExample], dict[str, list[AnyExample]]]:
    """Returns the training and test sets of a file, split by a column of its rows, or else by a seeded choice."""
    source = _single_file(reading.config, path)
    parts = divided(reading, source, read(path))
    others = [name for name in reading.config.test if name != source.each.name]
    reading.notes += [f"test set left out: {name}: data.path is a single file" for name in others]
    return parts["train"], _by_task(parts["test"])


def _single_file(config: DataConfig, path: Path) -> Source:
    name = _only_training_set(config, "a single file")
    return Source(SETS[name], name, str(path), _line_or_row(path))


def _by_task(examples: Iterable[AnyExample]) -> dict[str, list[AnyExample]]:
    found: dict[str, list[AnyExample]] = {}
    for example in examples:
        found.setdefault(example.task, []).append(example)
    return found


def _only_training_set(config: DataConfig, what: str) -> str:
    names = [name for name in config.train if name != EMBEDDED]
    if len(config.train) != 1 or not names:
        raise UserError(
            f"data.path={config.path}: {what} holds one training set, got data.train=[{','.join(config.train)}]. "
            "Name one, or give a folder."
        )
    return names[0]


def _tests(reading: Reading) -> dict[str, list[AnyExample]]:
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


def _examples(reading: Reading, name: str, split: str) -> list[AnyExample]:
    """Returns the examples of one split of one set. Raises UserError if there are none."""
    if name == EMBEDDED:
        return _embedded(reading, split)
    each, path, num_notes = SETS[name], reading.config.path, len(reading.notes)
    if path is not None and Path(path).is_dir():
        examples = _from_folder(reading, each, Path(path), split)
    else:
        remote = remote_of(reading.config, name)
        if each.in_one and remote is each.remote:
            examples = divided(reading, Source(each, name, remote.place(split), "line"), remote.rows(split))[split]
        elif isinstance(remote, Hub) and remote != each.remote and name in reading.config.test and not remote.has_test():
            examples = divided(reading, Source(each, name, remote.place("train"), "row"), remote.rows("train"))[split]
        else:
            source = Source(each, name, remote.place(split), "row", owned=split == "train")
            examples = converted(reading, source, remote.rows(split))
    if not examples:
        raise _MissingError(f"{name}: expected {split} rows, but each is malformed, first {reading.notes[num_notes]}.")
    return examples


def remote_of(config: DataConfig, name: str) -> Hub | Address:
    """Returns where a set is fetched from: the hub name in `data.path` for the training set, else the set's own source.

    Raises UserError for a set that has none.
    """
    if config.path is not None and name == _only_training_set(config, "a hub name"):
        return Hub(config.path)
    found = SETS[name].remote
    if found is None:
        raise UserError(f"data.path: {name} is a set of your own; set it to a file, a folder, or a hub name.")
    return found


def _embedded(reading: Reading, split: str) -> list[AnyExample]:
    from fedsim.embedded import FAMILIES, examples

    in_all, of_each = reading.config.train_examples, reading.config.test_examples
    asked = of_each if split == "test" else in_all and ceil(in_all / len(FAMILIES))
    each = asked or EMBEDDED_SIZES[split]
    return [example for family in FAMILIES for example in examples(family, split, each, reading.seed)]


def _from_folder(reading: Reading, each: DataSet, folder: Path, split: str) -> list[AnyExample]:
    examples: list[AnyExample] = []
    for source in _sources(each, folder, split):
        rows = read(Path(source.place))
        examples += divided(reading, source, rows)[split] if each.in_one else converted(reading, source, rows)
    return examples


def _sources(each: DataSet, folder: Path, split: str) -> list[Source]:
    """Returns the files of a set, at least one; a file in the folder of one of the eight commonsense sets has that task."""
    owned, found = each.in_one or split == "train", []
    for file in _files(each, folder, split):
        task = file.parent.name if file.parent.name in COMMONSENSE else each.name
        found.append(Source(each, task, str(file), _line_or_row(file), owned))
    return found


def _files(each: DataSet, folder: Path, split: str) -> list[Path]:
    for pattern in each.patterns(split):
        found = sorted(path for path in folder.glob(pattern) if path.suffix.lower() in READERS and "." not in path.stem)
        if len({path.with_suffix("") for path in found}) < len(found):
            twice = ", ".join(str(path) for path in found[:4])
            raise UserError(f"data.path={folder}: expected the {split} split of {each.name} in one format, got {twice}. Keep one of them.")
        if found:
            return found
    wanted = ", ".join(each.patterns(split)[:5])
    others = sorted(path.name for path in folder.iterdir() if path.suffix.lower() in READERS)
    found_instead = f" but {', '.join(others[:3])}{' and more' if len(others) > 3 else ''}; rename them, or name one file" if others else ""
    raise _MissingError(f"{each.name}: expected a {split} file in {folder}, such as {wanted}; found none{found_instead}")


def _line_or_row(path: Path) -> str:
    return "row" if path.suffix.lower() == ".parquet" else "line"


def _sampled(examples: Sequence[AnyExample], count: int | None, seed: int, purpose: str) -> list[AnyExample]:
    """Returns a seeded choice of `count` examples, in their order; all of them if there are no more."""
    if count is None or count >= len(examples):
        return list(examples)
    chosen = numpy_generator(seed, "subset", purpose).choice(len(examples), count, replace=False)
    return [examples[i] for i in sorted(chosen.tolist())]
