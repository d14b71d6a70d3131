"""The server: sets a run up, carries its rounds out over any Flower Grid, evaluates, and leaves a checkpoint after each step.

Everything that can be wrong with the input is found before the run folder is made. The state is a value that a checkpoint holds whole,
so a run that was killed at any moment goes on from the last checkpoint and ends with the same adapter, bit for bit.
"""

import errno
import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid
from torch import Tensor

from fedsim.choices import Init
from fedsim.config import Config
from fedsim.core.adapters import bound, merged, unadapted
from fedsim.core.communication import CommunicationLedger
from fedsim.core.fedbuff import Buffer
from fedsim.core.global_state import GlobalState
from fedsim.core.initialization import DERIVED, zero
from fedsim.core.missing import counted
from fedsim.core.participation import givers
from fedsim.core.traffic import needed_for_gradients, refresh_due
from fedsim.errors import RunStopped
from fedsim.export import peft_files
from fedsim.flower.asking import keeps_memory
from fedsim.flower.facts import RoundFacts
from fedsim.flower.roster import Roster
from fedsim.flower.simulated import set_up_seconds
from fedsim.flower.strategy import FedsimStrategy
from fedsim.flower.worker import read_memory, write_memory
from fedsim.models import source
from fedsim.plain import to_dict
from fedsim.privacy.ledger import PrivacyLedger
from fedsim.progress import Progress
from fedsim.report import curves_png, diagnosis_png, holdings_table, network_png, partition_png, privacy_png, summary_table, transfers_csv
from fedsim.run_folder import RunFolder
from fedsim.session import PERSONAL, Memory, Session, open_session
from fedsim.training.budget import TokenBudget
from fedsim.training.cohort import PassFacts
from fedsim.training.evaluation import evaluate
from fedsim.types import Adapter

FACTOR, FOLDED, INCREMENT, MOMENT, CONTROL_VARIATE, MEMORY = "factor", "folded", "increment", "moment", "control", "memory"
BUFFER = "buffer"
"""First parts of the names of tensors in a checkpoint."""

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
"""Errors of the system that say that nothing more can be written."""


@dataclass
class State:
    """The whole state of a run after `round`. `evaluations` is {round: {task: {accuracy, loss, num_examples}}}."""

    round: int
    shared: GlobalState
    ledger: CommunicationLedger = field(default_factory=CommunicationLedger)
    privacy: PrivacyLedger | None = None
    evaluations: dict[int, dict[str, dict[str, Any]]] = field(default_factory=dict)
    num_tokens: int = 0
    missing: dict[str, int] = field(default_factory=dict)  # replies that were asked for and did not count, by reason
    wall_seconds: float = 0.0  # of training: messages, local training and aggregation
    simulated_seconds: float = 0.0  # of everything, on a simulated network


def serve(
    grid: Grid,
    config: Config,
    contexts: Mapping[int, Context] | None = None,
    *,
    roster: Roster | None = None,
    quiet: bool = False,
    display: Callable[..., Progress] = Progress,
) -> dict[str, Any]:
    """Carries the experiment out and returns its summary, also written to summary.json.

    `contexts` are those of the nodes in this process, by node: what clients keep there goes into the checkpoints.
    `roster` knows the clients' own nodes in a deployment; `display` shows how the run goes, and `quiet` shows nothing.

    Raises UserError for what the user can mend, and RunStopped for a run that cannot go on now. A KeyboardInterrupt is raised again with
    the run folder as its argument. The last checkpoint there stays for `resume=true`.
    """
    evaluations = [number for number in range(config.federation.rounds + 1) if _evaluated_after(number, config)]
    with display(config.federation.rounds, evaluations, quiet=quiet) as progress:
        progress.phase("loading model and data")
        session = open_session(config)
        with RunFolder.open(config) as folder:
            if folder.finished_summary is not None:
                progress.note(f"{folder.folder} holds a finished run: nothing is left to do")
                summary = folder.finished_summary | {"run_dir": str(folder.folder)}  # it may have been moved since
            else:
                summary = Run(session, config, grid, contexts or {}, roster, folder, progress).carry_out()
    if not quiet:
        print(f"\n{summary_table(summary)}")
    return summary


