"""The strategy: who takes part, what each worker is asked, how replies become the next global factors, and what it all weighs in bytes.

Messages are addressed to workers (Flower nodes) and name the clients that a worker stands for. Which clients take part is drawn from
the run's seed and the round, never from node ids.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from math import prod

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from torch import Tensor

from fedsim.config import Config, Weighting, to_dict
from fedsim.core.communication import CommunicationLedger, Direction, Purpose, Transfer
from fedsim.flower.records import from_record, numbers, serialized_bytes, to_record, whole_numbers
from fedsim.flower.worker import NEEDS_BASES, client_key
from fedsim.seeding import numpy_generator
from fedsim.session import Session
from fedsim.types import Adapter

ADAPTER, BASES, REQUEST = "adapter", "bases", "request"


@dataclass
class RoundFacts:
    """What a round's replies say; lists run in the order of arrival."""

    clients: list[int] = field(default_factory=list)
    num_examples: list[int] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)  # as used in the average, before normalisation
    num_tokens: int = 0

    @property
    def shares(self) -> list[float]:
        """The clients' weights p_i, which sum to one."""
        return [weight / sum(self.weights) for weight in self.weights]

    @property
    def mean_loss(self) -> float:
        """Training loss averaged over the clients by their number of examples."""
        return sum(n * loss for n, loss in zip(self.num_examples, self.loss, strict=True)) / sum(self.num_examples)


