"""Reports a run: events in its folder, the journal for auditors, and the progress display."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from flwr.serverapp import Grid

from fedsim.config import Config
from fedsim.core.communication import Totals
from fedsim.core.missing import count_by_reason, missing_text
from fedsim.flower.facts import RoundFacts
from fedsim.flower.in_flight import CHARGED, GRADIENT, TRAINING, charge_line
from fedsim.flower.state import State
from fedsim.flower.strategy import FedsimStrategy
from fedsim.plain import to_dict
from fedsim.privacy.accounting import Mechanism
from fedsim.progress import Progress
from fedsim.run_folder import RunFolder
from fedsim.session import Session
from fedsim.training.cohort import PassFacts
from fedsim.training.encoding import describe_limit
from fedsim.unused import unused


class Reporter:
    """Reports the clients and rounds of one run. `tokens_per_pass` is the last reported limit."""

    def __init__(self, session: Session, folder: RunFolder, progress: Progress) -> None:
        self._session, self._config, self._folder, self._progress = session, session.config, folder, progress
        self._reported_lengths: Counter[str] = Counter()  # the part of `session.lengths` reported so far
        self.tokens_per_pass = session.budget.tokens

    def started(self, given: Config) -> None:
        """Records the start of a new run: the given configuration, each client's data, skipped rows and unused options."""
        self._folder.event("run_started", config=to_dict(given))
        self._folder.record("started", method=given.method.name, seed=given.seed, config_sha256=_sha256(given))
        self._folder.event("partition", holdings=self._session.holdings, skipped=self._session.data.skipped)
        for line in self._session.data.skipped:
            self._progress.note(f"data: {line}")
        for line in unused(given):
            self._progress.note(line)
        if given.evaluation.diagnosis and not self._config.evaluation.diagnosis:
            self._progress.note("no diagnosis of the rounds: it would reveal single uploads, which are hidden")

    def membership(self, kind: str, **facts: Any) -> None:
        """Records that a client of a deployment joined, left, is absent, or was refused, and why."""
        self._folder.event(kind, **facts)
        self._folder.record(kind, **facts)
        if kind == "refused":
            self._progress.note(f"refused: {facts['reason']}")
        elif kind != "joined":
            self._progress.note(f"{kind}: client {facts.get('client', facts.get('clients'))}")

    def gradients_requested(self, number: int, clients: Sequence[int], charged: Mapping[int, Mechanism], adapter_digest: str) -> None:
        """Records which clients are asked for an initial gradient and its privacy cost, before anything leaves a client."""
        self._folder.record("asked", round=number, what=GRADIENT, clients=clients)
        self._record_charge(GRADIENT, number, adapter_digest, charged)

    def training_requested(self, number: int, strategy: FedsimStrategy, adapter_digest: str) -> None:
        """Records which clients are asked to train and the privacy cost, before anything leaves a client."""
        clients = [*strategy.participants(number), *strategy.asking.spares(number)]
        self._folder.record("asked", round=number, what=TRAINING, clients=clients, adapter_digest=adapter_digest)
        self._record_charge(TRAINING, number, adapter_digest, strategy.asking.charged(number))

    def charged_earlier(self, lines: Iterable[dict[str, Any]]) -> None:
        """Records what a resumed run had already been charged after its last checkpoint."""
        for line in lines:
            self._folder.record(CHARGED, **line)

    def _record_charge(self, what: str, number: int, adapter_digest: str, mechanisms: Mapping[int, Mechanism]) -> None:
        if mechanisms:
            self._folder.record(CHARGED, **charge_line(what, number, adapter_digest, mechanisms))

    def accepted(self, number: int, facts: RoundFacts) -> None:
        """Records the clients in the result, and the missing ones with reasons."""
        self._folder.record("accepted", round=number, clients=facts.clients, num_examples=facts.num_examples)
        if facts.missing:
            self._folder.record("missing", round=number, clients=[each.to_json() for each in facts.missing])

    def gradients_received(self, number: int, facts: RoundFacts) -> None:
        """Reports the clients whose initial gradients are in the sum, and the missing ones with reasons."""
        self.accepted(number, facts)
        self._report_long_examples()
        if facts.secure:
            self._folder.event("secure_gradients", round=number, **facts.secure)
        if facts.missing:
            self._folder.event("missing_gradients", round=number, missing=[each.to_json() for each in facts.missing])
            self._progress.note(f"initial gradients: {missing_text(count_by_reason(facts.missing))}")

    def round_finished(self, state: State, facts: RoundFacts, before: Totals, wall_seconds: float) -> None:
        """Reports the round that led to this state; `before` are the totals of the ledger at its start."""
        number, after = state.round, state.ledger.totals()
        report = _report(state, facts, {name: total - before[name] for name, total in after.items()}, wall_seconds)
        absent = [each.to_json() for each in facts.missing]
        outcome = {
            "clients": facts.clients,
            "weights": facts.shares,
            "missing": absent,
            **_optional_fields(facts),
            **report,
            **facts.diagnosis,
        }
        self._folder.event("round", round=number, **outcome)
        self.accepted(number, facts)
        self._folder.record("released", round=number, adapter_digest=report["adapter_digest"])
        if "refused" in facts.secure:
            self._progress.note(f"round {number} changes nothing: {facts.secure['refused']}")
        self._report_long_examples()
        self._progress.round_finished(number, report | {"missing": count_by_reason(facts.missing)}, after)
        self._report_pass_limit(number)

    @contextmanager
    def show_passes(self, number: int, strategy: FedsimStrategy, grid: Grid) -> Iterator[None]:
        """Shows the progress of passes in this process; workers elsewhere show their own."""
        cohorts = [len(clients) for _, clients in strategy.cohorts(strategy.participants(number), grid)]

        def show(facts: PassFacts) -> None:
            done = len(strategy.facts.clients)  # clients of earlier cohorts
            now = min(cohorts[0], sum(cohorts) - done)
            self._progress.step(facts.num_tokens, facts.loss, (done + now * facts.fraction) / sum(cohorts))

        self._session.on_pass = show
        try:
            yield
        finally:
            self._session.on_pass = lambda facts: None

    def _report_long_examples(self) -> None:
        """Reports how many of the examples read in this process since the last report were left out or cut for their length."""
        new = self._session.lengths - self._reported_lengths
        outcomes = {"left out": "left out, whose response lies beyond", "cut": "cut"}
        what = [f"{new[name]:,} {words}" for name, words in outcomes.items() if new[name]]
        if what:
            longest = describe_limit(self._config.data.max_length, self._session.tokenizer)
            self._progress.note(f"longer than {longest}: of {new['read']:,} training examples {', '.join(what)}")
            self._folder.event("too_long", **{name.replace(" ", "_"): number for name, number in new.items()})
        self._reported_lengths = Counter(self._session.lengths)

    def _report_pass_limit(self, number: int) -> None:
        """Reports a reduced limit on passes after this process ran out of memory; the next checkpoint keeps it."""
        tokens = self._session.budget.tokens
        if tokens < self.tokens_per_pass:
            self._progress.note(f"out of memory: passes hold at most {tokens} tokens now, {self.tokens_per_pass} before")
            self._folder.event("passes_halved", round=number, tokens_per_pass=tokens)
            self.tokens_per_pass = tokens


def _report(state: State, facts: RoundFacts, moved: Totals, wall_seconds: float) -> dict[str, Any]:
    """Returns the totals of a round, for its event and the display."""
    report = {
        "train_loss": facts.mean_loss,
        "tokens": facts.num_tokens,
        "wall_seconds": wall_seconds,
        **{name: moved[name] for name in ("uplink_bytes", "downlink_bytes", "setup_bytes")},
        "adapter_digest": state.shared.adapter_digest(),
    }
    if state.privacy is not None:
        report["epsilon"] = state.privacy.largest_epsilon()
    if facts.simulated_seconds is not None:
        report |= {"simulated_seconds": facts.simulated_seconds, "simulated_time": state.simulated_seconds}
    return report | ({"secure": facts.secure} if facts.secure else {})


def _optional_fields(facts: RoundFacts) -> dict[str, Any]:
    """Returns the optional fields of a round's event."""
    attempts = facts.num_attempts if facts.num_attempts > 1 else 0
    fields = {"num_attempts": attempts, "num_clipped": facts.num_clipped, "staleness": facts.staleness}
    return {name: value for name, value in fields.items() if value}


def _sha256(config: Config) -> str:
    return hashlib.sha256(json.dumps(to_dict(config)).encode()).hexdigest()
