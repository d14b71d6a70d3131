"""Section a: local training against centralised training and against the software in use today.

Peers that work client by client cost the same for every client, so they are measured on a few clients of the workload.
"""

import statistics
import subprocess
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from experiments.benchmarks import whole_run, workloads
from experiments.benchmarks.peers import centralised, peft_trainer, pfl_research
from experiments.benchmarks.processes import call, require
from experiments.benchmarks.suite import Case, Column, Found, Section, Settings, SkippedError
from experiments.benchmarks.timing import Task, interleaved, margin, medians, ratio
from experiments.benchmarks.workloads import Workload

CLIENTS = {"embedded": (1, 5, 25, 100, 1000), "llama_4m": (25,), "llama_20m": (5, 25, 100)}
"""Clients of the rows by model."""

TOKENS = {1: 32, 4: 64, 16: 64}
"""Length of a sequence by the client's batch."""

STEP_TOKENS = {"embedded": 140_000, "llama_4m": 140_000, "llama_20m": 13_000}
"""Most tokens in one step of all clients: larger combinations get shorter sequences, or they would take minutes."""

ROW_TOKENS = {"embedded": 8_000, "llama_4m": 8_000, "llama_20m": 2_500}
"""Tokens that all clients train in about a second, which sets a row's steps, between one and eight."""

PEER_CLIENTS = 5
PEER_CASES = {("llama_4m", 25, 1), ("llama_4m", 25, 4)}
"""Cases that are also measured with other software."""


def cases(settings: Settings) -> list[Case]:
    """Returns model, clients, batch and length of every row."""
    if settings.quick:
        return [case(*each) for each in (("embedded", 5, 1), ("llama_4m", 25, 1), ("llama_20m", 25, 1))]
    return [case(model, clients, batch) for model, counts in CLIENTS.items() for batch in TOKENS for clients in counts]


