"""Section d: memory by number of clients, each in a process of its own, and the speed of averaging uploads."""

from typing import Any

import torch
from flwr.app import Message

from experiments.benchmarks import workloads
from experiments.benchmarks.processes import answer, asked, call
from experiments.benchmarks.runs import BRIEF, carried_out
from experiments.benchmarks.suite import Case, Column, Found, Section, Settings
from experiments.benchmarks.timing import interleaved, medians, ratio
from experiments.benchmarks.workloads import Workload
from fedsim.cli.compose import compose
from fedsim.config import MethodConfig
from fedsim.core.adapters import factors
from fedsim.core.collecting import Collector
from fedsim.experiment import in_process
from fedsim.flower.grid import WatchedGrid
from fedsim.memory import keep_freed_memory, resident_bytes

ROUNDS, EARLY, LATE = "rounds of a tenth of 1,000 clients", 4, 20
PER_CLIENT_COPIES = 4
"""float32 numbers per parameter of a client: R, its gradient and two moments of AdamW."""


def cases(settings: Settings) -> list[Case]:
    """Returns what is measured in every row."""
    counts = (1, 25, 100) if settings.quick else (1, 25, 100, 1000)
    sizes = (25, 250)
    return [
        *({"what": "a cohort in one process", "clients": clients} for clients in counts),
        {"what": ROUNDS, "clients": 100},
        *({"what": "averaging of uploads", "clients": clients} for clients in sizes),
    ]


def measure(case: Case, settings: Settings) -> Found:
    """Measures one row."""
    if case["what"] == "averaging of uploads":
        return _averaging(case["clients"], settings)
    return call("experiments.benchmarks.memory", {**case, "threads": torch.get_num_threads()})


def rounds_in_this_process(clients: int) -> dict[str, Any]:
    """Trains `clients` of 1,000 clients in each round, drawn anew, and returns the memory in MB in the rounds EARLY and LATE."""
    sizes = ("federation.clients=1000", f"federation.fraction={clients / 1000}", f"federation.rounds={LATE}")
    config = compose([*BRIEF, *sizes, "adapter.init=orthogonal", "training.local_steps=1", "training.batch_size=1"])
    resident: dict[str, int] = {}

    def record(reply: Message) -> None:
        resident[reply.metadata.group_id] = resident_bytes()

    carried_out(config, lambda config: in_process(config, quiet=True, watch=lambda grid: WatchedGrid(grid, record)))
    early, late = (resident[str(number)] / 1e6 for number in (EARLY, LATE))
    return {"early_mb": early, "late_mb": late, "ratio": late / early}


def train_in_this_process(clients: int) -> dict[str, Any]:
    """Trains the embedded model at rank 64 for two steps of one sequence, and returns the memory used, in MB."""
    keep_freed_memory()  # as a session does
    on = workloads.subject("embedded", 64)
    workload = Workload("embedded", clients, batch=1, tokens=64, steps=2, rank=64)
    data = workload.all_clients(on.vocabulary)
    loaded = resident_bytes() / 1e6
    workloads.train(on, data, workload.training)
    peak = resident_bytes(peak=True) / 1e6
    own = PER_CLIENT_COPIES * 4 * on.layout.num_parameters * clients / 1e6
    return {"loaded_mb": loaded, "peak_mb": peak, "own_mb": own, "besides_mb": peak - own}


def _averaging(clients: int, settings: Settings) -> Found:
    """Compares the server's streaming mean with copying the same uploads."""
    on = workloads.subject("embedded", 64)
    start = {name: tensor for kind in on.spec.kinds for name, tensor in factors(on.model, (kind,)).items()}
    uploads = list(torch.randn(clients, on.layout.num_parameters))
    spaces = [torch.zeros_like(upload) for upload in uploads]
    num_bytes = 4.0 * on.layout.num_parameters * clients

    def average() -> float:
        collector = Collector(
            on.spec, ("R",), start, on.spec.pack(start, ("R",)), MethodConfig(), keep_products=False, keep_clients=False, rule=None
        )
        for upload in uploads:
            collector.add(1.0, upload)
        collector.mean()
        return num_bytes

    def copy() -> float:
        for upload, space in zip(uploads, spaces, strict=True):
            space.copy_(upload)
        return num_bytes

    rates = interleaved({"average": average, "copy": copy}, turns=max(5, settings.turns))
    return {name: value / 1e9 for name, value in medians(rates).items()} | {"ratio": ratio(rates, "average", "copy")}


SECTION = Section(
    "d",
    "Memory and averaging",
    "Resident memory of one process in MB after loading and at its peak, the embedded model at rank 64, two steps of one sequence of 64 "
    "tokens for each client. *own*: four float32 copies of each client's R (R, gradient, two moments); *besides*: the peak without them. "
    "*round*: resident memory after that round of a run whose clients take one step of one sequence. GB/s: the server's streaming mean in "
    "float64 over uploads of 458 kB, beside a plain copy of the same bytes.",
    (
        Column("", "what"),
        Column("clients", "clients", "{:,}"),
        Column("loaded", "loaded_mb", "{:,.0f}"),
        Column("peak", "peak_mb", "{:,.0f}"),
        Column("own", "own_mb", "{:,.0f}"),
        Column("besides", "besides_mb", "{:,.0f}"),
        Column(f"round {EARLY}", "early_mb", "{:,.0f}"),
        Column(f"round {LATE}", "late_mb", "{:,.0f}"),
        Column("GB/s averaged", "average", "{:.1f}"),
        Column("GB/s copied", "copy", "{:.1f}"),
        Column("x", "ratio", "{:.2f}"),
    ),
    cases,
    measure,
)

if __name__ == "__main__":
    given = asked()
    torch.set_num_threads(given["threads"])
    measured = rounds_in_this_process if given["what"] == ROUNDS else train_in_this_process
    answer(measured(given["clients"]))
