"""A benchmark is a section: cases known in advance, a function that measures one, and the columns of its table."""

import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

Case = dict[str, Any]
"""What identifies a row, as plain values."""

Found = dict[str, Any]
"""What was measured, as plain values; `skipped` holds the reason if nothing was."""


@dataclass(frozen=True)
class Settings:
    """How thoroughly to measure, and on which device and models."""

    quick: bool = False
    device: str = "auto"
    models: tuple[str, ...] = ()  # of the section on the accelerator; empty takes what fits the device
    turns: int = 31
    seconds: float = 60.0  # after which a comparison stops, once it has two turns

    @classmethod
    def of(cls, quick: bool, device: str = "auto", models: tuple[str, ...] = ()) -> "Settings":
        """Returns the usual settings, or those of a short try."""
        return cls(True, device, models, 2, 1.0) if quick else cls(False, device, models)


class SkippedError(Exception):
    """A case lacks something it needs; the message is the reason."""


@dataclass(frozen=True)
class Column:
    """A column of the table: the head, the key in the row, and the format of its value."""

    head: str
    key: str
    form: str = "{}"

    def cell(self, row: dict[str, Any]) -> str:
        """Returns the value as text, empty where there is none."""
        value = row.get(self.key)
        return "" if value is None else self.form.format(value)


@dataclass(frozen=True)
class Section:
    """One benchmark. `about` says what is compared and how the competitors differ."""

    letter: str
    title: str
    about: str
    columns: tuple[Column, ...]
    cases: Callable[[Settings], list[Case]]
    measure: Callable[[Case, Settings], Found]
    summary: Callable[[list[dict[str, Any]]], str] = lambda rows: ""  # of the rows that did not fail


def measured(section: Section, settings: Settings, rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yields a row {case, found, seconds, load} for each case, from `rows` if it was measured before.

    `found` holds `failed` if the case fails, and `skipped` if it cannot be measured here; the other cases continue.
    """
    present = {_key(row["case"]): row for row in rows if not {"failed", "skipped"} & set(row["found"])}
    for case in section.cases(settings):
        if _key(case) in present:
            yield present[_key(case)]
            continue
        begun = time.perf_counter()
        try:
            found = section.measure(case, settings)
        except SkippedError as reason:
            found = {"skipped": str(reason)}
        except Exception as error:
            found = {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        yield {"case": case, "found": found, "seconds": time.perf_counter() - begun, "load": os.getloadavg()[0]}


def _key(case: Case) -> str:
    return repr(sorted(case.items()))
