"""Section w: a whole run with everything switched on (messages, ledger, log, diagnosis, checkpoints) against centralised training.

The default experiment on the embedded data. Centralised training sees the same clients' batches in the same process.
"""

import tempfile
from datetime import datetime
from pathlib import Path

from experiments.benchmarks.peers import centralised
from experiments.benchmarks.suite import Case, Column, Found, Section, Settings
from experiments.benchmarks.timing import Rates, medians, rate, ratio
from experiments.benchmarks.workloads import Subject
from fedsim.cli.compose import compose
from fedsim.config import Config
from fedsim.core.initialization import from_seed
from fedsim.events import read_events
from fedsim.experiment import run
from fedsim.session import open_session


def cases(settings: Settings) -> list[Case]:
    """Returns clients, batch and privacy of every row."""
    grid = [(25, 4, "none")] if settings.quick else [(25, 4, "none"), (25, 4, "example"), (100, 1, "none"), (1000, 1, "none")]
    return [{"clients": clients, "batch": batch, "privacy": privacy} for clients, batch, privacy in grid]


def measure(case: Case, settings: Settings) -> Found:
    """Measures in turns whole runs of two rounds and the centralised loop."""
    steps = 2 if settings.quick or case["clients"] > 100 else 4
    config = compose(
        [
            *(f"federation.clients={case['clients']}", f"training.batch_size={case['batch']}", f"training.local_steps={steps}"),
            *("federation.rounds=2", "data.test_examples=1", "evaluation.max_new_tokens=1", "adapter.init=orthogonal"),
            *(["privacy=example", "privacy.noise_multiplier=1.0"] if case["privacy"] == "example" else []),
        ]
    )
    session = open_session(config)
    session.install(from_seed(session.spec, {}, 0), {})
    on = Subject(session.model, session.spec)
    clients = [session.client_data(client) for client in range(case["clients"])]  # tokens are made once, before the clock runs
    _run(config)
    centralised.train(on, clients, session.config.training)
    rates: Rates = {"run": [], "centralised": []}
    for _ in range(2 if settings.quick else 3):
        rates["run"].append(_run(config))
        session.digests.clear()  # a run leaves its own factors in the model
        rates["centralised"].append(rate(lambda: centralised.train(on, clients, session.config.training)))
    return medians(rates) | {"ratio": ratio(rates, "run", "centralised")}


def _run(config: Config) -> float:
    """Returns trained tokens over the seconds from the end of the first evaluation to the end of the last round."""
    with tempfile.TemporaryDirectory() as folder:
        config.run_dir = str(Path(folder) / "run")
        passed = 0
        session = open_session(config)
        trained = session.train

        def counted(*arguments, **options):  # type: ignore[no-untyped-def]
            nonlocal passed
            shown = session.on_pass

            def count(facts):  # type: ignore[no-untyped-def]
                nonlocal passed
                passed += facts.num_tokens
                shown(facts)

            session.on_pass = count
            try:
                return trained(*arguments, **options)
            finally:
                session.on_pass = shown

        session.train = counted  # type: ignore[method-assign]
        try:
            run(config, quiet=True)
        finally:
            del session.train  # type: ignore[method-assign]
        events = list(read_events(Path(config.run_dir) / "events.jsonl"))
    first = max(_time(event) for event in events if event["kind"] == "evaluated" and event["round"] == 0)
    last = max(_time(event) for event in events if event["kind"] == "round")
    return passed / (last - first)


def _time(event: dict[str, str]) -> float:
    return datetime.fromisoformat(event["time"]).timestamp()


SECTION = Section(
    "w",
    "Whole runs",
    "Tokens per second of `fedsim run` with everything on (Flower's messages, ledger, log, diagnosis, checkpoints), rank "
    "64, embedded model and data, "
    "against a plain centralised loop over the same clients' batches; without evaluation and set-up.",
    (
        Column("clients", "clients", "{:,}"),
        Column("batch", "batch"),
        Column("privacy", "privacy"),
        Column("fedsim run", "run", "{:,.0f}"),
        Column("centralised", "centralised", "{:,.0f}"),
        Column("x", "ratio", "{:.2f}"),
    ),
    cases,
    measure,
)
