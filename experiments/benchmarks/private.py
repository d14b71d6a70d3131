"""Section b: DP-SGD against the same training without it, and against Opacus client by client."""

from experiments.benchmarks import workloads
from experiments.benchmarks.peers import opacus_client, peft_trainer
from experiments.benchmarks.suite import Case, Column, Found, Section, Settings
from experiments.benchmarks.timing import Task, interleaved, margin, medians, ratio
from experiments.benchmarks.training import PEER_CLIENTS, TOKENS, workload_of

NOISE = 1.0


def cases(settings: Settings) -> list[Case]:
    """Returns model, clients and expected batch of every row."""
    grid = [("llama_4m", 25, 1), ("llama_4m", 25, 4)]
    if not settings.quick:
        grid = [("embedded", 25, 1), ("embedded", 25, 4), ("embedded", 100, 4), *grid, ("llama_20m", 25, 4)]
    return [{"model": model, "clients": clients, "batch": batch, "tokens": TOKENS[batch]} for model, clients, batch in grid]


def measure(case: Case, settings: Settings) -> Found:
    """Measures one row in turns. Poisson batches differ in size, so tokens are counted as they pass."""
    workload = workload_of(case, settings)
    on = workloads.subject(workload.model, workload.rank)
    clients = workload.all_clients(on.vocabulary)
    model = peft_trainer.peft_model(workload.model, workload.rank)
    tasks: dict[str, Task] = {
        "plain": lambda: workloads.train(on, clients, workload.training),
        "private": lambda: workloads.train(on, clients, workload.training, NOISE),
        "opacus": lambda: opacus_client.train(model, clients[:PEER_CLIENTS], workload.training, NOISE),
    }
    rates = interleaved(tasks, turns=settings.turns, seconds=settings.seconds)
    return medians(rates) | {
        "cost": ratio(rates, "plain", "private"),
        "margin": margin(rates, "plain", "private"),
        "ratio_opacus": ratio(rates, "private", "opacus"),
    }


SECTION = Section(
    "b",
    "DP-SGD",
    "Tokens per second with and without example-level DP-SGD, as in section a; *cost* is the time per token with it over "
    "that without it, ± half the 95 % interval of its median. "
    "*Opacus*: a PrivacyEngine with Poisson sampling and hooks over the peft model, client after client.",
    (
        Column("model", "model"),
        Column("clients", "clients"),
        Column("batch", "batch"),
        Column("tokens", "tokens"),
        Column("without", "plain", "{:,.0f}"),
        Column("DP-SGD", "private", "{:,.0f}"),
        Column("cost", "cost", "{:.2f}"),
        Column("±", "margin", "{:.2f}"),
        Column("Opacus", "opacus", "{:,.0f}"),
        Column("x Opacus", "ratio_opacus", "{:.1f}"),
    ),
    cases,
    measure,
)
