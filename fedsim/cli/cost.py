"""`fedsim cost`: what methods would send, for any model and number of clients, without weights or training.

Data is read only for the labels of a user's own set. A comma list of any option makes rows, as in a sweep. The numbers equal those of a
run's ledger (`fedsim.core.cost`).
"""

import csv
import io
import json
import math
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from fedsim.choices import PrivacyUnit, Residual
from fedsim.cli.calling import width
from fedsim.cli.compose import compose_with_hydra, initialized, to_config
from fedsim.cli.groups import default_choices
from fedsim.cli.overrides import parse
from fedsim.cli.sweep import Job, plan
from fedsim.config import Config, DataConfig
from fedsim.config_check import check
from fedsim.core.cost import Forecast, forecast
from fedsim.core.forms import AdapterSpec
from fedsim.core.methods import METHODS, Method
from fedsim.data import labels, load
from fedsim.effective import effective, method_of
from fedsim.errors import UserError
from fedsim.plain import from_dict, to_dict
from fedsim.progress import plural, size
from fedsim.published import SOURCE, Published, published
from fedsim.report import table
from fedsim.shapes import adapter_of


@dataclass(frozen=True)
class Row:
    """One line of the table: the options that distinguish it, the given configuration, and its cost."""

    varied: dict[str, str]
    config: Config
    method: Method
    spec: AdapterSpec
    found: Forecast
    published: Published | None

    @property
    def num_bytes(self) -> int:
        """Payload over all clients and rounds, both directions and set-up."""
        return sum(number for name, number in self.found.totals.items() if name.endswith("payload_bytes"))


@dataclass(frozen=True)
class LeftOut:
    """An invalid combination, of a method that the user did not ask for."""

    varied: dict[str, str]
    method: str
    reason: str


@dataclass(frozen=True)
class Costs:
    """All rows, and the combinations left out."""

    rows: list[Row]
    left_out: list[LeftOut]


def costs(overrides: list[str]) -> Costs:
    """Returns a row for each combination of the comma lists; without a chosen method, for all methods that communicate.

    Raises UserError for overrides that do not compose, and if a requested row, or every row, is invalid or its model has no known shapes.
    """
    found = Costs([], [])
    with initialized():
        jobs, asked = _jobs(overrides)
        for job in jobs:
            config = to_config(compose_with_hydra(job.overrides))
            try:
                check(config)
                found.rows.append(_row(job, config))
            except UserError as error:
                if asked:
                    raise UserError(f"{' '.join(job.varied)}: {error}" if len(jobs) > 1 else str(error)) from None
                found.left_out.append(LeftOut(_varied(job), config.method.name, str(error)))
    if not found.rows:
        raise UserError(found.left_out[0].reason)
    return found


def _jobs(overrides: list[str]) -> tuple[list[Job], bool]:
    """Returns the combinations, and whether the user or a preset chose their methods."""
    if any(override.key_or_group in ("method", "method.name") for override in parse(overrides)):
        return plan(overrides)[1], True
    every = ",".join(name for name, method in METHODS.items() if not method.pooled)
    master, jobs, _ = plan([f"method={every}", *overrides])
    if master.method.name != default_choices()["method"] or "method" in (master.hydra.sweeper.params or {}):
        return plan(overrides)[1], True
    return jobs, False


def _varied(job: Job) -> dict[str, str]:
    return {key.lstrip("+~"): value for key, _, value in (word.partition("=") for word in job.varied)}


def _row(job: Job, given: Config) -> Row:
    config, method = effective(given), method_of(given)
    spec = adapter_of(config, method, *_classes(json.dumps(to_dict(config.data)), config.seed))
    return Row(_varied(job), given, method, spec, forecast(config, method, spec), _published(given, spec))


@lru_cache
def _classes(data: str, seed: int) -> tuple[tuple[str, ...], int]:
    """Returns the labels of classification data and the number of texts per row, which it reads from a user's own set."""
    config = from_dict(DataConfig, json.loads(data))
    known = labels(config)
    if known is not None:
        return known, 2
    found = load(config, seed)
    return found.labels, found.texts


def _published(config: Config, spec: AdapterSpec) -> Published | None:
    """Returns the published figures, if any: in those runs all clients took part, with equal ranks and stacked factors."""
    federation, options = config.federation, config.method
    if federation.fraction < 1 or federation.ranks or options.residual is not Residual.stacked or options.residual_rank is not None:
        return None
    return published(options.name, spec.rank, federation.clients, spec.layers.values())


