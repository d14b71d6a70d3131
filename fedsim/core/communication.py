"""The communication ledger: the cost of every transfer, stored in columns.

A published "communication cost" often covers one direction and one kind of tensor. The ledger records every transfer with its purpose, so
bases, initial gradients and the other direction count as well as adapters.
"""

import zlib
from array import array
from base64 import b64decode, b64encode
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
from numpy.typing import NDArray


class Direction(Enum):
    """Which way a transfer goes, seen from the client."""

    uplink = "client to server"
    downlink = "server to client"


class Purpose(Enum):
    """What a transfer is for. Bases and initial gradients are set-up, everything else belongs to the rounds."""

    bases = "the common bases B and A"
    initial_gradient = "gradients from which the bases are made"
    adapter = "the trained factors of a round"
    fold = "what is added to the base weights"
    control = "control variates of SCAFFOLD"
    secure_aggregation = "keys, sealed shares and unmasking of secure aggregation"


SETUP = (Purpose.bases, Purpose.initial_gradient)


@dataclass(frozen=True)
class Transfer:
    """One payload between the server and a client.

    `parameters` counts numbers, `raw_bytes` is their size as float32, `payload_bytes` that of the arrays sent (less if compressed), and
    `serialized_bytes` that of their record as Flower serialises it. The rest of the message is not counted: configuration text, metrics
    and addresses, about 2.5 kB per request and 0.6 kB per reply for any model.
    """

    round: int
    client: int
    direction: Direction
    purpose: Purpose
    parameters: int
    raw_bytes: int
    payload_bytes: int
    serialized_bytes: int


DIRECTIONS = tuple(Direction)
PURPOSES = tuple(Purpose)
IS_SETUP = np.array([purpose in SETUP for purpose in PURPOSES])
COLUMNS = {"round": "q", "client": "q", "direction": "b", "purpose": "b", "parameters": "q"}
COLUMNS |= {"raw_bytes": "q", "payload_bytes": "q", "serialized_bytes": "q"}
BLOCK = 1 << 16
"""Rows per compressed text in a checkpoint."""

AMOUNTS = {"parameters": "parameters", "bytes": "serialized_bytes", "raw_bytes": "raw_bytes", "payload_bytes": "payload_bytes"}

Totals = dict[str, int]
"""{uplink,downlink,setup}_{parameters,bytes,raw_bytes,payload_bytes}."""


