"""Section n: parts of the model in one autograd step each, against the same model in transformers' own code."""

from experiments.benchmarks import workloads
from experiments.benchmarks.peers import as_written
from experiments.benchmarks.suite import Case, Column, Found, Section, Settings
from experiments.benchmarks.timing import interleaved, margin, medians, ratio
from experiments.benchmarks.workloads import Workload

CLIENTS = 25


def cases(settings: Settings) -> list[Case]:
    """Returns model, batch, tokens and steps of every row."""
    names, sizes = ("model", "batch", "tokens", "steps"), [("embedded", 1, 32, 4), ("embedded", 4, 64, 2), ("llama_4m", 1, 32, 4)]
    sizes += [] if settings.quick else [("llama_4m", 4, 64, 2), ("llama_20m", 1, 32, 2), ("llama_20m", 4, 64, 1)]
    return [dict(zip(names, row, strict=True)) for row in sizes]


def measure(case: Case, settings: Settings) -> Found:
    """Measures the training of one cohort with both, in turns."""
    workload = Workload(clients=CLIENTS, **case)
    with as_written():
        theirs = workloads.adapted(workloads.base_model(workload.model), workload.rank)
    on = workloads.subject(workload.model, workload.rank)
    clients = workload.all_clients(on.vocabulary)

    def written() -> float:
        with as_written():
            return workloads.train(theirs, clients, workload.training)

    tasks = {"fused": lambda: float(workloads.train(on, clients, workload.training)), "written": written}
    rates = interleaved(tasks, turns=settings.turns, seconds=settings.seconds)
    return medians(rates) | {"ratio": ratio(rates, "fused", "written"), "margin": margin(rates, "fused", "written")}


SECTION = Section(
    "n",
    "Fused parts",
    "Tokens per second of a cohort of 25 clients on the CPU, with rotation and gate of the model in one step of autograd each "
    "(`fedsim/core/fused.py`), and with the code of transformers; the results are the same bit for bit. ±: half the 95 % interval of x.",
    (
        Column("model", "model"),
        Column("batch", "batch"),
        Column("tokens", "tokens"),
        Column("fused", "fused", "{:,.0f}"),
        Column("as written", "written", "{:,.0f}"),
        Column("x", "ratio", "{:.2f}"),
        Column("±", "margin", "{:.2f}"),
    ),
    cases,
    measure,
)
