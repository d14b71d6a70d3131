"""Fetches remote rows: data sets of the Hugging Face hub, and files at a URL. Both are fetched once and cached."""

import shutil
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from fedsim.data.rows import BATCH, NumberedRow, batch_rows, read
from fedsim.errors import UserError
from fedsim.files import atomically, cache_folder

PATIENCE_SECONDS = 10.0
"""Timeout of a host's first answer."""


@dataclass(frozen=True)
class Hub:
    """A data set of the hub with splits called train and test, or a local folder in the hub's form."""

    name: str
    config: str | None = None

    def place(self, split: str) -> str:
        """Returns the name of a split for messages."""
        return f"{self.name} ({split})"

    def rows(self, split: str) -> Iterator[NumberedRow]:
        """Yields the rows of a split, numbered from one. Raises UserError if they cannot be fetched."""
        tables = self._load(split).with_format("arrow").iter(batch_size=BATCH)
        yield from enumerate((row for table in tables for row in batch_rows(table)), 1)

    def has_test(self) -> bool:
        """Returns whether there is a test split, which it asks once. Raises UserError if that cannot be fetched."""
        return "test" in self._fetched("train", lambda: _splits(self.name, self.config))

    def _load(self, split: str) -> Any:
        from datasets import load_dataset

        return self._fetched(split, lambda: load_dataset(self.name, self.config, split=split))

    def _fetched(self, split: str, fetch: Callable[[], Any]) -> Any:
        try:
            _check_reachable(self.name)
            return fetch()
        except Exception as error:  # the libraries raise dozens of types, for a wrong name or a network that is down
            raise UserError(_not_fetched(self.place(split), error)) from error


@cache
def _splits(name: str, config: str | None) -> tuple[str, ...]:
    from datasets import get_dataset_split_names

    return tuple(get_dataset_split_names(name, config))


@dataclass(frozen=True)
class Address:
    """A file on the web; {split} in its URL stands for train or test."""

    url: str

    def place(self, split: str) -> str:
        """Returns the URL of a split."""
        return self.url.format(split=split)

    def rows(self, split: str) -> Iterator[NumberedRow]:
        """Yields the rows of the file with their line numbers. Raises UserError if it cannot be fetched."""
        url = self.place(split)
        path = cache_folder() / urlsplit(url).netloc / urlsplit(url).path.lstrip("/")
        if not path.is_file():
            _fetch(url, path)
        yield from read(path)


def _fetch(url: str, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(url, timeout=PATIENCE_SECONDS) as reply, atomically(path) as file:
            shutil.copyfileobj(reply, file)
            if reply.length:  # bytes of the announced size that are missing
                raise OSError(f"the connection closed {reply.length} bytes too early")
    except (OSError, HTTPException) as error:  # of the network and of the disk
        raise UserError(_not_fetched(url, error)) from error


def _check_reachable(name: str) -> None:
    """Checks that the hub answers, since the library would retry for half a minute; skipped offline and for a local folder."""
    from huggingface_hub import constants, get_session

    if not constants.HF_HUB_OFFLINE and not Path(name).is_dir():
        get_session().head(constants.ENDPOINT, timeout=PATIENCE_SECONDS)


def _not_fetched(what: str, error: Exception) -> str:
    reason = " ".join(str(error).split()) or type(error).__name__
    return f"{what}: this data set cannot be fetched: {reason:.150}. Check name and network, or give data.path= a local folder."
