"""Whole runs of fedsim in a temporary folder, and the figures in their logs."""

import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

from fedsim.config import Config
from fedsim.events import read_events
from fedsim.experiment import run
from fedsim.flower import worker
from fedsim.local_round import ClientReply
from fedsim.session import Session

BRIEF = ("data.test_examples=1", "evaluation.max_new_tokens=1", "model.device=cpu")
"""Overrides of a run on the CPU with minimal evaluation."""

Log = list[dict[str, Any]]
"""The events of a run."""


def carried_out(config: Config, engine: Callable[[Config], dict[str, Any]] = lambda config: run(config, quiet=True)) -> tuple[Any, Log]:
    """Returns the summary and the log of a run of `config`."""
    with tempfile.TemporaryDirectory() as folder:
        config.run_dir = str(Path(folder) / "run")
        summary = engine(config)
        return summary, list(read_events(Path(config.run_dir) / "events.jsonl"))


def times(log: Log, kind: str) -> list[float]:
    """Returns the seconds at which the events of a kind were written."""
    return [datetime.fromisoformat(event["time"]).timestamp() for event in log if event["kind"] == kind]


def round_seconds(log: Log) -> list[float]:
    """Returns the seconds from each round's event to the next one's: a whole round and the checkpoint before it. The first is left out."""
    return [after - before for before, after in pairwise(times(log, "round"))]


def round_rates(config: Config) -> list[float]:
    """Returns the trained tokens per second of every round after the first, of a run in this process."""
    with _counted_tokens() as tokens:
        _, log = carried_out(config)
    return [tokens[round] / seconds for round, seconds in enumerate(round_seconds(log), start=2)]


@contextmanager
def _counted_tokens() -> Iterator[Counter[int]]:
    """Yields the tokens of all passes by round, including those of private training, whose events omit its batches."""
    train, tokens = worker.train_clients, Counter[int]()

    def counted(session: Session, clients: Sequence[int], round: int, *arguments: Any, **options: Any) -> list[ClientReply]:
        shown = session.on_pass

        def count(facts: Any) -> None:
            tokens[round] += facts.num_tokens
            shown(facts)

        session.on_pass = count
        try:
            return train(session, clients, round, *arguments, **options)
        finally:
            session.on_pass = shown

    worker.train_clients = counted
    try:
        yield tokens
    finally:
        worker.train_clients = train
