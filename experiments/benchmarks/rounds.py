"""What a round costs besides training, and whether memory grows: `python experiments/benchmarks/rounds.py [--clients 1000] [--rounds 20]`.

A real run's messages, ledger, aggregation and diagnosis over the in-process Grid, a tenth of the clients in each round, the embedded model
at its default rank. Training itself is measured inside and taken off. Prints one line per method and writes JSON where --out says.
"""

import argparse
import json
import platform
import resource
import statistics
import time
from pathlib import Path
from typing import Any

import psutil
import torch

from clients.app import app
from fedsim import session as session_module
from fedsim.cli.compose import compose
from fedsim.core.communication import CommunicationLedger
from fedsim.flower.grid import InProcessGrid
from fedsim.flower.strategy import FedsimStrategy
from fedsim.session import open_session


def measure(method: str, clients: int, rounds: int, fraction: float) -> dict[str, Any]:
    """Returns overhead in ms per client and round, and resident memory after the third and the last round, in MB."""
    config = compose(
        [
            *(f"method={method}", f"federation.clients={clients}", f"federation.rounds={rounds}", f"federation.fraction={fraction}"),
            *("training.local_steps=1", "training.batch_size=1", f"data.train_examples={max(4 * clients, 1000)}"),
        ]
        + (["adapter.init=orthogonal"] if method == "fed_sb" else [])
    )
    session, ledger = open_session(config), CommunicationLedger()
    trained = _timed(session_module)
    state = session.initial_state(session.derived_factors(1))
    strategy, grid, process = FedsimStrategy(session, config, ledger, state), InProcessGrid(app), psutil.Process()
    for client in range(clients):
        session.client_data(client)  # tokens are made once, before the first round
    overheads, memory = [], []
    for number in range(1, rounds + 1):
        before, begun = trained["seconds"], time.perf_counter()
        session.install_state(state)
        strategy.exchange(number, grid)
        whole = time.perf_counter() - begun
        overheads.append((whole - (trained["seconds"] - before)) / len(strategy.participants(number)))
        memory.append(process.memory_info().rss / 1e6)
    return {
        "method": method,
        "clients": clients,
        "per_round": len(strategy.participants(1)),
        "overhead_ms_per_client": 1e3 * statistics.median(overheads),
        "memory_mb_third_round": memory[min(2, rounds - 1)],
        "memory_mb_last_round": memory[-1],
        "memory_mb_peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
    }


def _timed(module: Any) -> dict[str, float]:
    """Adds the time spent in local training to the returned total."""
    total, original = {"seconds": 0.0}, getattr(module.train_cohort, "original", module.train_cohort)

    def timed(*arguments: Any, **options: Any) -> Any:
        begun = time.perf_counter()
        try:
            return original(*arguments, **options)
        finally:
            total["seconds"] += time.perf_counter() - begun

    timed.original = original  # type: ignore[attr-defined]
    module.train_cohort = timed
    return total


def main() -> None:
    """Measures the methods named, one after another."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--fraction", type=float, default=0.1)
    parser.add_argument("--methods", default="fed_sb,fedit")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    results = [measure(method, options.clients, options.rounds, options.fraction) for method in options.methods.split(",")]
    for result in results:
        print(
            f"{result['method']:<12} {result['clients']} clients, {result['per_round']} a round: "
            f"{result['overhead_ms_per_client']:.2f} ms a client and round besides training; "
            f"resident {result['memory_mb_third_round']:.0f} MB after round 3, {result['memory_mb_last_round']:.0f} MB after the last"
        )
    if options.out:
        facts = {"machine": platform.machine(), "cores": torch.get_num_threads(), "torch": torch.__version__, "results": results}
        options.out.write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()