class Run:
    """One run under way."""

    def __init__(
        self,
        session: Session,
        config: Config,
        grid: Grid,
        contexts: Mapping[int, Context],
        roster: Roster | None,
        folder: RunFolder,
        progress: Progress,
    ) -> None:
        self._session, self._config, self._grid, self._contexts, self._roster = session, session.config, grid, contexts, roster
        self._given, self._folder, self._progress = config, folder, progress
        self._told_too_long = 0
        self._tokens_per_pass = session.budget.tokens  # as told last

    def carry_out(self) -> dict[str, Any]:
        """Goes from the last checkpoint, or from the beginning, to the summary."""
        try:
            self._muster()
            state = self._restored() or self._initial()
            strategy = self._strategy(state.shared, state.ledger, state.privacy)
            while True:
                self._evaluate_if_due(state)
                if state.round == self._config.federation.rounds:
                    return self._finish(state)
                self._next_round(state, strategy)
        except KeyboardInterrupt:
            self._folder.event("interrupted")
            raise KeyboardInterrupt(str(self._folder.folder)) from None
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            raise RunStopped(
                f"Expected room for the files of the run in {self._folder.folder}, but: {error.strerror}. "
                "The last good checkpoint is kept: free some space and go on with resume=true."
            ) from None

    def _strategy(self, shared: GlobalState, ledger: CommunicationLedger, privacy: PrivacyLedger | None) -> FedsimStrategy:
        homes = None if self._roster is None else self._roster.homes
        return FedsimStrategy(self._session, self._given, ledger, shared, privacy, homes)

    # ---- setting up

    def _muster(self) -> None:
        """In a deployment, waits for the clients; what they or the server say against it is told."""
        if self._roster is None:
            return
        self._progress.phase(f"waiting for {self._config.federation.clients} clients")
        self._roster.muster(self._session, self._member_event)

    def _member_event(self, kind: str, **facts: Any) -> None:
        self._folder.event(kind, **facts)
        self._folder.record(kind, **facts)
        if kind == "refused":
            self._progress.note(f"left out: {facts['reason']}")
        elif kind != "joined":
            self._progress.note(f"{kind}: client {facts.get('client', facts.get('clients'))}")

    def _initial(self) -> State:
        self._folder.event("run_started", config=to_dict(self._given))
        self._folder.record("started", method=self._given.method.name, seed=self._given.seed, config_sha256=_sha256(self._given))
        self._folder.event("partition", holdings=self._session.holdings, skipped=self._session.data.skipped)
        for line in self._session.data.skipped:
            self._progress.note(f"left out: {line}")
        if self._given.evaluation.diagnosis and not self._config.evaluation.diagnosis:
            self._progress.note("no diagnosis of the rounds: it needs single uploads, which secure aggregation hides")
        self._progress.phase(f"initial factors ({self._init.name})")
        begun = time.perf_counter()
        ledger, privacy = CommunicationLedger(), self._privacy_ledger()
        zeros = zero(self._session.spec, {}, 0)
        self._session.install_folded({}, "")  # an earlier run in this process may have left something there
        self._session.budget = TokenBudget.of(self._config.training, self._session.model)
        shared = self._session.initial_state(self._session.derived_factors(1) or zeros)
        if self._init not in DERIVED:
            shared.factors |= self._factors_from_gradients(shared, ledger, privacy, 0)
        seconds = time.perf_counter() - begun
        facts = {"wall_seconds": seconds, "setup_bytes": ledger.totals()["setup_bytes"], "digests": shared.digests()}
        facts["tokens_per_pass"] = self._tokens_per_pass = self._session.budget.tokens
        self._folder.event("initialized", init=self._init.name, rank=self._session.spec.rank, **facts)
        state = State(0, shared, ledger, privacy)
        state.simulated_seconds = set_up_seconds(self._session.links, ledger.rows())
        self._save(state)
        return state

    @property
    def _init(self) -> Init:
        init = self._config.adapter.init
        assert init is not None  # `fedsim.effective` has settled it
        return init

    def _privacy_ledger(self) -> PrivacyLedger | None:
        """Returns the empty ledger of a private run, None where nothing is claimed."""
        options, plan = self._config.privacy, self._session.privacy_plan
        if not plan:
            return None
        deltas = {client: each.delta for client, each in enumerate(plan)}
        noise = sorted({round(each.noise_multiplier, 4) for each in plan})
        self._folder.event("privacy_planned", unit=options.unit.name, budget=options.epsilon, noise_multipliers=noise)
        return PrivacyLedger(options.unit.name, deltas, options.accountant.name, None if options.unsafe_init else options.epsilon)

    def _factors_from_gradients(
        self, shared: GlobalState, ledger: CommunicationLedger, privacy: PrivacyLedger | None, number: int
    ) -> Adapter:
        """Returns B, R, A from the gradients at the present base weights, with what that moved in the ledger."""
        session = self._session
        session.install_state(shared, needed_for_gradients(shared.exchange))
        if self._init is Init.gradient_public:
            gradients = session.weight_gradients(session.encode(session.public))
        else:
            strategy = self._strategy(shared, ledger, privacy)
            gradients = self._gathered_gradients(strategy, privacy, number)
            if strategy.facts.secure:
                self._folder.event("secure_gradients", round=number, **strategy.facts.secure)
        steps = number * session.total_steps // self._config.federation.rounds
        return session.factors_from_gradients(gradients, steps)

    def _gathered_gradients(self, strategy: FedsimStrategy, privacy: PrivacyLedger | None, number: int) -> Adapter:
        clients = list(givers(self._config))
        self._folder.record("asked", round=number, what="initial gradient", clients=clients)
        if privacy is not None:
            self._folder.record("charged", round=number, what="initial gradient", clients=clients)
        gradients = strategy.initial_gradients(self._grid, number)
        self._record_taken(number, strategy.facts)
        return gradients

    def _refresh(self, state: State) -> None:
        """Adds B R A to the base weights and computes new bases; clients that hold B and A need no more than R for it."""
        self._progress.phase(f"new bases after round {state.round}")
        shared, number, before, num_transfers = state.shared, state.round, state.ledger.totals(), len(state.ledger)
        shared.fold(self._session.spec.pick(shared.factors, ("R",)), number, builds_on=("B", "A"))
        if self._init in DERIVED:
            self._session.install_folded(shared.folded, shared.tag)
            factors = self._session.derived_factors(number + 1)
            assert factors is not None
        else:
            factors = self._factors_from_gradients(shared, state.ledger, state.privacy, number)
        state.simulated_seconds += set_up_seconds(self._session.links, islice(state.ledger.rows(), num_transfers, None))
        shared.replace(shared.factors | factors, self._session.spec.form_kinds, number)
        shared.moments = {}
        after = state.ledger.totals()
        moved = {name: after[name] - before[name] for name in ("uplink_bytes", "downlink_bytes", "setup_bytes")}
        self._folder.event("refreshed", round=number, **moved, digests=shared.digests())

    # ---- checkpoints

    def _restored(self) -> State | None:
        checkpoint = self._folder.last_checkpoint()
        if checkpoint is None:
            return None
        facts, tensors = checkpoint.state, _by_first_part(checkpoint.tensors)
        shared = self._session.initial_state(tensors[FACTOR])
        exchange = shared.exchange
        exchange.versions, exchange.needed = facts["versions"], facts["needed"]
        exchange.held = {int(client): dict(zip(exchange.versions, held, strict=True)) for client, held in facts["held"].items()}
        shared.folded, shared.increment, shared.moments = tensors[FOLDED], tensors[INCREMENT], tensors[MOMENT]
        shared.tag, shared.increment_on = facts["tag"], facts["increment_on"]
        shared.accepted = {int(client): number for client, number in facts["accepted"].items()}
        shared.buffer = Buffer.from_json(facts["buffer"], tensors[BUFFER])
        shared.control, shared.clip_norm = tensors[CONTROL_VARIATE].get("c"), facts["clip_norm"]
        for node, context in self._contexts.items():
            for client, own in _by_client(tensors[MEMORY], node).items():
                write_memory(context, {client: own}, shared.accepted[client], shared.accepted)
        if facts["adapter_digest"] != shared.adapter_digest():
            raise ValueError(f"Expected a state with digest {facts['adapter_digest'][:16]}..., got {shared.adapter_digest()[:16]}....")
        self._session.budget = TokenBudget(
            facts.get("tokens_per_pass") or TokenBudget.of(self._config.training, self._session.model).tokens
        )
        self._tokens_per_pass = self._session.budget.tokens
        self._folder.event("resumed", round=checkpoint.round, tokens_per_pass=self._tokens_per_pass)
        self._progress.note(f"going on after round {checkpoint.round}")
        return State(
            checkpoint.round,
            shared,
            CommunicationLedger.from_json(facts["ledger"]),
            PrivacyLedger.from_json(facts["privacy"]) if facts["privacy"] else None,
            {int(round_): tasks for round_, tasks in facts["evaluations"].items()},
            facts["num_tokens"],
            facts["missing"],
            facts["wall_seconds"],
            facts["simulated_seconds"],
        )

    def _save(self, state: State) -> None:
        shared = state.shared
        exchange = shared.exchange
        facts = {
            "adapter_digest": shared.adapter_digest(),
            "versions": exchange.versions,
            "needed": exchange.needed,
            "held": {client: [held.get(part, -1) for part in exchange.versions] for client, held in exchange.held.items()},
            "tag": shared.tag,
            "increment_on": shared.increment_on,
            "clip_norm": shared.clip_norm,
            "tokens_per_pass": self._session.budget.tokens,
            "accepted": shared.accepted,
            "ledger": state.ledger.to_json(),
            "privacy": state.privacy.to_json() if state.privacy else None,
            "evaluations": state.evaluations,
            "num_tokens": state.num_tokens,
            "missing": state.missing,
            "wall_seconds": state.wall_seconds,
            "simulated_seconds": state.simulated_seconds,
            "buffer": shared.buffer.to_json(),
        }
        tensors = {
            FACTOR: shared.factors,
            FOLDED: shared.folded,
            INCREMENT: shared.increment,
            MOMENT: shared.moments,
            CONTROL_VARIATE: {} if shared.control is None else {"c": shared.control},
            MEMORY: self._memory(shared),
            BUFFER: shared.buffer.changes(),
        }
        flat = {f"{first}/{name}": tensor for first, group in tensors.items() for name, tensor in group.items()}
        self._folder.save_checkpoint(state.round, flat, facts)

    def _memory(self, shared: GlobalState) -> dict[str, Tensor]:
        """Returns what clients in this process keep for themselves, by node/client/name."""
        clients = list(range(self._config.federation.clients)) if keeps_memory(self._config, self._session.method) else []
        memories = {node: read_memory(context, clients, shared.accepted) for node, context in self._contexts.items()}
        return {
            f"{node}/{client}/{name}": tensor
            for node, memory in memories.items()
            for client, own in memory.items()
            for name, tensor in own.items()
        }

    # ---- a round

    def _next_round(self, state: State, strategy: FedsimStrategy) -> None:
        number = state.round + 1
        before = state.ledger.totals()
        self._progress.round_started(number, len(strategy.participants(number)), before)
        begun = time.perf_counter()
        self._session.install_state(state.shared)
        self._record_asked(number, state.shared, strategy)
        with self._passes_shown(number, strategy):
            strategy.exchange(number, self._grid)
        seconds = time.perf_counter() - begun
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
            "adapter_digest": state.shared.adapter_digest(),
        }
        if state.privacy is not None:
            report["epsilon"] = self._largest_epsilon(state.privacy)
        absent = [each.to_json() for each in facts.missing]
        if facts.simulated_seconds is not None:
            state.simulated_seconds += facts.simulated_seconds
            report |= {"simulated_seconds": facts.simulated_seconds, "simulated_time": state.simulated_seconds}
        report |= {"secure": facts.secure} if facts.secure else {}
        self._folder.event(
            "round",
            round=number,
            clients=facts.clients,
            weights=facts.shares,
            missing=absent,
            **_if_any(facts),
            **report,
            **facts.diagnosis,
        )
        self._record_taken(number, facts)
        self._folder.record("released", round=number, adapter_digest=report["adapter_digest"])
        state.missing = dict(Counter(state.missing) + Counter(counted(facts.missing)))
        if "refused" in facts.secure:
            self._progress.note(f"round {number} changes nothing: {facts.secure['refused']}")
        self._progress.round_finished(number, report | {"missing": counted(facts.missing)}, after)
        self._tell_too_long()
        self._tell_less_memory(number)
        if refresh_due(self._config, number):
            self._refresh(state)
        self._save(state)

    def _record_asked(self, number: int, shared: GlobalState, strategy: FedsimStrategy) -> None:
        """Writes down, before anything leaves a client, who is asked for what, and whose privacy it costs something."""
        asked = [*strategy.participants(number), *strategy.asking.spares(number)]
        self._folder.record("asked", round=number, what="training", clients=asked, adapter_digest=shared.adapter_digest())
        charged = strategy.asking.charged(number)
        if charged:
            noise = [self._session.privacy_plan[client].noise_multiplier for client in charged]
            self._folder.record("charged", round=number, what="training", clients=charged, noise_multipliers=noise)

    def _record_taken(self, number: int, facts: RoundFacts) -> None:
        """Writes down who is in the result, and who is not and why."""
        self._folder.record("accepted", round=number, clients=facts.clients, num_examples=facts.num_examples)
        if facts.missing:
            self._folder.record("missing", round=number, clients=[each.to_json() for each in facts.missing])

    def _largest_epsilon(self, privacy: PrivacyLedger) -> float:
        """Returns the epsilon of the client that has spent most so far; clients with equal histories are computed once."""
        plan = self._session.privacy_plan
        kinds = {(privacy.history(client), plan[client].delta): client for client in range(len(plan))}
        return max(privacy.epsilon(client) for client in kinds.values())

    def _tell_too_long(self) -> None:
        """Says how many examples this process has left out since it said so last."""
        count = self._session.num_too_long - self._told_too_long
        if count:
            limit = self._config.data.max_length
            self._progress.note(f"left out: {count} training examples whose response lies beyond data.max_length={limit}")
            self._folder.event("too_long", num_examples=count, max_length=limit)
            self._told_too_long = self._session.num_too_long

    def _tell_less_memory(self, number: int) -> None:
        """Says to what passes in this process were cut because memory ran out; the next checkpoint keeps it."""
        tokens = self._session.budget.tokens
        if tokens < self._tokens_per_pass:
            self._progress.note(f"out of memory: passes hold at most {tokens} tokens now, {self._tokens_per_pass} before")
            self._folder.event("passes_halved", round=number, tokens_per_pass=tokens)
            self._tokens_per_pass = tokens

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
        personal = self._session.method.personal and state.round > 0
        tasks = self._evaluate_personally(state) if personal else self._evaluate_globally(state)
        for task, found in tasks.items():
            self._folder.event("evaluated", round=state.round, task=task, **found)
        state.evaluations[state.round] = tasks
        self._progress.evaluated(state.round, time.perf_counter() - begun)
        self._save(state)

    def _evaluate_globally(self, state: State) -> dict[str, dict[str, Any]]:
        session, tasks = self._session, {}
        session.install_state(state.shared)
        with merged(session.model) if state.round else unadapted(session.model):  # round 0 is the base model itself
            for task, examples in session.data.test.items():
                self._progress.phase(f"evaluating {task} ({len(examples)} questions) after round {state.round}")
                found = evaluate(
                    session.model, session.tokenizer, examples, self._config.evaluation, self._config.data, self._progress.done
                )
                tasks[task] = {"accuracy": found.accuracy, "loss": found.loss, "num_examples": found.num_examples}
        return tasks

    def _evaluate_personally(self, state: State) -> dict[str, dict[str, Any]]:
        """Every client answers its share of the questions with its own model."""
        self._progress.phase(f"evaluating the clients' own models after round {state.round}")
        return self._strategy(state.shared, state.ledger, None).personal_evaluation(state.round, self._grid)

    # ---- the end

    def _finish(self, state: State) -> dict[str, Any]:
        self._progress.phase("writing adapter, tables and pictures")
        for name, content in self._adapter_files(state):
            self._folder.write_bytes(f"adapter/{name}", content)
        summary = self._summary(state)
        self._folder.event("finished", round=state.round, adapter_digest=summary["adapter_digest"])
        summary["journal"] = self._folder.record("finished", round=state.round, adapter_digest=summary["adapter_digest"]).to_json()
        self._folder.write_bytes("communication.csv", transfers_csv(state.ledger.rows()))
        self._folder.write_bytes("holdings.txt", f"{holdings_table(self._session.holdings, max_clients=None)}\n".encode())
        self._folder.write_bytes("partition.png", partition_png(self._session.holdings))
        self._folder.write_bytes("curves.png", curves_png(self._folder.events()))
        if self._config.evaluation.diagnosis:
            self._folder.write_bytes("diagnosis.png", diagnosis_png(self._folder.events()))
        if self._session.links:
            self._folder.write_bytes("network.png", network_png(self._folder.events()))
        if state.privacy is not None:
            self._folder.write_bytes("privacy.png", privacy_png(self._folder.events()))
        self._folder.finish(summary)
        return summary

    def _adapter_files(self, state: State) -> Iterator[tuple[str, bytes]]:
        """Yields name and content of PEFT's files: one adapter, or one folder for each client that has a personal one in this process."""
        session = self._session
        session.install_state(state.shared)
        if not session.method.personal:
            yield from peft_files(session.model, self._base_model()).items()
        layout = session.spec.layout(session.method.personal)
        for name, tensor in self._memory(state.shared).items():
            _, client, what = name.split("/")
            if what == PERSONAL:
                with bound(session.model, layout.unpack(tensor.to(session.device))):
                    yield from (
                        (f"client_{client}/{file}", content) for file, content in peft_files(session.model, self._base_model()).items()
                    )

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
            "clients": self._given.federation.clients,
            "seed": self._config.seed,
            "rank": self._session.spec.rank,
            "adapter_digest": state.shared.adapter_digest(),
            "evaluation": evaluation,
            "communication": state.ledger.totals(),
            "privacy": state.privacy.summary() if state.privacy else None,
            "network": self._network(state),
            "training": {
                "tokens": state.num_tokens,
                "wall_seconds": state.wall_seconds,
                "tokens_per_second": state.num_tokens / state.wall_seconds if state.wall_seconds else 0.0,
            },
            "missing": state.missing,
            "run_dir": str(self._folder.folder),
        }

    def _network(self, state: State) -> dict[str, Any] | None:
        federation = self._config.federation
        told = {"name": federation.network, "mode": federation.mode.name, "simulated_seconds": state.simulated_seconds}
        return told if self._session.links else None


