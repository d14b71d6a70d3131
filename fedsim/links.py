"""The clients' network links: drawn around published medians, or read from a file.

A file has one row per kind of client, in YAML (a list of mappings) or CSV with a header: uplink and downlink in bit/s, one-way latency in
seconds, speed in tokens/s, and dropout, a probability. Client k has row k; with fewer rows than clients, rows are reused in turn.
"""

import csv
from math import inf
from pathlib import Path
from typing import Any

import yaml

from fedsim.config import Config
from fedsim.core.network import NO_NETWORK, POPULATIONS, Link, draw_links
from fedsim.errors import UserError, nearest

COLUMNS = ("uplink", "downlink", "latency", "dropout", "speed")
OPTIONAL = {"dropout": 0.0, "latency": 0.0, "speed": inf}


def links_of(config: Config, num_parameters: int) -> list[Link] | None:
    """Returns each client's link, or None if no network is simulated. Raises UserError for an unknown name or a bad file."""
    name, clients = config.federation.network, config.federation.clients
    if name == NO_NETWORK:
        return None
    if name in POPULATIONS:
        return draw_links(POPULATIONS[name], clients, num_parameters, config.seed)
    rows = _read(name)
    return [rows[client % len(rows)] for client in range(clients)]


def check(config: Config) -> None:
    """Raises UserError if the network is neither a known name nor a valid file."""
    links_of(config, 1)


def _read(name: str) -> list[Link]:
    path = Path(name)
    if not path.is_file():
        known = [NO_NETWORK, *POPULATIONS]
        raise UserError(f"federation.network: expected one of {', '.join(known)} or a file, got {name!r}.{nearest(name, known)}")
    try:
        text = path.read_text()
        rows: Any = list(csv.DictReader(text.splitlines())) if path.suffix.lower() == ".csv" else yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"federation.network: expected a YAML or CSV file in {name}, but: {str(error).splitlines()[0]}.") from None
    if not isinstance(rows, list) or not rows:
        raise UserError(f"federation.network: expected a list of clients with {', '.join(COLUMNS)} in {name}, got {rows!s:.40}.")
    return [_link(row, f"{name}, client {number}") for number, row in enumerate(rows)]


def _link(row: Any, where: str) -> Link:
    if not isinstance(row, dict) or not {"uplink", "downlink"} <= set(row) <= set(COLUMNS):
        raise UserError(f"federation.network: {where}: expected {', '.join(COLUMNS)}, got {row!s:.60}.")
    try:
        values = {column: float(row[column] if column in row else OPTIONAL[column]) for column in COLUMNS}
    except (TypeError, ValueError):
        raise UserError(f"federation.network: {where}: expected numbers, got {row!s:.80}.") from None
    if not (
        all(values[name] > 0 for name in ("uplink", "downlink", "speed")) and 0 <= values["latency"] < inf and 0 <= values["dropout"] < 1
    ):
        raise UserError(
            f"federation.network: {where}: expected bandwidths and speed above 0, latency of 0 or more, dropout below 1, got {row}."
        )
    return Link(**values)
