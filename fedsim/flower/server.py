"""The server: sets up a run, carries out its rounds over any Flower Grid, evaluates, and saves checkpoints.

Mistakes in options, paths, shapes and the run folder are found before model and data are loaded, and most others before the folder is made;
one found later, but before the first checkpoint, leaves no folder behind. A checkpoint holds the whole state, so a run that was killed
at any moment continues from the last checkpoint and ends with the same adapter, bit for bit.
"""

import errno
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict
from itertools import islice
from typing import Any

import torch
from flwr.app import Context
from flwr.serverapp import Grid
from torch import Tensor

from fedsim import occupancy
from fedsim.choices import Init, NoiseSource, PrivacyUnit
from fedsim.config import Config
from fedsim.core.adapters import merged, unadapted
from fedsim.core.communication import CommunicationLedger
from fedsim.core.global_state import GlobalState
from fedsim.core.initialization import DERIVED, zero
from fedsim.core.missing import Missing
from fedsim.core.participation import central_privacy
from fedsim.core.traffic import needed_for_gradients, refresh_due
from fedsim.errors import RunStopped, UserError
from fedsim.flower.asking import keeps_memory
from fedsim.flower.in_flight import InFlight
from fedsim.flower.reporter import Reporter
from fedsim.flower.results import write_results
from fedsim.flower.roster import Roster
from fedsim.flower.simulated import set_up_seconds
from fedsim.flower.state import State, checkpoint_of, memories_in, restored
from fedsim.flower.strategy import FedsimStrategy
from fedsim.initial_gradient import factors_from_gradients, summed_gradients
from fedsim.interruption import raise_if_due
from fedsim.occupancy import NOISE_KEY
from fedsim.privacy.ledger import PrivacyLedger
from fedsim.privacy.plan import budget
from fedsim.progress import Progress, plural
from fedsim.report import summary_table
from fedsim.run_folder import RunFolder
from fedsim.seeding import NoiseKey
from fedsim.session import Session, check, open_session
from fedsim.training.budget import TokenBudget
from fedsim.training.evaluation import evaluate
from fedsim.types import Adapter

SOONEST_SECONDS = 0.025
"""Least time between checkpoints of a simulation: one takes milliseconds, up to a third of a very short round."""
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
"""System errors that mean that nothing more can be written."""


def serve(
    grid: Grid,
    config: Config,
    contexts: Mapping[int, Context] | None = None,
    *,
    roster: Roster | None = None,
    quiet: bool = False,
    display: Callable[..., Progress] = Progress,
) -> dict[str, Any]:
    """Runs the experiment and returns its summary, also written to summary.json.

    `contexts` are those of the nodes in this process, by node: client state in them goes into the checkpoints. `roster` maps the clients
    of a deployment to their nodes; `display` makes the progress display, which `quiet` silences.

    Raises UserError for mistakes the user can fix, and RunStopped if the run cannot continue now. A KeyboardInterrupt is raised again
    with the run folder as its argument. The last checkpoint in the folder stays for `resume=true`.
    """
    check(config)  # before seconds are spent on loading
    occupancy.check(config)
    evaluations = [number for number in range(config.federation.rounds + 1) if _evaluated_after(number, config)]
    with display(config.federation.rounds, evaluations, quiet=quiet) as progress:
        progress.phase("loading model and data")
        session = open_session(config)
        with _stop_on_full_disk(config), RunFolder.open(config) as folder:
            if folder.finished_summary is not None:
                progress.note(f"{folder.folder} holds a finished run: nothing is left to do")
                summary = folder.finished_summary | {"run_dir": str(folder.folder)}  # the folder may have been moved
            else:
                summary = Run(session, config, grid, contexts or {}, roster, folder, progress).carry_out()
    if not quiet:
        print(f"\n{summary_table(summary)}")
    return summary


@contextmanager
def _stop_on_full_disk(config: Config) -> Iterator[None]:
    """Turns an OSError of `NO_ROOM` into RunStopped."""
    try:
        yield
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        raise RunStopped(
            f"Expected room for the files of the run{f' in {config.run_dir}' if config.run_dir else ''}, but: {error.strerror}. "
            "The last good checkpoint is kept: free some space and go on with resume=true."
        ) from None


