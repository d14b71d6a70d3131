"""Section c: what a round costs when clients do nothing, with everything else of a run: messages, ledger, diagnosis, log, checkpoints."""

import statistics
import tempfile
from collections.abc import Sequence
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

from experiments.benchmarks.processes import call
from experiments.benchmarks.suite import Case, Column, Found, Section, Settings
from fedsim.cli.compose import compose
from fedsim.core.adapters import factors
from fedsim.events import read_events
from fedsim.experiment import run
from fedsim.session import VALUES, ClientReply, Session, open_session
from fedsim.training.cohort import LocalResult

COHORT = 100
"""Clients in a message, so that the memory of ten thousand uploads is not needed at once."""

RAY_MOST = 100
"""Clients of the largest round through Ray: at tens of milliseconds a client more would only take longer."""


def cases(settings: Settings) -> list[Case]:
    """Returns engine, method and clients of every row."""
    counts = (10, 100) if settings.quick else (10, 100, 1000, 10_000)
    ours = [{"engine": "fedsim, in process", "method": "fed_sb", "clients": clients} for clients in counts]
    if not settings.quick:
        ours.append({"engine": "fedsim, in process", "method": "fedit", "clients": 1000})
    return [*ours, *({"engine": "Flower, Ray", "method": "FedAvg", "clients": clients} for clients in counts if clients <= RAY_MOST)]


def measure(case: Case, settings: Settings) -> Found:
    """Measures rounds after the first, in which there is set-up."""
    clients = case["clients"]
    if case["engine"] == "Flower, Ray":
        seconds = call("experiments.benchmarks.peers.flower_ray", {"clients": clients, "rounds": 3, "workload": None})["seconds"][1:]
    else:
        seconds = _rounds(case["method"], clients, 3 if clients > 1000 else 5)
    return {"round_ms": 1e3 * statistics.median(seconds), "client_ms": 1e3 * statistics.median(seconds) / clients}


def _rounds(method: str, clients: int, rounds: int) -> list[float]:
    """Returns the seconds from each round's event to the next one's: a whole round and the checkpoint before it."""
    config = compose(
        [
            *(f"method={method}", f"federation.clients={clients}", f"federation.rounds={rounds}", f"engine.cohort_size={COHORT}"),
            *("training.local_steps=1", "data.test_examples=1", "evaluation.max_new_tokens=1"),
        ]
        + (["adapter.init=orthogonal"] if method == "fed_sb" else [])
    )
    session = open_session(config)
    session.train = _Idle(session)  # type: ignore[method-assign]
    try:
        with tempfile.TemporaryDirectory() as folder:
            config.run_dir = str(Path(folder) / "run")
            run(config, quiet=True)
            events = list(read_events(Path(config.run_dir) / "events.jsonl"))
    finally:
        del session.train  # type: ignore[method-assign]
    ends = [datetime.fromisoformat(event["time"]).timestamp() for event in events if event["kind"] == "round"]
    return [after - before for before, after in pairwise(ends)]


class _Idle:
    """Local training that returns the factors as they came."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def __call__(self, clients: Sequence[int], round: int, *_: Any, **__: Any) -> list[ClientReply]:
        kinds = self._session.method.uploaded(round)
        flat = self._session.spec.pack(factors(self._session.model, kinds), kinds)
        return [ClientReply(LocalResult(client, flat, 1, 0.0, 1, 1), {VALUES: flat.clone()}, None) for client in clients]


SECTION = Section(
    "c",
    "Rounds in which clients do nothing",
    "Milliseconds of a whole round, and for each client, median of the rounds after the first. fedsim: the embedded model at rank 64 "
    "(458 kB up from each client), every client in every round, with messages, ledger, aggregation, diagnosis, log and "
    "checkpoint. Flower's "
    "simulation: one array of 28 kB, FedAvg, nothing else; an actor a core, started before.",
    (
        Column("engine", "engine"),
        Column("method", "method"),
        Column("clients", "clients", "{:,}"),
        Column("ms a round", "round_ms", "{:,.0f}"),
        Column("ms a client", "client_ms", "{:.2f}"),
    ),
    cases,
    measure,
)
