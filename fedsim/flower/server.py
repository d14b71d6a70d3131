"""The server: sets a run up, carries its rounds out over any Flower Grid, evaluates, and leaves a checkpoint after each step.

Everything that can be wrong with the input is found before the run folder is made. The state is a value that a checkpoint holds whole,
so a run that was killed at any moment goes on from the last checkpoint and ends with the same adapter, bit for bit.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from flwr.serverapp import Grid
from torch import Tensor

from fedsim.config import Config, Init, to_dict
from fedsim.core.adapters import merged
from fedsim.core.communication import CommunicationLedger
from fedsim.core.initialization import bases_of
from fedsim.core.payload import digest
from fedsim.export import peft_files
from fedsim.flower.records import from_record, to_record
from fedsim.flower.strategy import FedsimStrategy
from fedsim.models import source
from fedsim.progress import Progress
from fedsim.report import curves_png, holdings_table, partition_png, summary_table, transfers_csv
from fedsim.run_folder import RunFolder
from fedsim.session import DERIVED, Session, open_session
from fedsim.training.cohort import PassFacts
from fedsim.training.evaluation import evaluate
from fedsim.types import Adapter

FACTORS, BASES = "factors", "bases"  # names of the tensors in a checkpoint


@dataclass
class State:
    """The whole state of a run after `round`. `evaluations` is {round: {task: {accuracy, loss, num_examples}}}."""

    round: int
    factors: Tensor  # flat, on the CPU
    bases: Adapter | None  # None where every client derives them
    bases_digest: str
    ledger: CommunicationLedger = field(default_factory=CommunicationLedger)
    has_bases: set[int] = field(default_factory=set)
    evaluations: dict[int, dict[str, dict[str, Any]]] = field(default_factory=dict)
    num_tokens: int = 0
    wall_seconds: float = 0.0  # of training: messages, local training and aggregation


def serve(grid: Grid, config: Config, *, quiet: bool = False) -> dict[str, Any]:
    """Carries the experiment out and returns its summary, also written to summary.json.

    Raises UserError for what the user can mend. A KeyboardInterrupt is raised again with the run folder as its argument: the last
    checkpoint there stays for `resume=true`.
    """
    evaluations = [number for number in range(config.federation.rounds + 1) if _evaluated_after(number, config)]
    with Progress(config.federation.rounds, evaluations, quiet=quiet) as progress:
        progress.phase("loading model and data")
        session = open_session(config)
        with RunFolder.open(config) as folder:
            if folder.finished_summary is not None:
                progress.note(f"{folder.folder} holds a finished run: nothing is left to do")
                summary = folder.finished_summary | {"run_dir": str(folder.folder)}  # it may have been moved since
            else:
                summary = Run(session, config, grid, folder, progress).carry_out()
    if not quiet:
        print(f"\n{summary_table(summary)}")
    return summary


class Run:
    """One run under way."""

    def __init__(self, session: Session, config: Config, grid: Grid, folder: RunFolder, progress: Progress) -> None:
        self._session, self._config, self._grid, self._folder, self._progress = session, config, grid, folder, progress
        self._told_too_long = 0

    def carry_out(self) -> dict[str, Any]:
        """Goes from the last checkpoint, or from the beginning, to the summary."""
        try:
            state = self._restored() or self._initial()
            strategy = self._strategy(state)
            while True:
                self._evaluate_if_due(state)
                if state.round == self._config.federation.rounds:
                    return self._finish(state)
                self._next_round(state, strategy)
        except KeyboardInterrupt:
            self._folder.event("interrupted")
            raise KeyboardInterrupt(str(self._folder.folder)) from None

    # ---- setting up

    def _initial(self) -> State:
        self._folder.event("run_started", config=to_dict(self._config))
        self._folder.event("partition", holdings=self._session.holdings, skipped=self._session.data.skipped)
        for line in self._session.data.skipped:
            self._progress.note(f"left out: {line}")
        self._progress.phase(f"initial bases ({self._config.adapter.init.name})")
        begun = time.perf_counter()
        ledger = CommunicationLedger()
        adapter = self._initial_adapter(ledger)
        bases = bases_of(adapter)
        bases_digest = self._session.install_bases(bases)
        factors = self._session.layout.pack({name: adapter[name] for name in self._session.layout.names})
        seconds = time.perf_counter() - begun
        facts = {"bases_digest": bases_digest, "wall_seconds": seconds, "setup_bytes": ledger.totals()["setup_bytes"]}
        self._folder.event("initialized", init=self._config.adapter.init.name, rank=self._session.rank, **facts)
        derived = self._config.adapter.init in DERIVED
        state = State(0, factors, None if derived else bases, bases_digest, ledger)
        self._save(state)
        return state

    def _initial_adapter(self, ledger: CommunicationLedger) -> Adapter:
        """Returns B, R, A by `adapter.init`, with what that moved in the ledger."""
        session, init = self._session, self._config.adapter.init
        if init in DERIVED:
            return session.derive_bases()
        if init is Init.gradient_public:
            return session.bases_from_gradients(session.weight_gradients(session.encode(session.public)))
        gradients = FedsimStrategy(session, self._config, ledger, None, set()).initial_gradients(self._grid)
        return session.bases_from_gradients(gradients)

    def _restored(self) -> State | None:
        checkpoint = self._folder.last_checkpoint()
        if checkpoint is None:
            return None
        facts = checkpoint.state
        bases = {name: tensor for name, tensor in checkpoint.tensors.items() if name != FACTORS} or None
        bases_digest = self._session.install_bases(bases or bases_of(self._session.derive_bases()))
        if bases_digest != facts["bases_digest"]:
            raise ValueError(f"Expected bases with digest {facts['bases_digest'][:16]}..., derived {bases_digest[:16]}... on this machine.")
        self._folder.event("resumed", round=checkpoint.round)
        self._progress.note(f"going on after round {checkpoint.round}")
        return State(
            checkpoint.round,
            checkpoint.tensors[FACTORS],
            bases,
            bases_digest,
            CommunicationLedger.from_json(facts["ledger"]),
            set(facts["has_bases"]),
            {int(round_): tasks for round_, tasks in facts["evaluations"].items()},
            facts["num_tokens"],
            facts["wall_seconds"],
        )

    def _save(self, state: State) -> None:
        facts = {
            "bases_digest": state.bases_digest,
            "ledger": state.ledger.to_json(),
            "has_bases": sorted(state.has_bases),
            "evaluations": state.evaluations,
            "num_tokens": state.num_tokens,
            "wall_seconds": state.wall_seconds,
        }
        self._folder.save_checkpoint(state.round, {FACTORS: state.factors, **(state.bases or {})}, facts)

    def _strategy(self, state: State) -> FedsimStrategy:
        bases = None if state.bases is None else self._session.bases_layout.pack(state.bases)
        return FedsimStrategy(self._session, self._config, state.ledger, bases, state.has_bases)

    # ---- a round

    def _next_round(self, state: State, strategy: FedsimStrategy) -> None:
        number = state.round + 1
        before = state.ledger.totals()
        self._progress.round_started(number, len(strategy.participants(number)), before)
        begun = time.perf_counter()
        with self._passes_shown(number, strategy):
            record = strategy.exchange(number, to_record(state.factors), self._grid)
        seconds = time.perf_counter() - begun
        state.factors = from_record(record, self._session.layout.num_parameters)
        state.round, facts = number, strategy.facts
        state.num_tokens += facts.num_tokens
        state.wall_seconds += seconds
        after = state.ledger.totals()
        moved = {name: total - before[name] for name, total in after.items()}
        report = {
            "train_loss": facts.mean_loss,
            "tokens": facts.num_tokens,
            "wall_seconds": seconds,
            "uplink_bytes": moved["uplink_bytes"],
            "downlink_bytes": moved["downlink_bytes"],
            "setup_bytes": moved["setup_bytes"],
            "adapter_digest": self._digest(state),
        }
        self._folder.event("round", round=number, clients=facts.clients, weights=facts.shares, **report)
        self._progress.round_finished(number, report, after)
        self._tell_too_long()
        self._save(state)

    def _tell_too_long(self) -> None:
        """Says how many examples this process has left out since it said so last."""
        count = self._session.num_too_long - self._told_too_long
        if count:
            limit = self._config.data.max_length
            self._progress.note(f"left out: {count} training examples whose response lies beyond data.max_length={limit}")
            self._folder.event("too_long", num_examples=count, max_length=limit)
            self._told_too_long = self._session.num_too_long

    @contextmanager
    def _passes_shown(self, number: int, strategy: FedsimStrategy) -> Iterator[None]:
        """Shows the passes of workers in this process; workers elsewhere show theirs where they run."""
        cohorts = [len(clients) for _, clients in strategy.cohorts(strategy.participants(number), self._grid)]

        def show(facts: PassFacts) -> None:
            done = len(strategy.facts.clients)  # of the cohorts before this one
            now = min(cohorts[0], sum(cohorts) - done)
            self._progress.step(facts.num_tokens, facts.loss, (done + now * facts.fraction) / sum(cohorts))

        self._session.on_pass = show
        try:
            yield
        finally:
            self._session.on_pass = lambda facts: None

    # ---- evaluation

    def _evaluate_if_due(self, state: State) -> None:
        """Evaluates the base model (round 0), every k-th round and the last, unless that has been done before an interruption."""
        if not _evaluated_after(state.round, self._config) or state.round in state.evaluations:
            return
        begun = time.perf_counter()
        factors = torch.zeros_like(state.factors) if state.round == 0 else state.factors  # round 0 is the base model itself
        self._session.install_factors(factors)
        tasks = {}
        with merged(self._session.model):
            for task, examples in self._session.data.test.items():
                self._progress.phase(f"evaluating {task} ({len(examples)} questions) after round {state.round}")
                result = evaluate(
                    self._session.model,
                    self._session.tokenizer,
                    examples,
                    self._config.evaluation,
                    self._config.data,
                    self._progress.done,
                )
                tasks[task] = {"accuracy": result.accuracy, "loss": result.loss, "num_examples": result.num_examples}
                self._folder.event("evaluated", round=state.round, task=task, **tasks[task])
        state.evaluations[state.round] = tasks
        self._progress.evaluated(state.round, time.perf_counter() - begun)
        self._save(state)

    # ---- the end

    def _digest(self, state: State) -> str:
        return digest(self._session.layout.unpack(state.factors), common=state.bases_digest)

    def _finish(self, state: State) -> dict[str, Any]:
        self._progress.phase("writing adapter, tables and pictures")
        self._session.install_factors(state.factors)
        for name, content in peft_files(self._session.model, self._base_model()).items():
            self._folder.write_bytes(f"adapter/{name}", content)
        summary = self._summary(state)
        self._folder.event("finished", round=state.round, adapter_digest=summary["adapter_digest"])
        self._folder.write_bytes("communication.csv", transfers_csv(state.ledger.rows()))
        self._folder.write_bytes("holdings.txt", f"{holdings_table(self._session.holdings, max_clients=None)}\n".encode())
        self._folder.write_bytes("partition.png", partition_png(self._session.holdings))
        self._folder.write_bytes("curves.png", curves_png(self._folder.events()))
        self._folder.finish(summary)
        return summary

    def _base_model(self) -> str:
        return "fedsim/embedded" if self._config.model.path is None else source(self._config.model)

    def _summary(self, state: State) -> dict[str, Any]:
        base, final = state.evaluations[0], state.evaluations[state.round]
        evaluation = {
            task: {
                "base": {key: base[task][key] for key in ("accuracy", "loss")},
                "final": {key: final[task][key] for key in ("accuracy", "loss")},
                "num_examples": final[task]["num_examples"],
            }
            for task in final
        }
        return {
            "method": self._config.method.name,
            "rounds": state.round,
            "clients": self._config.federation.clients,
            "seed": self._config.seed,
            "rank": self._session.rank,
            "adapter_digest": self._digest(state),
            "evaluation": evaluation,
            "communication": state.ledger.totals(),
            "privacy": None,
            "training": {
                "tokens": state.num_tokens,
                "wall_seconds": state.wall_seconds,
                "tokens_per_second": state.num_tokens / state.wall_seconds if state.wall_seconds else 0.0,
            },
            "run_dir": str(self._folder.folder),
        }


def _evaluated_after(number: int, config: Config) -> bool:
    every = config.evaluation.every
    return number in (0, config.federation.rounds) or (every > 0 and number % every == 0)
