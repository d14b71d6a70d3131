"""Section c: the cost of a round whose clients do nothing, with everything else of a run: messages, ledger, diagnosis, log, checkpoints."""

import statistics
from collections.abc import Sequence
from typing import Any

from flwr.clientapp import ClientApp

from clients.app import app
from experiments.benchmarks.processes import answer, asked, call, require
from experiments.benchmarks.runs import BRIEF, carried_out, round_seconds
from experiments.benchmarks.suite import Case, Column, Found, Section, Settings
from fedsim.cli.compose import compose
from fedsim.config import Config
from fedsim.core.adapters import factors
from fedsim.experiment import in_process
from fedsim.flower import worker
from fedsim.local_round import VALUES, ClientReply
from fedsim.session import Session
from fedsim.training.cohort import LocalResult

IN_PROCESS, RAY, PEER = "fedsim, in process", "fedsim, Ray", "Flower, Ray"

COHORT = 100
"""Clients per message, so that ten thousand uploads are not in memory at once."""

PEER_MOST = 1000
"""Most clients in a round of Flower's simulation: at tens of milliseconds per client, 10,000 would take ten minutes."""


def cases(settings: Settings) -> list[Case]:
    """Returns engine and clients of every row."""
    counts = (10, 100) if settings.quick else (10, 100, 1000, 10_000)
    rows = [(engine, clients) for engine in (IN_PROCESS, RAY) for clients in counts]
    rows += [(PEER, clients) for clients in counts if clients <= PEER_MOST]
    return [{"engine": engine, "clients": clients} for engine, clients in rows]


def measure(case: Case, settings: Settings) -> Found:
    """Measures the rounds after the first, which includes set-up, each row in a process of its own."""
    clients = case["clients"]
    rounds = _rounds(case["engine"], clients, settings)
    if case["engine"] != IN_PROCESS:
        require("ray")
    if case["engine"] == PEER:
        seconds = call("experiments.benchmarks.peers.flower_ray", {"clients": clients, "rounds": rounds, "workload": None})["seconds"][1:]
    else:
        seconds = call("experiments.benchmarks.rounds", {**case, "rounds": rounds})["seconds"]
    return {"round_ms": 1e3 * statistics.median(seconds), "client_ms": 1e3 * statistics.median(seconds) / clients}


def _rounds(engine: str, clients: int, settings: Settings) -> int:
    """Returns the number of rounds of a row, more if they are short."""
    if settings.quick or clients > 1000:
        return 3
    if clients <= 100:
        return 30
    return 2 if engine == PEER else 5


def idle_rounds(engine: str, clients: int, rounds: int) -> list[float]:
    """Returns the seconds of the rounds after the first of a run whose clients do nothing."""
    sizes = [f"federation.clients={clients}", f"federation.rounds={rounds}", f"engine.cohort_size={COHORT}"]
    config = compose([*sizes, "adapter.init=orthogonal", "training.local_steps=1", *BRIEF])
    _, log = carried_out(config, _on_ray if engine == RAY else _in_this_process)
    return round_seconds(log)


def _in_this_process(config: Config) -> dict[str, Any]:
    idle_app()
    return in_process(config, quiet=True)


def _on_ray(config: Config) -> dict[str, Any]:
    from fedsim.flower.ray_grid import RayGrid
    from fedsim.flower.server import serve

    with RayGrid(idle_app, config.engine) as grid:
        return serve(grid, config, grid.contexts, quiet=True)


def idle_app() -> ClientApp:
    """Returns the ClientApp of fedsim, and disables training in this process."""
    worker.train_clients = _train_nothing
    return app


def _train_nothing(session: Session, clients: Sequence[int], round: int, *_: Any, **__: Any) -> list[ClientReply]:
    """Returns the factors unchanged."""
    kinds = session.method.uploaded(round)
    flat = session.spec.pack(factors(session.model, kinds), kinds)
    return [ClientReply(LocalResult(client, flat, 1, 0.0, 1, 1), {VALUES: flat}, None) for client in clients]


def summary(rows: list[Found]) -> str:
    """States the fixed cost of a round and the cost of each client."""
    own = {row["clients"]: row["round_ms"] for row in rows if row["engine"] == IN_PROCESS}
    few, many = min(own, default=0), max(own, default=0)
    if few == many:
        return ""
    each = (own[many] - own[few]) / (many - few)
    return f"In process a round costs {own[few] - few * each:.0f} ms, and {each:.2f} ms more for each client."


SECTION = Section(
    "c",
    "Rounds in which clients do nothing",
    "Milliseconds of a whole round, and for each client, median of the rounds after the first. fedsim: Fed-SB on the embedded model at "
    "rank 64 (458 kB up from each client), every client in every round, with messages, ledger, aggregation, diagnosis, log and checkpoints "
    "(at most forty a second), 100 clients in a message; with Ray an actor a core. Flower's simulation: one array of the same size, "
    "FedAvg, nothing else; an actor a core, started before, not measured beyond 1,000 clients.",
    (
        Column("engine", "engine"),
        Column("clients", "clients", "{:,}"),
        Column("ms a round", "round_ms", "{:,.0f}"),
        Column("ms a client", "client_ms", "{:.2f}"),
    ),
    cases,
    measure,
    summary,
)

if __name__ == "__main__":
    from experiments.benchmarks import rounds  # the module that Ray's actors import, not this copy of it named __main__

    answer({"seconds": rounds.idle_rounds(**asked())})