# ---- machine-readable rows


def plain_rows(found: Costs) -> list[dict[str, Any]]:
    """Returns flat rows of plain values, all with the same keys. Counts are of parameters or bytes; means may be fractional."""
    return [_plain(row) for row in found.rows]


def _plain(row: Row) -> dict[str, Any]:
    cost = row.found
    return {
        "method": row.config.method.name,
        "model": row.config.model.name,
        "clients": row.config.federation.clients,
        "rounds": row.config.federation.rounds,
        **{key: value for key, value in row.varied.items() if key not in ("method", "model")},
        "rank": row.spec.rank if row.method.form.low_rank else None,
        "layers": len(row.spec.layers),
        "trained_parameters": _number(cost.trained),
        "round_up_parameters": _number(cost.up.parameters),
        "round_up_payload_bytes": _number(cost.up.payload_bytes),
        "round_down_parameters": _number(cost.down.parameters),
        "round_down_payload_bytes": _number(cost.down.payload_bytes),
        "client_bases_parameters": _number(cost.bases),
        "client_gradient_parameters": cost.gradient,
        "clients_with_gradient": cost.clients_with_gradient,
        **{f"total_{name}": number for name, number in cost.totals.items()},
        "published_parameters": _number(row.published.parameters) if row.published else None,
        "published_direction": ("down" if row.published.down else "up") if row.published else None,
        "published_differs": (row.published.differs or None) if row.published else None,
    }


def _number(value: float) -> float | int:
    """Returns a mean as an integer if it is whole."""
    return round(value) if abs(value - round(value)) < 1e-6 else value


