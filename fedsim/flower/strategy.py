"""The strategy: carries out one round at a time over any Flower Grid, from requests and replies to aggregation."""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from math import isfinite, nan
from typing import Any

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid
from torch import Tensor

from fedsim.choices import Init, Mode
from fedsim.config import Config
from fedsim.core.communication import CommunicationLedger
from fedsim.core.global_state import GlobalState
from fedsim.core.missing import Missing, Reason, count_by_reason, missing_text
from fedsim.core.network import RoundEnd
from fedsim.core.participation import gradient_samples, least_replies
from fedsim.core.traffic import needed_for_gradients
from fedsim.errors import RunStopped, UserError
from fedsim.flower.aggregation import Aggregation
from fedsim.flower.asking import Ask, Asking, ClientNodes
from fedsim.flower.buffered import BufferedRound
from fedsim.flower.charging import Charges
from fedsim.flower.facts import RoundFacts
from fedsim.flower.gathering import Failure, gathered
from fedsim.flower.in_flight import GRADIENT, InFlight
from fedsim.flower.reading import DIVERGED, MOST
from fedsim.flower.records import numbers
from fedsim.flower.requests import METRICS, REQUEST
from fedsim.flower.rounds import GradientRound, Round, TrainingRound
from fedsim.flower.secure import Protocol, SumRefused
from fedsim.flower.secure_round import secure_gradients, secure_round
from fedsim.flower.simulated import Simulation
from fedsim.flower.transfer import Packer
from fedsim.flower.worker import EVALUATE, INITIAL_GRADIENT
from fedsim.privacy.accounting import Mechanism
from fedsim.privacy.ledger import PrivacyLedger
from fedsim.progress import plural
from fedsim.session import Session
from fedsim.types import Adapter

RETRY_SECONDS = 5.0
"""Pause before missing clients are asked again."""

Replies = Iterator[tuple[Ask, Message | Failure]]