class CommunicationLedger:
    """All transfers of a run, one row each in the order of addition; a row takes 50 bytes of memory.

    In all totals `setup_*` are bases and initial gradients of both directions, and `uplink_*` and `downlink_*` the rest; the three
    add up to all traffic. `*_bytes` are as serialized, `*_payload_bytes` the arrays alone, `*_raw_bytes` their float32 size.
    """

    def __init__(self) -> None:
        self._columns = {name: array(code) for name, code in COLUMNS.items()}
        self._totals, self._counted = _zero_totals(), 0  # totals of the first `_counted` rows
        self._blocks: list[str] = []  # full blocks, encoded for `to_json`

    def __len__(self) -> int:
        return len(self._columns["round"])

    def add(self, transfer: Transfer) -> None:
        """Adds one transfer. Raises ValueError, and adds nothing, if a size is negative."""
        sizes = (transfer.parameters, transfer.raw_bytes, transfer.payload_bytes, transfer.serialized_bytes)
        if min(sizes) < 0:
            raise ValueError(f"Expected sizes of at least 0, got {transfer}.")
        direction, purpose = DIRECTIONS.index(transfer.direction), PURPOSES.index(transfer.purpose)
        for column, value in zip(self._columns.values(), (transfer.round, transfer.client, direction, purpose, *sizes), strict=True):
            column.append(value)

    def totals(self) -> Totals:
        """Returns {uplink,downlink,setup}_{parameters,bytes,raw_bytes,payload_bytes} over the whole run; reads new rows only."""
        start, self._counted = self._counted, len(self)
        if start < len(self):
            for kind, chosen in self._kinds(start).items():
                for suffix, column in AMOUNTS.items():
                    self._totals[f"{kind}_{suffix}"] += int(self._column(column, start)[chosen].sum())
        return dict(self._totals)

    def rows(self) -> Iterator[dict[str, int | str]]:
        """Yields one flat dictionary per transfer, enums by name: the rows of a CSV or JSONL export."""
        for values in zip(*self._columns.values(), strict=True):
            row: dict[str, int | str] = dict(zip(COLUMNS, values, strict=True))
            yield row | {"direction": DIRECTIONS[values[2]].name, "purpose": PURPOSES[values[3]].name}

    def add_rows(self, rows: Iterable[dict[str, Any]]) -> None:
        """Adds the transfers of rows as returned by `rows`; numbers may be text, as in `csv.DictReader`."""
        for row in rows:
            numbers = {name: int(row[name]) for name in COLUMNS if name not in ("direction", "purpose")}
            self.add(Transfer(direction=Direction[row["direction"]], purpose=Purpose[row["purpose"]], **numbers))

    def to_json(self) -> dict[str, Any]:
        """Returns plain values for a checkpoint, lossless and short; encodes only the rows added since the last full block."""
        full = len(self) // BLOCK
        self._blocks += [self._encoded(block * BLOCK, (block + 1) * BLOCK) for block in range(len(self._blocks), full)]
        last = [self._encoded(full * BLOCK, len(self))] if len(self) % BLOCK else []
        return {"blocks": self._blocks + last, "directions": [d.name for d in DIRECTIONS], "purposes": [p.name for p in PURPOSES]}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "CommunicationLedger":
        """Returns the ledger that `to_json` was called on. Enum codes are read by name, so members may have been added since."""
        blocks = [_decoded(block) for block in value["blocks"]]
        columns = dict(zip(COLUMNS, np.concatenate([np.zeros((len(COLUMNS), 0), dtype=np.int64), *blocks], axis=1), strict=True))
        for name, members, now in (("direction", value["directions"], DIRECTIONS), ("purpose", value["purposes"], PURPOSES)):
            code_now = np.array([[member.name for member in now].index(word) for word in members], dtype=np.int64)
            columns[name] = code_now[columns[name]]
        ledger = cls()
        for name, code in COLUMNS.items():
            ledger._columns[name] = array(code, columns[name].tolist())
        return ledger

    def _encoded(self, start: int, stop: int) -> str:
        """Returns rows as text: compressed differences of successive rows, since these are mostly alike."""
        rows = np.array([self._columns[name][start:stop] for name in COLUMNS], dtype="<i8")
        return b64encode(zlib.compress(np.diff(rows, prepend=0).astype("<i8").tobytes(), level=1)).decode()

    def _column(self, name: str, start: int) -> NDArray[np.int64]:
        return np.array(self._columns[name][start:], dtype=np.int64)

    def _kinds(self, start: int) -> dict[str, NDArray[np.bool_]]:
        """Returns masks that partition the rows from `start` on into uplink, downlink and setup."""
        setup = IS_SETUP[self._column("purpose", start)]
        upward = self._column("direction", start) == DIRECTIONS.index(Direction.uplink)
        return {"uplink": ~setup & upward, "downlink": ~setup & ~upward, "setup": setup}


def _zero_totals() -> Totals:
    return {f"{kind}_{suffix}": 0 for kind in ("uplink", "downlink", "setup") for suffix in AMOUNTS}


def _decoded(block: str) -> NDArray[np.int64]:
    """Returns [columns, rows] from the text of `CommunicationLedger._encoded`."""
    differences = np.frombuffer(zlib.decompress(b64decode(block)), dtype="<i8").reshape(len(COLUMNS), -1)
    return np.cumsum(differences, axis=1, dtype=np.int64)