def csv_text(rows: list[dict[str, Any]]) -> str:
    """Returns the rows as CSV with a header, without a trailing newline."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().rstrip("\n")


# ---- the table


def cost_table(found: Costs) -> str:
    """Returns the title, table and notes as text."""
    rows = found.rows
    swept = [key for key in rows[0].varied if key not in ("method", "adapter.rank")]
    columns: dict[str, Callable[[Row], str]] = {
        "method": lambda row: row.config.method.name,
        **{key: (lambda row, key=key: row.varied[key]) for key in swept},  # type: ignore[misc]
        "rank": lambda row: str(row.spec.rank) if row.method.form.low_rank else "-",
        "layers": lambda row: str(len(row.spec.layers)),
        "trained": lambda row: amount(row.found.trained),
        "up": lambda row: amount(row.found.up.parameters),
        "down": lambda row: amount(row.found.down.parameters),
        "bases": lambda row: amount(row.found.bases),
        "gradient": lambda row: amount(row.found.gradient),
        "all up": lambda row: amount(row.found.totals["uplink_parameters"]),
        "all down": lambda row: amount(row.found.totals["downlink_parameters"]),
        "all set-up": lambda row: amount(row.found.totals["setup_parameters"]),
        "all bytes": lambda row: size(row.num_bytes) if row.num_bytes else "0",
    }
    if any(row.published for row in rows):
        columns["published"] = lambda row: _published_cell(row.published)
    notes = [textwrap.fill(note, width(), subsequent_indent="  ") for note in _notes(found)]
    body = table(list(columns), [[cell(row) for cell in columns.values()] for row in rows])
    return "\n".join([_title(rows), "", body, "", *notes])


def amount(number: float) -> str:
    """Returns a number of parameters as text, in millions while that is readable: "467 k", "8.96 M", "2,097 M", "14.0 G"."""
    if number < 1000:
        return f"{number:.0f}"
    unit, letter = next((unit, letter) for below, unit, letter in _UNITS if number < below)
    value = number / unit
    return f"{value:,.{0 if value >= 100 else 1 if value >= 10 else 2}f} {letter}"


_UNITS = ((1e6, 1e3, "k"), (1e10, 1e6, "M"), (1e13, 1e9, "G"), (math.inf, 1e12, "T"))


def _published_cell(found: Published | None) -> str:
    return "" if found is None else f"{amount(found.parameters)}{'*' if found.differs else ''}"


def _title(rows: list[Row]) -> str:
    """Returns the facts that all rows share."""
    facts = [
        {row.config.model.name for row in rows},
        {plural(row.config.federation.clients, "client") for row in rows},
        {_participation(row.config.federation.fraction) for row in rows},
        {plural(row.config.federation.rounds, "round") for row in rows},
    ]
    return ", ".join(next(iter(each)) for each in facts if len(each) == 1)


def _participation(fraction: float) -> str:
    return "all in every round" if fraction == 1 else f"{100 * fraction:g} % of them in a round"


def _notes(found: Costs) -> Iterator[str]:
    """Yields the notes that explain the table, each once."""
    rows = found.rows
    yield (
        "trained, up, down: parameters of one client that takes part in every round, in a middle round. bases, gradient: of one client "
        "over the whole run. all: over all clients and rounds. Bytes are those of the arrays; Flower's framing adds about 500 a transfer."
    )
    turns = _names(row for row in rows if len(row.method.turns) > 1)
    if turns:
        yield f"{turns}: factors take turns, so a round is the mean of a turn of each."
    folds = _names(row for row in rows if row.method.folds)
    if folds:
        yield f"{folds}: the result of the last round is not sent, so what is added to the weights goes down in one round less."
    yield from _gradient_clients(rows)
    if any(row.config.federation.ranks for row in rows):
        yield "Clients of different rank: numbers of one client are means over all clients."
    if any(row.config.compression.name != "none" for row in rows):
        yield "Compression makes uploads smaller in bytes, not in number."
    if any(row.config.privacy.unit is not PrivacyUnit.none for row in rows):
        yield "Clients that stop early because their privacy budget is spent are not modelled."
    yield from _dense(rows)
    yield from _differences(rows)
    yield from left_out_notes(found)


def left_out_notes(found: Costs) -> Iterator[str]:
    """Yields why methods have no row, and how many other combinations are left out."""
    present = {row.config.method.name for row in found.rows}
    by_reason: dict[str, list[str]] = {}
    listed: set[str] = set()
    for each in found.left_out:
        if each.method not in present | listed:
            listed.add(each.method)
            reason = re.sub(rf"\b(method=)?{each.method}\b", "the method", each.reason)
            by_reason.setdefault(reason, []).append(each.method)
    for reason, methods in by_reason.items():
        yield f"left out: {', '.join(methods)}. {reason}"
    more = [each for each in found.left_out if each.method in present]
    if more:
        yield f"left out: {len(more)} more combinations, first {_label(more[0].method, more[0].varied)}. {more[0].reason}"


def _names(rows: Iterable[Row]) -> str:
    return ", ".join(dict.fromkeys(row.config.method.name for row in rows))


def _gradient_clients(rows: list[Row]) -> Iterator[str]:
    for some, every in dict.fromkeys((row.found.clients_with_gradient, row.config.federation.clients) for row in rows):
        if 0 < some < every:
            yield f"Initial gradients come from {some} of {every} clients (adapter.init_samples)."


def _dense(rows: list[Row]) -> Iterator[str]:
    """Yields a note on rows whose stacked factors are larger than their dense product."""
    listed = []
    for row in rows:
        config = effective(row.config)
        if row.method.folds and config.method.residual is Residual.stacked and config.method.residual_rank is None:
            dense = forecast(replace(config, method=replace(config.method, residual=Residual.dense)), row.method, row.spec).down.parameters
            if dense < row.found.down.parameters:
                listed.append(
                    f"{_label(row.config.method.name, row.varied)} {amount(dense)} instead of {amount(row.found.down.parameters)}"
                )
    if listed:
        yield f"method.residual=dense would send less down: {'; '.join(listed)}."


def _label(method: str, varied: dict[str, str]) -> str:
    """Returns a row's label: its method and the options that vary."""
    return " ".join([method, *(f"{key}={value}" for key, value in varied.items() if key != "method")])


def _differences(rows: list[Row]) -> Iterator[str]:
    listed = [row for row in rows if row.published]
    if listed:
        bases = max(row.found.bases for row in listed)
        yield (
            f"published: {SOURCE}; what a client sends in a round, for fedex_lora and flora what it receives. It leaves out the other "
            f"direction, the bases{f' (up to {amount(bases)} for each client)' if bases else ''} and the initial gradients."
        )
    for found in dict.fromkeys(row.published for row in listed):
        if found is not None and found.differs:
            yield f"* {found.method}: published is {found.differs}."