class FedsimStrategy(Strategy):
    """Federated training of flat factors by any method of `fedsim.core.methods`.

    `has_bases` are the clients that hold the common bases; the others are sent `bases` (a flat record, or None where every client
    derives them) with their first request.
    """

    def __init__(self, session: Session, config: Config, ledger: CommunicationLedger, bases: Tensor | None, has_bases: set[int]) -> None:
        self._session = session
        self._method = session.method
        self._federation = session.config.federation
        self._config_text = json.dumps(to_dict(config))
        self._cohort_size = config.engine.cohort_size
        self._ledger = ledger
        self._bases = None if bases is None else to_record(bases)
        self.has_bases = has_bases
        self.facts = RoundFacts()

    def participants(self, server_round: int) -> list[int]:
        """Returns the clients of a round, in ascending order; a function of seed and round."""
        count = max(1, round(self._federation.fraction * self._federation.clients))
        generator = numpy_generator(self._session.config.seed, "participants", server_round)
        return sorted(generator.choice(self._federation.clients, count, replace=False).tolist())

    def configure_train(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Iterator[Message]:
        """Yields one message per cohort, made when it is asked for."""
        for node, clients in self.cohorts(self.participants(server_round), grid):
            content = RecordDict({ADAPTER: arrays, REQUEST: self._request(clients, round=[server_round])})
            newcomers = [client for client in clients if client not in self.has_bases]
            if newcomers and self._bases is not None:
                content[BASES] = self._bases
                self._record(server_round, newcomers, Direction.downlink, Purpose.bases, self._bases)
            self.has_bases.update(clients)
            self._record(server_round, clients, Direction.downlink, Purpose.adapter, arrays)
            yield Message(content, node, "train", group_id=str(server_round))

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Combines the clients' factors as their replies come; holds one reply at a time."""
        self.facts = RoundFacts()
        combined = self._method.aggregate(self._updates(server_round, replies))
        return to_record(combined), MetricRecord({"loss": self.facts.mean_loss, "num_tokens": self.facts.num_tokens})

    def exchange(self, server_round: int, arrays: ArrayRecord, grid: Grid) -> ArrayRecord:
        """Carries one round out and returns the new global factors."""
        messages = self.configure_train(server_round, arrays, ConfigRecord(), grid)
        combined, _ = self.aggregate_train(server_round, self._replies(grid, messages, arrays))
        assert combined is not None
        return combined

    def _replies(self, grid: Grid, messages: Iterable[Message], arrays: ArrayRecord) -> Iterator[Message]:
        """Yields replies as they come. A worker process that does not hold the bases itself is sent its request again with them."""
        again = []
        for reply in _checked(grid.send_and_receive(messages)):
            if NEEDS_BASES in reply.content and self._bases is not None:
                content = RecordDict({ADAPTER: arrays, REQUEST: reply.content[REQUEST], BASES: self._bases})
                again.append(Message(content, reply.metadata.src_node_id, "train", group_id=reply.metadata.group_id))
            else:
                yield reply
        if again:
            yield from _checked(grid.send_and_receive(again))

    def initial_gradients(self, grid: Grid) -> Adapter:
        """Returns the sum of the clients' weight gradients over `adapter.init_samples` examples in all; streaming, one client at a time."""
        layout = self._session.gradient_layout
        total = torch.zeros(layout.num_parameters, dtype=torch.float64)
        nodes = cycle(sorted(grid.get_node_ids()))
        for node, (client, samples) in zip(nodes, self.init_shares().items(), strict=False):
            request = self._request([client], samples=[samples])
            message = Message(RecordDict({REQUEST: request}), node, "train.initial_gradient", group_id="0")
            (reply,) = _checked(grid.send_and_receive([message]))
            record = reply.content.array_records[client_key(client)]
            total += from_record(record, layout.num_parameters)
            self._record(0, [client], Direction.uplink, Purpose.initial_gradient, record)
        return layout.unpack(total.float())

    def init_shares(self) -> dict[int, int]:
        """Returns how many samples each client gives: equal shares; of fewer samples than clients, a seeded choice gives one each."""
        samples, clients = self._session.config.adapter.init_samples, self._federation.clients
        order = numpy_generator(self._session.config.seed, "init_shares").permutation(clients).tolist()
        shares = {client: samples // clients + (place < samples % clients) for place, client in enumerate(order)}
        return {client: shares[client] for client in sorted(shares) if shares[client]}

    def cohorts(self, clients: Sequence[int], grid: Grid) -> Iterator[tuple[int, list[int]]]:
        """Yields (node, clients): cohorts of `engine.cohort_size`, or equal parts for all nodes, dealt to the nodes in turn."""
        nodes = sorted(grid.get_node_ids())
        size = self._cohort_size or -(-len(clients) // len(nodes))
        for node, start in zip(cycle(nodes), range(0, len(clients), size), strict=False):
            yield node, list(clients[start : start + size])

    def configure_evaluate(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Iterable[Message]:
        """Evaluation is done at the server, on held-out data."""
        return []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Nothing is evaluated at the clients."""
        return None

    def summary(self) -> None:
        """The run's own display and log tell what Flower would print here."""

    def _updates(self, server_round: int, replies: Iterable[Message]) -> Iterator[tuple[float, Tensor]]:
        for reply in replies:
            metrics = reply.content.metric_records["metrics"]
            self.facts.num_tokens += sum(whole_numbers(metrics, "num_tokens"))
            clients, counts = whole_numbers(metrics, "clients"), whole_numbers(metrics, "num_examples")
            for client, num_examples, loss in zip(clients, counts, numbers(metrics, "loss"), strict=True):
                self.facts.clients.append(client)
                self.facts.num_examples.append(num_examples)
                self.facts.loss.append(loss)
                record = reply.content.array_records[client_key(client)]
                self._record(server_round, [client], Direction.uplink, Purpose.adapter, record)
                weight = float(num_examples) if self._federation.weighting is Weighting.examples else 1.0
                self.facts.weights.append(weight)
                yield weight, from_record(record, self._session.layout.num_parameters)

    def _request(self, clients: Sequence[int], **facts: list[int]) -> ConfigRecord:
        return ConfigRecord({"config": self._config_text, "clients": list(clients), "bases_digest": self._session.bases_digest, **facts})

    def _record(self, server_round: int, clients: Sequence[int], direction: Direction, purpose: Purpose, record: ArrayRecord) -> None:
        if self._method.pooled:
            return
        parameters = sum(prod(array.shape) for array in record.values())
        size = serialized_bytes(record)
        for client in clients:
            self._ledger.add(Transfer(server_round, client, direction, purpose, parameters, 4 * parameters, size))


def _checked(replies: Iterable[Message]) -> Iterator[Message]:
    for reply in replies:
        if reply.has_error():
            raise RuntimeError(f"Worker {reply.metadata.src_node_id} failed: {reply.error.reason}")
        yield reply
