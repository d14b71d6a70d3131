"""Section a: local training against the floor (centralised) and against what people run today.

Peers that work client by client cost the same for every client, so they are measured on a few clients of the workload.
"""

import statistics
from dataclasses import asdict
from typing import Any

import torch

from experiments.benchmarks import workloads
from experiments.benchmarks.peers import centralised, peft_trainer, pfl_research
from experiments.benchmarks.processes import call
from experiments.benchmarks.suite import Case, Column, Found, Section, Settings
from experiments.benchmarks.timing import Rates, Task, interleaved, medians, ratio
from experiments.benchmarks.workloads import Workload

TOKENS = {1: 32, 4: 64, 16: 64}
"""Length of a sequence by the client's batch."""

MOST_TOKENS = {"embedded": 140_000, "llama_4m": 140_000, "llama_20m": 30_000}
"""Of one step of all clients: a larger combination is no case, it would take minutes."""

PEER_CLIENTS, ALONE_CLIENTS = 5, 25
PEERS = {("llama_4m", 25, 1), ("llama_4m", 25, 4), ("embedded", 25, 4)}
"""Cases that are measured beside other people's software as well."""


def cases(settings: Settings) -> list[Case]:
    """Returns model, clients and batch of every row."""
    if settings.quick:
        grid = [("embedded", 5, 1), ("llama_4m", 25, 1), ("llama_4m", 25, 4)]
    else:
        grid = [("embedded", clients, batch) for batch in TOKENS for clients in (1, 5, 25, 100, 1000)]
        grid += [("llama_4m", 25, batch) for batch in TOKENS]
        grid += [("llama_20m", clients, batch) for batch in TOKENS for clients in (5, 25, 100)]
    return [
        {"model": model, "clients": clients, "batch": batch, "tokens": TOKENS[batch]}
        for model, clients, batch in grid
        if clients * batch * TOKENS[batch] <= MOST_TOKENS[model]
    ]


def workload_of(case: Case, settings: Settings) -> Workload:
    """Returns the workload of a case: as many steps as take about a second, one at least."""
    tokens = {"llama_20m": 3000}.get(case["model"], 16_000) // (4 if settings.quick else 1)
    steps = max(1, min(8, tokens // (case["clients"] * case["batch"] * case["tokens"])))
    return Workload(steps=steps, **case)


def measure(case: Case, settings: Settings) -> Found:
    """Measures one row: our own ways in turns in this process, then the peers."""
    workload = workload_of(case, settings)
    on = workloads.subject(workload.model, workload.rank)
    clients = workload.all_clients(on.vocabulary)
    tasks: dict[str, Task] = {
        "cohort": lambda: workloads.train(on, clients, workload.training),
        "centralised": lambda: centralised.train(on, clients, workload.training),
        "one by one": lambda: workloads.train_one_by_one(on, clients[:ALONE_CLIENTS], workload.training),
    }
    rates = interleaved(tasks, turns=settings.turns, seconds=settings.seconds)
    found: Found = {"steps": workload.steps, "ratio_centralised": ratio(rates, "cohort", "centralised")}
    found["ratio_alone"] = ratio(rates, "cohort", "one by one")
    if (workload.model, workload.clients, workload.batch) in PEERS:
        rates |= _peers(workload, settings, found)
    middle = medians(rates)
    found |= {name.replace(" ", "_"): value for name, value in middle.items()}
    for name in ("trainer", "flower_ray", "pfl"):
        if name in middle:
            found[f"ratio_{name}"] = middle["cohort"] / middle[name]
    return found


def _peers(workload: Workload, settings: Settings, found: Found) -> Rates:
    """Returns the peers' rates; `found` is told what could not be measured and what the first round of Ray took."""
    model = peft_trainer.peft_model(workload.model, workload.rank)
    clients = workload.all_clients(int(model.config.vocab_size), PEER_CLIENTS)  # type: ignore[union-attr, arg-type]
    turns = 1 if settings.quick else 3
    rates = interleaved({"trainer": lambda: peft_trainer.train(model, clients, workload.training)}, turns=turns)
    given: dict[str, Any] = {"workload": asdict(workload)}
    rounds = 2 if settings.quick else 3
    try:
        seconds = call("experiments.benchmarks.peers.flower_ray", {**given, "clients": workload.clients, "rounds": rounds})["seconds"]
        rates["flower_ray"] = [workload.num_tokens / each for each in seconds[1:]]
        found["ray_first_round"] = seconds[0]
    except RuntimeError as error:
        found["missing"] = f"Flower with Ray: {error}"
    reason = pfl_research.install()
    if reason is None:
        told = {**given, "rounds": rounds, "threads": torch.get_num_threads()}
        try:
            seconds = call("experiments.benchmarks.peers.pfl_research", told, FIRST_PATH=str(pfl_research.FOLDER))["seconds"]
            rates["pfl"] = [workload.num_tokens / each for each in seconds[1:]]
        except RuntimeError as error:
            reason = str(error)
    if reason:
        found["missing"] = f"{found.get('missing', '')} pfl-research: {reason}".strip()
    return rates


def summary(rows: list[Found]) -> str:
    """States the two floors."""
    many = [row["ratio_centralised"] for row in rows if row["clients"] > 1]
    alone = [row["ratio_alone"] for row in rows if row["clients"] > 1]
    if not many:
        return ""
    return (
        f"Cohorts of several clients reach {min(many):.2f} to {max(many):.2f} of centralised training (median "
        f"{statistics.median(many):.2f}), "
        f"and {min(alone):.2f} to {max(alone):.2f} of the same clients one by one."
    )


SECTION = Section(
    "a",
    "Local training",
    "Tokens per second of local training, LoRA-SB of rank 16 on all seven kinds of layers, float32, AdamW, random tokens "
    "of one length with "
    "the loss on all of them; the same base model, adapter, tokens and threads for all. *centralised*: one plain torch "
    "loop over the same "
    "batches, the floor. *one by one*: the same code with one client in each cohort. *Trainer*: peft and the Hugging "
    "Face Trainer, client "
    "after client (it also clips gradients, its default). *Flower, Ray*: Flower's simulation with FedAvg, one actor and "
    "one thread a core, "
    "the same peft and Trainer inside, rounds after the first. *pfl*: pfl-research 0.6, its SimulatedBackend in one "
    "process over the same peft model; it is "
    "installed without its own pins. x is the cohort's rate over the other's, of the first two the median of neighbouring turns.",
    (
        Column("model", "model"),
        Column("clients", "clients", "{:,}"),
        Column("batch", "batch"),
        Column("tokens", "tokens"),
        Column("cohort", "cohort", "{:,.0f}"),
        Column("centralised", "centralised", "{:,.0f}"),
        Column("x", "ratio_centralised", "{:.2f}"),
        Column("one by one", "one_by_one", "{:,.0f}"),
        Column("x", "ratio_alone", "{:.2f}"),
        Column("Trainer", "trainer", "{:,.0f}"),
        Column("x", "ratio_trainer", "{:.1f}"),
        Column("Flower, Ray", "flower_ray", "{:,.0f}"),
        Column("x", "ratio_flower_ray", "{:.1f}"),
        Column("pfl", "pfl", "{:,.0f}"),
        Column("x", "ratio_pfl", "{:.1f}"),
        Column("missing", "missing"),
    ),
    cases,
    measure,
    summary,
)