def case(model: str, clients: int, batch: int) -> Case:
    """Returns a row with the length of its sequences, a power of two."""
    fitting = 1 << (STEP_TOKENS[model] // (clients * batch)).bit_length() - 1
    return {"model": model, "clients": clients, "batch": batch, "tokens": min(TOKENS[batch], fitting)}


def workload_of(case: Case, settings: Settings) -> Workload:
    """Returns the workload of a case."""
    step = case["clients"] * case["batch"] * case["tokens"]
    return Workload(steps=max(1, min(8, ROW_TOKENS[case["model"]] // step)), **case)


def measure(case: Case, settings: Settings) -> Found:
    """Measures one row: fedsim and centralised training in turns in this process, then the peers."""
    workload = workload_of(case, settings)
    on = workloads.subject(workload.model, workload.rank)
    clients = workload.all_clients(on.vocabulary)
    tasks: dict[str, Task] = {
        "cohort": lambda: workloads.train(on, clients, workload.training),
        "centralised": lambda: centralised.train(on, clients, workload.training),
        "one by one": lambda: workloads.train_one_by_one(on, clients[:PEER_CLIENTS], workload.training),
    }
    rates = interleaved(tasks, turns=settings.turns, seconds=settings.seconds)
    found: Found = {"steps": workload.steps, "turns": len(rates["cohort"])}
    found |= {"ratio_centralised": ratio(rates, "cohort", "centralised"), "margin": margin(rates, "cohort", "centralised")}
    found["ratio_alone"] = ratio(rates, "cohort", "one by one")
    found |= {name.replace(" ", "_"): value for name, value in medians(rates).items()}
    if (workload.model, workload.clients, workload.batch) in PEER_CASES:
        whole = whole_run.beside_centralised(
            partial(whole_run.rates_of, workload, rounds=2 if settings.quick else 6), tasks["centralised"], settings
        )
        found |= {"run": whole["run"], "ratio_run": whole["ratio"], "margin_run": whole["margin"]}
        found |= _measure_peers(workload, settings, whole["run"])
    return found


def _measure_peers(workload: Workload, settings: Settings, run: float) -> Found:
    """Returns the rates of the peers, the ratios of whole runs to them, and what could not be measured."""
    found: Found = {}
    missing = []
    for name, peer in PEERS.items():
        try:
            found[name] = statistics.median(peer(workload, settings))
            found[f"ratio_{name}"] = run / found[name]
        except (SkippedError, RuntimeError, subprocess.TimeoutExpired) as reason:
            missing.append(f"{name}: {reason}")
    return {**found, "missing": "; ".join(missing) or None}


def _trainer(workload: Workload, settings: Settings) -> list[float]:
    require("peft", "accelerate")
    model = peft_trainer.peft_model(workload.model, workload.rank)
    clients = workload.all_clients(int(model.config.vocab_size), PEER_CLIENTS)  # type: ignore[union-attr, arg-type]
    turns = 1 if settings.quick else 3
    return interleaved({"trainer": lambda: peft_trainer.train(model, clients, workload.training)}, turns=turns)["trainer"]


def _flower_ray(workload: Workload, settings: Settings) -> list[float]:
    require("peft", "accelerate", "ray")
    return _rounds("flower_ray", workload, settings, {"clients": workload.clients}, {})


def _pfl(workload: Workload, settings: Settings) -> list[float]:
    require("peft")
    pfl_research.install()
    return _rounds("pfl_research", workload, settings, {"threads": torch.get_num_threads()}, {"PYTHONPATH": str(pfl_research.FOLDER)})


def _rounds(peer: str, workload: Workload, settings: Settings, told: dict[str, Any], environment: dict[str, str]) -> list[float]:
    """Returns the rates of the rounds after the first, in which a peer loads its models."""
    told = {"workload": asdict(workload), "rounds": 2 if settings.quick else 3, **told}
    seconds = call(f"experiments.benchmarks.peers.{peer}", told, environment=environment)["seconds"]
    return [workload.num_tokens / each for each in seconds[1:]]


PEERS: dict[str, Callable[[Workload, Settings], list[float]]] = {"trainer": _trainer, "flower_ray": _flower_ray, "pfl": _pfl}
"""Functions that measure the tokens per second of other software, by the name of the column."""


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
    "Tokens per second of local training, LoRA-SB of rank 16 on all seven kinds of layers, float32, AdamW, random tokens of one length "
    "with the loss on all of them; the same base model, adapter, tokens and threads for all. *centralised*: one plain torch loop over "
    "the same batches. *one by one*: the same code with one client in each cohort. *fedsim run*: rounds after the first with "
    "everything on (Flower's messages, ledger, log, diagnosis, checkpoints). *Trainer*: peft and the Hugging Face Trainer, client after "
    "client (it also clips gradients, its default). *Flower, Ray*: Flower's simulation with FedAvg, one actor and one thread a core, the "
    "same peft and Trainer inside, rounds after the first. *pfl*: pfl-research 0.6, its SimulatedBackend in one process over the same "
    "peft model; it is installed without its own pins. x: of the cohort over centralised and over one by one, of the run over "
    "centralised, each the median of neighbouring turns with ± half its 95 % interval; of the run over each peer.",
    (
        Column("model", "model"),
        Column("clients", "clients", "{:,}"),
        Column("batch", "batch"),
        Column("tokens", "tokens"),
        Column("cohort", "cohort", "{:,.0f}"),
        Column("centralised", "centralised", "{:,.0f}"),
        Column("x", "ratio_centralised", "{:.2f}"),
        Column("±", "margin", "{:.2f}"),
        Column("one by one", "one_by_one", "{:,.0f}"),
        Column("x", "ratio_alone", "{:.2f}"),
        Column("fedsim run", "run", "{:,.0f}"),
        Column("x", "ratio_run", "{:.2f}"),
        Column("±", "margin_run", "{:.2f}"),
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
