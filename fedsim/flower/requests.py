"""Parses requests to a worker without trusting them: a request is complete and valid, or it is refused before any work starts.

Raises ValueError, or UserError if the configuration is at fault, and nothing else, whatever the message holds.
"""

import json
from dataclasses import dataclass
from functools import lru_cache
from math import isfinite
from typing import Any, TypeVar

from flwr.app import ConfigRecord, RecordDict

from fedsim.config import Config
from fedsim.config_check import check
from fedsim.flower.records import numbers, whole_number, whole_numbers
from fedsim.plain import from_text

REQUEST, METRICS = "request", "metrics"
"""Names of the record in every request, and of the one in a reply with counts and measurements."""
LIMIT = 2**31
Value = TypeVar("Value")
SETUP = "setup"
"""Key in a request for a sum outside a round's training, to which simulated drop-out does not apply."""


@dataclass(frozen=True)
class Request:
    """A request to train, to give initial gradients, or to evaluate, for some clients in a round."""

    record: ConfigRecord
    config: Config
    clients: list[int]
    round: int
    digests: dict[str, str]  # of the needed parts of the global state
    accepted: dict[int, int]  # by client: the last round that used its upload
    samples: list[int]
    noise: list[float]
    rates: list[float]  # sampling rates, if the sum of gradients is noised
    clip_norm: float | None
    tasks: list[str]  # to evaluate
    setup: bool  # outside a round's training, so without simulated drop-out
    # with secure aggregation, in a request for uploads:
    largest: int | None  # most examples of any client in the sum
    contributors: int | None  # clients in the sum
    gradient_range: float | None
    noise_multiplier: float | None  # of the noise in the sum, added by the clients with client-level privacy; never 0

    @classmethod
    def of(cls, content: RecordDict) -> "Request":
        """Returns the request in a message. Raises ValueError or UserError for anything else."""
        record = content.config_records.get(REQUEST)
        if record is None:
            raise ValueError(f"Expected a record {REQUEST!r}, got {sorted(content)[:5]!s:.100}.")
        config = _configuration(text(record, "config"))
        clients = _clients(record, config)
        accepted = _for_each(clients, whole_numbers(record, "accepted") if "accepted" in record else [0] * len(clients))
        samples = _for_each(clients, whole_numbers(record, "samples") if "samples" in record else [0] * len(clients))
        noise = _for_each(clients, numbers(record, "noise")) if "noise" in record else {}
        rates = _for_each(clients, numbers(record, "rates") if "rates" in record else [0.0] * len(clients))
        number = whole_number(record, "round")
        if not all(0 <= count < LIMIT for count in (number, *accepted.values(), *samples.values())):
            raise ValueError(f"Expected rounds and numbers of samples from 0 to {LIMIT - 1}, got {number} and others.")
        largest = _count(record, "largest", 1, config.federation.max_examples)
        contributors = _count(record, "contributors", 2, config.federation.clients)
        if not all(isfinite(each) and each >= 0 for each in noise.values()) or not all(0 <= each <= 1 for each in rates.values()):
            raise ValueError("Expected noise multipliers of at least 0 and sampling rates from 0 to 1.")
        return cls(
            record=record,
            config=config,
            clients=clients,
            round=number,
            digests=texts(record, "digests") if "digests" in record else {},
            accepted=accepted,
            samples=[*samples.values()],
            noise=[*noise.values()],
            rates=[*rates.values()],
            clip_norm=_optional_number(record, "clip_norm"),
            tasks=words(record, "tasks") if "tasks" in record else [],
            setup=SETUP in record,
            largest=largest,
            contributors=contributors,
            gradient_range=_optional_number(record, "gradient_range"),
            noise_multiplier=_optional_number(record, "noise_multiplier"),
        )


@lru_cache(maxsize=1)
def _configuration(text: str) -> Config:
    """Returns the checked configuration, which must not be modified; all messages of a run hold the same one."""
    config = from_text(text)
    check(config)
    return config


def _clients(record: ConfigRecord, config: Config) -> list[int]:
    clients, number = whole_numbers(record, "clients"), config.federation.clients
    if not clients or len(set(clients)) != len(clients) or not all(0 <= client < number for client in clients):
        raise ValueError(f"Expected different clients from 0 to {number - 1}, got {clients[:5]}.")
    return clients


def _for_each(clients: list[int], values: list[Any]) -> dict[int, Any]:
    if len(values) != len(clients):
        raise ValueError(f"Expected a value for each of {len(clients)} clients, got {len(values)}.")
    return dict(zip(clients, values, strict=True))


def _optional_number(record: ConfigRecord, key: str) -> float | None:
    return number_above_zero(record, key) if key in record else None


def _count(record: ConfigRecord, key: str, least: int, most: int) -> int | None:
    if key not in record:
        return None
    if not least <= (value := whole_number(record, key)) <= most:
        raise ValueError(f"Expected {key!r} to be from {least} to {most}, got {value}.")
    return value


def needed(value: Value | None, key: str) -> Value:
    """Returns the value that a request gave under `key`. Raises ValueError if it gave none."""
    if value is None:
        raise ValueError(f"Expected {key!r} in the request, got none.")
    return value


def text(record: ConfigRecord, key: str) -> str:
    """Returns the text under `key`. Raises ValueError for anything else."""
    value = record.get(key)
    if not isinstance(value, str):
        raise ValueError(f"Expected {key!r} to be a text, got {value!r:.60}.")
    return value


def words(record: ConfigRecord, key: str) -> list[str]:
    """Returns the list of texts under `key`. Raises ValueError for anything else."""
    value = record.get(key)
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise ValueError(f"Expected {key!r} to be a list of texts, got {value!r:.60}.")
    return list(value)  # type: ignore[arg-type]


def number_above_zero(record: ConfigRecord, key: str) -> float:
    """Returns the finite number above 0 under `key`. Raises ValueError for anything else."""
    value = record.get(key)
    if not is_above_zero(value):
        raise ValueError(f"Expected {key!r} to be a number above 0, got {value!r:.60}.")
    return float(value)  # type: ignore[arg-type]


def is_above_zero(value: object) -> bool:
    """Returns whether the value is a finite number above 0."""
    return type(value) in (int, float) and 0 < value < float("inf")  # type: ignore[operator]


def texts(record: ConfigRecord, key: str) -> dict[str, str]:
    """Returns the JSON object of texts under `key`. Raises ValueError for anything else."""
    value = json_object(record, key)
    if not all(isinstance(each, str) for each in value.values()):
        raise ValueError(f"Expected {key!r} to be texts by name, got {value!r:.60}.")
    return value


def shapes(record: ConfigRecord, key: str) -> dict[str, tuple[int, ...]]:
    """Returns the JSON object of shapes under `key`. Raises ValueError for anything else."""
    value = json_object(record, key)
    if not all(isinstance(each, list) and all(type(side) is int and side > 0 for side in each) for each in value.values()):
        raise ValueError(f"Expected {key!r} to be shapes by name, got {value!r:.60}.")
    return {name: tuple(each) for name, each in value.items()}


def json_object(record: ConfigRecord, key: str) -> dict[str, Any]:
    """Returns the JSON object under `key`. Raises ValueError for anything else."""
    try:
        value = json.loads(text(record, key))
    except RecursionError:
        raise ValueError(f"Expected {key!r} to be a flat JSON object, got a deep one.") from None
    if not isinstance(value, dict):
        raise ValueError(f"Expected {key!r} to be a JSON object, got {value!r:.60}.")
    return value