def _evaluated_after(number: int, config: Config) -> bool:
    every = config.evaluation.every
    return number in (0, config.federation.rounds) or (every > 0 and number % every == 0)


def _sha256(config: Config) -> str:
    return hashlib.sha256(json.dumps(to_dict(config)).encode()).hexdigest()


def _if_any(facts: RoundFacts) -> dict[str, Any]:
    """Returns what few rounds have to tell."""
    attempts = facts.num_attempts if facts.num_attempts > 1 else 0
    told = {"num_attempts": attempts, "num_clipped": facts.num_clipped, "staleness": facts.staleness}
    return {name: value for name, value in told.items() if value}


def _by_first_part(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Returns the tensors of a checkpoint by the first part of their name; a group may be empty."""
    groups: dict[str, dict[str, Tensor]] = {first: {} for first in (FACTOR, FOLDED, INCREMENT, MOMENT, CONTROL_VARIATE, MEMORY, BUFFER)}
    for name, tensor in tensors.items():
        first, _, rest = name.partition("/")
        groups[first][rest] = tensor
    return groups


def _by_client(tensors: dict[str, Tensor], node: int) -> Memory:
    """Returns the memories of a node's clients, of tensors named node/client/name."""
    memory: Memory = {}
    for name, tensor in tensors.items():
        owner, client, what = name.split("/")
        if int(owner) == node:
            memory.setdefault(int(client), {})[what] = tensor
    return memory
