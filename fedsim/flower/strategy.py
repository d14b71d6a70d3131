"""The strategy: one round after the other over any Flower Grid; what is asked, gathered, read and combined meets here."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from torch import Tensor

from fedsim.config import Config, Init
from fedsim.core.communication import CommunicationLedger, Purpose
from fedsim.core.global_state import GlobalState
from fedsim.core.missing import Missing, Reason
from fedsim.core.participation import givers
from fedsim.core.traffic import needed_for_gradients
from fedsim.flower.asking import REQUEST, Ask, Asking, Homes
from fedsim.flower.charging import Charges
from fedsim.flower.combining import Combining
from fedsim.flower.facts import RoundFacts
from fedsim.flower.gathering import Failure, gathered, read
from fedsim.flower.reading import Reader
from fedsim.flower.records import from_record, numbers
from fedsim.flower.secure import Protocol, SumRefused
from fedsim.flower.secure_round import secure_gradients, secure_round
from fedsim.flower.transfer import Packer
from fedsim.flower.worker import client_key
from fedsim.privacy.ledger import PrivacyLedger
from fedsim.session import Session
from fedsim.types import Adapter


class FedsimStrategy(Strategy):
    """Federated training of one `GlobalState` by any method of `fedsim.core.methods`; every transfer goes into the ledger.

    `homes` are the clients' own nodes in a deployment.
    """

    def __init__(
        self,
        session: Session,
        config: Config,
        ledger: CommunicationLedger,
        state: GlobalState,
        privacy: PrivacyLedger | None = None,
        homes: Homes | None = None,
    ) -> None:
        self._session, self._state, self._privacy = session, state, privacy
        self._charges = Charges(session, state, ledger)
        self.asking = Asking(session, config, state, self._charges, privacy, homes)
        self._asked: list[Ask] = []  # by Flower's own loop, in this round
        self.facts = RoundFacts()

    def participants(self, server_round: int) -> list[int]:
        """Returns the clients of a round, see `Asking.participants`."""
        return self.asking.participants(server_round)

    def cohorts(self, clients: Sequence[int], grid: Grid) -> Iterator[tuple[int, list[int]]]:
        """Yields (node, clients), see `Asking.cohorts`."""
        return self.asking.cohorts(clients, grid)

    # ---- a round

    def exchange(self, server_round: int, grid: Grid) -> None:
        """Carries one round out and brings the global state forward."""
        packer = self._packer()
        self.asking.charge_privacy(server_round)
        if self._session.config.privacy.secure_aggregation:
            return self._combine_secretly(server_round, packer, grid)
        asks = self.asking.to_train(server_round, packer, grid)
        self._combine(server_round, gathered(grid, asks, self._again(packer)))

    def configure_train(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Iterator[Message]:
        """Yields one message per cohort, made when it is asked for. The state is the strategy's own, so `arrays` is not looked at."""
        self._asked = []
        for ask in self.asking.to_train(server_round, self._packer(), grid):
            self._asked.append(ask)
            yield ask.message

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Combines the clients' uploads as they come into the global state; holds one reply at a time."""
        by_id = {ask.message.metadata.message_id: ask for ask in self._asked}
        self._combine(server_round, ((by_id.pop(reply.metadata.reply_to_message_id), read(reply)) for reply in replies))
        return None, MetricRecord({"loss": self.facts.mean_loss, "num_tokens": self.facts.num_tokens})

    def _combine(self, server_round: int, replies: Iterable[tuple[Ask, Message | Failure]]) -> None:
        self.facts = facts = RoundFacts()
        combining = Combining(self._session, self._state, server_round, facts)
        reader = Reader(self._session, self._state, self._charges, server_round)
        for ask, reply in replies:
            if isinstance(reply, Failure):
                facts.missing += [Missing(client, server_round, reply.reason, reply.detail) for client in ask.clients]
            else:
                combining.add(reader.uploads(reply))
                gone = [client for client in ask.clients if client not in facts.clients]
                facts.missing += [Missing(client, server_round, Reason.dropped_out) for client in gone]
        self._note_absent(server_round)
        combining.finish()

    def _combine_secretly(self, server_round: int, packer: Packer, grid: Grid) -> None:
        """Combines the sum over the clients that stay; with too few of them the round changes nothing."""
        self.facts = facts = RoundFacts()
        combining = Combining(self._session, self._state, server_round, facts)
        protocol = self._protocol(server_round, packer, grid, self.participants(server_round))

        def work(clients: list[int], told: dict[str, Any]) -> RecordDict:
            return self.asking.brought_up(server_round, clients, packer, **self.asking.private_facts(clients), **told)

        try:
            combining.add_sum(secure_round(self._session, self._state, protocol, work))
        except SumRefused as refused:
            facts.secure = {"refused": str(refused)}
            facts.clients.clear()
        facts.secure |= protocol.facts()
        facts.missing = protocol.missing()
        self._note_absent(server_round)
        combining.finish()

    def _protocol(self, server_round: int, packer: Packer, grid: Grid, clients: Sequence[int], *, alone: bool = False) -> Protocol:
        """Returns the stages of secure aggregation over these clients; `alone` asks each in a message of its own."""
        nodes = [(node, [client]) for client, node in self.asking.nodes(clients, grid).items()] if alone else self.cohorts(clients, grid)
        return Protocol(
            self._session.config,
            server_round,
            list(clients),
            list(nodes),
            ask=lambda asks: gathered(grid, asks, self._again(packer)),
            request=lambda asked, **told: self.asking.request(asked, server_round, {}, **told),
            charges=self._charges,
            came=lambda client: self.facts.clients.append(client),
        )

    def _note_absent(self, server_round: int) -> None:
        """Writes down the participants whose node is not connected, so that nobody could be asked for them."""
        told = {*self.facts.clients, *(each.client for each in self.facts.missing)}
        absent = [client for client in self.participants(server_round) if client not in told]
        self.facts.missing += [Missing(client, server_round, Reason.died, "not connected") for client in absent]

    def _packer(self) -> Packer:
        return Packer(self._state, self._session.method.moving)

    def _again(self, packer: Packer) -> Callable[[Ask], Ask]:
        return lambda ask: self.asking.again(ask, packer)

    # ---- setting up

    def initial_gradients(self, grid: Grid, server_round: int = 0) -> Adapter:
        """Returns the sum of the clients' weight gradients over `adapter.init_samples` examples in all; streaming, one client at a time."""
        layout = self._session.gradient_layout
        if self._session.config.privacy.secure_aggregation:
            return layout.unpack(self._masked_gradients(server_round, grid).float())
        total = torch.zeros(layout.num_parameters, dtype=torch.float64)
        packer = self._packer()
        for (client,), reply in self._each_gradient(server_round, packer, grid):
            record = reply.content.array_records[client_key(client)]
            total += from_record(record, layout.num_parameters)
            self._charges.up(server_round, client, Purpose.initial_gradient, layout.num_parameters, record)
        return layout.unpack(total.float())

    def _each_gradient(self, server_round: int, packer: Packer, grid: Grid) -> Iterator[tuple[tuple[int, ...], Message]]:
        for ask, reply in gathered(grid, self._gradient_asks(server_round, packer, grid), self._again(packer)):
            if isinstance(reply, Failure):
                raise RuntimeError(f"client {ask.clients[0]}: {reply.reason.name}: {reply.detail}")
            yield ask.clients, reply

    def _gradient_asks(self, server_round: int, packer: Packer, grid: Grid) -> Iterator[Ask]:
        samples = givers(self._session.config)
        for client, node in self.asking.nodes(list(samples), grid).items():
            content = self._gradient_request(server_round, packer, client, samples[client])
            yield Ask(Message(content, node, "train.initial_gradient", group_id=str(server_round)), (client,))

    def _gradient_request(self, server_round: int, packer: Packer, client: int, samples: int, **told: Any) -> RecordDict:
        mechanism = self._session.privacy_plan[client].initialization if self._session.privacy_plan else None
        if mechanism is not None and self._session.config.adapter.init is Init.gradient_dp:
            told |= {"noise": [mechanism.noise_multiplier], "rates": [mechanism.sampling_rate]}
        if self._privacy is not None and mechanism is not None:
            self._privacy.charge(client, replace(mechanism, steps=1))
        needed = needed_for_gradients(self._state.exchange)
        return self.asking.brought_up(server_round, [client], packer, needed, samples=[samples], **told)

    def _masked_gradients(self, server_round: int, grid: Grid) -> Tensor:
        packer, samples = self._packer(), givers(self._session.config)
        protocol = self._protocol(server_round, packer, grid, list(samples), alone=True)

        def work(clients: list[int], told: dict[str, Any]) -> RecordDict:
            return self._gradient_request(server_round, packer, clients[0], samples[clients[0]], **told)

        planned = [self._session.privacy_plan[client].initialization for client in samples] if self._session.privacy_plan else []
        noise = max((each.noise_multiplier for each in planned if each), default=0.0) * self._session.config.privacy.clip_norm
        total = secure_gradients(self._session, protocol, work, noise)
        self.facts.secure = protocol.facts()
        return total

    # ---- personal models

    def personal_evaluation(self, server_round: int, grid: Grid) -> dict[str, dict[str, Any]]:
        """Returns {task: {accuracy, loss, num_examples}} over the clients' own models; the test questions are dealt out among them.

        Not charged: it belongs to the experiment, not to what is simulated.
        """
        packer = self._packer()
        sums: dict[str, list[float]] = {task: [0.0, 0.0, 0.0] for task in self._session.data.test}
        for ask, reply in gathered(grid, self._evaluation_asks(server_round, packer, grid), self._again(packer)):
            if isinstance(reply, Failure):
                raise RuntimeError(f"clients {ask.clients}: {reply.reason.name}: {reply.detail}")
            metrics = reply.content.metric_records["metrics"]
            for task, total in sums.items():
                for place, name in enumerate(("correct", "loss", "num_examples")):
                    total[place] += sum(numbers(metrics, f"{task}/{name}"))
        return {task: {"accuracy": right / n, "loss": loss / n, "num_examples": int(n)} for task, (right, loss, n) in sums.items()}

    def _evaluation_asks(self, server_round: int, packer: Packer, grid: Grid) -> Iterator[Ask]:
        versions = self._state.exchange.versions
        records, told = packer.pack(versions, versions, increment=False)
        for node, clients in self.cohorts(range(self._session.config.federation.clients), grid):
            content = RecordDict({**records, REQUEST: self.asking.request(clients, server_round, told)})
            yield Ask(Message(content, node, "evaluate", group_id=str(server_round)), tuple(clients))

    def configure_evaluate(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Iterable[Message]:
        """Evaluation is no part of a round: the server does it on held-out data, or asks for it by `personal_evaluation`."""
        return []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Nothing is evaluated within a round."""
        return None

    def summary(self) -> None:
        """The run's own display and log tell what Flower would print here."""