class Run:
    """One run in progress."""

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
        self._reporter = Reporter(session, folder, progress)
        # only clients of a deployment outlive their server, and an update with the server's noise is not released before a checkpoint
        may_have_answered = roster is not None and not central_privacy(session.config)
        self._saved = -math.inf  # time of the last checkpoint
        self._in_flight = InFlight(folder.superseded if may_have_answered else ())

    def carry_out(self) -> dict[str, Any]:
        """Runs from the last checkpoint, or from the beginning, to the summary."""
        try:
            self._session.noise_key = self._noise_key()
            self._wait_for_clients()
            state = self._restored() or self._initial()
            strategy = self._strategy(state.shared, state.ledger, state.privacy)
            while True:
                raise_if_due()
                self._evaluate_if_due(state)
                if state.round == self._config.federation.rounds:
                    return self._finish(state)
                self._next_round(state, strategy)
        except KeyboardInterrupt:
            with suppress(OSError):  # a full disk must not hide the interruption
                self._folder.event("interrupted")
            raise KeyboardInterrupt(str(self._folder.folder)) from None
        except torch.OutOfMemoryError as error:
            raise RunStopped(
                f"Expected memory for the model and a pass of the fewest tokens, but: {str(error).splitlines()[0][:200]} The last good "
                "checkpoint is kept: lower evaluation.tokens_per_pass or engine.cohort_size, add training.activation_checkpointing=true, "
                "and go on with resume=true."
            ) from error

    def _strategy(self, shared: GlobalState, ledger: CommunicationLedger, privacy: PrivacyLedger | None) -> FedsimStrategy:
        client_nodes = None if self._roster is None else self._roster.client_nodes
        return FedsimStrategy(self._session, self._given, ledger, shared, privacy, client_nodes, self._in_flight)

    def _noise_key(self) -> NoiseKey:
        """Returns the key of the server's noise and coins; a secret one is kept in the run folder, so that a resumed run draws the same."""
        options = self._config.privacy
        if options.unit is PrivacyUnit.none or (options.noise is NoiseSource.seed and self._roster is None):
            return NoiseKey.of_seed(self._config.seed)
        return NoiseKey.kept_in(self._folder.folder / NOISE_KEY)

    # ---- setting up

    def _wait_for_clients(self) -> None:
        """In a deployment, waits for the clients; joins and refusals are reported."""
        if self._roster is None:
            return
        self._progress.phase(f"waiting for {plural(self._config.federation.clients, 'client')}")
        self._roster.wait_for_clients(self._session, self._reporter.membership)

    def _initial(self) -> State:
        self._reporter.started(self._given)
        self._progress.phase(f"initial factors ({self._init.name})")
        begun = time.perf_counter()
        ledger, privacy = CommunicationLedger(), self._privacy_ledger()
        zeros = zero(self._session.spec, {}, 0)
        self._session.install_folded({}, "")  # an earlier run in this process may have left increments
        self._session.budget = self._session.new_budget()
        shared = self._session.initial_state(self._session.derived_factors(1) or zeros)
        missing: Sequence[Missing] = ()
        if self._init not in DERIVED:
            factors, missing = self._factors_from_gradients(shared, ledger, privacy, 0)
            shared.replace(shared.factors | factors, self._session.spec.form.kinds, 0)
        seconds = time.perf_counter() - begun
        facts = {"wall_seconds": seconds, "setup_bytes": ledger.totals()["setup_bytes"], "digests": shared.digests()}
        facts["tokens_per_pass"] = self._reporter.tokens_per_pass = self._session.budget.tokens
        self._folder.event("initialized", init=self._init.name, rank=self._session.spec.rank, **facts)
        state = State(0, shared, ledger, privacy)
        state.count_missing(missing)
        state.simulated_seconds = set_up_seconds(self._session.links, ledger.rows())
        self._save(state)
        return state

    @property
    def _init(self) -> Init:
        init = self._config.adapter.init
        assert init is not None  # set by `fedsim.effective`
        return init

    def _privacy_ledger(self) -> PrivacyLedger | None:
        """Returns a private run's new ledger, charged only with what is in flight; None if no privacy is claimed."""
        options, plan = self._config.privacy, self._session.privacy_plan
        if not plan:
            return None
        deltas = {client: each.delta for client, each in enumerate(plan)}
        noise = sorted({round(each.noise_multiplier, 4) for each in plan})
        self._folder.event("privacy_planned", unit=options.unit.name, budget=options.epsilon, noise_multipliers=noise)
        ledger = PrivacyLedger(options.unit.name, deltas, options.accountant.name, budget(self._config))
        self._reporter.charged_earlier(self._in_flight.charge(ledger))
        return ledger

    def _factors_from_gradients(
        self, shared: GlobalState, ledger: CommunicationLedger, privacy: PrivacyLedger | None, number: int
    ) -> tuple[Adapter, Sequence[Missing]]:
        """Returns B, R and A from the gradients at the present base weights, charged to the ledgers, and the missing clients."""
        session = self._session
        session.install_state(shared, needed_for_gradients(shared.exchange))
        missing: Sequence[Missing] = ()
        if self._init is Init.gradient_public:
            gradients = summed_gradients(session, session.encode(session.public))
        else:
            strategy = self._strategy(shared, ledger, privacy)
            gradients, missing = self._gathered_gradients(strategy, shared, number), strategy.facts.missing
        steps = number * session.total_steps // self._config.federation.rounds
        return factors_from_gradients(session, gradients, steps), missing

    def _gathered_gradients(self, strategy: FedsimStrategy, shared: GlobalState, number: int) -> Adapter:
        clients = list(strategy.samples_within_budget(number))
        self._reporter.gradients_requested(number, clients, strategy.gradient_costs(number, clients), shared.adapter_digest())
        self._sync_if_deployed()
        gradients = strategy.initial_gradients(self._grid, number)
        self._reporter.gradients_received(number, strategy.facts)
        return gradients

    def _refresh(self, state: State) -> None:
        """Adds B R A to the base weights and computes new bases; clients that hold B and A need only R for it."""
        self._progress.phase(f"new bases after round {state.round}")
        shared, number, before, num_transfers = state.shared, state.round, state.ledger.totals(), len(state.ledger)
        shared.fold(self._session.spec.pick(shared.factors, ("R",)), number, builds_on=("B", "A"))
        if self._init in DERIVED:
            self._session.install_folded(shared.folded, shared.tag)
            factors = self._session.derived_factors(number + 1)
            assert factors is not None
        else:
            factors, missing = self._factors_from_gradients(shared, state.ledger, state.privacy, number)
            state.count_missing(missing)
        state.simulated_seconds += set_up_seconds(self._session.links, islice(state.ledger.rows(), num_transfers, None))
        shared.replace(shared.factors | factors, self._session.spec.form.kinds, number)
        shared.moments = {}
        after = state.ledger.totals()
        moved = {name: after[name] - before[name] for name in ("uplink_bytes", "downlink_bytes", "setup_bytes")}
        self._folder.event("refreshed", round=number, **moved, digests=shared.digests())

    # ---- checkpoints

    def _restored(self) -> State | None:
        checkpoint = self._folder.last_checkpoint()
        if checkpoint is None:
            return None
        if self._roster is None and not self._contexts and keeps_memory(self._config, self._session.method):
            raise UserError(
                "Expected resume=true where clients' memories are kept with the run, got Flower's own simulation, which forgets them. "
                "Start again with `fedsim run`, in one process or on Ray."
            )
        state = restored(checkpoint, self._session, self._contexts)
        tokens = checkpoint.state.get("tokens_per_pass") or self._session.new_budget().tokens
        self._session.budget, self._reporter.tokens_per_pass = TokenBudget(tokens), tokens
        self._folder.event("resumed", round=checkpoint.round, tokens_per_pass=tokens)
        if state.privacy is not None:
            self._reporter.charged_earlier(self._in_flight.charge(state.privacy))
        self._progress.note(f"resuming after round {checkpoint.round}")
        return state

    def _save(self, state: State) -> None:
        """Saves a checkpoint, unless a simulation saved one a moment ago: a kill may cost that moment."""
        now, last = time.monotonic(), state.round == self._config.federation.rounds
        if self._roster is None and not last and now - self._saved < SOONEST_SECONDS:
            return
        self._saved = now
        memories, moving = self._memories(state.shared), self._session.method.moving
        checkpoint = checkpoint_of(state, memories, self._session.budget.tokens, moving, self._session.data.labels)
        self._folder.save_checkpoint(checkpoint.round, checkpoint.tensors, checkpoint.state, checkpoint.bases)

    def _sync_if_deployed(self) -> None:
        """In a deployment, makes the requests, their charges and the state they are for durable, before clients are asked.

        So no client is ever more than one round ahead of what is durable here.
        """
        if self._roster is not None:
            self._folder.settle_all()

    def _memories(self, shared: GlobalState) -> dict[str, Tensor]:
        clients = range(self._config.federation.clients) if keeps_memory(self._config, self._session.method) else ()
        return memories_in(self._contexts, clients, shared.accepted)

    # ---- a round

    def _next_round(self, state: State, strategy: FedsimStrategy) -> None:
        number, before = state.round + 1, state.ledger.totals()
        if self._roster is not None:
            self._roster.begin_round()
        self._progress.round_started(number, len(strategy.participants(number)), before)
        begun = time.perf_counter()
        self._session.install_state(state.shared)
        self._reporter.training_requested(number, strategy, state.shared.adapter_digest())
        self._sync_if_deployed()
        with nullcontext() if self._roster is not None else self._reporter.show_passes(number, strategy, self._grid):
            strategy.exchange(number, self._grid)
        seconds = time.perf_counter() - begun
        state.count(strategy.facts, seconds)
        self._reporter.round_finished(state, strategy.facts, before, seconds)
        if refresh_due(self._config, number):
            self._refresh(state)
        self._save(state)

    # ---- evaluation

    def _evaluate_if_due(self, state: State) -> None:
        """Evaluates the base model (round 0), every k-th round and the last, unless already done before an interruption."""
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
                    session.model,
                    session.tokenizer,
                    examples,
                    self._config.evaluation,
                    self._config.data,
                    self._progress.done,
                    session.answer_budget,
                )
                tasks[task] = asdict(found)
        return tasks

    def _evaluate_personally(self, state: State) -> dict[str, dict[str, Any]]:
        """Has every client answer its share of the questions with its own model."""
        self._progress.phase(f"evaluating the clients' own models after round {state.round}")
        return self._strategy(state.shared, state.ledger, None).personal_evaluation(state.round, self._grid)

    # ---- the end

    def _finish(self, state: State) -> dict[str, Any]:
        self._progress.phase("writing adapter, tables and pictures")
        return write_results(self._session, self._given, state, self._memories(state.shared), self._folder)


def _evaluated_after(number: int, config: Config) -> bool:
    every = config.evaluation.every
    return number in (0, config.federation.rounds) or (every > 0 and number % every == 0)