class FedsimStrategy:
    """Federated training of one `GlobalState` by any method of `fedsim.core.methods`; every transfer goes into the ledger.

    It is not a Flower Strategy, whose own loop has no privacy charges, spares, least number of replies or secure aggregation: `exchange`
    is the only way to carry out a round. `client_nodes` finds the clients' own nodes in a deployment; `in_flight` is what was charged
    before the run was resumed.
    """

    def __init__(
        self,
        session: Session,
        config: Config,
        ledger: CommunicationLedger,
        state: GlobalState,
        privacy: PrivacyLedger | None = None,
        client_nodes: ClientNodes | None = None,
        in_flight: InFlight | None = None,
    ) -> None:
        self._session, self._state, self._ledger, self._privacy = session, state, ledger, privacy
        self._charges = Charges(session, state, ledger)
        self.asking = Asking(session, config, state, self._charges, privacy, client_nodes, in_flight or InFlight())
        self._simulation = Simulation(session, state, self._charges, session.links) if session.links else None
        self.facts = RoundFacts()

    def participants(self, server_round: int) -> list[int]:
        """Returns the clients of a round, see `Asking.participants`; with FedBuff, those that start training."""
        if self._buffered:
            flush, _ = self._simulation.flush(server_round)  # type: ignore[union-attr]
            return sorted(job.client for job in flush.begun)
        return self.asking.participants(server_round)

    def cohorts(self, clients: Sequence[int], grid: Grid) -> Iterator[tuple[int, list[int]]]:
        """Yields (node, clients), see `Asking.cohorts`."""
        return self.asking.cohorts(clients, grid)

    # ---- a round

    def exchange(self, server_round: int, grid: Grid) -> None:
        """Carries out one round and updates the global state.

        Continues without clients that have not replied by `federation.round_timeout`. Raises RunStopped, with the state unchanged, if
        fewer than `federation.min_replies` have replied after the others were asked again.
        """
        packer, wanted = self._packer(), self.participants(server_round)
        if self._buffered:
            return self._fill_buffer(server_round, packer, grid)
        self.asking.charge_privacy(server_round)
        if self._session.config.privacy.secure_aggregation:
            return self._aggregate_securely(server_round, packer, grid)
        asked, least = [*wanted, *self.asking.spares(server_round)], least_replies(self._session.config, len(wanted))
        round_end = self._simulation.round_end(server_round, asked, len(wanted), least) if self._simulation else None
        round_ = self._new_round(server_round, round_end)
        enough = None if round_end else round_  # on a simulated network late clients train as well
        self._ask_until_enough(
            round_,
            asked,
            least,
            lambda clients: self._gathered(grid, self.asking.to_train(server_round, packer, grid, clients), packer, enough),
        )
        round_.finish()

    def _new_round(self, server_round: int, round_end: RoundEnd | None = None) -> TrainingRound:
        wanted, in_time = len(self.participants(server_round)), None if round_end is None else set(round_end.arrived)
        round_ = TrainingRound(self._session, self._state, self.asking, self._charges, server_round, wanted, in_time)
        round_.facts.simulated_seconds = None if round_end is None else round_end.seconds
        return round_

    @property
    def _buffered(self) -> bool:
        return self._session.config.federation.mode is Mode.fedbuff

    def _fill_buffer(self, server_round: int, packer: Packer, grid: Grid) -> None:
        """Trains the clients that start, and makes the next version from the updates that fill the buffer."""
        assert self._simulation is not None  # the configuration was checked
        begun, before = self.participants(server_round), self._state.buffer.queue.time
        flush, queue = self._simulation.flush(server_round)
        round_ = BufferedRound(self._session, self._state, self.asking, self._ledger, server_round, flush, queue)
        self.facts = round_.facts
        round_.take(self._gathered(grid, self.asking.to_train(server_round, packer, grid, begun), packer))
        round_.finish()
        round_.facts.simulated_seconds = queue.time - before

    def _ask_until_enough(self, round_: Round, asked: list[int], least: int, replies: Callable[[list[int]], Replies]) -> None:
        """Asks all clients, then up to `federation.retries` times those that may yet reply, until at least `least` are in the result.

        Raises RunStopped if fewer are.
        """
        self.facts = facts = round_.facts
        while True:
            round_.take(replies(asked))
            round_.note_absent(asked)
            dropped = sum(each.reason is Reason.dropped_out for each in facts.missing)  # simulated: not a failure of this run
            if len(facts.clients) >= min(least, len(facts.clients) + len(facts.missing) - dropped):
                return
            missing, asked = list(facts.missing), round_.pop_retryable()
            if not asked or facts.num_attempts > self._session.config.federation.retries:
                raise RunStopped(too_few(len(facts.clients), least, missing))
            time.sleep(RETRY_SECONDS)
            facts.num_attempts += 1

    def _aggregate_securely(self, server_round: int, packer: Packer, grid: Grid) -> None:
        """Aggregates the sum over the clients that stay; with too few of them the round changes nothing."""
        self.facts = facts = RoundFacts()
        aggregation = Aggregation(self._session, self._state, server_round, facts)
        protocol = self._protocol(server_round, packer, grid, self.participants(server_round))

        def work(clients: list[int], fields: dict[str, Any]) -> RecordDict:
            return self.asking.state_request(server_round, clients, packer, **self.asking.private_facts(clients), **fields)

        try:
            aggregation.add_sum(secure_round(self._session, self._state, protocol, work))
        except SumRefused as refused:
            facts.secure = {"refused": str(refused)}
            facts.clients.clear()
        facts.secure |= protocol.facts()
        facts.missing = protocol.missing()
        aggregation.finish()

    def _protocol(self, server_round: int, packer: Packer, grid: Grid, clients: Sequence[int], *, alone: bool = False) -> Protocol:
        """Returns the protocol of secure aggregation over these clients; `alone` asks each in its own message."""
        nodes = [(node, [client]) for client, node in self.asking.nodes(clients, grid).items()] if alone else self.cohorts(clients, grid)
        return Protocol(
            self._session.config,
            server_round,
            list(clients),
            list(nodes),
            ask=lambda asks: self._confirmed(self._gathered(grid, asks, packer)),
            request=lambda asked, **fields: self.asking.request(asked, server_round, {}, **fields),
            charges=self._charges,
            check_num_examples=self._session.check_num_examples,
            came=lambda client: self.facts.clients.append(client),
        )

    def _confirmed(self, replies: Replies) -> Replies:
        for ask, reply in replies:
            if not isinstance(reply, Failure):
                self.asking.confirmed(ask)
            yield ask, reply

    def _packer(self) -> Packer:
        return Packer(self._state, self._session.method.moving)

    def _gathered(self, grid: Grid, asks: Iterable[Ask], packer: Packer, round_: Round | None = None) -> Replies:
        return gathered(
            grid,
            asks,
            lambda ask: self.asking.again(ask, packer),
            timeout=self._session.config.federation.round_timeout,
            enough=lambda: round_ is not None and round_.full,
            in_turn=self.asking.client_nodes is None,  # a simulation must not depend on which process is faster
        )

    # ---- setting up

    def initial_gradients(self, grid: Grid, server_round: int = 0) -> Adapter:
        """Returns the sum of the clients' weight gradients over `adapter.init_samples` examples in total, in the session's parts.

        Streams one client at a time. Continues without clients, or raises RunStopped, as `exchange` does.
        """
        packer, samples = self._packer(), self.samples_within_budget(server_round)
        if self._session.config.privacy.secure_aggregation:
            return self._session.gradient_parts.layout.unpack(self._masked_gradients(server_round, packer, samples, grid).float())
        round_ = GradientRound(self._session, self.asking, self._charges, server_round, len(samples))
        self.asking.charge(self.gradient_costs(server_round, samples))
        self._ask_until_enough(
            round_,
            list(samples),
            min(len(samples), least_replies(self._session.config, len(samples))),
            lambda clients: self._gathered(
                grid, self._gradient_asks(server_round, packer, grid, {client: samples[client] for client in clients}), packer, round_
            ),
        )
        return round_.result()

    def samples_within_budget(self, server_round: int) -> dict[int, int]:
        """Returns the clients whose budget allows another initial gradient, with their samples. Raises UserError if none can."""
        ledger, samples = self._privacy, gradient_samples(self._session.config)
        if ledger is None:
            return samples
        left = {client: samples[client] for client in self.asking.affordable(samples, self.gradient_costs(server_round, samples))}
        if samples and not left:
            after = f"after round {server_round}" if server_round else "at the beginning"
            raise UserError(
                f"privacy.epsilon: initial gradients {after} would exceed the budget of {ledger.budget:g} of every client; allow more, "
                "give a larger privacy.init_noise_multiplier, or take adapter.init=orthogonal. What was before is in the last checkpoint."
            )
        return left

    def gradient_costs(self, server_round: int, clients: Iterable[int]) -> dict[int, Mechanism]:
        """Returns the privacy cost of an initial gradient for each of the clients that it charges."""
        planned = {client: self._session.privacy_plan[client].initialization for client in clients if self._privacy is not None}
        once = {client: replace(mechanism, steps=1) for client, mechanism in planned.items() if mechanism is not None}
        return self.asking.not_in_flight(GRADIENT, server_round, once)

    def _gradient_asks(self, server_round: int, packer: Packer, grid: Grid, samples: dict[int, int]) -> Iterator[Ask]:
        for client, node in self.asking.nodes(list(samples), grid).items():
            content = self._gradient_request(server_round, packer, client, samples[client])
            yield Ask(Message(content, node, INITIAL_GRADIENT, group_id=str(server_round)), (client,))

    def _gradient_request(self, server_round: int, packer: Packer, client: int, samples: int, **fields: Any) -> RecordDict:
        mechanism = self._session.privacy_plan[client].initialization if self._session.privacy_plan else None
        if mechanism is not None and self._session.config.adapter.init is Init.gradient_dp:
            fields |= {"noise": [mechanism.noise_multiplier], "rates": [mechanism.sampling_rate]}
        needed = needed_for_gradients(self._state.exchange)
        return self.asking.state_request(server_round, [client], packer, needed, samples=[samples], **fields)

    def _masked_gradients(self, server_round: int, packer: Packer, samples: dict[int, int], grid: Grid) -> Tensor:
        self.asking.charge(self.gradient_costs(server_round, samples))
        protocol = self._protocol(server_round, packer, grid, list(samples), alone=True)

        def work(clients: list[int], fields: dict[str, Any]) -> RecordDict:
            return self._gradient_request(server_round, packer, clients[0], samples[clients[0]], **fields)

        planned = [self._session.privacy_plan[client].initialization for client in samples] if self._session.privacy_plan else []
        noise = max((each.noise_multiplier for each in planned if each), default=0.0) * self._session.config.privacy.clip_norm
        total = secure_gradients(self._session, protocol, work, noise)
        self.facts.secure, self.facts.missing = protocol.facts(), protocol.missing()
        return total

    # ---- personal models

    def personal_evaluation(self, server_round: int, grid: Grid) -> dict[str, dict[str, Any]]:
        """Returns {task: {accuracy, loss, num_examples, num_losses}} over the clients' own models, each on its share of the questions.

        Not charged: it belongs to the experiment, not to the simulated method. Raises RunStopped if a task has no answers.
        """
        packer = self._packer()
        names = ("correct", "loss", "num_examples", "num_losses")
        sums: dict[str, list[float]] = {task: [0.0] * len(names) for task in self._session.data.test}
        reason = "no reply"
        for _, reply in self._gathered(grid, self._evaluation_asks(server_round, packer, grid), packer):
            if isinstance(reply, Failure):
                reason = reply.detail or reply.reason.name
                continue  # the questions of clients that do not reply are left out
            try:
                metrics = reply.content.metric_records[METRICS]
                found = {task: [sum(numbers(metrics, f"{task}/{name}")) for name in names] for task in sums}
                for each in found.values():
                    _check_answers(*each)
            except (KeyError, ValueError) as error:
                reason = str(error)
                continue  # as are those of a client whose own data has other tasks
            sums = {task: [one + other for one, other in zip(sums[task], found[task], strict=True)] for task in sums}
        if without := [task for task, (_, _, n, _) in sums.items() if not n]:
            reason = f"no questions of {', '.join(without)} answered ({reason})"
            raise RunStopped(
                f"Expected clients to evaluate their own models after round {server_round}, got {reason}; go on with resume=true."
            )
        return {
            task: {"accuracy": right / n, "loss": loss / losses if losses else nan, "num_examples": int(n), "num_losses": int(losses)}
            for task, (right, loss, n, losses) in sums.items()
        }

    def _evaluation_asks(self, server_round: int, packer: Packer, grid: Grid) -> Iterator[Ask]:
        versions = self._state.exchange.versions
        records, fields = packer.pack(versions, versions, increment=False)
        for node, clients in self.cohorts(range(self._session.config.federation.clients), grid):
            content = RecordDict({**records, REQUEST: self.asking.request(clients, server_round, fields, tasks=[*self._session.data.test])})
            yield Ask(Message(content, node, EVALUATE, group_id=str(server_round)), tuple(clients))


def _check_answers(correct: float, loss: float, num_examples: float, num_losses: float) -> None:
    """Raises ValueError for results that no evaluation can give."""
    counts = (correct, num_losses, num_examples)
    if not all(isfinite(each) for each in (*counts, loss)) or not all(0 <= each <= num_examples <= MOST for each in counts) or loss < 0:
        raise ValueError(
            f"Expected right answers and losses of at most all questions, got {correct}, {loss}, {num_examples} and {num_losses}."
        )


def too_few(replied: int, least: int, missing: Sequence[Missing]) -> str:
    """Returns the error message of a run that stops because too few clients replied."""
    details = Counter(each.detail.rstrip(".") for each in missing)
    reasons = "; ".join(f"{detail} ({plural(number, 'client')})" for detail, number in details.most_common(3))
    diverged = all(DIVERGED in each.detail for each in missing)
    remedy = (
        "Training has diverged: lower training.learning_rate and start again, in another run_dir= or with overwrite=true."
        if missing and diverged
        else "The rounds before are in the last checkpoint: fix the cause and continue with resume=true."
    )
    found = f"got {replied}, {missing_text(count_by_reason(missing))}: {reasons}"
    return f"Expected replies of at least {least} clients (federation.min_replies), {found}. {remedy}"
