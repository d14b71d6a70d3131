"""Section w: a whole run with everything switched on (messages, ledger, log, diagnosis, checkpoints) against centralised training.

The default experiment on the embedded data. Centralised training sees the same clients' batches in the same process.
"""

import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

from experiments.benchmarks.peers import centralised
from experiments.benchmarks.runs import BRIEF, round_rates
from experiments.benchmarks.suite import Case, Column, Found, Section, Settings
from experiments.benchmarks.timing import Task, in_turns, margin, medians, rate, ratio
from experiments.benchmarks.workloads import Subject, Workload, save_base_model
from fedsim.cli.compose import compose
from fedsim.core.initialization import from_seed
from fedsim.session import open_session


def cases(settings: Settings) -> list[Case]:
    """Returns clients, batch and privacy of every row."""
    grid = [(25, 4, "none")] if settings.quick else [(25, 4, "none"), (25, 4, "example"), (100, 1, "none"), (1000, 1, "none")]
    return [{"clients": clients, "batch": batch, "privacy": privacy} for clients, batch, privacy in grid]


def measure(case: Case, settings: Settings) -> Found:
    """Measures in turns the rounds of a whole run and the centralised loop."""
    steps = 1 if case["clients"] > 100 else 2 if settings.quick else 4
    overrides = [f"federation.clients={case['clients']}", f"training.batch_size={case['batch']}", f"training.local_steps={steps}"]
    overrides += ["privacy=example", "privacy.noise_multiplier=1.0"] if case["privacy"] == "example" else []
    config = compose([*overrides, "federation.rounds=3", "adapter.init=orthogonal", *BRIEF])
    session = open_session(config)
    session.install(from_seed(session.spec, {}, 0), {})
    on = Subject(session.model, session.spec)
    clients = [session.client_data(client) for client in range(case["clients"])]  # encoded once, before the timing
    return beside_centralised(lambda: round_rates(config), lambda: centralised.train(on, clients, session.config.training), settings)


def beside_centralised(run: Callable[[], list[float]], train: Task, settings: Settings) -> Found:
    """Measures whole runs and centralised training in turns and returns their rates; `run` returns a rate per round."""
    train()
    measures = {"run": lambda: statistics.median(run()), "centralised": lambda: rate(train)}
    rates = in_turns(measures, turns=settings.turns, seconds=3 * settings.seconds)
    found = {"ratio": ratio(rates, "run", "centralised"), "margin": margin(rates, "run", "centralised")}
    return medians(rates) | found


def rates_of(workload: Workload, rounds: int) -> list[float]:
    """Returns the tokens per second of every round after the first of a whole run over the clients of a workload."""
    training = workload.training
    overrides = [f"federation.clients={workload.clients}", f"federation.rounds={rounds}", f"adapter.rank={workload.rank}"]
    overrides += [f"training.batch_size={workload.batch}", f"training.local_steps={workload.steps}"]
    overrides += [f"training.{name}={getattr(training, name)}" for name in ("learning_rate", "warmup_ratio")]
    with tempfile.TemporaryDirectory() as folder:
        if workload.model != "embedded":
            save_base_model(workload.model, Path(folder))
            overrides.append(f"model.path={folder}")
        config = compose([*overrides, f"training.schedule={training.schedule.name}", "adapter.init=orthogonal", *BRIEF])
        session = open_session(config)
        for client in range(workload.clients):
            examples = workload.client(client, int(session.model.config.vocab_size)).examples  # type: ignore[union-attr, arg-type]
            session.client_data(client).examples[:] = examples  # type: ignore[index]  # a list that the session keeps
        return round_rates(config)


SECTION = Section(
    "w",
    "Whole runs",
    "Tokens per second of `fedsim run` with everything on (Flower's messages, ledger, log, diagnosis, checkpoints), rounds "
    "after the first, without evaluation; rank 64, embedded model and data; against a plain centralised loop over the same "
    "clients' batches; x is the median of neighbouring turns, ± half its 95 % interval.",
    (
        Column("clients", "clients", "{:,}"),
        Column("batch", "batch"),
        Column("privacy", "privacy"),
        Column("fedsim run", "run", "{:,.0f}"),
        Column("centralised", "centralised", "{:,.0f}"),
        Column("x", "ratio", "{:.2f}"),
        Column("±", "margin", "{:.2f}"),
    ),
    cases,
    measure,
)
